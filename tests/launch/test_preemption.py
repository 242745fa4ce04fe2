"""Runs that are asked to stop, with real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.preemption import StopRequest
from tests.runs import ROOT, arguments, make_place, read_lines, start


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("preemption"))


def wait_until(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_is_remembered_and_the_handlers_come_back(number, capfd):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    threads = threading.active_count()
    with StopRequest() as stop:
        assert stop.agreed() == ""
        os.kill(os.getpid(), signal.SIGCHLD)  # another signal is none of its business
        os.kill(os.getpid(), number)
        wait_until(stop.agreed)
        assert stop.agreed() == number.name
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    wait_until(lambda: threading.active_count() == threads)
    assert capfd.readouterr().out.startswith(f"{number.name}: this step is finished and saved")


# One long call into C, as compiling is: no handler of Python's own gets a turn on the main thread.
BUSY = """
import jax, jax.numpy as jnp
from launch.preemption import StopRequest
work = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda i, x: jnp.sin(x), x))
with StopRequest() as stop:
    print("ready", flush=True)
    jax.block_until_ready(work(jnp.ones(1000)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_the_process_at_once(number, tmp_path):
    (tmp_path / "wait.py").write_text(BUSY)
    waiting = subprocess.Popen(
        [sys.executable, str(tmp_path / "wait.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "ready\n"
    waiting.send_signal(number)
    assert waiting.stdout.readline().startswith(f"{number.name}: ")
    started = time.monotonic()
    waiting.send_signal(number)
    assert waiting.wait(10) == 128 + number
    assert time.monotonic() - started < 5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_run_goes_on(number, place, tmp_path):
    workdir = tmp_path / "w"
    # No checkpoint would be due before the end.
    given = ["--config.total_steps=400", "--config.checkpoint.every_steps=1000"]
    process = start(*arguments("sft", place, workdir, *given))
    metrics = workdir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_bytes()) > 2000, 120)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    steps = [row["step"] for row in read_lines(metrics)]
    said = output.strip().splitlines()[-1]
    assert said == (
        f"launch.train: {number.name} after step {steps[-1]} of 400; start again to go on from there"
    )
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == [str(steps[-1])]
    assert "Traceback" not in output

    process = start(*arguments("sft", place, workdir, *given))
    wait_until(lambda: len(read_lines(metrics)) > len(steps) + 3, 120)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert f"going on from step {steps[-1]}" in output
    rows = read_lines(metrics)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    timings = read_lines(workdir / "timings.jsonl")
    assert [row["restarts"] for row in timings] == [0] * len(steps) + [1] * (len(rows) - len(steps))
    totals = [row["train_total_s"] for row in timings]
    assert totals == sorted(totals)
    assert totals[-1] == pytest.approx(sum(row["step_s"] for row in timings))


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_without_one(place, tmp_path):
    workdir = tmp_path / "w"
    process = start(*arguments("sft", place, workdir))
    # It exists before the model is compiled for the first step.
    wait_until(lambda: (workdir / "checkpoints").exists(), 60)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    done = int(output.strip().splitlines()[-1].split("after step ")[1].split()[0])
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == [str(done)] * bool(done)
