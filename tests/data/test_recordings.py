from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import recorded_packages, scenes
from data.recordings import Recordings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes with recordings for each split, every recording a tone of its own."""
    root = tmp_path_factory.mktemp("recordings")
    pitches = itertools.count(200, 40)
    for label in ("old_gate", "crow", "mill"):
        (root / label).mkdir()
        # The content decides the split.
        while label.replace("_", " ") not in Recordings.load(root).labels(scenes.SPLITS):
            pitch = next(pitches)
            t = np.arange(8_000 * 2) / 8_000
            wave = np.concatenate([np.zeros(2_000), 0.5 * np.sin(2 * np.pi * pitch * t)])
            soundfile.write(root / label / f"{pitch}.wav", wave, 8_000)
    return root


def _pitch(wave: np.ndarray, rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(wave))) * rate / len(wave))


def test_no_recording_is_in_two_splits(folder):
    index = Recordings.load(folder)
    assert index.labels(["train", "test"]) == ["crow", "mill", "old gate"]
    used = [path for paths in index.files.values() for path in paths]
    assert len(used) == len(set(used)) == len(list(folder.glob("*/*.wav")))
    heard = {}
    for split in ("train", "validation", "test"):
        waves = (
            index.excerpt("crow", np.random.default_rng(seed), split, 0.5, 16_000)
            for seed in range(20)
        )
        heard[split] = {round(_pitch(wave, 16_000) / 10) for wave in waves}
    assert not heard["train"] & heard["test"]
    assert not heard["train"] & heard["validation"]


def test_a_file_keeps_its_split_whatever_is_added_or_renamed(folder, tmp_path):
    root = tmp_path / "recordings"
    shutil.copytree(folder, root)
    before = {entry.digest: entry.split for entry in Recordings.load(root).entries}
    assert set(before.values()) == {"train", "validation", "test"}
    for number in range(5):
        soundfile.write(root / "crow" / f"-{number}.wav", np.full(99, 0.15 * number), 8_000)
    min((root / "crow").iterdir()).rename(root / "mill" / "a.wav")
    shutil.copy(max((root / "mill").iterdir()), root / "old_gate" / "a copy.wav")
    after = [(entry.digest, entry.split) for entry in Recordings.load(root).entries]
    assert len(after) == len(before) + 6
    assert all(before[digest] == split for digest, split in after if digest in before)
    assert {digest for digest, _ in after} > set(before)


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
    assert (tmp_path / scenes.SKIPPED_RECORDINGS).read_text() == ""
    read = scenes.read_scenes(tmp_path, "train")
    assert {scene.source for scene in read} == {"recorded"}
    assert {event.label for scene in read for event in scene.events} <= set(config.classes)


def test_a_class_without_recordings_is_named(folder, tmp_path):
    config = scenes.SceneConfig(
        classes=("crow", "mill", "horse", "cough"), recordings_root=str(folder), num_events=(2, 3)
    )
    with pytest.raises(ValueError, match=r"under .*: 'horse' \(train 0, test 0, validation 0\)"):
        scenes.write_scenes(config, tmp_path, num_processes=1)
    assert not (tmp_path / "scenes.json").exists()
    with pytest.raises(ValueError, match=r"recorded_packages"):
        Recordings.load(tmp_path / "none")


def _config(root: Path, **fields) -> scenes.SceneConfig:
    """Short scenes of two recorded classes and a synthetic one."""
    return scenes.SceneConfig(
        **{"counts": {"train": 3, "test": 2}} | fields,
        classes=("crow", "mill", "low beep"),
        recordings_root=str(root),
        num_events=(2, 3),
    )


def _copied(folder: Path, tmp_path: Path) -> scenes.SceneConfig:
    shutil.copytree(folder, tmp_path / "recordings")
    return _config(tmp_path / "recordings")


def test_a_build_does_not_go_on_with_other_recordings(folder, tmp_path):
    config, out = _copied(folder, tmp_path), tmp_path / "out"
    scenes.write_scenes(config, out, num_processes=1)
    more = dataclasses.replace(config, counts={"train": 4, "test": 2})
    soundfile.write(tmp_path / "recordings" / "old_gate" / "x.wav", np.full(99, 0.1), 8_000)
    # Of a class that is not in use.
    assert scenes.write_scenes(more, out, num_processes=1) == {"written": 1, "kept": 5}
    soundfile.write(tmp_path / "recordings" / "crow" / "x.wav", np.full(99, 0.1), 8_000)
    with pytest.raises(ValueError, match=r"scenes\.json was made with other recordings"):
        scenes.write_scenes(more, out, num_processes=1)


def test_bad_recordings_are_named_and_left_out(folder, tmp_path):
    config, out = _copied(folder, tmp_path), tmp_path / "out"
    crows = tmp_path / "recordings" / "crow"
    soundfile.write(crows / "silent.wav", np.zeros(8_000), 8_000)
    soundfile.write(crows / "empty.wav", np.zeros(0), 8_000)
    (crows / "torn.wav").write_bytes(b"RIFF but not really")
    (crows / "gone.wav").symlink_to(crows / "nowhere")
    scenes.write_scenes(config, out, num_processes=1, max_bad_fraction=0.5)
    rows = map(json.loads, (out / scenes.SKIPPED_RECORDINGS).read_text().splitlines())
    assert {row["audio_path"]: row["reason"] for row in rows} == {
        str(crows / "silent.wav"): "silent",
        str(crows / "empty.wav"): "empty",
        str(crows / "torn.wav"): "unreadable",
        str(crows / "gone.wav"): "missing",
    }
    message = r"4 of \d+ recordings cannot be used.* max_bad_fraction=0\.01 .*crow/.*\.wav: "
    with pytest.raises(ValueError, match=message):
        scenes.write_scenes(config, tmp_path / "again", num_processes=1, max_bad_fraction=0.01)


def test_recordings_are_rendered_alike_by_several_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "RENDER_CHUNK", 2)
    config = _config(folder, counts={"train": 4})
    for name, processes in (("one", 1), ("two", 2)):
        scenes.write_scenes(config, tmp_path / name, num_processes=processes)
    files = sorted(path for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 4 + 5
    for path in files:
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == (
            path.read_bytes()
        )


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
