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
* ``spread``: 0.5 x (union of cited time / sum of cited time), whatever the answer;
* ``overlong``: what DAPO takes off an answer that comes near its budget; 0 unless asked for.

A citation is paid only when its audio can be inserted: readable times, in order, inside the clip,
at least 0.2 s long, and, where the rollout says how many clips it inserted, inserted indeed. The
released code pays any text that looks like a citation; ``RewardOptions(pay_uninsertable=True)`` and
``RewardOptions(ordered_tags=False)`` reproduce that.

Every reward is linear in the length of the text, whatever the text holds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from echo_jax import ranges
from echo_jax.text import segments

THINK = ("<think>", "</think>")
ANSWER = ("<answer>", "</answer>")
PARTS = ("format", "accuracy", "segment", "consistency", "spread", "overlong")
# Fresh starts beyond these cost nothing more: R_consist is at least -0.5.
MOST_FRESH_STARTS = 5


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
        num_tokens: length of the response in tokens, inserted audio included.
    """

    text: str
    truth: str
    num_samples: int
    probability: float | None = None
    num_inserted: int | None = None
    num_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """Choices beyond the reward's id.

    Attributes:
        pay_uninsertable: count every citation, insertable or not (the released behaviour;
            gameable).
        ordered_tags: demand that `</think>` precedes `<answer>` and that no tag is left over; False
            counts pairs only, as released.
        overlong_buffer: over the last so many tokens of the budget the overlong part falls to
            -overlong_penalty; 0 turns it off.
        overlong_penalty: how much that is.
        max_response_tokens: the budget.

    Raises:
        ValueError: a number out of its range; the message names the field.
    """

    pay_uninsertable: bool = False
    ordered_tags: bool = True
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    max_response_tokens: int = 0

    def __post_init__(self) -> None:
        most = ranges.Range(least=0, most=self.max_response_tokens, whole=True)
        ranges.check("config.reward.overlong_buffer", self.overlong_buffer, most)
        ranges.check("config.reward.overlong_penalty", self.overlong_penalty, ranges.NOT_NEGATIVE)


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


def cited_spans(response: Response, options: RewardOptions = RewardOptions()) -> np.ndarray:
    """The spans that are paid for, i64[N, 2] in samples, in the order of the text, ends clamped to
    the clip.

    By default those that were, or could be, inserted. With ``pay_uninsertable`` every pair of
    numbers as it is written; reversed times then last 0 s rather than less than nothing.
    """
    begin, end = segments.written_samples(response.text.encode("utf-8", errors="replace")).T
    if options.pay_uninsertable:
        return np.stack([begin, np.maximum(begin, end)], axis=-1)
    begin, end, reason = segments.check_clip(
        np.full(len(begin), int(segments.Reason.VALID)), begin, end, response.num_samples, np
    )
    spans = np.stack([begin, end], axis=-1)[reason == segments.Reason.VALID]
    return spans[: response.num_inserted]


def count_paid(spans: np.ndarray, options: RewardOptions) -> int:
    """How many of `cited_spans` the segment part counts: a span that is cited twice counts once,
    but as often as it is cited with ``pay_uninsertable``, as released."""
    if options.pay_uninsertable:
        return len(spans)
    # Both ends fit in 32 bits: one number a span.
    return len(np.unique(spans[:, 0] << 32 | spans[:, 1]))


def span_statistics(spans: np.ndarray) -> dict[str, float]:
    """Count, total, mean and union duration in seconds, and overlap = 1 - union / total (0 without
    any cited time), of i64[N, 2] in samples. A span that is cited twice is there twice, and
    overlaps with itself."""
    begin, end = spans[np.argsort(spans[:, 0], kind="stable")].T
    total = int((end - begin).sum())
    # How far the spans before each one reach; before the first there is nothing.
    reached = np.append(begin[:1], np.maximum.accumulate(end))[: len(end)]
    union = int(np.maximum(end - np.maximum(begin, reached), 0).sum())
    return {
        "segments": float(len(spans)),
        "total_s": total / segments.SAMPLE_RATE,
        "mean_s": total / len(spans) / segments.SAMPLE_RATE if len(spans) else 0.0,
        "union_s": union / segments.SAMPLE_RATE,
        "overlap": 1.0 - union / total if total > 0 else 0.0,
    }


def fresh_starts(text: str, most: int = MOST_FRESH_STARTS) -> int:
    """How many ``</seg>``, up to `most`, are followed by an upper-case letter or ``<`` (R_consist
    counts them); the end of the text is neither."""
    count, cursor = 0, text.find("</seg>")
    while cursor >= 0 and count < most:
        follower = text[cursor + len("</seg>") : cursor + len("</seg>") + 1]
        count += follower == "<" or follower.isupper()
        cursor = text.find("</seg>", cursor + 1)
    return count


def overlong(num_tokens: int, options: RewardOptions) -> float:
    """The soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13) times ``overlong_penalty``: 0
    up to the buffer, then linear, -1 where the budget is used up."""
    if not options.overlong_buffer:
        return 0.0
    free = options.max_response_tokens - options.overlong_buffer
    beyond = (num_tokens - free) / options.overlong_buffer
    return -options.overlong_penalty * min(max(beyond, 0.0), 1.0)


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
        paid = min(count_paid(spans, options), rule.segments_for_full)
        parts["segment"] = parts["accuracy"] * paid / rule.segments_for_full
    if rule.consistency:
        parts["consistency"] = -0.1 * fresh_starts(response.text)
    if rule.spread and statistics["total_s"] > 0:
        parts["spread"] = 0.5 * statistics["union_s"] / statistics["total_s"]
    parts["overlong"] = overlong(response.num_tokens, options)
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
