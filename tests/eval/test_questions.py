import json

import pytest

from data import eaqa_builder, scenes
from data.questions import QuestionConfig
from eval import questions
from tests.eval.examples import make_record, released_row


def write(path, records):
    path.write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    return path


def test_a_file_of_records(data):
    found = questions.load(data, "test")
    assert len(found.records) == 11
    assert found.audio_root == data.parent
    assert (found.audio_root / found.records[0].audio_path).is_file()
    assert questions.load(data, "all").sha256 == found.sha256


def test_another_answer_or_another_recording_is_another_hash(data):
    before = questions.load(data, "test").sha256
    text = data.read_text()
    data.write_text(text.replace('"answer": "a bell"', '"answer": "rain"', 1))
    assert questions.load(data, "test").sha256 != before
    data.write_text(text)
    assert questions.load(data, "test").sha256 == before
    (data.parent / "audio" / "3.wav").write_bytes(b"")
    assert questions.load(data, "test").sha256 != before


def test_a_limit_takes_a_part_of_a_larger_one(data):
    found = questions.load(data, "test")
    small, large = found.limited(3), found.limited(7)
    assert len(small.records) == 3
    assert {r.id for r in small.records} < {r.id for r in large.records}
    assert small.sha256 == found.sha256
    assert found.limited(0).records == found.records
    with pytest.raises(ValueError, match="must not be negative"):
        found.limited(-1)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([make_record(1), make_record(1)], "'q1' occurs twice"),
        ([make_record(1, answer="a cat")], "the answer 'a cat' is not among its choices"),
        ([make_record(1, choices=("x", "x"), answer="x")], "'q1' has one choice only"),
    ],
)
def test_questions_that_cannot_be_scored(tmp_path, records, message):
    with pytest.raises(ValueError, match=message):
        questions.load(write(tmp_path / "q.jsonl", records), "test")


def test_missing_things_are_named(tmp_path, data):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        questions.load(tmp_path / "nowhere", "test")
    with pytest.raises(ValueError, match=r"no question of split 'dev'; splits there: test"):
        questions.load(data, "dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no questions"):
        questions.load(tmp_path / "empty", "test")
    (tmp_path / "bad.jsonl").write_text('{"cot": ""}\n')
    with pytest.raises(ValueError, match="lacks the field"):
        questions.load(tmp_path / "bad.jsonl", "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evidence": [[3, 1]]},
            r"record 'q1': field 'evidence' is wrong: \(3, 1\) is not a time span",
        ),
        ({"evidence": [[float("nan"), 1]]}, "'evidence' is wrong"),
        ({"duration_s": float("inf")}, "'duration_s' is wrong: inf is not a length"),
        ({"duration_s": 0}, "'duration_s' is wrong: 0 is not a length"),
        ({"events": [{"start_s": 2, "end_s": 1, "label": "x"}]}, "'events' is wrong"),
    ],
)
def test_times_that_make_no_sense_are_named_before_anything_is_asked(tmp_path, changes, message):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({**make_record(1).to_json(), **changes}) + "\n")
    with pytest.raises(ValueError, match=rf"q\.jsonl:1: .*{message}"):
        questions.load(path, "test")


def test_a_file_in_the_released_format(data):
    rows = [released_row(number) for number in (1, 2, 99)]
    path = data.parent / "rl.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = questions.load(path, "test")
    assert [record.id for record in found.records] == ["r1", "r2"]
    assert found.records[0].duration_s == pytest.approx(2.25)
    (unaskable,) = found.unaskable
    assert (unaskable["id"], unaskable["audio_path"]) == ("r99", "audio/99.wav")
    assert f"{path}:3: audio file audio/99.wav" in unaskable["reason"]
    # It is a question like the others: a limit may take it, and another set of them is another hash.
    one = [found.limited(1), found.limited(2)]
    assert [len(part.records) + len(part.unaskable) for part in one] == [1, 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert questions.load(path, "test").sha256 != found.sha256


def test_a_folder_that_data_build_wrote(tmp_path):
    config = scenes.SceneConfig(
        counts={"train": 2, "test": 3}, duration_s=(6.0, 8.0), event_s=(0.5, 0.8), num_events=(3, 4)
    )
    scenes.write_scenes(config, tmp_path, num_processes=1)
    made = eaqa_builder.builder(tmp_path, QuestionConfig(style="short"))
    counts = eaqa_builder.build_records(made)
    found = questions.load(tmp_path, "test")
    assert len(found.records) == counts["test"]
    assert found.audio_root == tmp_path
    assert all((tmp_path / record.audio_path).is_file() for record in found.records)
    assert questions.load(tmp_path / "tfds", "test").sha256 == found.sha256
    with pytest.raises(ValueError, match="no split 'dev'"):
        questions.load(tmp_path, "dev")
