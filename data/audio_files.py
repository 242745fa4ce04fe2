"""Reading audio files as 16 kHz mono, with one kind of error that says which file and why."""

from __future__ import annotations

from pathlib import Path

import librosa
import numpy as np
import soundfile

SAMPLING_RATE = 16_000
LENGTH_TOLERANCE_S = 0.1  # between a file and what its labels say
SILENCE_PEAK = 1e-5  # -100 dB full scale: below the last bit of 16-bit audio


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
      AudioFileError: missing, unreadable, empty (no samples), silent (peak below -100 dB),
        overlong (more than `max_seconds`, judged from the header before decoding) or non-finite.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioFileError(path, "missing")
    try:
        with soundfile.SoundFile(path) as file:
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
