import numpy as np
import pytest

from eval import grounding


def test_one_segment():
    found = grounding.measure([(1.0, 3.0)], [(2.0, 4.0)])
    assert found.iou == pytest.approx(1 / 3)
    assert found.coverage == pytest.approx(0.5)
    assert found.overlap == pytest.approx(0.0)
    assert found.mean_length_s == pytest.approx(2.0)


def test_union_of_overlapping_segments():
    found = grounding.measure([(0.0, 2.0), (1.0, 3.0), (1.0, 3.0)], [(0.0, 3.0)])
    assert found.iou == pytest.approx(1.0)
    assert found.overlap == pytest.approx(1 - 3 / 6)
    assert found.num_segments == 3


def test_nothing_cited_is_zero_and_no_evidence_is_none():
    nothing = grounding.measure([], [(0.0, 1.0)])
    assert (nothing.iou, nothing.coverage) == (0.0, 0.0)
    assert nothing.overlap is None
    assert nothing.mean_length_s is None
    without = grounding.measure([(0.0, 1.0)], [])
    assert (without.iou, without.coverage) == (None, None)


def test_against_a_sampled_time_line():
    rng = np.random.default_rng(0)
    for _ in range(200):
        starts = rng.integers(0, 900, 8)
        spans = [
            (int(s) / 100, int(s + n) / 100)
            for s, n in zip(starts, rng.integers(1, 90, 8), strict=True)
        ]
        cited, evidence = spans[: rng.integers(0, 5)], spans[5:]
        line = np.zeros((2, 1000), bool)
        for row, some in enumerate((cited, evidence)):
            for start_s, end_s in some:
                line[row, round(start_s * 100) : round(end_s * 100)] = True
        found = grounding.measure(cited, evidence)
        assert found.iou == pytest.approx((line[0] & line[1]).sum() / (line[0] | line[1]).sum())
        assert found.coverage == pytest.approx((line[0] & line[1]).sum() / line[1].sum())
        assert found.union_s == pytest.approx(line[0].sum() / 100)


def test_summary_keeps_every_answer_in_the_denominator():
    summary = grounding.summarize(
        [
            grounding.measure([(0.0, 2.0), (0.0, 2.0)], [(0.0, 2.0)]),
            grounding.measure([], [(0.0, 2.0)]),
            grounding.measure([(0.0, 1.0)], []),
        ]
    )
    assert summary["segments_per_answer"] == pytest.approx(1.0)
    assert summary["with_segment"] == pytest.approx(2 / 3)
    assert summary["mean_length_s"] == pytest.approx(5 / 3)
    assert summary["overlap"] == pytest.approx((0.5 + 0.0) / 2)
    assert summary["num_with_evidence"] == 2
    assert summary["mean_iou"] == pytest.approx(0.5)
    assert summary["recall_at_0.5"] == pytest.approx(0.5)
    assert grounding.summarize([])["mean_iou"] is None


@pytest.mark.parametrize("span", [(2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_what_is_not_a_span_is_refused(span):
    with pytest.raises(ValueError, match="is not a time span"):
        grounding.union([span])
