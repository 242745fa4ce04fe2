"""The training command: errors in one line, a whole small run, and runs that are killed and go on."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from configs import grpo as grpo_config
from configs import sft as sft_config
from echo_jax import huggingface
from echo_jax.sampler import Rollout
from echo_jax.text.tokenizer import Tokenizer
from echo_jax.train.checkpoint import CheckpointError
from launch import rollouts, train
from tests.models import citing_tokenizer
from tests.runs import ROOT, arguments, fill, make_place, record, start


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("train"))


# -------------------- errors --------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--workdir=w"], "--config is missing"),
        (["--config=configs/sft.py:tiny"], "--workdir is missing"),
        (["--config=configs/nope.py", "--workdir=w"], "there is no file 'configs/nope.py'"),
        (
            ["--config=configs/sft.py:tinny", "--workdir=w"],
            "configs/sft.py has no variant 'tinny'; did you mean tiny?",
        ),
        (
            ["--config=configs/sft.py:tiny", "--workdir=w", "--config.optimizer.learnin_rate=1e-3"],
            "--config.optimizer.learnin_rate: the config has no such field; "
            "did you mean --config.optimizer.learning_rate?",
        ),
    ],
)
def test_command_line_errors_are_one_line(given, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert train.main(["train", *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("launch.train: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--config.init_from=/nowhere/at/all"], "/nowhere/at/all"),
        (["--config.optimizer.learning_rate=fast"], "fast"),
        (["--config.data.split=test"], "no record of split 'test'"),
    ],
)
def test_wrong_values_end_with_one_line_and_a_status(given, message, place, tmp_path):
    process = start(*arguments("sft", place, tmp_path / "w", *given))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    line = output.strip().splitlines()[-1]
    assert line.startswith("launch.train: ")
    assert message in line
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_from": ""}, r"config.init_from is empty; give the sft stage a model directory"),
        ({"data.root": ""}, r"config.data.root='' is not a folder; make one with python -m data"),
        ({"data.records": "/none.jsonl"}, r"config.data.records='/none.jsonl' does not exist"),
        ({"batch_size": 6}, r"5 chats in split 'train', fewer than a batch of 6"),
        ({"micro_batches": 3}, r"config.micro_batches=3 must divide config.batch_size=2"),
        ({"data.clip_seconds": 1.0}, r"a clip of 3.00 s does not fit 1.00 s"),
    ],
)
def test_wrong_fields_are_named(change, message, place, tmp_path):
    config = fill(sft_config.get_config("test"), place)
    for name, value in change.items():
        config.update_from_flattened_dict({name: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train(config, tmp_path / "w")


@pytest.mark.parametrize("stage", [sft_config, grpo_config])
def test_what_means_nothing_is_refused_before_anything_is_read(stage, tmp_path):
    config = stage.get_config("test")
    config.init_from = "/nowhere/at/all"
    config.optimizer.b2 = 1.0
    with pytest.raises(
        ValueError,
        match=r"config.optimizer.b2=1.0 must be a finite number in \[0, 1\)",
    ):
        train.train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


# -------------------- runs --------------------


def test_a_run_ends_with_a_model_and_is_not_done_twice(place, tmp_path, capsys):
    config = fill(sft_config.get_config("test"), place)
    config.micro_batches = 2
    config.optimizer.learning_rate = 0.05
    workdir = tmp_path / "w"
    train.train(config, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(len(row["ids"]) == 2 for row in rows)
    assert "step 4/4  loss" in capsys.readouterr().out

    before, after = (huggingface.load_pretrained(p)[1] for p in (place / "model", workdir))
    assert huggingface.resolve(workdir) == workdir / "export"
    assert Tokenizer.from_directory(workdir / "export").vocab_size == citing_tokenizer().vocab_size
    for part, changed in (("audio_tower", False), ("language_model", True)):
        kernel = "k" if part == "language_model" else "q"
        one, two = (p[part]["layers"][kernel]["kernel"] for p in (before, after))
        assert bool((one != two).any()) == changed

    stamp = (workdir / "metrics.jsonl").stat().st_mtime_ns
    train.train(config, workdir)
    assert "is finished" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="is the workdir of a sft run, not of grpo"):
        train.train(fill(grpo_config.get_config("test"), place), workdir)


def test_an_unfinished_run_goes_on_with_its_own_config(place, tmp_path, capsys):
    config = fill(sft_config.get_config("test"), place)
    config.optimizer.schedule, config.optimizer.warmup_fraction = "constant", 0.0
    config.total_steps = 2
    workdir = tmp_path / "w"
    train.train(config, workdir)
    (workdir / "done.json").unlink()
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    config.total_steps, config.log_every_steps = 3, 3
    config.optimizer.learning_rate = 0.5
    with pytest.raises(
        ValueError, match=r"w holds a run with config.optimizer.learning_rate=0.001, not 0.5; give"
    ):
        train.train(config, workdir)
    assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    config.optimizer.learning_rate = 0.001
    train.train(config, workdir)
    assert "going on from step 2" in capsys.readouterr().out
    assert json.loads((workdir / "done.json").read_text())["step"] == 3


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(place, tmp_path, caplog):
    config = fill(sft_config.get_config("test"), place)
    workdir = tmp_path / "w"
    train.train(config, workdir)
    ends = [workdir / "metrics.jsonl", workdir / "export" / "model.safetensors"]
    undisturbed = [path.read_bytes() for path in ends]
    (workdir / "done.json").unlink()
    step = workdir / "checkpoints" / "4"
    files = [path for path in (step / "arrays").rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    train.train(config, workdir)
    said = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"checkpoint {step} is damaged (arrays: ")
    assert said[0].endswith("/damaged/4, and the run goes on from step 2")
    assert [path.read_bytes() for path in ends] == undisturbed
    assert step.is_dir()

    # With none that is whole the run does not start anew by itself.
    (workdir / "done.json").unlink()
    for number in (2, 4):
        (workdir / "checkpoints" / str(number) / "host" / "metadata").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"holds no checkpoint that is whole \(4: host: it ho"
    ):
        train.train(config, workdir)
    assert [path.read_bytes() for path in ends] == undisturbed


def killed_then_finished(stage: str, place: Path, folder: Path, lines: int, given: list[str]):
    """An undisturbed run and one that is killed once it has written `lines` lines; both workdirs."""
    whole, cut = folder / "whole", folder / "cut"
    process = start(*arguments(stage, place, whole, *given))
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    process = start(*arguments(stage, place, cut, *given))
    metrics = cut / "metrics.jsonl"
    deadline = time.monotonic() + 900
    saved = cut / "checkpoints"
    # A checkpoint that is being written has a longer name than its step.
    while (
        not metrics.exists()
        or metrics.read_bytes().count(b"\n") < lines
        or not any(path.name.isdigit() for path in saved.iterdir())
    ):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cut / "done.json").exists()
    process = start(*arguments(stage, place, cut, *given))
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return whole, cut, output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "lines", "given"),
    [
        ("sft", 5, ["--config.total_steps=8"]),
        ("grpo", 2, ["--config.total_steps=6", "--config.reward.name=1"]),
    ],
)
def test_killed_and_resumed_equals_undisturbed(stage, lines, given, place, tmp_path):
    whole, cut, output = killed_then_finished(stage, place, tmp_path, lines, given)
    assert "going on from step" in output
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()
    one, two = ((w / "export" / "model.safetensors").read_bytes() for w in (whole, cut))
    assert one == two
    assert (whole / "timings.jsonl").read_bytes() != (cut / "timings.jsonl").read_bytes()
    if stage == "grpo":
        rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
        assert sum(row["insertions"] for row in rows) > 0
        assert any(row["reward/consistency"] < 0 for row in rows)
        assert all(row["logprob_gap"] < 1e-4 for row in rows)
        assert any(row["policy"] != 0 for row in rows)


@pytest.mark.slow
def test_grpo_learns_what_is_rewarded(place, tmp_path):
    # The model starts a new sentence ("A") after some of its citations, which costs 0.1 each time.
    config = fill(grpo_config.get_config("test"), place)
    config.total_steps = 16
    config.rollouts_per_query = 8
    config.queries_per_step = config.queries_per_minibatch = config.queries_per_microbatch = 4
    config.sampling.max_response_tokens = 112
    config.reward.name = "1"
    config.loss.kl_coefficient = 0.0
    config.optimizer.learning_rate = 5e-4
    config.checkpoint.every_steps = 100
    train.train(config, tmp_path / "w")
    lines = (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward/total"] for line in lines]
    assert np.mean(rewards[:3]) < -0.01
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) / 3
    assert all("kl" not in json.loads(line) for line in lines)


# -------------------- rewards of rollouts --------------------


def rollout_of(tokenizer: Tokenizer, texts: list[str], inserted: list[int]) -> Rollout:
    """Rows of a 2-token prompt, a text and <|im_end|>, with an inserted clip of one token before the end."""
    rows = [[tokenizer.audio_id, 0, *tokenizer.encode(text)] for text in texts]
    width = max(map(len, rows)) + 2
    tokens = np.full((len(rows), width), tokenizer.pad_id, np.int32)
    sampled = np.zeros(tokens.shape, bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row) + 2] = [*row, tokenizer.audio_id, tokenizer.im_end_id]
        sampled[number, 2 : len(row)] = sampled[number, len(row) + 1] = True
    count = len(rows)
    return Rollout(
        tokens=tokens,
        prompt_length=np.full(count, 2),
        length=np.array([len(row) + 2 for row in rows]),
        logprob=np.where(sampled, np.log(0.5), 0.0),
        model_logprob=np.where(sampled, np.log(0.5), 0.0),
        sampled=sampled,
        stop_rest=np.full(tokens.shape, -1),
        stop_reason=np.full(tokens.shape, -1),
        segment_samples=np.zeros((count, 7, 2), np.int32),
        segment_token_start=np.zeros((count, 7), np.int32),
        num_segments=np.array(inserted),
        finish_reason=np.array([0, 1, 2, 0])[:count],
        num_turns=np.ones(count),
        num_decode_steps=np.int32(1),
        num_insert_steps=np.int32(1),
    )


@pytest.mark.parametrize(
    ("how", "name", "totals"),
    [
        ("interleaved", "paper", [1.5, 1.0, 0.5, 0.0]),
        ("grounded", "paper", [1.5, 1.5, 0.5, 0.0]),
        # c = 0.5: right 0.375, wrong -0.125.
        ("grounded", "6", [1.25, 1.25, 0.375, 0.0]),
    ],
)
def test_rollouts_are_scored_by_their_sampled_text(how, name, totals):
    tokenizer = citing_tokenizer()
    cited = "<think><seg>1.0, 2</seg> ok</think><answer>%s</answer>"
    texts = [cited % "ok", cited % "ok", cited % "A", "no form"]
    rollout = rollout_of(tokenizer, texts, [1, 0, 1, 0])
    config = grpo_config.get_config("test")
    config.rollouts_per_query = 2
    config.format = how
    config.reward.name = name
    scorer = rollouts.Scorer.from_config(config, tokenizer)
    scores = scorer(rollout, [record(0), record(1)], np.array([48_000, 48_000]))
    assert [score["total"] for score in scores] == pytest.approx(totals)
    drawn = rollouts.Drawn(None, [], rollout, scores, {})
    metrics = rollouts.step_metrics(drawn, 2)
    assert metrics["reward/total"] == pytest.approx(np.mean(totals))
    assert metrics["reward/correct"] == 0.5
    assert metrics["insertions"] == 0.5
    assert metrics["finish/end"] == 0.5
    assert metrics["finish/turn_limit"] == 0.25
    assert metrics["response_length"] == metrics["response_tokens"] + 1
    signal_free = 0.0 if how == "interleaved" else 0.5
    assert metrics["groups_without_signal"] == signal_free
