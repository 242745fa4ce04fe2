"""Rewards of sampled answers: pure functions of one answer, registered by name.

The formulas are those of the paper and of its released training code (ids ``base``, ``1``, ``2``,
``3``, ``6``, ``10``, ``11`` and ``12``; ``paper`` is an alias of ``3``). Every reward is the sum of
named parts, so that each part can be logged:

* ``format``: 0.5 for exactly one ``<think>…</think>`` followed by exactly one
  ``<answer>…</answer>``;
* ``accuracy``: 0.5 or 0, or a function of the probability ``c`` the policy gave to its own answer;
  0 when the format fails;
* ``segment``: paid only on top of a positive accuracy, for having cited audio;
* ``consistency``: -0.1 for each ``</seg>`` after which the model starts anew (upper-case letter or
  ``<``), at least -0.5;
* ``spread``: 0.5 x (union of cited time / sum of cited time).

A citation is paid only when its audio can be inserted: readable times, in order, inside the clip,
at least 0.2 s long, and, where the rollout says how many clips it inserted, inserted indeed. The
released code pays any text that looks like a citation; ``RewardOptions(pay_uninsertable=True)`` and
``RewardOptions(ordered_tags=False)`` reproduce that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from echo_jax.text import segments

THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")
PARTS = ("format", "accuracy", "segment", "consistency", "spread")


@dataclasses.dataclass(frozen=True)
class Response:
    """One sampled answer as the rewards see it.

    Attributes:
        text: the decoded response without control tokens and without inserted audio.
        truth: the text of the right choice.
        num_samples: length of the clip at 16 kHz; bounds the times that can be cited.
        probability: ``c`` of the ids 6, 10, 11 and 12, see `answer_probability`; None where it is
            not known.
        num_inserted: how many clips the rollout inserted; None for a format that inserts nothing.
    """

    text: str
    truth: str
    num_samples: int
    probability: float | None = None
    num_inserted: int | None = None


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """Choices beyond the reward's id.

    Attributes:
        pay_uninsertable: count every citation, insertable or not (the released behaviour;
            gameable).
        ordered_tags: demand that `</think>` precedes `<answer>` and that no tag is left over; False
            counts pairs only, as released.
    """

    pay_uninsertable: bool = False
    ordered_tags: bool = True


RewardFunction = Callable[[Response, RewardOptions], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class RewardRule:
    """One row of the released table of variants.

    Attributes:
        accuracy: ``binary``, ``confidence`` (right 0.5(1-(c-1)^2), wrong -0.5c^2) or ``signed``
            (+-0.5c).
        segments_for_full: None for no segment part, else how many citations earn it whole: accuracy
            x min(n, N) / N.
        consistency: whether the consistency part is paid.
        spread: whether the spread part is paid.
    """

    accuracy: str = "binary"
    segments_for_full: int | None = None
    consistency: bool = False
    spread: bool = False

    @property
    def needs_probability(self) -> bool:
        """Whether the rule reads ``Response.probability``."""
        return self.accuracy != "binary"


RULES: dict[str, RewardRule] = {
    "base": RewardRule(),
    "1": RewardRule(consistency=True),
    "2": RewardRule(segments_for_full=1),
    "3": RewardRule(segments_for_full=1, consistency=True),
    "6": RewardRule("confidence", segments_for_full=1, consistency=True),
    "10": RewardRule("signed"),
    "11": RewardRule("confidence", segments_for_full=2, consistency=True, spread=True),
    "12": RewardRule("confidence", segments_for_full=3, consistency=True, spread=True),
}
RULES["paper"] = RULES["3"]


def single_span(text: str, tags: tuple[str, str], start: int = 0) -> tuple[int, int] | None:
    """The inside of the only ``open…close`` pair of ``text`` at or after ``start``; None when there
    is no pair, or a second tag.

    Linear in the length of the text, whatever it holds.
    """
    opening, closing = tags
    begin = text.find(opening, start)
    if begin < 0:
        return None
    inside = begin + len(opening)
    end = text.find(closing, inside)
    if end < 0 or text.count(opening) != 1 or text.count(closing) != 1:
        return None
    return inside, end


def pairs(text: str, tags: tuple[str, str]) -> list[tuple[int, int]]:
    """Insides of the non-overlapping ``open…close`` pairs, as a non-greedy regular expression finds
    them (the released rule)."""
    opening, closing = tags
    found: list[tuple[int, int]] = []
    cursor = 0
    while True:
        begin = text.find(opening, cursor)
        end = text.find(closing, begin + len(opening)) if begin >= 0 else -1
        if end < 0:
            return found
        found.append((begin + len(opening), end))
        cursor = end + len(closing)


def final_answer(text: str, options: RewardOptions = RewardOptions()) -> str | None:
    """The stripped answer when the format is right, else None (paper, appendix on rewards;
    R_format)."""
    if not options.ordered_tags:
        thinks, answers = pairs(text, THINK), pairs(text, ANSWER)
        if len(thinks) != 1 or len(answers) != 1:
            return None
        return text[slice(*answers[0])].strip()
    think = single_span(text, THINK)
    answer = single_span(text, ANSWER, think[1]) if think else None
    return text[slice(*answer)].strip() if answer else None


def _times(citations: Sequence[segments.Citation]) -> list[tuple[float, float]]:
    """Those that are two numbers."""
    return [
        (c.start_s, c.end_s) for c in citations if c.start_s is not None and c.end_s is not None
    ]


def cited_spans(
    response: Response, options: RewardOptions = RewardOptions()
) -> list[tuple[float, float]]:
    """The (start_s, end_s) that are paid for, in the order of the text, ends clamped to the clip.

    By default those that were, or could be, inserted; a span cited twice counts once. With
    ``pay_uninsertable`` every pair of numbers counts, as often as it stands there; reversed times
    then last 0 s rather than less than nothing.
    """
    data = response.text.encode("utf-8", errors="replace")
    citations = segments.parse_bytes(data, response.num_samples)
    if options.pay_uninsertable:
        return [(start, max(start, end)) for start, end in _times(citations)]
    valid = _times([c for c in citations if c.valid])
    if response.num_inserted is not None:
        valid = valid[: response.num_inserted]
    duration_s = response.num_samples / segments.SAMPLE_RATE
    return list(dict.fromkeys((start, min(end, duration_s)) for start, end in valid))


def span_statistics(spans: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Count, total, mean and union duration in seconds, and overlap = 1 - union / total (0 without
    any cited time)."""
    total = sum(end - start for start, end in spans)
    union, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        union += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {
        "segments": float(len(spans)),
        "total_s": total,
        "mean_s": total / len(spans) if spans else 0.0,
        "union_s": union,
        "overlap": 1.0 - union / total if total > 0 else 0.0,
    }


