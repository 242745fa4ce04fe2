"""Decoded waveforms in memory, least recently used first out, within a limit of bytes."""

from __future__ import annotations

import collections
import threading
from pathlib import Path

import numpy as np
from absl import logging

from data.audio_files import LENGTH_TOLERANCE_S, SAMPLING_RATE, AudioFileError, read_audio


class TooManyBadFiles(RuntimeError):
    """More files than the config allows could not be used; the message names some of them."""


class AudioStore:
    """Reads files of one dataset root as 16 kHz mono and keeps them.

    Attributes:
      bad: path -> reason of every file that could not be used so far.
      hits, misses: number of reads served from memory and from disk.
    """

    def __init__(
        self,
        root: Path | str,
        max_bytes: int = 1 << 30,
        max_seconds: float = 300.0,
        max_bad: int = 10,
    ):
        """Args: max_bytes: memory for waveforms; max_bad: bad files that are tolerated before a run stops."""
        self.root = Path(root)
        self.bad: dict[str, str] = {}
        self.hits = self.misses = 0
        self._max_bytes, self._max_seconds, self._max_bad = max_bytes, max_seconds, max_bad
        self._bytes = 0
        self._waves: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def read(
        self, audio_path: str, least_s: float = 0.0, most_s: float = float("inf")
    ) -> np.ndarray:
        """The file's waveform: f32[n], read-only, 16 kHz.

        Args:
          least_s: the labels reach so far; a file that is more than 0.1 s shorter is bad ("truncated").
          most_s: the labels end there; a file that is more than 0.1 s longer is bad ("overlong"), because what is said
            of its sounds need not be true of the rest.

        Raises:
          AudioFileError: the file cannot be used. It is logged and counted the first time.
          TooManyBadFiles: it is one more bad file than `max_bad`.
        """
        wave = self._decoded(audio_path)
        seconds = len(wave) / SAMPLING_RATE
        if least_s - LENGTH_TOLERANCE_S <= seconds <= most_s + LENGTH_TOLERANCE_S:
            return wave
        short = seconds < least_s
        detail = f"{seconds:.2f} s, its labels reach {least_s if short else most_s:.2f} s"
        error = AudioFileError(self.root / audio_path, "truncated" if short else "overlong", detail)
        self._count_bad(audio_path, error)
        raise error

    def _decoded(self, audio_path: str) -> np.ndarray:
        with self._lock:
            if audio_path in self._waves:
                self._waves.move_to_end(audio_path)
                self.hits += 1
                return self._waves[audio_path]
        try:
            wave = read_audio(self.root / audio_path, SAMPLING_RATE, self._max_seconds)
        except AudioFileError as error:
            self._count_bad(audio_path, error)
            raise
        wave.flags.writeable = False
        with self._lock:
            self.misses += 1
            if audio_path not in self._waves and wave.nbytes <= self._max_bytes:
                self._waves[audio_path] = wave
                self._bytes += wave.nbytes
                while self._bytes > self._max_bytes:
                    self._bytes -= self._waves.popitem(last=False)[1].nbytes
        return wave

    def _count_bad(self, audio_path: str, error: AudioFileError) -> None:
        with self._lock:
            if audio_path in self.bad:
                return
            self.bad[audio_path] = error.reason
            count = len(self.bad)
        logging.warning("skipped (%d so far): %s", count, error)
        if count > self._max_bad:
            raise TooManyBadFiles(f"{count} audio files could not be used, the last one: {error}")
