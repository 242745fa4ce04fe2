"""Reading audio files as 16 kHz mono, with one kind of error that says which file and why."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import librosa
import numpy as np
import soundfile

SAMPLING_RATE = 16_000
LENGTH_TOLERANCE_S = 0.1  # between a file and what its labels say
# One step of 16-bit audio. Channels in antiphase leave half a step of rounding when they are mixed down.
SILENCE_PEAK = 1 / 32_768
# Full scale is 1, and whole numbers that were stored as floats reach 32,768: such a file means something else.
LARGEST_SAMPLE = 1e4
# What a writer that cannot go back leaves as the size of the samples: nothing yet, "until the end", or about the
# most that fits 31 or 32 bits, 63 or 64 where sizes are that long.
_UNKNOWN_SIZE, _LEAST_ENDLESS_SIZE, _LEAST_ENDLESS_LONG_SIZE = 0, 0x7FFF_F000, 1 << 62
_SIZE_IS_IN_DS64 = 0xFFFF_FFFF


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """How a format lays out its chunks; a name is what its chunk's identifier begins with.

    Attributes:
      begin: bytes before the first chunk.
      header: `struct` format of a chunk's identifier and size in bytes.
      counted: bytes of its own header that a chunk's size includes.
      align: chunks begin at multiples of it.
      samples: name of the chunk that holds the samples.
      endless: a size of the samples from which on it says no more than "until the end".
    """

    begin: int
    header: str
    counted: int = 0
    align: int = 2
    samples: bytes = b"data"
    endless: int = _LEAST_ENDLESS_SIZE


# By the first four bytes of the file and the four at the place of its form.
_LAYOUTS = {
    (b"RIFF", b"WAVE"): _Chunks(12, "<4sI"),
    (b"RIFX", b"WAVE"): _Chunks(12, ">4sI"),
    (b"RF64", b"WAVE"): _Chunks(12, "<4sI", endless=_LEAST_ENDLESS_LONG_SIZE),
    (b"FORM", b"AIFF"): _Chunks(12, ">4sI", samples=b"SSND"),
    (b"FORM", b"AIFC"): _Chunks(12, ">4sI", samples=b"SSND"),
    (b"riff", b"wave"): _Chunks(40, "<16sQ", counted=24, align=8, endless=_LEAST_ENDLESS_LONG_SIZE),
}


class AudioFileError(ValueError):
    """A file that cannot be used. `path` names it, `reason` is one of `REASONS`."""

    REASONS = (
        "missing",
        "unreadable",
        "empty",
        "silent",
        "overlong",
        "non-finite",
        "out-of-range",
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
      AudioFileError: missing, unreadable (or a folder), empty (no samples), silent (the mix peaks below one step of
        16-bit audio), overlong (more than `max_seconds`, judged from the header before decoding), non-finite,
        out-of-range (a sample beyond +-1e4, where 1 is full scale), or truncated: it ends before its header says.
        That is seen in WAV (RIFF, RIFX, RF64), W64, AIFF, FLAC ("unreadable") and MP3 with a Xing header, and not
        in Ogg, AU, other MP3, or a WAV whose writer left its size open: those last until they end.
    """
    path = Path(path)
    if path.is_dir():
        raise AudioFileError(path, "unreadable", "it is a folder; name a file in it")
    if not path.is_file():
        raise AudioFileError(path, "missing")
    try:
        with soundfile.SoundFile(path) as file:
            _check_complete(path)
            rate, frames = file.samplerate, file.frames
            if rate > 0 and frames / rate > max_seconds:
                raise AudioFileError(path, "overlong", f"{frames / rate:.1f} s > {max_seconds:g} s")
            channels = file.read(dtype="float32", always_2d=True)
            # A header may count the padding of an encoder, so a little less is whole.
            if rate > 0 and (frames - len(channels)) / rate > LENGTH_TOLERANCE_S:
                raise _truncated(path, f"{frames / rate:.2f} s", f"{len(channels) / rate:.2f} s")
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        raise AudioFileError(path, "unreadable", str(error).splitlines()[0]) from None
    wave = channels.mean(axis=1)
    if len(wave) == 0:
        raise AudioFileError(path, "empty")
    if not np.isfinite(wave).all():
        raise AudioFileError(path, "non-finite")
    peak = float(np.abs(wave).max())
    if peak > LARGEST_SAMPLE:
        detail = f"samples reach {peak:.3g}, full scale is 1; scale them to [-1, 1]"
        raise AudioFileError(path, "out-of-range", detail)
    if peak < SILENCE_PEAK:
        cancels = np.abs(channels).max() >= SILENCE_PEAK
        raise AudioFileError(path, "silent", "its channels cancel each other" if cancels else "")
    if rate != sampling_rate:
        wave = librosa.resample(wave, orig_sr=rate, target_sr=sampling_rate, res_type="soxr_hq")
    return np.ascontiguousarray(wave, np.float32)


def _truncated(path: Path, promised: str, found: str) -> AudioFileError:
    detail = f"its header promises {promised}, the file holds {found}"
    return AudioFileError(path, "truncated", detail)


def _check_complete(path: Path) -> None:
    """Raises AudioFileError ("truncated") for a file of chunks that holds fewer samples than its header promises.

    libsndfile reads what is there of such a file and says nothing.
    """
    with path.open("rb") as file:
        start = file.read(28).ljust(28, b"\0")
        layout = _LAYOUTS.get((start[:4], start[8:12])) or _LAYOUTS.get((start[:4], start[24:28]))
        if layout is None:
            return
        order, width = layout.header[0], struct.calcsize(layout.header)
        end = path.stat().st_size
        bytes_per_second, long_size = 0, None
        file.seek(layout.begin)
        while len(header := file.read(width)) == width:
            name, size = struct.unpack(layout.header, header)
            begin = file.tell()
            size = max(size - layout.counted, 0)
            if name.startswith(b"fmt "):
                fields = file.read(12).ljust(12, b"\0")
                bytes_per_second = struct.unpack(f"{order}HHII", fields)[3]
            elif name == b"ds64":
                # RF64: sizes of the file and of its samples in 64 bits.
                long_size = struct.unpack("<8xQ", file.read(16).ljust(16, b"\0"))[0]
            elif name.startswith(layout.samples):
                if long_size is not None and size == _SIZE_IS_IN_DS64:
                    size = long_size
                present = end - begin
                if size == _UNKNOWN_SIZE or size >= layout.endless or size <= present:
                    return
                promised, found = f"{size} bytes", f"{present}"
                if bytes_per_second:
                    promised = f"{size / bytes_per_second:.2f} s ({promised})"
                    found = f"{present / bytes_per_second:.2f} s ({found})"
                raise _truncated(path, promised, found)
            after = begin + size
            file.seek(min(after + -after % layout.align, end))
