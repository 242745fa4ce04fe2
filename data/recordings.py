"""Real recordings as a source of sounds for scenes, split by recording.

A recordings folder holds one subfolder per label with audio files in it, `<label>/<name>.<ext>`.
Underscores in a label's folder name read as spaces.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from pathlib import Path

import numpy as np

from data.audio_files import AudioFileError, read_audio

EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3")


@dataclasses.dataclass(frozen=True)
class Recording:
    """One file of one class; `split` is decided by the file, so no recording is in two splits."""

    label: str
    path: Path
    split: str


@functools.lru_cache(maxsize=64)
def _active(path: Path, sampling_rate: int) -> np.ndarray:
    """The file between its first and last sample within 30 dB of its peak: f32[n]."""
    wave = read_audio(path, sampling_rate)
    loud = np.flatnonzero(np.abs(wave) > np.abs(wave).max() * 10**-1.5)
    return wave[loud[0] : loud[-1] + 1]


@dataclasses.dataclass(frozen=True)
class Recordings:
    """An index of recordings: (label, split) -> files."""

    files: dict[tuple[str, str], tuple[Recording, ...]]

    @classmethod
    def load(cls, root: Path) -> Recordings:
        """Index a recordings folder. Per label, files go round the splits train, test, train, validation."""
        if not root.is_dir():
            raise ValueError(f"recordings folder {root} is missing")
        found: dict[tuple[str, str], list[Recording]] = {}
        for folder in sorted(p for p in root.iterdir() if p.is_dir()):
            label = folder.name.replace("_", " ")
            paths = [p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS]
            paths.sort(key=lambda p: zlib.crc32(p.name.encode()))
            for i, path in enumerate(paths):
                split = ("train", "test", "train", "validation")[i % 4]
                found.setdefault((label, split), []).append(Recording(label, path, split))
        return cls({key: tuple(value) for key, value in found.items()})

    def excerpt(
        self, label: str, rng: np.random.Generator, split: str, seconds: float, sampling_rate: int
    ) -> np.ndarray:
        """A random part of a random recording of `label`: f32[round(seconds * sampling_rate)].

        A recording shorter than `seconds` is repeated.

        Raises:
          AudioFileError: the file drawn is broken.
          ValueError: no recording of that label belongs to the split.
        """
        choices = self.files.get((label, split), ())
        if not choices:
            raise ValueError(f"no recording of {label!r} in split {split!r}")
        path = choices[rng.integers(len(choices))].path
        wave = _active(path, sampling_rate)
        n = round(seconds * sampling_rate)
        if len(wave) == 0:
            raise AudioFileError(path, "empty")
        begin = int(rng.integers(max(len(wave) - n, 0) + 1))
        return np.resize(wave[begin:], n) if len(wave) - begin < n else wave[begin : begin + n]
