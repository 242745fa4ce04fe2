"""Checkpoints that move to another mesh, to one device, and to another number of processes."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from subprocess import Popen

import pytest

from tests.runs import start

MODULE = "tests.sharded_checkpoints"


def run(*given: object) -> str:
    process = start(*map(str, given), module=MODULE)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def run_processes(
    count: int, *given: object, meanwhile: Callable[[list[Popen[str]]], None] | None = None
) -> list[tuple[int, str]]:
    """Exit status and output of each of so many processes, with 4 devices each; `meanwhile` runs beside them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = [*map(str, given), "--devices=4", f"--processes={count}", f"--port={port}"]
    processes = [start(*common, f"--process={i}", module=MODULE) for i in range(count)]
    try:
        if meanwhile:
            meanwhile(processes)
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_saved_under_one_mesh_restored_under_others(tmp_path):
    run("save", tmp_path / "c", "--mesh=2,2,2")
    meshes = ("2,2,2", "8,1,1", "1,8,1", "1,1,8", "2,4,1", "1,2,2", "1,1,1")
    output = run("restore", tmp_path / "c", *(f"--mesh={mesh}" for mesh in meshes))
    assert [line for line in output.splitlines() if line.endswith("ok")] == [
        f"restore {mesh} ok" for mesh in meshes
    ]
    # A machine with a single device.
    run("restore", tmp_path / "c", "--devices=1", "--mesh=1,1,1")


@pytest.mark.slow
def test_saved_on_one_device_restored_under_meshes(tmp_path):
    run("save", tmp_path / "c", "--devices=1", "--mesh=1,1,1")
    run("restore", tmp_path / "c", "--mesh=1,4,2", "--mesh=4,2,1")


@pytest.mark.slow
def test_another_number_of_processes(tmp_path):
    together = tmp_path / "together"
    for status, output in run_processes(2, "save", together, "--mesh=2,2,2"):
        assert status == 0, output
    run("restore", together, "--mesh=1,4,2")
    for status, output in run_processes(2, "restore", together, "--mesh=1,8,1", "--mesh=4,1,2"):
        assert status == 0, output
    # All processes pass over the same damaged step, although each reads parts of its own.
    data = max((together / "3" / "arrays").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    for status, output in run_processes(2, "restore", together, "--mesh=2,2,2", "--step=2"):
        assert status == 0, output
    assert (together / "damaged" / "3").is_dir()


@pytest.mark.slow
def test_data_that_processes_divide_stays_with_as_many(tmp_path):
    folder = tmp_path / "c"
    for status, output in run_processes(2, "save", folder, "--mesh=2,2,2", "--shards=2"):
        assert status == 0, output
    for status, output in run_processes(2, "restore", folder, "--mesh=2,2,2", "--shards=2"):
        assert status == 0, output
    process = start("restore", str(folder), "--mesh=2,2,2", module=MODULE)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "whose data was divided among 2 processes, not 1; go on with as many" in output
    assert not (folder / "damaged").exists()


@pytest.mark.slow
def test_processes_stop_after_the_same_step(tmp_path):
    def ask_one_of_them(processes: list[Popen[str]]) -> None:
        deadline = time.monotonic() + 120
        while not all((tmp_path / f"ready{number}").exists() for number in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGTERM)

    ends = []
    for status, output in run_processes(2, "stop", tmp_path, meanwhile=ask_one_of_them):
        assert status == 0, output
        ends += [line for line in output.splitlines() if line.startswith("SIGTERM at ")]
    assert len(ends) == 2
    assert ends[0] == ends[1]
