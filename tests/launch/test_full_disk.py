"""Runs on a disk that fills up: a small file system of its own, and a limit on the size of files."""

from __future__ import annotations

import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs import sft as sft_config
from launch import train
from tests.runs import arguments, fill, make_place, start

STEPS = 60


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> Path:
    """An undisturbed run; one checkpoint every other step, and all of them kept."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    train.train(config(place), workdir)
    return workdir


def config(place: Path):
    made = fill(sft_config.get_config("test"), place)
    made.total_steps = STEPS
    made.checkpoint.keep_last = STEPS
    return made


def flags(place: Path, workdir: Path) -> list[str]:
    more = (f"--config.total_steps={STEPS}", f"--config.checkpoint.keep_last={STEPS}")
    return arguments("sft", place, workdir, *more)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB; `resize` makes it another size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, bytes_: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={bytes_}", str(disk)], check=True)


def failure(process: subprocess.Popen[str]) -> str:
    """The one line by which a process ended."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    said = [line for line in output.splitlines() if line.startswith("launch.train: ")]
    assert len(said) == 1, output
    assert "Traceback" not in output, output
    return said[0]


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def assert_same_end(one: Path, two: Path) -> None:
    for name in ("metrics.jsonl", "export/model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_earlier_checkpoints(place, whole, small_disk):
    workdir = small_disk / "w"
    step_bytes = size(whole / "checkpoints" / "2")
    resize(small_disk, 6 * step_bytes)
    said = failure(start(*flags(place, workdir)))
    assert f"launch.train: {workdir}/" in said
    assert "could not be written: no space left on device (" in said
    assert " bytes to write, " in said
    there = checkpoints(workdir)
    assert there
    assert there[-1] < STEPS
    if "checkpoints/" in said:
        assert f"{workdir / 'checkpoints'}/{there[-1] + 2} could not" in said
        assert f"the checkpoint of step {there[-1]} is intact: free space" in said
    resize(small_disk, 100 * step_bytes)
    process = start(*flags(place, workdir))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"going on from step {there[-1]}" in output
    assert "damaged" not in output
    assert_same_end(whole, workdir)


@pytest.mark.slow
def test_an_export_that_does_not_fit_is_named(place, whole, small_disk):
    workdir = small_disk / "w"
    resize(small_disk, size(whole) + (8 << 20))
    shutil.copytree(whole, workdir)
    (workdir / "done.json").unlink()
    shutil.rmtree(workdir / "export")
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(b"x" * (free - (100 << 10)))
    said = failure(start(*flags(place, workdir)))
    assert f"launch.train: {workdir / 'export'} could not be written: no space left on" in said
    assert said.endswith("the checkpoints are intact: free space, and start again to export")
    assert not (workdir / "done.json").exists()
    assert not (workdir / "export" / "config.json").exists()
    (small_disk / "filler").unlink()
    process = start(*flags(place, workdir))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_same_end(whole, workdir)


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_named_too(place, whole, tmp_path):
    workdir = tmp_path / "w"
    process = start(*flags(place, workdir))
    deadline = time.monotonic() + 120
    while not (workdir / "checkpoints").exists() or len(checkpoints(workdir)) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    # Room for lines of metrics, none for arrays.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    said = failure(process)
    there = checkpoints(workdir)
    assert f"{workdir / 'checkpoints'}/{there[-1] + 2} could not be written: file too large" in said
    assert f"the checkpoint of step {there[-1]} is intact: free space" in said
    process = start(*flags(place, workdir))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"going on from step {there[-1]}" in output
    assert_same_end(whole, workdir)
