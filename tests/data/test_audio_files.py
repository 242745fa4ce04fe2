from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import audio_files
from data.audio_files import AudioFileError, read_audio
from data.audio_store import AudioStore, TooManyBadFiles


def _tone(rate: int, seconds: float = 1.0) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("extension", ["wav", "flac", "ogg"])
def test_formats_and_rates_become_16_khz_mono(tmp_path, rate, extension):
    path = tmp_path / f"tone.{extension}"
    soundfile.write(path, np.stack([_tone(rate), _tone(rate)], 1), rate)
    wave = read_audio(path)
    assert wave.dtype == np.float32
    assert abs(len(wave) - 16_000) <= 1
    middle = slice(1_000, 15_000)
    np.testing.assert_allclose(wave[middle], _tone(16_000)[middle], atol=0.02)


def test_each_kind_of_bad_file_is_named(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(tmp_path / "overlong.wav", _tone(16_000, 3.0), 16_000)
    soundfile.write(tmp_path / "non-finite.wav", np.full(99, np.nan), 16_000, "FLOAT")
    soundfile.write(tmp_path / "out-of-range.wav", np.full(99, 2e4), 16_000, "FLOAT")
    (tmp_path / "unreadable.wav").write_bytes(b"RIFF but not really")
    soundfile.write(tmp_path / "truncated.wav", _tone(16_000), 16_000)
    _cut(tmp_path / "truncated.wav", 10_000)
    for reason in AudioFileError.REASONS:
        path = tmp_path / f"{reason}.wav"
        with pytest.raises(AudioFileError, match=reason) as caught:
            read_audio(path, max_seconds=2.0)
        assert caught.value.reason == reason
        assert str(path) in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_folder_is_not_called_missing(tmp_path):
    with pytest.raises(AudioFileError, match=r"unreadable audio file \(it is a folder"):
        read_audio(tmp_path)


def test_silence_is_judged_after_mixing_down(tmp_path):
    path = tmp_path / "a.wav"
    tone = np.round(_tone(16_000) * 32_000).astype(np.int16)
    # Antiphase, and one channel's rounding is one step off: half a step is left.
    soundfile.write(path, np.stack([tone, 1 - tone], 1), 16_000)
    with pytest.raises(AudioFileError, match=r"silent.*its channels cancel each other"):
        read_audio(path)
    soundfile.write(path, np.array([0, 1, 0, -1] * 4_000, np.int16), 16_000)
    assert np.abs(read_audio(path)).max() == 1 / 32_768


def test_whole_numbers_stored_as_floats_are_out_of_range(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, _tone(16_000) * 1e5, 16_000, "FLOAT")
    with pytest.raises(AudioFileError, match=r"samples reach 3e\+04, full scale is 1"):
        read_audio(path)
    soundfile.write(path, _tone(16_000) * 100, 16_000, "FLOAT")
    assert np.abs(read_audio(path)).max() > 29


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:-size])


def _set_size(path: Path, chunk: bytes, size: int) -> None:
    """Writes the size that a little-endian header gives a chunk."""
    content = path.read_bytes()
    begin = content.index(chunk) + 4
    path.write_bytes(content[:begin] + struct.pack("<I", size) + content[begin + 4 :])


