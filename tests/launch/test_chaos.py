"""Runs that are killed again and again, anywhere, and end as if nothing had happened.

The kills are drawn by seed (ECHO_JAX_CHAOS_SEED, the clock without it) and printed; when they hit is a matter of
microseconds. What the run must end with is not: every byte of the metrics and of the exported weights.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.runs import arguments, make_place, read_lines, start

# Over both stages; the issue is to survive at least 20.
KILLS = {"sft": 12, "grpo": 10}
STEPS = {"sft": 72, "grpo": 44}
# A checkpoint nearly always is being written.
EVERY = {"sft": 3, "grpo": 2}
RECORDS = 5


@dataclasses.dataclass(frozen=True)
class Kill:
    """When a process is to end, and how.

    Attributes:
        where: "start" so long after the process has started, or with its first step; "step" when so many lines of
            metrics are there; "write" at the next time from there on that a checkpoint is being written.
        lines: of metrics.
        delay_s: from there.
        signals: what is sent, 0.02 s apart.
    """

    where: str
    lines: int
    delay_s: float
    signals: tuple[signal.Signals, ...]


def draw(rng: random.Random, stage: str) -> list[Kill]:
    """Kills at growing progress, so that they do not depend on how fast the machine is."""
    count, kills = KILLS[stage], []
    for number in range(count):
        where = ("write", "step", "write", "start", "write", "step")[number % 6]
        # Not too near to the end, where a run might be done before it is hit.
        progress = 0.8 * (number + rng.random()) / count
        how = rng.choice(
            [
                (signal.SIGKILL,),
                (signal.SIGKILL,),
                (signal.SIGTERM,),
                # A grace that is over while the last checkpoint is being written.
                (signal.SIGTERM, signal.SIGKILL),
                (signal.SIGTERM, signal.SIGTERM),
            ]
        )
        longest = {"start": 12.0, "step": 0.05, "write": 0.01}[where]
        delay = longest * rng.random() * (rng.random() < 0.7)
        kills.append(Kill(where, int(progress * STEPS[stage]), delay, how))
    return kills


def lines_of(workdir: Path) -> int:
    metrics = workdir / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def being_written(workdir: Path) -> set[tuple[str, int]]:
    """Orbax's temporary folders, by name and inode; a killed process leaves its own for the next to remove."""
    found, folder = set(), workdir / "checkpoints"
    for path in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):
            if "tmp" in path.name:
                found.add((path.name, path.stat().st_ino))
    return found


def strike(
    process: subprocess.Popen[str], workdir: Path, kill: Kill, left: set[tuple[str, int]]
) -> str:
    """Waits for the moment and sends the signals; returns where that was.

    Args:
        process: of the run.
        workdir: of the run.
        kill: when and how.
        left: temporary folders of the processes before.
    """
    deadline = time.monotonic() + 300

    def wait_for(condition) -> None:
        while process.poll() is None and not condition():
            assert time.monotonic() < deadline
            time.sleep(0.0005)

    if kill.where == "start":
        before, until = lines_of(workdir), time.monotonic() + kill.delay_s
        wait_for(lambda: time.monotonic() > until or lines_of(workdir) > before)
    else:
        wait_for(lambda: lines_of(workdir) >= kill.lines)
        if kill.where == "write":
            wait_for(lambda: being_written(workdir) - left)
        time.sleep(kill.delay_s)
    writing = being_written(workdir) - left
    for number, sent in enumerate(kill.signals):
        time.sleep(0.02 * (number > 0))
        process.send_signal(sent)
    return f"line {lines_of(workdir)}{', while a checkpoint was written' if writing else ''}"


def disturbed(stage: str, place: Path, workdir: Path, kills: list[Kill], *given: str) -> list[str]:
    """Runs to the end through all kills; returns a line about each."""
    report = []
    for kill in kills:
        left = being_written(workdir)
        process = start(*arguments(stage, place, workdir, *given))
        where = strike(process, workdir, kill, left)
        output, _ = process.communicate(timeout=120)
        names = "+".join(s.name for s in kill.signals)
        report.append(f"{stage}: {names} at {where} ({kill.where}), status {process.returncode}")
        allowed = {-signal.SIGKILL} if kill.signals[-1] == signal.SIGKILL else set()
        if kill.signals[0] == signal.SIGTERM:
            # Before the program listens a signal ends it as it ends any; after the last step it is too late.
            allowed |= {75, 128 + signal.SIGTERM}
        if kill.where == "start" and kill.signals[0] == signal.SIGTERM:
            allowed |= {-signal.SIGTERM}
        assert process.returncode in allowed, "\n".join([*report, output])
        assert "Traceback" not in output, "\n".join([*report, output])
        assert not (workdir / "done.json").exists(), report
    process = start(*arguments(stage, place, workdir, *given))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "going on from step" in output
    assert "damaged" not in output
    return report


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(stage, tmp_path):
    seed = int(os.environ.get("ECHO_JAX_CHAOS_SEED", time.time_ns() % 1_000_000))
    print(f"ECHO_JAX_CHAOS_SEED={seed}")
    place = make_place(tmp_path, RECORDS)
    given = [
        f"--config.total_steps={STEPS[stage]}",
        f"--config.checkpoint.every_steps={EVERY[stage]}",
        "--config.checkpoint.keep_best=1",
        "--config.checkpoint.best_metric=loss",
        "--config.checkpoint.best_mode=min",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(*arguments(stage, place, whole, *given))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output

    started = time.monotonic()
    report = disturbed(stage, place, cut, draw(random.Random(seed), stage), *given)
    print("\n".join(report))
    print(f"{stage}: {len(report)} kills, {time.monotonic() - started:.0f} s")
    assert len(report) == KILLS[stage]
    assert any("while a checkpoint was written" in line for line in report)

    for name in ("metrics.jsonl", "export/model.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    rows = read_lines(cut / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS[stage] + 1))
    seen = [name for row in rows for name in row["ids"]]
    names = {f"r{number}" for number in range(RECORDS)}
    # Epoch by epoch every record once.
    for first in range(0, len(seen) - RECORDS + 1, RECORDS):
        assert set(seen[first : first + RECORDS]) == names
    counts = collections.Counter(seen)
    assert max(counts.values()) - min(counts.values()) <= 1
    # Nothing is left of the checkpoints that were being written.
    left = [path.name for path in (cut / "checkpoints").iterdir()]
    assert all(name.isdigit() for name in left), left
