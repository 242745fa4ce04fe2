"""GRPO runs: dynamic sampling, recomputed log-probabilities, validation, formats; what they leave, how they go on."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from configs import grpo as grpo_config
from echo_jax import huggingface
from eval import curves, report
from launch import grpo_stage, inputs, train, validation
from tests.launch import test_train
from tests.models import citing_tokenizer

place = test_train.place

HELD_OUT = 3


@pytest.fixture(scope="module")
def held_out(place) -> Path:
    """Questions that are not trained on; the last one's recording is missing."""
    rng = np.random.default_rng(1)
    lines = []
    for number in range(100, 100 + HELD_OUT):
        row = dataclasses.replace(test_train.record(number), split="validation")
        lines.append(json.dumps(row.to_json()) + "\n")
        if number < 99 + HELD_OUT:
            soundfile.write(place / row.audio_path, rng.normal(0, 0.1, 48_000), 16_000)
    path = place / "held_out.jsonl"
    path.write_text("".join(lines))
    return path


def make_config(place: Path, held_out: Path | None = None, **changes):
    config = test_train.fill(grpo_config.get_config("test"), place)
    config.reward.name = "1"
    if held_out:
        config.validation.every_steps = 2
        config.validation.records = str(held_out)
        config.data.max_bad_fraction = 0.4
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def rows_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


ALL_OPTIONS = {
    "total_steps": 4,
    "dynamic_sampling__max_rounds": 3,
    "old_logprobs": "recomputed",
    "importance_cap": 2.0,
    "loss__aggregation": "constant_length",
    "reference__dtype": "bfloat16",
    "reward__overlong_buffer": 16,
}


@pytest.fixture(scope="module")
def workdir(place, held_out, tmp_path_factory) -> Path:
    """A run with everything that is off by default."""
    workdir = tmp_path_factory.mktemp("grpo") / "w"
    train.train(make_config(place, held_out, **ALL_OPTIONS), workdir)
    return workdir


