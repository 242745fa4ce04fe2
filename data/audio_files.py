"""Reading audio files as 16 kHz mono, with one kind of error that says which file and why."""

from __future__ import annotations

import struct
from pathlib import Path

import librosa
import numpy as np
import soundfile

SAMPLING_RATE = 16_000
LENGTH_TOLERANCE_S = 0.1  # between a file and what its labels say
SILENCE_PEAK = 1e-5  # -100 dB full scale: below the last bit of 16-bit audio
# What a writer that cannot go back leaves as the size of a WAV file's samples: nothing yet, "until the end", or
# about the most that fits 31 or 32 bits.
_UNKNOWN_SIZE, _LEAST_ENDLESS_SIZE = 0, 0x7FFF_F000


class AudioFileError(ValueError):
    """A file that cannot be used. `path` names it, `reason` is one of `REASONS`."""

    REASONS = (
        "missing",
        "unreadable",
        "empty",
        "silent",
        "overlong",
        "non-finite",
        "truncated",
    )

    def __init__(self, path: Path | str, reason: str, detail: str = ""):
        self.path = str(path)
        self.reason = reason
        self.detail = detail
        super().__init__(f"{path}: {reason} audio file" + (f" ({detail})" if detail else ""))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.path, self.reason, self.detail)


def read_audio(
    path: Path | str, sampling_rate: int = SAMPLING_RATE, max_seconds: float = 300.0
) -> np.ndarray:
    """Decode, mix down and resample a file (wav, flac, ogg, mp3, whatever libsndfile reads).

    Returns:
      f32[n] mono at `sampling_rate`; the channels are averaged.

    Raises:
      AudioFileError: missing, unreadable, truncated (a RIFF/WAVE file that ends before its header says), empty (no
        samples), silent (peak below -100 dB), overlong (more than `max_seconds`, judged from the header before
        decoding) or non-finite.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioFileError(path, "missing")
    try:
        with soundfile.SoundFile(path) as file:
            _check_complete(path)
            rate, frames = file.samplerate, file.frames
            if rate > 0 and frames / rate > max_seconds:
                raise AudioFileError(path, "overlong", f"{frames / rate:.1f} s > {max_seconds:g} s")
            wave = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        raise AudioFileError(path, "unreadable", str(error).splitlines()[0]) from None
    if len(wave) == 0:
        raise AudioFileError(path, "empty")
    if not np.isfinite(wave).all():
        raise AudioFileError(path, "non-finite")
    if np.abs(wave).max() < SILENCE_PEAK:
        raise AudioFileError(path, "silent")
    if rate != sampling_rate:
        wave = librosa.resample(wave, orig_sr=rate, target_sr=sampling_rate, res_type="soxr_hq")
    return np.ascontiguousarray(wave, np.float32)


def _check_complete(path: Path) -> None:
    """Raises AudioFileError ("truncated") for a RIFF/WAVE file that holds fewer samples than its header promises.

    libsndfile reads what is there of such a file and says nothing.
    """
    with path.open("rb") as file:
        magic, _, form = struct.unpack("<4sI4s", file.read(12).ljust(12, b"\0"))
        if magic not in (b"RIFF", b"RIFX") or form != b"WAVE":
            return
        order = "<" if magic == b"RIFF" else ">"
        end = path.stat().st_size
        bytes_per_second = 0
        while len(header := file.read(8)) == 8:
            name, size = struct.unpack(f"{order}4sI", header)
            begin = file.tell()
            if name == b"fmt ":
                fields = file.read(12).ljust(12, b"\0")
                bytes_per_second = struct.unpack(f"{order}HHII", fields)[3]
            elif name == b"data":
                present = end - begin
                if size == _UNKNOWN_SIZE or size >= _LEAST_ENDLESS_SIZE or size <= present:
                    return
                promised, found = f"{size} bytes", f"{present}"
                if bytes_per_second:
                    promised = f"{size / bytes_per_second:.2f} s ({promised})"
                    found = f"{present / bytes_per_second:.2f} s ({found})"
                detail = f"its header promises {promised}, the file holds {found}"
                raise AudioFileError(path, "truncated", detail)
            file.seek(begin + size + size % 2)  # chunks begin at even places
