"""What can be asked about a scene: questions before they are worded, from timed labels alone.

A `Draft` says what is asked, what the right and the plausible wrong answers are, and which events prove it. One
function a kind finds the drafts of a scene; `data/questions.py` puts them into words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from data import wordings
from data.records import KINDS, Scene
from echo_jax import ranges

Rng = np.random.Generator
STYLES = ("full", "short")
STRATEGIES = ("direct", "scan", "mixed")
MIN_ONSET_DIFFERENCE_S = 0.3
MIN_DURATION_DIFFERENCE_S = 0.3
MIN_GAP_DIFFERENCE_S = 0.5


@dataclasses.dataclass(frozen=True)
class QuestionConfig:
    """What is asked and how it is worded.

    Attributes:
      seed: decides everything together with the scene's id.
      per_scene: questions made per scene (fewer where the scene does not give them).
      kinds: kind -> weight; kinds not named are not asked.
      style, strategy: see `data/questions.py`.
      min_choices, num_choices: a question with fewer than min_choices plausible choices is not asked.
      max_citations: no reasoning cites more spans (the sampler inserts at most 7).
      ordinals: largest k of "the k-th sound".
    """

    seed: int = 0
    per_scene: int = 2
    kinds: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"order": 1.0, "before": 1.0, "after": 1.0}
    )
    style: str = "full"
    strategy: str = "direct"
    min_choices: int = 4
    num_choices: int = 4
    max_citations: int = 7
    ordinals: int = 5

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> QuestionConfig:
        """From a config section; an unknown field raises and is named."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"questions.{unknown[0]} is not a field; use one of {sorted(names)}")
        plain = dict(values)
        if "kinds" in plain:
            plain["kinds"] = dict(plain["kinds"])
        return cls(**plain)

    def __post_init__(self) -> None:
        ranges.check("questions.seed", self.seed, ranges.Range(least=0, whole=True))
        ranges.check("questions.per_scene", self.per_scene, ranges.COUNT)
        for kind, weight in self.kinds.items():
            if kind not in KINDS:
                raise ValueError(f"questions.kinds.{kind} is unknown; use {list(KINDS)}")
            ranges.check(f"questions.kinds.{kind}", weight, ranges.NOT_NEGATIVE)
        if not any(self.kinds.values()):
            raise ValueError("questions.kinds asks for nothing; give one kind or more a weight")
        if self.style not in STYLES:
            raise ValueError(f"questions.style {self.style!r} is unknown; use {list(STYLES)}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"questions.strategy {self.strategy!r}: use {list(STRATEGIES)}")
        for name, least, most in (
            ("min_choices", 2, math.inf),
            ("num_choices", self.min_choices, math.inf),
            ("max_citations", 1, math.inf),
            ("ordinals", 1, len(wordings.ORDINALS)),
        ):
            allowed = ranges.Range(least=least, most=most, whole=True)
            ranges.check(f"questions.{name}", getattr(self, name), allowed)


@dataclasses.dataclass(frozen=True)
class Draft:
    """One question before it is worded.

    Attributes:
      form: key of `wordings.QUESTIONS`.
      slots: values of the slots in questions, openings and closings.
      wrong: wrong choices, the most plausible first.
      cites: event indices in the order in which direct reasoning cites them.
      roles: one per cite: "anchor" or a key of `wordings.FOUND_LEADS`.
      scan: event indices that a walk in time order cites, () where a walk makes no sense.
      timed: reasoning states the duration of each cited event.
    """

    kind: str
    form: str
    slots: dict[str, str]
    answer: str
    wrong: tuple[str, ...]
    cites: tuple[int, ...]
    roles: tuple[str, ...]
    scan: tuple[int, ...]
    timed: bool = False


def seconds_text(seconds: float) -> str:
    """A duration as a choice, e.g. "0.8 seconds"."""
    return f"{seconds:.1f} seconds"


def times_text(count: int) -> str:
    """A count as a choice, e.g. "once", "3 times"."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _labels(scene: Scene) -> list[str]:
    return [event.label for event in scene.events]


def _once(scene: Scene) -> list[int]:
    """Indices of the events whose label occurs once."""
    labels = _labels(scene)
    return [i for i, label in enumerate(labels) if labels.count(label) == 1]


def _others(
    scene: Scene, exclude: Iterable[str], rng: Rng, vocabulary: Sequence[str]
) -> tuple[str, ...]:
    """Labels to choose wrong answers from: those of this scene in random order, then the rest of the vocabulary."""
    excluded = set(exclude)
    present = [label for label in dict.fromkeys(_labels(scene)) if label not in excluded]
    absent = [label for label in vocabulary if label not in excluded | set(present)]
    mixed = list(rng.permutation(present)) + list(rng.permutation(absent))
    return tuple(str(label) for label in mixed)


def _clear(scene: Scene, i: int, j: int) -> bool:
    """Whether event i ends before event j starts."""
    return scene.events[i].end_s <= scene.events[j].start_s


def _distinct_onset(scene: Scene, i: int) -> bool:
    here = scene.events[i].start_s
    return all(
        abs(event.start_s - here) >= MIN_ONSET_DIFFERENCE_S - 1e-9
        for j, event in enumerate(scene.events)
        if j != i
    )


def draft_order(
    scene: Scene, rng: Rng, vocabulary: Sequence[str], config: QuestionConfig
) -> list[Draft]:
    """Which sound is the k-th, the last."""
    labels, drafts = _labels(scene), []
    for i in range(min(len(labels), config.ordinals)):
        if _distinct_onset(scene, i):
            slots = {"k": wordings.ORDINALS[i], "n": str(i + 1)}
            wrong = _others(scene, [labels[i]], rng, vocabulary)
            scan = tuple(range(i + 1))
            drafts.append(Draft("order", "kth", slots, labels[i], wrong, (i,), ("kth",), scan))
    i = len(labels) - 1
    if i > 0 and _distinct_onset(scene, i) and _clear(scene, i - 1, i):
        wrong = _others(scene, [labels[i]], rng, vocabulary)
        scan = tuple(range(i + 1))
        drafts.append(Draft("order", "last", {}, labels[i], wrong, (i,), ("last",), scan))
    return drafts


def _neighbour(scene: Scene, rng: Rng, vocabulary: Sequence[str], after: bool) -> list[Draft]:
    labels, drafts = _labels(scene), []
    for i in _once(scene):
        j = i + 1 if after else i - 1
        if not 0 <= j < len(labels) or not _clear(scene, min(i, j), max(i, j)):
            continue
        # The neighbour must be the only sound next to the anchor.
        around = [k for k in (i - 1, i + 1, j + (1 if after else -1)) if 0 <= k < len(labels)]
        if not all(_clear(scene, min(k, m), max(k, m)) for k in around for m in (i, j) if k != m):
            continue
        kind, role = ("after", "next") if after else ("before", "previous")
        wrong = _others(scene, [labels[i], labels[j]], rng, vocabulary)
        slots, scan = {"x": labels[i]}, tuple(range(max(i, j) + 1))
        drafts.append(Draft(kind, kind, slots, labels[j], wrong, (i, j), ("anchor", role), scan))
    return drafts


def draft_after(
    scene: Scene, rng: Rng, vocabulary: Sequence[str], config: QuestionConfig
) -> list[Draft]:
    """Which sound comes right after X, where X is heard once."""
    return _neighbour(scene, rng, vocabulary, after=True)


def draft_before(
    scene: Scene, rng: Rng, vocabulary: Sequence[str], config: QuestionConfig
) -> list[Draft]:
    """Which sound comes right before X, where X is heard once."""
    return _neighbour(scene, rng, vocabulary, after=False)


def _exchangeable(
    rng: Rng, values: Mapping[Any, Any], config: QuestionConfig, least: float = 0
) -> tuple[list[Any], Any] | None:
    """Up to `num_choices` keys whose values differ by more than `least`, and one of them as the one asked for.

    Every choice of such a question is the right answer to the same question about another key, and which key is asked
    for is left to chance. So the choices tell nothing, however unevenly their values are distributed.
    """
    chosen: list[Any] = []
    for i in rng.permutation(len(values)):
        key = list(values)[i]
        if all(abs(values[key] - values[other]) > least for other in chosen):
            chosen.append(key)
        if len(chosen) == config.num_choices:
            break
    if len(chosen) < config.min_choices:
        return None
    return chosen, chosen[int(rng.integers(len(chosen)))]


def _alone(scene: Scene, i: int) -> bool:
    """Whether event i overlaps with none of its neighbours."""
    last = len(scene.events) - 1
    return (i == 0 or _clear(scene, i - 1, i)) and (i == last or _clear(scene, i, i + 1))


def draft_count(
    scene: Scene, rng: Rng, vocabulary: Sequence[str], config: QuestionConfig
) -> list[Draft]:
    """How many sounds come before X; which sound is heard n times; how many times X is heard."""
    labels, drafts = _labels(scene), []
    counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
    everything = tuple(range(len(labels)))

    places = {i: i for i in _once(scene) if _alone(scene, i)}
    if found := _exchangeable(rng, places, config):
        chosen, i = found
        wrong = tuple(str(j) for j in chosen if j != i)
        cites, roles = tuple(range(i + 1)), ("item",) * i + ("anchor",)
        slots = {"x": labels[i]}
        drafts.append(Draft("count", "count_before", slots, str(i), wrong, cites, roles, cites))

    for times in sorted(set(counts.values()) - {1}):
        names = [label for label, count in counts.items() if count == times]
        others = [str(label) for label in rng.permutation([n for n in counts if n not in names])]
        answer = names[int(rng.integers(len(names)))]
        cites = tuple(i for i in everything if labels[i] == answer)
        slots, roles = {"n": times_text(times)}, ("item",) * len(cites)
        drafts.append(
            Draft("count", "count_which", slots, answer, tuple(others), cites, roles, everything)
        )

    if found := _exchangeable(rng, counts, config):
        chosen, label = found
        wrong = tuple(times_text(counts[other]) for other in chosen if other != label)
        cites = tuple(i for i in everything if labels[i] == label)
        answer = times_text(counts[label])
        slots, roles = {"x": label, "n": answer}, ("item",) * len(cites)
        drafts.append(Draft("count", "count_label", slots, answer, wrong, cites, roles, everything))
    return drafts


def draft_gap(
    scene: Scene, rng: Rng, vocabulary: Sequence[str], config: QuestionConfig
) -> list[Draft]:
    """How long from the end of X to the start of Y, both heard once; the wrong choices are other gaps of the scene."""
    events, once = scene.events, _once(scene)
    gaps = {
        (i, j): round(events[j].start_s - events[i].end_s, 1)
        for i in once
        for j in once
        if i < j and _clear(scene, i, j)
    }
    drafts = []
    for _ in range(3):
        if not (found := _exchangeable(rng, gaps, config, MIN_GAP_DIFFERENCE_S - 1e-9)):
            break
        chosen, (i, j) = found
        wrong = tuple(seconds_text(gaps[pair]) for pair in chosen if pair != (i, j))
        slots = {"x": events[i].label, "y": events[j].label}
        slots |= {"e": f"{events[i].end_s:.1f}", "s": f"{events[j].start_s:.1f}"}
        answer, roles, scan = seconds_text(gaps[i, j]), ("anchor", "anchor"), tuple(range(j + 1))
        drafts.append(Draft("gap", "gap", slots, answer, wrong, (i, j), roles, scan))
        del gaps[i, j]
    return drafts


def draft_duration(
    scene: Scene, rng: Rng, vocabulary: Sequence[str], config: QuestionConfig
) -> list[Draft]:
    """Which of the listed sounds lasts longest or shortest; each is heard once in this scene."""
    events, drafts, seen = scene.events, [], set()
    lengths = {i: events[i].duration_s for i in _once(scene)}
    size = min(config.num_choices, len(lengths))
    for _ in range(6 if size >= config.min_choices else 0):
        chosen = tuple(sorted(int(i) for i in rng.permutation(list(lengths))[:size]))
        for form, sign in (("longest", -1), ("shortest", 1)):
            ranked = sorted(chosen, key=lambda i: sign * lengths[i])
            margin = abs(lengths[ranked[0]] - lengths[ranked[1]])
            if (form, chosen) in seen or margin < MIN_DURATION_DIFFERENCE_S - 1e-9:
                continue
            seen.add((form, chosen))
            wrong, roles = tuple(events[i].label for i in ranked[1:]), ("item",) * size
            answer = events[ranked[0]].label
            drafts.append(
                Draft("duration", form, {}, answer, wrong, chosen, roles, chosen, timed=True)
            )
    return drafts


def draft_overlap(
    scene: Scene, rng: Rng, vocabulary: Sequence[str], config: QuestionConfig
) -> list[Draft]:
    """Which sound overlaps with X; X is heard once and overlaps with one other sound."""
    events, drafts = scene.events, []
    for i in _once(scene):
        mates = [
            j
            for j, event in enumerate(events)
            if j != i
            and min(event.end_s, events[i].end_s) - max(event.start_s, events[i].start_s) > 0.15
        ]
        if len(mates) != 1:
            continue
        j = mates[0]
        wrong = _others(scene, [events[i].label, events[j].label], rng, vocabulary)
        slots, scan = {"x": events[i].label}, tuple(range(max(i, j) + 1))
        roles = ("anchor", "together")
        drafts.append(
            Draft("overlap", "overlap", slots, events[j].label, wrong, (i, j), roles, scan)
        )
    return drafts


def draft_moment(
    scene: Scene, rng: Rng, vocabulary: Sequence[str], config: QuestionConfig
) -> list[Draft]:
    """Which sound is heard at a time that the question names."""
    drafts = []
    for i, event in enumerate(scene.events):
        tenths = round(event.start_s * 10), round(event.end_s * 10)
        if not _alone(scene, i) or tenths[1] - tenths[0] < 2:
            continue
        # Inside the sound, so that the answer does not hang on a border.
        slots = {"m": f"{rng.integers(tenths[0] + 1, tenths[1]) / 10:.1f}"}
        wrong = _others(scene, [event.label], rng, vocabulary)
        drafts.append(Draft("moment", "moment", slots, event.label, wrong, (i,), ("moment",), (i,)))
    return drafts


def draft_span(
    scene: Scene, rng: Rng, vocabulary: Sequence[str], config: QuestionConfig
) -> list[Draft]:
    """Which sound is heard between two times that the question names."""
    drafts = []
    for i, event in enumerate(scene.events):
        if not _alone(scene, i):
            continue
        slots = {"s": f"{event.start_s:.1f}", "e": f"{event.end_s:.1f}"}
        wrong = _others(scene, [event.label], rng, vocabulary)
        drafts.append(Draft("span", "span", slots, event.label, wrong, (i,), ("span",), (i,)))
    return drafts


DRAFTS = {
    "order": draft_order,
    "before": draft_before,
    "after": draft_after,
    "count": draft_count,
    "gap": draft_gap,
    "duration": draft_duration,
    "overlap": draft_overlap,
    "moment": draft_moment,
    "span": draft_span,
}