@pytest.mark.slow
def test_every_question_that_is_drawn_is_counted_in_order(workdir, place):
    rows = rows_of(workdir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert len(row["ids"]) == row["dynamic_sampling/questions"]
        assert row["dynamic_sampling/questions"] == 2 * row["dynamic_sampling/rounds"]
        kept = row["dynamic_sampling/dropped"] + row["dynamic_sampling/surplus"]
        assert row["dynamic_sampling/questions"] - kept == 2
    drawn = [name for row in rows for name in row["ids"]]
    assert len(drawn) > 8, "no step drew again"
    config = make_config(place)
    batches = inputs.batches(config, citing_tokenizer())
    records = itertools.chain.from_iterable(batch["records"] for batch in batches)
    assert drawn == [row.id for row in itertools.islice(records, len(drawn))]


@pytest.mark.slow
def test_recomputed_logprobs_are_the_samplers_but_for_float_error(workdir):
    for row in rows_of(workdir):
        assert row["logprob_gap"] < 1e-4
        assert row["importance_mean"] == pytest.approx(1.0, abs=1e-4)
        assert row["importance_max"] == pytest.approx(1.0, abs=1e-2)
        assert row["importance_truncated"] == 0.0
        # Of bfloat16 parameters, against the float32 ones they were cut from.
        assert 0 <= row["kl"] < 0.1


@pytest.mark.slow
def test_validation_is_written_when_it_is_due(workdir):
    rows = rows_of(workdir)
    validated = [row["step"] for row in rows if "validation/accuracy" in row]
    assert validated == [2, 4]
    for row in rows[1::2]:
        assert row["validation/skipped"] == 1
        assert 0 <= row["validation/accuracy"] <= (HELD_OUT - 1) / HELD_OUT
        assert row["validation/response_length"] >= row["validation/response_tokens"] > 0


@pytest.mark.slow
def test_validation_and_a_stop_change_nothing_else(workdir, place, held_out, tmp_path):
    plain = tmp_path / "plain"
    train.train(make_config(place, **ALL_OPTIONS), plain)
    names = ("loss", "kl", "grad_norm", "reward/total", "ids", "importance_mean")
    for one, two in zip(rows_of(workdir), rows_of(plain), strict=True):
        assert [one[name] for name in names] == [two[name] for name in names]
    # Stopped after one step, gone on with: in the middle of a pass over the questions, after redraws.
    cut = tmp_path / "cut"
    train.train(make_config(place, held_out, **{**ALL_OPTIONS, "total_steps": 1}), cut)
    (cut / "done.json").unlink()
    train.train(make_config(place, held_out, **ALL_OPTIONS), cut)
    assert (cut / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()
    weights = [w / "export" / "model.safetensors" for w in (cut, workdir, plain)]
    assert len({path.read_bytes() for path in weights}) == 1


@pytest.mark.slow
def test_killed_between_redraws_and_validations_equals_undisturbed(place, held_out, tmp_path):
    given = [
        "--config.total_steps=5",
        "--config.reward.name=1",
        "--config.data.max_bad_fraction=0.4",
        "--config.dynamic_sampling.max_rounds=3",
        "--config.old_logprobs=recomputed",
        "--config.validation.every_steps=2",
        f"--config.validation.records={held_out}",
    ]
    whole, cut, output = test_train.killed_then_finished("grpo", place, tmp_path, 2, given)
    assert "going on from step" in output
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()
    one, two = ((w / "export" / "model.safetensors").read_bytes() for w in (whole, cut))
    assert one == two
    rows = rows_of(whole)
    assert any(row["dynamic_sampling/rounds"] > 1 for row in rows)
    assert any("validation/accuracy" in row for row in rows)


@pytest.mark.slow
def test_all_curves_of_the_dynamics_figure_are_drawn(workdir, tmp_path):
    shown = curves.read({"GRPO": workdir})
    page = tmp_path / "report.html"
    report.write(page, "t", [], [], shown, [], {})
    text = page.read_text(encoding="utf-8")
    for name in (
        *(f"reward/{part}" for part in ("total", "correct", "format", "accuracy", "segment")),
        *(f"reward/{part}" for part in ("consistency", "spread", "overlong")),
        *("segments", "mean_s", "overlap", "kl", "response_length", "response_tokens"),
        *("insertions", "logprob_gap", "importance_max", "dynamic_sampling/rounds"),
        *("validation/accuracy", "validation/format", "validation/segments", "validation/overlap"),
    ):
        assert f"<figcaption>{name}</figcaption>" in text, name
    captions = [curve.name for curve in shown]
    assert captions[:4] == ["loss", "reward/total", "reward/correct", "reward/format"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["conditioned", "grounded", "interleaved"])
def test_every_format_trains(how, place, tmp_path):
    # It pays for citing, which this model does in every format.
    config = make_config(place, format=how, total_steps=1, reward__name="12")
    workdir = tmp_path / how
    train.train(config, workdir)
    row = rows_of(workdir)[0]
    assert (row["insertions"] > 0) == (how == "interleaved")
    assert row["logprob_gap"] < 1e-4
    before, after = (huggingface.load_pretrained(p)[1] for p in (place / "model", workdir))
    kernels = [p["language_model"]["layers"]["k"]["kernel"] for p in (before, after)]
    assert (kernels[0] != kernels[1]).any()
    asked = next(inputs.batches(config, citing_tokenizer()))["prompt_tokens"][0]
    assert ("Cite" in citing_tokenizer().decode(asked)) == (how != "conditioned")


def test_the_reference_is_kept_in_its_dtype_or_not_at_all():
    config = grpo_config.get_config("test")
    params = {"a": np.ones((2, 3), np.float32), "b": jnp.ones(4)}
    same = grpo_stage.reference_params(config, params)
    assert jax.tree.map(lambda x: x.dtype, same) == {"a": jnp.float32, "b": jnp.float32}
    config.reference.dtype = "bfloat16"
    half = grpo_stage.reference_params(config, params)
    assert jax.tree.map(lambda x: x.dtype, half) == {"a": jnp.bfloat16, "b": jnp.bfloat16}
    config.loss.kl_coefficient = 0.0
    assert grpo_stage.reference_params(config, params) is None


def test_held_out_questions_are_spread_over_their_file(place, held_out):
    config = make_config(place, held_out)
    config.validation.limit = 2
    assert [row.id for row in validation.held_out(config)] == ["r100", "r101"]
    config.validation.limit = 0
    assert len(validation.held_out(config)) == HELD_OUT
    config.validation.split = "test"
    with pytest.raises(ValueError, match=r"config.validation: .*holds no record of split 'test'"):
        validation.held_out(config)