def fresh_starts(text: str) -> int:
    """How many ``</seg>`` are followed by an upper-case letter or ``<`` (R_consist counts them);
    the end of the text is neither."""
    count, cursor = 0, text.find("</seg>")
    while cursor >= 0:
        follower = text[cursor + len("</seg>") : cursor + len("</seg>") + 1]
        count += follower == "<" or follower.isupper()
        cursor = text.find("</seg>", cursor + 1)
    return count


def _accuracy(rule: RewardRule, right: bool, probability: float | None) -> float:
    if not rule.needs_probability:
        return 0.5 if right else 0.0
    if probability is None:
        raise ValueError(
            f"reward with {rule.accuracy} accuracy needs Response.probability; pass answer_probability(...)"
        )
    if rule.accuracy == "signed":
        return 0.5 * probability if right else -0.5 * probability
    return 0.5 * (1.0 - (probability - 1.0) ** 2) if right else -0.5 * probability**2


def score(rule: RewardRule, response: Response, options: RewardOptions) -> dict[str, float]:
    """All parts of one rule for one answer, their ``total``, ``correct`` and the statistics of the
    cited spans.

    Never raises for what the model wrote, whatever it wrote.

    Raises:
        ValueError: the rule needs ``response.probability`` and the answer is well-formed, but there
        is none.
    """
    answer = final_answer(response.text, options)
    right = answer is not None and answer == response.truth.strip()
    spans = cited_spans(response, options)
    statistics = span_statistics(spans)
    parts = dict.fromkeys(PARTS, 0.0)
    if answer is not None:
        parts["format"] = 0.5
        parts["accuracy"] = _accuracy(rule, right, response.probability)
    if rule.segments_for_full and parts["accuracy"] > 0:
        share = min(len(spans), rule.segments_for_full) / rule.segments_for_full
        parts["segment"] = parts["accuracy"] * share
    if rule.consistency:
        parts["consistency"] = -0.1 * min(fresh_starts(response.text), 5)
    if rule.spread and statistics["total_s"] > 0:
        parts["spread"] = 0.5 * statistics["union_s"] / statistics["total_s"]
    return {"total": sum(parts.values()), **parts, "correct": float(right), **statistics}


REWARDS: dict[str, RewardFunction] = {
    name: functools.partial(score, rule) for name, rule in RULES.items()
}


def get_reward(name: str) -> RewardFunction:
    """The reward registered under ``name``.

    Raises:
        ValueError: no reward has that name; the message lists those there are.
    """
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; known rewards: {', '.join(sorted(REWARDS))}")
    return REWARDS[name]


def needs_probability(name: str) -> bool:
    """Whether a registered reward reads ``Response.probability``; rewards that were added from
    outside are assumed to."""
    return RULES[name].needs_probability if name in RULES else True


def answer_probability(
    tokens: Sequence[int], logprobs: Sequence[float], token_bytes: Sequence[bytes], truth: str
) -> float:
    """``c``: the probability the rollout policy gave to the token that decides the answer.

    That is the first token after ``<answer>`` when the answer is right, else the first token whose
    bytes leave the right answer (released code, `find_answer_pattern_flexible`). Works on bytes:
    however the model spelled the tag, no text is tokenized again.

    Args:
        tokens: response ids (inserted audio and control tokens have no bytes and are passed over).
        logprobs: log-probability of each under the sampling distribution.
        token_bytes: bytes of every id of the vocabulary.
        truth: the right answer.

    Returns:
        A probability; 0.0 when there is no ``<answer>`` or nothing after it.
    """
    pieces = [token_bytes[token] for token in tokens]
    text = b"".join(pieces)
    begin = text.find(b"<answer>")
    if begin < 0:
        return 0.0
    begin += len(b"<answer>")
    end = text.find(b"</answer>", begin)
    expected = truth.strip().encode()
    given = text[begin:] if end < 0 else text[begin:end]
    decisive = begin
    if given.strip() != expected:
        following = text[begin:]
        agreed = next(
            (i for i, byte in enumerate(expected) if following[i : i + 1] != bytes([byte])),
            len(expected),
        )
        decisive += agreed
    cursor = 0
    for piece, logprob in zip(pieces, logprobs, strict=True):
        cursor += len(piece)
        if cursor > decisive:
            return min(1.0, math.exp(logprob))
    return 0.0


def summarize(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every key over the answers of a step, the form in which rewards are logged."""
    if not scores:
        raise ValueError("summarize needs at least one score")
    return {key: sum(s[key] for s in scores) / len(scores) for key in scores[0]}
