from __future__ import annotations

import pickle

import numpy as np
import pytest
import soundfile

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
    (tmp_path / "unreadable.wav").write_bytes(b"RIFF but not really")
    for reason in AudioFileError.REASONS[:-1]:
        path = tmp_path / f"{reason}.wav"
        with pytest.raises(AudioFileError, match=reason) as caught:
            read_audio(path, max_seconds=2.0)
        assert caught.value.reason == reason
        assert str(path) in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


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
