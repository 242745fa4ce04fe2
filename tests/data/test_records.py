import json

import pytest

from data.records import EaqaRecord, Event, RecordError, read_records, write_jsonl

RECORD = EaqaRecord(
    id="a",
    audio_path="a.wav",
    duration_s=3.0,
    question="Which <seg>1, 2</seg> {x}?",
    choices=("{a}", "b\"'", "Flöte 笛"),
    answer="{a}",
    cot="",
    kind="order",
    events=(Event(0.0, 1.0, "bell"),),
    evidence=((0.0, 1.0),),
    difficulty=1,
    split="test",
    source="test",
)


def test_a_record_survives_json():
    assert EaqaRecord.from_json(json.loads(json.dumps(RECORD.to_json()))) == RECORD


def test_fields_that_a_later_version_adds_are_left_out():
    row = RECORD.to_json() | {"new": 1}
    row["events"][0]["db"] = -3.0
    assert EaqaRecord.from_json(row) == RECORD


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("choices", "ab"),
        ("choices", [1, 2]),
        ("question", None),
        ("duration_s", "long"),
        ("duration_s", [3]),
        ("events", [{"start_s": 0.0, "end_s": 1.0}]),
        ("events", 3),
        ("evidence", [1.0, 2.0]),
        ("evidence", None),
        ("difficulty", None),
    ],
)
def test_a_field_of_the_wrong_type_is_named(field, value):
    with pytest.raises(RecordError, match=f"record 'a': field '{field}' is wrong: "):
        EaqaRecord.from_json(RECORD.to_json() | {field: value})


def test_a_missing_field_is_named():
    row = RECORD.to_json()
    del row["cot"]
    with pytest.raises(RecordError, match="record 'a' lacks the field 'cot'"):
        EaqaRecord.from_json(row)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"id": "\xff"}', "not UTF-8"),
        (b'{"id": "b"}', "record 'b' lacks the field 'answer'"),
    ],
)
def test_a_broken_line_is_named(line, message, tmp_path):
    path = tmp_path / "records.jsonl"
    write_jsonl(path, [RECORD.to_json()])
    assert read_records(path) == [RECORD]
    path.write_bytes(path.read_bytes() + b"\n" + line)
    with pytest.raises(RecordError, match=rf"records\.jsonl:3: {message}"):
        read_records(path)
