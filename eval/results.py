"""From responses to scored samples, and from samples to the figures of a run.

A *response* is what a run of a model left (see `eval.responses`): it holds no judgement. A *sample*
is a response beside its question with every judgement made, as one flat JSON object; reports and
tables are made of samples alone.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data.records import EaqaRecord
from eval import grounding, responses, scoring

Sample = dict[str, Any]


def make_sample(record: EaqaRecord, response: Mapping[str, Any]) -> Sample:
    """Scores one response.

    Args:
        record: its question.
        response: `id`, `text`, `segments` (each with `start_s`, `end_s`, `begin`, `end`, `valid`,
            `reason`), `num_tokens`, `num_audio_tokens`, `finish_reason`, `inserted` (each
            `[start_s, end_s]`, as the recording was cut).

    Raises:
        ValueError: if the response belongs to another question, or the answer is not among the
            choices.
    """
    if response["id"] != record.id:
        raise ValueError(
            f"the response of {response['id']!r} was paired with the question {record.id!r}"
        )
    result = scoring.score(response["text"], record.answer, record.choices)
    measured = grounding.measure(
        playable_spans(response["segments"], record.duration_s), record.evidence
    )
    return {
        "id": record.id,
        "audio_path": record.audio_path,
        "duration_s": record.duration_s,
        "kind": record.kind,
        "difficulty": record.difficulty,
        "question": record.question,
        "choices": list(record.choices),
        "answer": record.answer,
        "evidence": [list(span) for span in record.evidence],
        "events": [
            {"start_s": event.start_s, "end_s": event.end_s, "label": event.label}
            for event in record.events
        ],
        **{name: response[name] for name in responses.FIELDS if name != "id"},
        "answer_text": result.answer_text,
        "choice": result.match.choice,
        "how": result.match.how,
        "correct": result.correct,
        "strict": result.strict,
        "why": scoring.explain(result, record.answer),
        "num_segments": measured.num_segments,
        "total_s": measured.total_s,
        "union_s": measured.union_s,
        "iou": measured.iou,
        "coverage": measured.coverage,
    }


def playable_spans(
    segments: Sequence[Mapping[str, Any]], duration_s: float
) -> list[grounding.Span]:
    """Returns the time spans of the valid citations, cut at the end of the recording."""
    return [
        (segment["start_s"], min(segment["end_s"], duration_s))
        for segment in segments
        if segment["valid"]
    ]


def summarize(samples: Sequence[Sample], skipped: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Returns the figures of one run.

    Nothing leaves a denominator: an unparsed answer is wrong, and so is a question that could not
    be asked because its audio is broken. `accuracy_answered` leaves the latter out and says so by
    its name.

    Args:
        samples: one for each answered question.
        skipped: questions that were not asked: `id`, `audio_path`, `reason`.
    """
    total = len(samples) + len(skipped)
    measured = [
        grounding.Grounding(s["num_segments"], s["total_s"], s["union_s"], s["iou"], s["coverage"])
        for s in samples
    ]
    kinds = sorted({sample["kind"] for sample in samples})
    return {
        **_accuracy(samples, total),
        "accuracy_strict": _share(samples, "strict", total),
        "accuracy_answered": _share(samples, "correct", len(samples)),
        "parse_rate": sum(s["how"] in scoring.PARSED for s in samples) / total if total else None,
        "parsed_by": dict(sorted(Counter(s["how"] for s in samples).items())),
        "num_answered": len(samples),
        "num_skipped": len(skipped),
        "skipped": [dict(skip) for skip in skipped],
        "skipped_by_reason": dict(sorted(Counter(s["reason"] for s in skipped).items())),
        "per_kind": {
            kind or "unnamed": _accuracy(
                of_kind := [s for s in samples if s["kind"] == kind], len(of_kind)
            )
            for kind in kinds
        },
        "mean_num_tokens": _mean(samples, "num_tokens"),
        "mean_num_audio_tokens": _mean(samples, "num_audio_tokens"),
        "mean_insertions": sum(len(s["inserted"]) for s in samples) / len(samples)
        if samples
        else None,
        "finish_reasons": dict(sorted(Counter(s["finish_reason"] for s in samples).items())),
        "grounding": grounding.summarize(measured),
    }


def paired(first: Sequence[Sample], second: Sequence[Sample]) -> scoring.PairedTest:
    """Compares two runs on the questions that both answered.

    Raises:
        ValueError: if they have no question in common.
    """
    right = {sample["id"]: sample["correct"] for sample in second}
    shared = [sample for sample in first if sample["id"] in right]
    if not shared:
        raise ValueError("the two runs have no question in common")
    return scoring.mcnemar([s["correct"] for s in shared], [right[s["id"]] for s in shared])


def _accuracy(samples: Sequence[Sample], total: int) -> dict[str, Any]:
    correct = sum(sample["correct"] for sample in samples)
    low, high = scoring.wilson_interval(correct, total)
    return {
        "num_questions": total,
        "num_correct": correct,
        "accuracy": correct / total if total else None,
        "interval": [low, high],
        # Of a binomial proportion: what harnesses print beside the metric.
        "standard_error": math.sqrt(correct * (total - correct) / total**3) if total else None,
    }


def _share(samples: Sequence[Sample], name: str, total: int) -> float | None:
    return sum(sample[name] for sample in samples) / total if total else None


def _mean(samples: Sequence[Sample], name: str) -> float | None:
    return sum(sample[name] for sample in samples) / len(samples) if samples else None
