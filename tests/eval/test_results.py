import pytest

from data.records import EaqaRecord, Event
from eval import results


def record(number, kind="order"):
    return EaqaRecord(
        id=f"q{number}",
        audio_path=f"audio/{number}.wav",
        duration_s=4.0,
        question="Which sound comes first?",
        choices=("a bell", "a dog", "rain", "a horn"),
        answer="a bell",
        cot="",
        kind=kind,
        events=(Event(0.5, 1.5, "a bell"),),
        evidence=((0.5, 1.5),),
        difficulty=1,
        split="test",
        source="synthetic",
    )


def response(number, text, segments=()):
    return {
        "id": f"q{number}",
        "text": text,
        "segments": list(segments),
        "inserted": [[s["start_s"], s["end_s"]] for s in segments if s["valid"]],
        "num_tokens": 10,
        "num_audio_tokens": 4,
        "finish_reason": "end",
    }


def segment(start_s, end_s, valid=True):
    return {"start_s": start_s, "end_s": end_s, "begin": 0, "end": 0, "valid": valid, "reason": ""}


def test_a_sample_holds_question_answer_and_judgement():
    sample = results.make_sample(
        record(1),
        response(1, "<answer>a bell</answer>", [segment(0.5, 1.5), segment(3.0, 1.0, False)]),
    )
    assert sample["correct"]
    assert sample["choice"] == "a bell"
    assert sample["num_segments"] == 1
    assert sample["iou"] == pytest.approx(1.0)


def test_a_citation_ends_with_the_recording():
    sample = results.make_sample(record(1), response(1, "", [segment(3.0, 9.0)]))
    assert sample["total_s"] == pytest.approx(1.0)


def test_a_response_of_another_question_is_refused():
    with pytest.raises(ValueError, match="'q2' was paired with the question 'q1'"):
        results.make_sample(record(1), response(2, ""))


def test_unparsed_and_unasked_count_as_wrong():
    samples = [
        results.make_sample(record(1), response(1, "<answer>a bell</answer>", [segment(0.5, 1.5)])),
        results.make_sample(record(2, "count"), response(2, "a bell")),
    ]
    skipped = [{"id": "q3", "audio_path": "audio/3.wav", "reason": "empty"}]
    found = results.summarize(samples, skipped)
    assert found["num_questions"] == 3
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["accuracy_answered"] == pytest.approx(1 / 2)
    assert found["parse_rate"] == pytest.approx(1 / 3)
    assert found["interval"][0] < 1 / 3 < found["interval"][1]
    assert found["standard_error"] == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5)
    assert found["parsed_by"] == {"exact": 1, "no_answer": 1}
    assert found["skipped_by_reason"] == {"empty": 1}
    assert found["per_kind"]["count"]["accuracy"] == 0.0
    assert found["grounding"]["mean_iou"] == pytest.approx(0.5)
    assert results.summarize([], [])["accuracy"] is None


def test_paired_uses_the_shared_questions():
    right, wrong = "<answer>a bell</answer>", "<answer>rain</answer>"
    first = [results.make_sample(record(i), response(i, right)) for i in range(6)]
    second = [results.make_sample(record(i), response(i, wrong)) for i in range(2, 9)]
    test = results.paired(first, second)
    assert (test.only_first, test.only_second) == (4, 0)
    with pytest.raises(ValueError, match="no question in common"):
        results.paired(first[:2], second)
