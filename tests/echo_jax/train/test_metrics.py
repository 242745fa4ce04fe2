import io
import json
import struct

import numpy as np
from tensorboardX.proto import event_pb2

from echo_jax.train import metrics
from echo_jax.train.metrics import MetricWriter


def write(workdir, steps, first_step=0, scale=1.0):
    stream = io.StringIO()
    with MetricWriter(workdir, 10, first_step, shown=("loss", "kl"), stream=stream) as writer:
        for step in steps:
            writer.write(
                step,
                {"loss": step / 3},
                {"tokens_per_s": 100.0 * scale, "step_s": scale},
                ids=[f"q{step}"],
            )
    return stream.getvalue()


def test_live_line_and_files(tmp_path):
    shown = write(tmp_path, [1, 2])
    lines = shown.splitlines()
    assert lines[0].startswith("step 1/10  loss 0.3333  100 tokens/s  ETA ")
    assert len(lines) == 2
    assert "kl" not in shown
    records = metrics.read_jsonl(tmp_path / "metrics.jsonl")
    assert records == [{"step": s, "loss": s / 3, "ids": [f"q{s}"]} for s in (1, 2)]
    assert metrics.read_jsonl(tmp_path / "timings.jsonl")[1] == {
        "step": 2,
        "tokens_per_s": 100.0,
        "step_s": 1.0,
    }


def events_of(folder):
    """The events of all files, oldest file first: records of a length, its checksum, the event and its checksum."""
    found = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return found


def test_tensorboard_has_the_same_numbers_and_hides_what_was_trained_again(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [3, 4], first_step=2)
    first, *one, second, start, three, four = events_of(tmp_path / "tensorboard")
    assert first.file_version == second.file_version == "brain.Event:2"
    assert [event.step for event in one] == [1, 2, 3]
    assert (start.step, start.session_log.status) == (3, event_pb2.SessionLog.START)
    assert [event.step for event in (three, four)] == [3, 4]
    values = {value.tag: value.simple_value for value in four.summary.value}
    assert values == {
        "loss": np.float32(4 / 3),
        "timings/tokens_per_s": 100.0,
        "timings/step_s": 1.0,
    }


def test_resumed_file_equals_undisturbed(tmp_path):
    write(tmp_path / "whole", range(1, 9))
    write(tmp_path / "cut", range(1, 6))
    with open(tmp_path / "cut/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    write(tmp_path / "cut", range(4, 9), first_step=3, scale=7.0)
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (
        tmp_path / "cut/metrics.jsonl"
    ).read_bytes()
    timings = [
        json.loads(line)["step"]
        for line in (tmp_path / "cut/timings.jsonl").read_text().splitlines()
    ]
    assert timings == list(range(1, 9))


def test_a_line_whose_newline_is_missing_counts_as_torn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    metrics.truncate_beyond(path, 5)
    assert path.read_text() == '{"step": 1}\n'


def test_other_processes_write_nothing(tmp_path):
    with MetricWriter(tmp_path / "none", 3, active=False) as writer:
        writer.write(1, {"loss": 1.0}, {})
    assert not (tmp_path / "none").exists()


def test_durations():
    assert [metrics.format_duration(s) for s in (3.2, 185, 7800, float("inf"))] == [
        "3s",
        "3m05s",
        "2h10m",
        "?",
    ]
