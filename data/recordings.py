"""Real recordings as a source of sounds for scenes, split by recording.

A recordings folder holds one subfolder per class with audio files in it, `<label>/<name>.<ext>`; underscores in
a folder's name read as spaces. `python -m data.recorded_packages` makes one from installed packages.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.audio_files import read_audio

EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3")
# The files of a class, in the order of a hash of their names, go to these splits in turn.
SPLIT_CYCLE = ("train", "test", "train", "validation")
ACTIVE_DB = -30.0
TRIES = 6


@functools.lru_cache(maxsize=128)
def _active(path: Path, sampling_rate: int) -> np.ndarray:
    """The file between its first and last sample within 30 dB of its peak: f32[n]."""
    wave = read_audio(path, sampling_rate)
    loud = np.flatnonzero(np.abs(wave) > np.abs(wave).max() * 10 ** (ACTIVE_DB / 20))
    return wave[loud[0] : loud[-1] + 1]


@dataclasses.dataclass(frozen=True)
class Recordings:
    """An index of recordings: (label, split) -> files. No file is in two splits."""

    files: dict[tuple[str, str], tuple[Path, ...]]

    @classmethod
    def load(cls, root: Path) -> Recordings:
        """Index a recordings folder.

        Raises:
          ValueError: there is no such folder.
        """
        if not root.is_dir():
            raise ValueError(
                f"recordings folder {root} is missing; see python -m data.recorded_packages"
            )
        found: dict[tuple[str, str], list[Path]] = {}
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            label = folder.name.replace("_", " ")
            paths = [path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS]
            paths.sort(key=lambda path: (zlib.crc32(path.name.encode()), path.name))
            for i, path in enumerate(paths):
                found.setdefault((label, SPLIT_CYCLE[i % len(SPLIT_CYCLE)]), []).append(path)
        return cls({key: tuple(value) for key, value in found.items()})

    def labels(self, splits: Iterable[str]) -> list[str]:
        """Labels that have a recording in every one of `splits`, sorted."""
        wanted = tuple(splits)
        names = {label for label, _ in self.files}
        return sorted(n for n in names if all((n, split) in self.files for split in wanted))

    def excerpt(
        self, label: str, rng: np.random.Generator, split: str, seconds: float, sampling_rate: int
    ) -> np.ndarray:
        """A part of a random recording of `label` that is not a pause: f32[round(seconds * sampling_rate)].

        A recording shorter than `seconds` is repeated.

        Raises:
          AudioFileError: the file drawn is broken.
          ValueError: no recording of that label belongs to the split.
        """
        choices = self.files.get((label, split), ())
        if not choices:
            raise ValueError(f"no recording of {label!r} in split {split!r}")
        wave = _active(choices[int(rng.integers(len(choices)))], sampling_rate)
        n = round(seconds * sampling_rate)
        if len(wave) <= n:
            return np.resize(wave, n)
        begins = rng.integers(0, len(wave) - n + 1, TRIES)
        parts = [wave[begin : begin + n] for begin in begins]
        whole = float(np.mean(wave**2))
        loud_enough = [part for part in parts if float(np.mean(part**2)) > 0.3 * whole]
        return loud_enough[0] if loud_enough else max(parts, key=lambda p: float(np.mean(p**2)))