@pytest.mark.parametrize(
    ("rate", "how", "message"),
    [
        (16_000, {}, r"promises 1.00 s (32000 bytes), the file holds 0.75 s (24000)"),
        (8_000, {"subtype": "FLOAT"}, r"promises 1.00 s (32000 bytes), the file holds 0.75 s"),
        (16_000, {"endian": "BIG"}, r"promises 1.00 s (32000 bytes), the file holds 0.75 s"),
        (16_000, {"format": "WAVEX"}, r"promises 1.00 s (32000 bytes), the file holds 0.75 s"),
        (16_000, {"subtype": "IMA_ADPCM"}, "s (8192 bytes), the file holds 0.02 s (192)"),
        (16_000, {"format": "RF64"}, r"promises 1.00 s (32000 bytes), the file holds 0.75 s"),
        (16_000, {"format": "W64"}, r"promises 1.00 s (32000 bytes), the file holds 0.75 s"),
        # 8 bytes before the samples count.
        (16_000, {"format": "AIFF"}, r"promises 32008 bytes, the file holds 24008"),
    ],
)
def test_a_wav_file_that_ends_too_soon_is_truncated(tmp_path, rate, how, message):
    path = tmp_path / "a.wav"
    soundfile.write(path, _tone(rate), rate, **({"format": "WAV"} | how))
    assert len(read_audio(path)) >= 16_000
    _cut(path, 8_000)
    with pytest.raises(AudioFileError, match=re.escape(message)) as caught:
        read_audio(path)
    assert caught.value.reason == "truncated"
    assert str(caught.value).startswith(f"{path}: truncated audio file (its header promises")
    store = AudioStore(tmp_path)
    with pytest.raises(AudioFileError):
        store.read("a.wav")
    assert store.bad == {"a.wav": "truncated"}


def test_a_wav_file_without_any_of_its_samples_is_truncated(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, _tone(16_000), 16_000)
    _cut(path, 32_000)
    with pytest.raises(AudioFileError, match=r"the file holds 0.00 s \(0\)"):
        read_audio(path)


@pytest.mark.parametrize(
    ("whole", "samples"),
    [(0xFFFF_FFFF, 0xFFFF_FFFF), (0, 0xFFFF_FFFF), (8, 0), (0x7FFF_F024, 0x7FFF_F000)],
)
def test_headers_of_streams_are_read_to_the_end(tmp_path, whole, samples):
    path = tmp_path / "a.wav"
    soundfile.write(path, _tone(16_000), 16_000)
    _set_size(path, b"RIFF", whole)
    _set_size(path, b"data", samples)
    assert len(read_audio(path)) == 16_000


def test_an_rf64_or_w64_stream_is_read_to_the_end(tmp_path):
    path = tmp_path / "a.wav"
    for form, begin in (("RF64", 28), ("W64", None)):
        soundfile.write(path, _tone(16_000), 16_000, format=form)
        content = path.read_bytes()
        begin = content.index(b"data") + 16 if begin is None else begin
        for size in (0, (1 << 64) - 1):
            path.write_bytes(content[:begin] + struct.pack("<Q", size) + content[begin + 8 :])
            assert audio_files._check_complete(path) is None


def test_an_mp3_file_that_ends_before_its_count_of_frames_is_truncated(tmp_path):
    path = tmp_path / "a.mp3"
    soundfile.write(path, _tone(16_000, 4.0), 16_000)
    whole = len(read_audio(path))
    assert whole >= 64_000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioFileError, match=r"its header promises 4\.00 s, the file holds"):
        read_audio(path)


def test_chunks_around_the_samples_are_passed_over(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(
        path, _tone(16_000)[:15_999], 16_000, "PCM_U8"
    )  # an odd size, so a filling byte
    content = path.read_bytes()
    begin = content.index(b"data")
    odd = b"LIST" + struct.pack("<I", 5) + b"abcde\0"
    path.write_bytes(content[:begin] + odd + content[begin:] + odd)
    assert len(read_audio(path)) == 15_999
    path.write_bytes(content.rstrip(b"\0") if content[-1] == 0 else content)  # no filling byte
    assert len(read_audio(path)) == 15_999


def test_the_store_forgets_the_oldest_and_counts_bad_files(tmp_path):
    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", _tone(16_000), 16_000)
        (tmp_path / f"bad_{name}.wav").write_bytes(b"no")
    store = AudioStore(tmp_path, max_bytes=2 * 64_000, max_bad=2)
    for name in ("a", "b", "a", "c", "a", "b"):
        store.read(f"{name}.wav")
    assert (store.hits, store.misses) == (2, 4)
    for name in "aab":
        with pytest.raises(AudioFileError):
            store.read(f"bad_{name}.wav")
    assert store.bad == {"bad_a.wav": "unreadable", "bad_b.wav": "unreadable"}
    with pytest.raises(TooManyBadFiles, match=r"3 audio files .* bad_c|3 audio files"):
        store.read("bad_c.wav")
