from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import soundfile

from data import recorded_packages, scenes
from data.recordings import Recordings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes with four recordings each, every recording a tone of its own."""
    root = tmp_path_factory.mktemp("recordings")
    pitch = 200
    for label in ("old_gate", "crow", "mill"):
        (root / label).mkdir()
        for number in range(4):
            pitch += 150
            t = np.arange(8_000 * 2) / 8_000
            wave = np.concatenate([np.zeros(2_000), 0.5 * np.sin(2 * np.pi * pitch * t)])
            soundfile.write(root / label / f"{number}.wav", wave, 8_000)
    return root


def _pitch(wave: np.ndarray, rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(wave))) * rate / len(wave))


def test_no_recording_is_in_two_splits(folder):
    index = Recordings.load(folder)
    assert index.labels(["train", "test"]) == ["crow", "mill", "old gate"]
    used = [path for paths in index.files.values() for path in paths]
    assert len(used) == len(set(used)) == 12
    heard = {}
    for split in ("train", "validation", "test"):
        waves = (
            index.excerpt("crow", np.random.default_rng(seed), split, 0.5, 16_000)
            for seed in range(20)
        )
        heard[split] = {round(_pitch(wave, 16_000) / 10) for wave in waves}
    assert not heard["train"] & heard["test"]
    assert not heard["train"] & heard["validation"]


def test_excerpts_have_the_length_asked_for(folder):
    index = Recordings.load(folder)
    for seconds in (0.3, 1.9, 5.0):
        wave = index.excerpt("mill", np.random.default_rng(0), "train", seconds, 22_050)
        assert len(wave) == round(seconds * 22_050)
        assert np.std(wave) > 0.1


def test_scenes_mix_recordings_and_synthetic_sounds(folder, tmp_path):
    config = scenes.SceneConfig(
        counts={"train": 3, "test": 2},
        classes=("old gate", "crow", "mill", "low beep", "cough"),
        recordings_root=str(folder),
        num_events=(4, 5),
    )
    scenes.write_scenes(config, tmp_path, num_processes=1)
    read = scenes.read_scenes(tmp_path, "train")
    assert {scene.source for scene in read} == {"recorded"}
    assert {event.label for scene in read for event in scene.events} <= set(config.classes)


def test_a_class_without_recordings_is_named(folder, tmp_path):
    config = scenes.SceneConfig(
        classes=("crow", "mill", "horse", "cough"), recordings_root=str(folder), num_events=(2, 3)
    )
    with pytest.raises(ValueError, match="'horse' is not in the sound library"):
        scenes.write_scenes(config, tmp_path, num_processes=1)
    with pytest.raises(ValueError, match=r"recorded_packages"):
        Recordings.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("package", "stem", "label"),
    [
        ("sonicpi", "bd_808", "kick drum"),
        ("sonicpi", "loop_amen", ""),
        ("gcompris", "LRBark_3_LA_cut", "dog"),
        ("gcompris", "LRTrain_slowing_down_01_LA_cut", "train"),
        ("gcompris", "flute_traversiere", "flute"),
        ("lincity", "IndustryHigh3", "industry"),
        ("lincity", "CoalMine2", "coal mine"),
        ("tuxpaint", "sea_lion", "sea lion"),
        ("ovos", "owl", "owl"),
    ],
)
def test_labels_from_file_names(package, stem, label):
    assert recorded_packages.label_of(package, stem) == label


def _rcc(files: dict[str, bytes], compressed: bool) -> bytes:
    """A version 3 archive with one folder "d", written from the format's description."""
    names, offsets = b"", {}
    for name in ("d", *files):
        offsets[name] = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    data, places = b"", {}
    for name, content in files.items():
        places[name] = len(data)
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if compressed else content
        data += struct.pack(">I", len(stored)) + stored
    tree = struct.pack(">IHII8x", 0, 2, 1, 1)
    tree += struct.pack(">IHII8x", offsets["d"], 2, len(files), 2)
    for name in files:
        tree += struct.pack(">IHHHI8x", offsets[name], int(compressed), 0, 0, places[name])
    start = 24
    header = struct.pack(
        ">4s5I", b"qres", 3, start, start + len(tree), start + len(tree) + len(data), 0
    )
    return header + tree + data + names


@pytest.mark.parametrize("compressed", [False, True])
def test_resource_archives(tmp_path, compressed):
    files = {"cow.ogg": b"moo" * 9, "pig.ogg": b"oink"}
    (tmp_path / "a.rcc").write_bytes(_rcc(files, compressed))
    found = dict(recorded_packages.read_rcc(tmp_path / "a.rcc"))
    assert found == {f"d/{name}": content for name, content in files.items()}
    (tmp_path / "b.rcc").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="not a Qt resource archive"):
        list(recorded_packages.read_rcc(tmp_path / "b.rcc"))


def test_collecting_leaves_out_silence_and_doubles(tmp_path):
    stamps = tmp_path / "usr/share/tuxpaint/stamps/animals"
    stamps.mkdir(parents=True)
    tone = 0.1 * np.sin(np.arange(8_000))
    soundfile.write(stamps / "cow.wav", tone, 8_000)
    soundfile.write(stamps / "bull.wav", tone, 8_000)
    soundfile.write(stamps / "cow_desc_de.wav", tone[::-1], 8_000)
    soundfile.write(stamps / "giraffe.wav", np.zeros(8_000), 8_000)
    counts, bad = recorded_packages.collect(tmp_path, tmp_path / "out")
    assert {label: n for label, n in counts.items() if label in ("cow", "bull", "giraffe")} == {
        "bull": 1
    }
    assert bad == ["tuxpaint_giraffe.wav"]
    assert not (tmp_path / "out" / "giraffe").exists()
