"""Did the model listen to the right place? Cited segments against the spans that hold the evidence.

Spans are (start_s, end_s) pairs in seconds. Only citations that can be played are handed in; an
answer without one has IoU 0 and stays in every mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Span = tuple[float, float]


@dataclass(frozen=True)
class Grounding:
    """The cited segments of one answer.

    Attributes:
        num_segments: valid citations.
        total_s: sum of their lengths.
        union_s: length of the time that at least one of them covers.
        iou: intersection over union of the cited time and the evidence; 0 without a valid citation,
            None where the question has no timed evidence.
        coverage: share of the evidence that the cited time covers; None like `iou`.
    """

    num_segments: int
    total_s: float
    union_s: float
    iou: float | None
    coverage: float | None

    @property
    def mean_length_s(self) -> float | None:
        """Mean length of the citations; None without any."""
        return self.total_s / self.num_segments if self.num_segments else None

    @property
    def overlap(self) -> float | None:
        """1 - union / total: 0 when no moment is heard twice (paper, reward statistics)."""
        return 1.0 - self.union_s / self.total_s if self.total_s > 0 else None


def union(spans: Sequence[Span]) -> list[Span]:
    """Returns disjoint spans in order that cover the same time.

    Raises:
        ValueError: if a span is not finite or ends before it starts.
    """
    for start_s, end_s in spans:
        if not (math.isfinite(start_s) and math.isfinite(end_s) and start_s <= end_s):
            raise ValueError(f"({start_s}, {end_s}) is not a time span")
    merged: list[Span] = []
    for start_s, end_s in sorted(spans):
        if merged and start_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end_s))
        else:
            merged.append((start_s, end_s))
    return merged


def length_s(spans: Sequence[Span]) -> float:
    """Returns the sum of the lengths, overlaps counted as often as they occur."""
    return math.fsum(end_s - start_s for start_s, end_s in spans)


def intersection_s(first: Sequence[Span], second: Sequence[Span]) -> float:
    """Returns for how long both sets of spans are active."""
    return math.fsum(
        max(0.0, min(a_end, b_end) - max(a_start, b_start))
        for a_start, a_end in union(first)
        for b_start, b_end in union(second)
    )


def measure(cited: Sequence[Span], evidence: Sequence[Span]) -> Grounding:
    """Measures the valid citations of one answer against the evidence of its question."""
    union_s = length_s(union(cited))
    iou: float | None = None
    coverage: float | None = None
    evidence_s = length_s(union(evidence))
    if evidence_s > 0:
        shared_s = intersection_s(cited, evidence)
        iou = shared_s / (union_s + evidence_s - shared_s)
        coverage = shared_s / evidence_s
    return Grounding(len(cited), length_s(cited), union_s, iou, coverage)


def summarize(answers: Sequence[Grounding]) -> dict[str, float | int | None]:
    """Averages over the answers of a run; a figure that no answer defines is None.

    Returns a dict with
        segments_per_answer: mean over all answers, those without a segment included;
        with_segment: share of answers with at least one;
        mean_length_s: mean over all segments;
        overlap: mean of 1 - union / total over the answers with a segment;
        num_with_evidence: answers whose question has timed evidence, the denominator of the next
            figures;
        mean_iou, coverage: means over them (0 where nothing valid was cited);
        recall_at_0.3 … recall_at_0.9: share of them whose IoU reaches the bound.
    """
    overlaps = [answer.overlap for answer in answers if answer.overlap is not None]
    ious = [answer.iou for answer in answers if answer.iou is not None]
    coverages = [answer.coverage for answer in answers if answer.coverage is not None]
    num_segments = sum(answer.num_segments for answer in answers)
    total_s = math.fsum(answer.total_s for answer in answers)
    return {
        "segments_per_answer": _ratio(num_segments, len(answers)),
        "with_segment": _ratio(sum(a.num_segments > 0 for a in answers), len(answers)),
        "mean_length_s": _ratio(total_s, num_segments),
        "overlap": _ratio(math.fsum(overlaps), len(overlaps)),
        "num_with_evidence": len(ious),
        "mean_iou": _ratio(math.fsum(ious), len(ious)),
        "coverage": _ratio(math.fsum(coverages), len(coverages)),
        **{
            f"recall_at_{bound}": _ratio(sum(iou >= bound for iou in ious), len(ious))
            for bound in (0.3, 0.5, 0.7, 0.9)
        },
    }


def _ratio(numerator: float, denominator: int) -> float | None:
    return numerator / denominator if denominator else None
