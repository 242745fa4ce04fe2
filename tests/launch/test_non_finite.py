"""Runs whose loss is not finite for some records: they stop and say why, or skip and count."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from configs import sft as sft_config
from echo_jax import huggingface
from launch import train
from launch.stage import NonFiniteError
from tests.models import citing_tokenizer
from tests.runs import fill, make_place, read_lines, record

BAD = "r3"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A model that has no number for one byte, and a record that has this byte."""
    return poison(make_place(tmp_path_factory.mktemp("bad")))


def poison(place: Path) -> Path:
    rows = [record(number) for number in range(5)]
    rows = [dataclasses.replace(r, question="What?Z") if r.id == BAD else r for r in rows]
    lines = [json.dumps(row.to_json()) + "\n" for row in rows]
    (place / "records.jsonl").write_text("".join(lines))
    tokenizer = citing_tokenizer()
    config, params = huggingface.load_pretrained(place / "model")
    (byte,) = tokenizer.encode("Z")
    params["language_model"]["embed"]["embedding"][byte] = np.nan
    huggingface.save_pretrained(place / "model", config, params, tokenizer)
    return place


def config(place: Path, **changed):
    made = fill(sft_config.get_config("test"), place)
    made.total_steps = 10
    made.update_from_flattened_dict(changed)
    return made


def test_the_run_stops_with_step_records_and_part(place, tmp_path):
    with pytest.raises(NonFiniteError) as error:
        train.train(config(place), tmp_path / "w")
    said = str(error.value)
    metrics = tmp_path / "w" / "metrics.jsonl"
    rows = read_lines(metrics) if metrics.exists() else []
    assert said.startswith(f"step {len(rows) + 1}: loss is nan, the gradient of ")
    assert "; records of the batch: " in said
    assert BAD in said.rpartition(": ")[2].split(", ")
    assert "\n" not in said
    # What was saved before is kept, and a run may go on from it with another choice.
    train.train(config(place, non_finite="skip"), tmp_path / "w")
    assert len(read_lines(metrics)) == 10


def test_skipped_updates_are_counted_and_change_nothing(place, tmp_path, capsys):
    made = config(place, non_finite="skip")
    made.optimizer.schedule, made.optimizer.warmup_fraction = "linear", 0.0
    train.train(made, tmp_path / "w")
    rows = read_lines(tmp_path / "w" / "metrics.jsonl")
    bad = [BAD in row["ids"] for row in rows]
    assert 1 < sum(bad) < len(rows)
    assert [math.isnan(row["loss"]) for row in rows] == bad
    assert [row["skipped_updates"] for row in rows] == np.cumsum(bad).tolist()
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("update skipped: ")]
    assert [int(x.split("step ")[1].split(":")[0]) for x in said] == [
        row["step"] for row, b in zip(rows, bad, strict=True) if b
    ]
    # The schedule goes on where it stood before the skipped update.
    rates = [row["learning_rate"] for row in rows]
    for i in range(1, len(rows)):
        assert (rates[i] == rates[i - 1]) == bad[i - 1]
    exported = huggingface.load_pretrained(tmp_path / "w")[1]
    head = exported["language_model"]["lm_head"]["kernel"]
    assert np.isfinite(head).all()


def test_too_many_in_a_row_stop_the_run(place, tmp_path):
    made = config(place, non_finite="skip", non_finite_limit=1)
    # Every batch has all the records, so every update is skipped.
    made.batch_size = 5
    with pytest.raises(NonFiniteError, match=r"^step 2: .* \(after 1 skipped updates in a row\)$"):
        train.train(made, tmp_path / "w")
    assert [row["skipped_updates"] for row in read_lines(tmp_path / "w" / "metrics.jsonl")] == [1]
