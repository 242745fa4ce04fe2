"""Full disks are named; everything else passes."""

import errno
import os

import pytest

from echo_jax import disk


def test_what_a_full_disk_raises_is_named_with_folder_and_bytes(tmp_path):
    folder = tmp_path / "not" / "made" / "yet"
    wrapped = ValueError("RESOURCE_EXHAUSTED: writing x [errno: No space left on device]")
    for error in (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), wrapped):
        with (
            pytest.raises(disk.DiskFullError) as raised,
            disk.naming(folder, 12_345, "free space"),
        ):
            raise error
        said = str(raised.value)
        assert said.startswith(f"{folder} could not be written: no space left on device (12,345 ")
        assert said.endswith(" free); free space")
        assert "\n" not in said


def test_a_cause_counts_and_the_first_name_stays(tmp_path):
    error = RuntimeError("background")
    error.__cause__ = OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    with (
        pytest.raises(disk.DiskFullError, match=r"inner could not .*: file too large"),
        disk.naming(tmp_path / "outer", 1, "x"),
        disk.naming(tmp_path / "inner", 1, "x"),
    ):
        raise error


def test_other_errors_pass(tmp_path):
    with pytest.raises(PermissionError, match="no"), disk.naming(tmp_path, 1, "x"):
        raise PermissionError("no")
