from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from configs.scenes import get_config
from data import build, eaqa_builder
from data.drafts import QuestionConfig
from data.questions import make_questions
from data.scenes import read_scenes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    return folder, build.build(get_config("test"), folder)


def _made(folder) -> eaqa_builder.EaqaScenes:
    questions = QuestionConfig.from_mapping(get_config("test").questions)
    return eaqa_builder.builder(folder, questions)


def test_records_read_back_are_the_records_made(built):
    folder, result = built
    assert set(result["records"]) == {"train", "validation", "test"}
    made = _made(folder)
    assert made.info.file_format.value == "array_record"
    scenes = read_scenes(folder, "train")
    vocabulary = sorted({event.label for scene in scenes for event in scene.events})
    expected = list(make_questions(scenes, made.builder_config.questions, vocabulary))
    source = eaqa_builder.load_records(made, "train")
    assert list(source) == expected
    assert len(eaqa_builder.load_records(made, "train[:50%]")) == len(expected) // 2


def test_a_built_dataset_opens_by_its_directory(built):
    folder, result = built
    opened = tfds.builder_from_directory(str(result["directory"]))
    source = eaqa_builder.load_records(opened, "test")
    assert list(source) == list(eaqa_builder.load_records(_made(folder), "test"))


def test_tensorflow_is_not_needed(built):
    folder, _ = built
    code = (
        "import sys; from tests.data.test_build import _made; from data import eaqa_builder as e;"
        f"e.load_records(_made({str(folder)!r}), 'test')[0]; sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_building_again_keeps_everything(built):
    folder, first = built
    again = build.build(get_config("test"), folder)
    assert again["scenes"]["written"] == 0
    assert again["records"] == first["records"]


def test_a_killed_build_goes_on_to_the_same_files(built, tmp_path):
    folder, result = built
    # A file and a record set that were being written.
    name = read_scenes(folder, "train")[0].audio_path.removeprefix("audio/train/")
    torn = [tmp_path / "audio" / "train" / f".{name}.part", tmp_path / ".scenes.json.part"]
    torn.append(
        tmp_path
        / Path(result["directory"]).relative_to(folder).parent
        / "incomplete.X_1.0.0"
        / "a.json"
    )
    for path in torn:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
    again = build.build(get_config("test"), tmp_path)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == names
    for path in sorted(folder.glob("audio/*/*")) + sorted(folder.glob("*.tsv")):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()
    for split in again["records"]:
        one, two = (list(eaqa_builder.load_records(_made(f), split)) for f in (folder, tmp_path))
        assert one == two


def test_bad_files_are_reported_and_the_build_goes_on(tmp_path):
    config = get_config("test")
    build.build(config, tmp_path)
    victim = tmp_path / read_scenes(tmp_path, "test")[2].audio_path
    victim.write_bytes(victim.read_bytes()[:-2])
    config.questions.seed = 1  # other records, so the files are looked at again
    config.max_bad_fraction = 0.5
    result = build.build(config, tmp_path)
    assert result["skipped"] == 1
    (named,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert tmp_path / named["audio_path"] == victim
    assert named["reason"] == "truncated"
    made = eaqa_builder.builder(tmp_path, QuestionConfig.from_mapping(config.questions), 0.5)
    assert all("test_000002" not in r.id for r in eaqa_builder.load_records(made, "test"))
    config.questions.seed = 2
    config.max_bad_fraction = 0.1
    with pytest.raises(eaqa_builder.TooManySkipped, match=r"1 of 4 audio files.*test_000002"):
        build.build(config, tmp_path)


def test_records_of_another_longest_file_are_another_dataset(tmp_path):
    config = get_config("test")
    config.max_bad_fraction = 0.99
    whole = build.build(config, tmp_path)
    config.max_seconds = max(s.duration_s for s in read_scenes(tmp_path, "train")) - 0.01
    some = build.build(config, tmp_path)
    assert some["directory"] != whole["directory"]
    assert some["skipped"] > 0
    opened = tfds.builder_from_directory(str(some["directory"]))
    records = list(eaqa_builder.load_records(opened, "train"))
    assert 0 < len(records) < whole["records"]["train"]
    assert all(record.duration_s <= config.max_seconds for record in records)
    assert build.build(config, tmp_path)["directory"] == some["directory"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_bad_fraction", -1.0, "must be a finite number in [0, 1)"),
        ("max_bad_fraction", 1.0, "must be a finite number in [0, 1)"),
        ("num_processes", 0, "must be a whole number, at least 1"),
        ("max_seconds", 0.0, "must be a finite number, at least 0.1"),
    ],
)
def test_a_bad_value_is_refused_with_its_field(field, value, message, tmp_path):
    config = get_config("test")
    config[field] = value
    with pytest.raises(ValueError, match="^" + re.escape(f"{field}={value} {message}")):
        build.build(config, tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--config=configs/scenes.py:test", "--config.scenes.min_gap_s=9.0"], "scenes: 4 events"),
        (["--config=configs/scenes.py:test", "--config.scenes.sed=1"], "did you mean"),
        (["--config=configs/scenes.py:test", "--config.scenes.seed=abc"], "'abc'"),
        (["--config=configs/scenes.py:tset"], "did you mean test?"),
        (
            ["--config=configs/scenes.py:test", "--config.scenes.duration_s=6"],
            "scenes.duration_s=(6,) must be two numbers",
        ),
        (
            [
                "--config=configs/scenes.py:test",
                "--config.questions.num_choices=20",
                "--config.questions.min_choices=20",
                "--config.scenes.counts.train=1",
            ],
            "the scenes of split 'train' give no question; ask other config.questions.kinds",
        ),
        (["--config=configs/nope.py:test"], "there is no file 'configs/nope.py'"),
        (["--config=configs/scenes.py:test", "--root=README.md"], "README.md"),
        (["--config=configs/scenes.py:test", "--root="], "--root is empty"),
    ],
)
def test_the_command_answers_mistakes_in_one_line(given, message, tmp_path):
    command = [sys.executable, "-m", "data.build", f"--root={tmp_path}", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("data.build: ")
    assert message in lines[-1]
    assert "Traceback" not in done.stderr


def test_missing_records_say_what_to_do(tmp_path, built):
    with pytest.raises(ValueError, match=r"python -m data\.build"):
        eaqa_builder.builder(tmp_path, QuestionConfig())
    with pytest.raises(ValueError, match="no split 'dev'"):
        eaqa_builder.load_records(_made(built[0]), "dev")
