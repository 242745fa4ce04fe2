"""Real recordings as a source of sounds for scenes, split by recording.

A recordings folder holds one subfolder per class with audio files in it, `<label>/<name>.<ext>`; underscores in
a folder's name read as spaces. `python -m data.recorded_packages` makes one from installed packages.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import logging

from data.audio_files import SAMPLING_RATE, AudioFileError, read_audio

EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3")
# Equal shares of the recordings; a hash of a file's content decides its share.
SPLIT_SHARES = ("train", "test", "train", "validation")
ACTIVE_DB = -30.0
TRIES = 6


@functools.lru_cache(maxsize=128)
def _active(path: Path, sampling_rate: int) -> np.ndarray:
    """The file between its first and last sample within 30 dB of its peak: f32[n], n > 0."""
    wave = read_audio(path, sampling_rate)
    peak = np.abs(wave).max(initial=0.0)
    if not peak:
        raise AudioFileError(path, "silent", f"nothing is left of it at {sampling_rate} Hz")
    loud = np.flatnonzero(np.abs(wave) > peak * 10 ** (ACTIVE_DB / 20))
    return wave[loud[0] : loud[-1] + 1]


@dataclasses.dataclass(frozen=True)
class Recording:
    """One file of a recordings folder.

    Attributes:
      digest: SHA-256 of its content, in hexadecimal.
    """

    label: str
    path: Path
    digest: str

    @property
    def split(self) -> str:
        """The split that the content belongs to, whatever the file is called and whatever lies beside it."""
        return SPLIT_SHARES[int(self.digest[:8], 16) % len(SPLIT_SHARES)]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        # Reading its samples fails too, and says why (`Recordings.usable`).
        return hashlib.sha256().hexdigest()


@dataclasses.dataclass(frozen=True)
class Recordings:
    """An index of recordings, by label and content. No recording is in two splits, under whatever names."""

    entries: tuple[Recording, ...]

    @classmethod
    def load(cls, root: Path, labels: Iterable[str] | None = None) -> Recordings:
        """Index a recordings folder; every file is read for its hash and none is decoded.

        Args:
          labels: the classes to index; default all.

        Raises:
          ValueError: there is no such folder.
        """
        if not root.is_dir():
            raise ValueError(
                f"recordings folder {root} is missing; see python -m data.recorded_packages"
            )
        wanted = None if labels is None else set(labels)
        entries = []
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            label = folder.name.replace("_", " ")
            if wanted is None or label in wanted:
                paths = [path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS]
                entries += [Recording(label, path, _digest(path)) for path in paths]
        entries.sort(key=lambda entry: (entry.label, entry.digest, entry.path.name))
        return cls(tuple(entries))

    @property
    def digest(self) -> str:
        """A hash of the labels, names and contents of all files; the folder's place does not matter."""
        rows = "".join(f"{e.label}/{e.path.name} {e.digest}\n" for e in self.entries)
        return hashlib.sha256(rows.encode()).hexdigest()

    @functools.cached_property
    def files(self) -> dict[tuple[str, str], tuple[Path, ...]]:
        """(label, split) -> files."""
        found: dict[tuple[str, str], list[Path]] = {}
        for entry in self.entries:
            found.setdefault((entry.label, entry.split), []).append(entry.path)
        return {key: tuple(value) for key, value in found.items()}

    def labels(self, splits: Iterable[str]) -> list[str]:
        """Labels that have a recording in every one of `splits`, sorted."""
        wanted = tuple(splits)
        names = {label for label, _ in self.files}
        return sorted(n for n in names if all((n, split) in self.files for split in wanted))

    def describe(self, label: str) -> str:
        """How many recordings of a label each split has, e.g. "train 3, test 1, validation 0"."""
        counts = collections.Counter(e.split for e in self.entries if e.label == label)
        return ", ".join(f"{split} {counts[split]}" for split in dict.fromkeys(SPLIT_SHARES))

    def usable(
        self, max_bad_fraction: float, num_threads: int = 2
    ) -> tuple[Recordings, list[dict[str, str]]]:
        """Decode every file once and leave out those that cannot be used; each is logged.

        Returns:
          The index of the others, and a row {"audio_path", "reason", "detail"} per file left out.

        Raises:
          ValueError: more than `max_bad_fraction` of the files cannot be used; names the first of them.
        """

        def check(entry: Recording) -> AudioFileError | None:
            try:
                _active(entry.path, SAMPLING_RATE)
            except AudioFileError as error:
                return error
            return None

        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            errors = list(pool.map(check, self.entries))
        bad = [error for error in errors if error]
        for error in bad:
            logging.warning("recording left out: %s", error)
        if len(bad) > max_bad_fraction * len(self.entries):
            raise ValueError(
                f"{len(bad)} of {len(self.entries)} recordings cannot be used, more than max_bad_fraction="
                f"{max_bad_fraction:g} allows; the first is {bad[0]}; repair or remove them"
            )
        pairs = zip(self.entries, errors, strict=True)
        good = tuple(entry for entry, error in pairs if error is None)
        rows = [{"audio_path": e.path, "reason": e.reason, "detail": e.detail} for e in bad]
        return Recordings(good), rows

    def excerpt(
        self, label: str, rng: np.random.Generator, split: str, seconds: float, sampling_rate: int
    ) -> np.ndarray:
        """A part of a random recording of `label` that is not a pause: f32[round(seconds * sampling_rate)].

        A recording shorter than `seconds` is repeated.

        Raises:
          AudioFileError: the file drawn is broken (`usable` leaves those out).
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
