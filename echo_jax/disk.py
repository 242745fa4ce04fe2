"""Full disks: what cannot be written is named, with its folder and its bytes."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

# What the system says when a file system, a quota or a limit on file sizes is exhausted. Libraries wrap it in errors of
# their own, so only the words are left.
_FULL = re.compile("no space left on device|disk quota exceeded|file too large", re.IGNORECASE)


class DiskFullError(OSError):
    """Something could not be written for want of space; the message is one line."""


@contextlib.contextmanager
def naming(folder: Path, needed_bytes: int, then: str) -> Iterator[None]:
    """Turns what a full disk raises inside the block into one line.

    Args:
        folder: what is being written.
        needed_bytes: its size, about.
        then: what to do, or what is still there; the end of the line.

    Raises:
        DiskFullError: the disk was full. Other errors pass as they are.
    """
    try:
        yield
    except Exception as error:
        reason = full(error)
        if isinstance(error, DiskFullError) or not reason:
            raise
        raise named(reason, folder, needed_bytes, then) from error


def named(reason: str, folder: Path, needed_bytes: int, then: str) -> DiskFullError:
    """The error of `naming`; `reason` is what `full` has found."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    return DiskFullError(
        f"{folder} could not be written: {reason} ({needed_bytes:,} bytes to write, {free:,} free); {then}"
    )


def full(error: BaseException) -> str:
    """The words by which an error, or one that caused it, says that a disk is full; "" if none does."""
    chain: BaseException | None = error
    while chain is not None:
        if found := _FULL.search(str(chain)):
            return found[0].lower()
        chain = chain.__cause__ or chain.__context__
    return ""
