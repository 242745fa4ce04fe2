"""The trainer itself on one device, on eight, and in two processes of four devices each."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.runs import ROOT, arguments, make_place, read_lines

SIZES = {
    "sft": ("--config.batch_size=8", "--config.total_steps=3"),
    "grpo": (
        "--config.total_steps=2",
        "--config.rollouts_per_query=2",
        "--config.queries_per_step=8",
        "--config.queries_per_minibatch=8",
        "--config.queries_per_microbatch=8",
        "--config.reward.name=1",
    ),
}


def run(stage: str, place: Path, workdir: Path, processes: int, devices: int) -> None:
    """Trains on `devices` in each of `processes`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mesh = ("--config.mesh.data=2",) if processes * devices > 1 else ()
    given = arguments(stage, place, workdir, *SIZES[stage], *mesh)
    started = []
    for number in range(processes):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(number),
            }
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "launch.train", *given],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
        )
    for process in started:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_two_processes_train_what_one_device_does(stage, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    make_place(place, records=16)
    workdirs = {}
    for name, processes, devices in (("one", 1, 1), ("eight", 1, 8), ("two processes", 2, 4)):
        workdirs[name] = tmp_path / name
        run(stage, place, workdirs[name], processes, devices)
    want = read_lines(workdirs["one"] / "metrics.jsonl")
    weights = load_file(workdirs["one"] / "export" / "model.safetensors")
    for name in ("eight", "two processes"):
        got = read_lines(workdirs[name] / "metrics.jsonl")
        assert [row["ids"] for row in got] == [row["ids"] for row in want]
        for row, expected in zip(got, want, strict=True):
            for metric in expected.keys() - {"ids"}:
                np.testing.assert_allclose(
                    row[metric], expected[metric], atol=2e-4, rtol=1e-3, err_msg=metric
                )
        trained = load_file(workdirs[name] / "export" / "model.safetensors")
        assert trained.keys() == weights.keys()
        for key, array in weights.items():
            np.testing.assert_allclose(trained[key], array, atol=2e-3, err_msg=key)
