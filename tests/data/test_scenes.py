from __future__ import annotations

import csv
import dataclasses
import itertools
import re

import numpy as np
import pytest
import soundfile

from data import audio_files, scenes
from tests.data.conftest import CONFIG


def test_labels_read_back_are_the_plans(root):
    for split, count in CONFIG.counts.items():
        planned = [scenes.plan_scene(CONFIG, split, i).scene for i in range(count)]
        assert scenes.read_scenes(root, split) == planned


def test_the_label_file_has_the_layout_of_audioset_strong(root):
    with (root / "audioset_train_strong.tsv").open() as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0] == ["segment_id", "start_time_seconds", "end_time_seconds", "label"]
    with (root / "mid_to_display_name.tsv").open() as file:
        names = dict(csv.reader(file, delimiter="\t"))
    assert {row[3] for row in rows[1:]} <= set(names)


def test_plans_keep_the_config():
    config = scenes.SceneConfig(
        duration_s=(10.0, 14.0), num_events=(3, 6), min_gap_s=0.3, repeat_probability=0.3
    )
    for index in range(200):
        plan = scenes.plan_scene(config, "train", index)
        events = plan.scene.events
        assert 10 <= plan.scene.duration_s <= 14
        assert 3 <= len(events) <= 6
        assert events[-1].end_s <= plan.scene.duration_s
        for one, two in itertools.pairwise(events):
            assert two.start_s - one.end_s >= 0.3 - 1e-9
            assert one.label != two.label
        for event in events:
            assert event.start_s == round(event.start_s, 1)


def test_overlaps_are_made_and_only_one_a_scene():
    config = scenes.SceneConfig(overlap_probability=1.0)
    found = 0
    for index in range(100):
        events = scenes.plan_scene(config, "train", index).scene.events
        overlaps = [b.start_s < a.end_s for a, b in itertools.pairwise(events)]
        assert sum(overlaps) <= 1
        for a, b in itertools.pairwise(events):
            assert a.start_s < b.start_s
            assert a.end_s < b.end_s
        found += sum(overlaps)
    assert found > 80


def test_files_are_what_the_plan_says(root):
    seen = set()
    for index in range(CONFIG.counts["train"]):
        plan = scenes.plan_scene(CONFIG, "train", index)
        info = soundfile.info(root / plan.scene.audio_path)
        assert (info.samplerate, info.channels) == (plan.sampling_rate, plan.channels)
        wave = audio_files.read_audio(root / plan.scene.audio_path)
        assert abs(len(wave) / 16_000 - plan.scene.duration_s) < 0.001
        seen |= {info.samplerate, info.channels, info.format}
    assert len(seen) > 4


def test_an_event_is_louder_than_the_background(root):
    scene = scenes.read_scenes(root, "test")[0]
    wave = audio_files.read_audio(root / scene.audio_path)
    inside = np.zeros(len(wave), bool)
    for event in scene.events:
        inside[round(event.start_s * 16_000) : round(event.end_s * 16_000)] = True
    assert np.std(wave[inside]) > 2 * np.std(wave[~inside])


def test_writing_again_keeps_files_and_makes_only_what_is_missing(tmp_path):
    config = dataclasses.replace(CONFIG, counts={"train": 3})
    scenes.write_scenes(config, tmp_path, num_processes=1)
    victim = tmp_path / scenes.plan_scene(config, "train", 1).scene.audio_path
    before = victim.read_bytes()
    victim.unlink()
    assert scenes.write_scenes(config, tmp_path, num_processes=1) == {"written": 1, "kept": 2}
    assert victim.read_bytes() == before
    with pytest.raises(ValueError, match=r"another config \(scenes\.seed differs\)"):
        scenes.write_scenes(dataclasses.replace(config, seed=9), tmp_path, num_processes=1)
    for torn in ("{", "[]", ""):
        (tmp_path / "scenes.json").write_text(torn)
        with pytest.raises(ValueError, match=r"scenes\.json is damaged.*restore it, or give"):
            scenes.write_scenes(config, tmp_path, num_processes=1)


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match=r"scenes\.durations_s is not a field"):
        scenes.SceneConfig.from_mapping({"durations_s": (1, 2)})
    with pytest.raises(ValueError, match="'moo' is not in the sound library"):
        scenes.SceneConfig(classes=("moo",))
    with pytest.raises(ValueError, match="duration_s starts at 3 s"):
        scenes.SceneConfig(duration_s=(3.0, 4.0))
    with pytest.raises(ValueError, match="allow repeats"):
        scenes.SceneConfig(classes=("low beep", "cough"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", -1, "must be a whole number, at least 0"),
        ("duration_s", (12.0,), "=(12.0,) must be two numbers, (lowest, highest)"),
        ("duration_s", 12.0, "must be two numbers"),
        ("duration_s", (14.0, 12.0), "must begin with the lower of its two numbers"),
        ("duration_s", (float("nan"), 12.0), "each number must be a finite number, at least 0"),
        ("duration_s", (12.04, 12.04), "times are multiples of 0.1 s, got 12.04"),
        ("event_s", (0.9, 0.5), "must begin with the lower"),
        ("event_s", (0.1, 0.5), "each number must be a finite number, at least 0.2"),
        ("num_events", (4, 3), "must begin with the lower"),
        ("num_events", (2.5, 3.0), "each number must be a whole number, at least 1"),
        ("event_db", (-18.0, -28.0), "must begin with the lower"),
        ("snr_db", (25.0, 10.0), "must begin with the lower"),
        ("snr_db", ("10", "25"), "each number must be a finite number"),
        ("min_gap_s", -1.0, "must be a finite number, at least 0"),
        ("overlap_probability", 2.0, "must be a finite number in [0, 1]"),
        ("repeat_probability", -0.1, "must be a finite number in [0, 1]"),
        ("sampling_rates", (), "=() must name one or more rates in Hz"),
        (
            "sampling_rates",
            (8_000,),
            "each=8000 must be a whole number in [16000, 192000]",
        ),
        ("file_formats", ("ogg",), "'ogg' is unknown; use one or more of ['wav', 'flac']"),
        ("channels", (), "must name one or more of [1, 2]"),
        ("noise_kinds", ("blue",), "'blue' is unknown"),
        ("classes", ("cough", "horn", "cough"), "'cough' is there twice; name each class once"),
        ("classes", ("cough",), "name two or more"),
        ("counts", {"train": -1}, ".train=-1 must be a whole number, at least 0"),
        ("counts", {"dev": 1}, ".dev is not a split"),
    ],
)
def test_a_bad_value_is_refused_with_its_field(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        scenes.SceneConfig(**{field: value})
    assert str(caught.value).startswith(f"scenes.{field}")


def test_no_scenes_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"scenes\.counts asks for no scene"):
        scenes.write_scenes(dataclasses.replace(CONFIG, counts={"train": 0}), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_broken_label_row_is_named(root, tmp_path):
    for path in root.glob("*.tsv"):
        (tmp_path / path.name).write_text(path.read_text())
    with (tmp_path / "audioset_test_strong.tsv").open("a") as file:
        file.write("test_000000\tx\t1.0\t/s/cough\n")
    with pytest.raises(ValueError, match=r"audioset_test_strong\.tsv:\d+: bad time"):
        scenes.read_scenes(tmp_path, "test")
