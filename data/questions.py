"""Questions, choices, answers and reasoning from timed labels, without any language model.

A `Draft` says what is asked and which events prove the answer; wording is a second step, so that one draft can
be told in several styles and reasoning strategies:

  * style "full": 30 to 90 words that say why a span is needed and what it shows; "short": a few words per citation.
  * strategy "direct": cites the evidence; "scan": names the scene's events in time order until the answer is
    known; "mixed": one of the two per record.

The text follows echo.md section 6: a span is cited before what it shows is discussed, times have one decimal,
and the answer is the text of one choice.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data import sounds, wordings
from data.records import KINDS, EaqaRecord, Event, Scene

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
      style, strategy: see the module's docstring.
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
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"questions.kinds.{kind} is unknown; use {list(KINDS)}")
        if self.style not in STYLES:
            raise ValueError(f"questions.style {self.style!r} is unknown; use {list(STYLES)}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"questions.strategy {self.strategy!r}: use {list(STRATEGIES)}")
        if not 2 <= self.min_choices <= self.num_choices:
            raise ValueError("questions: 2 <= min_choices <= num_choices is required")


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


# ----------------------------------------------------------------------------- drafts, one function per kind


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

# ----------------------------------------------------------------------------- wording


def citation(event: Event) -> str:
    """The tag of an event, seconds with one decimal: `<seg>2.4, 3.1</seg>`."""
    return f"<seg>{event.start_s:.1f}, {event.end_s:.1f}</seg>"


def _pick(rng: Rng, options: Sequence) -> Any:
    return options[int(rng.integers(len(options)))]


def _full_cite(draft: Draft, event: Event, role: str, rng: Rng) -> str:
    slots = draft.slots | {"y": event.label, "t": seconds_text(event.duration_s)}
    if role == "anchor":
        slots["x"] = event.label
        lead, tail = _pick(rng, wordings.ANCHOR_LEADS), _pick(rng, wordings.ANCHOR_TAILS)
    else:
        lead = _pick(rng, wordings.FOUND_LEADS[role])
        tails = wordings.ITEM_TAILS if role == "item" else wordings.FOUND_TAILS
        tail = _pick(rng, wordings.LENGTH_TAILS if draft.timed else tails)
    return f"{lead.format(**slots)} {citation(event)}{tail.format(**slots)}."


def _short_cite(draft: Draft, event: Event, role: str, rng: Rng) -> str:
    slots = draft.slots | {"y": event.label, "t": seconds_text(event.duration_s)}
    if role == "anchor":
        slots["x"] = event.label
        lead, tail = _pick(rng, wordings.SHORT_ANCHOR)
    elif draft.timed:
        lead, tail = _pick(rng, wordings.SHORT_LENGTH)
    else:
        lead, tail = _pick(rng, wordings.SHORT_FOUND[role])
    return f"{lead.format(**slots)} {citation(event)}{tail.format(**slots)}"


def _scan_sentences(draft: Draft, scene: Scene, style: str, rng: Rng) -> list[str]:
    sentences = []
    for i in draft.scan:
        event = scene.events[i]
        slots = {"y": event.label, "t": seconds_text(event.duration_s)}
        first = i == draft.scan[0]
        if style == "short":
            lead = wordings.SHORT_SCAN_FIRST if first else wordings.SHORT_SCAN
            tail = ", {y}, {t}." if draft.timed else wordings.SHORT_SCAN_TAIL
        else:
            lead = _pick(rng, wordings.SCAN_LEADS_FIRST if first else wordings.SCAN_LEADS)
            tail = _pick(rng, wordings.LENGTH_TAILS) + "." if draft.timed else ""
            tail = tail or _pick(rng, wordings.SCAN_TAILS)
        sentences.append(f"{lead} {citation(event)}{tail.format(**slots)}")
    return sentences


def word_reasoning(draft: Draft, scene: Scene, style: str, strategy: str, rng: Rng) -> str:
    """`<think>…</think><answer>…</answer>` for a draft; strategy "direct" or "scan"."""
    slots = draft.slots | {"a": draft.answer}
    if strategy == "scan" and draft.scan:
        sentences = _scan_sentences(draft, scene, style, rng)
        opening = _pick(rng, wordings.SCAN_OPENINGS)
    else:
        cite = _short_cite if style == "short" else _full_cite
        cites = zip(draft.cites, draft.roles, strict=True)
        sentences = [cite(draft, scene.events[i], role, rng) for i, role in cites]
        opening = _pick(rng, wordings.OPENINGS[draft.form]).format(**slots)
    if style == "full":
        closing = _pick(rng, wordings.CLOSINGS[draft.form]).format(**slots)
        sentences = [opening, *sentences, closing]
    elif draft.kind == "gap":
        sentences.append(f"From {draft.slots['e']} to {draft.slots['s']}: {draft.answer}.")
    return f"<think>{' '.join(sentences)}</think><answer>{draft.answer}</answer>"


# ----------------------------------------------------------------------------- records


def make_questions(
    scenes: Iterable[Scene],
    config: QuestionConfig,
    vocabulary: Sequence[str] = (),
    reasoning: bool = True,
) -> Iterator[EaqaRecord]:
    """Yield up to `config.per_scene` records per scene, in the order of the scenes.

    A record depends on the config and on its own scene only, so scenes may be processed in any order.

    Args:
      vocabulary: labels to fill wrong choices from when a scene has too few; default the sound library.
      reasoning: False leaves `cot` empty (records for RL).
    """
    vocabulary = tuple(vocabulary) or tuple(sounds.LIBRARY)
    kinds = sorted(kind for kind, weight in config.kinds.items() if weight > 0)
    for scene in scenes:
        rng = np.random.default_rng((config.seed, zlib.crc32(scene.id.encode())))
        drafts: dict[str, list[Draft]] = {}
        for kind in kinds:
            found = [
                draft
                for draft in DRAFTS[kind](scene, rng, vocabulary, config)
                if len(draft.cites) <= config.max_citations
                and len(draft.wrong) + 1 >= config.min_choices
                and (config.strategy != "scan" or len(draft.scan) <= config.max_citations)
            ]
            if found:
                drafts[kind] = [found[i] for i in rng.permutation(len(found))]
        for number in range(config.per_scene):
            left = sorted(kind for kind, found in drafts.items() if found)
            if not left:
                break
            weights = np.array([config.kinds[kind] for kind in left], float)
            kind = str(rng.choice(left, p=weights / weights.sum()))
            draft = drafts[kind].pop()
            yield _record(draft, scene, number, config, rng, reasoning)


def _record(
    draft: Draft, scene: Scene, number: int, config: QuestionConfig, rng: Rng, reasoning: bool
) -> EaqaRecord:
    choices = list(draft.wrong[: config.num_choices - 1])
    choices = [str(choice) for choice in rng.permutation(choices)]
    choices.insert(int(rng.integers(len(choices) + 1)), draft.answer)
    question = str(_pick(rng, wordings.QUESTIONS[draft.form])).format(**draft.slots)
    strategy = config.strategy
    if strategy == "mixed":
        fits = len(draft.scan) <= config.max_citations
        strategy = str(rng.choice(["direct", "scan"])) if fits else "direct"
    cot = word_reasoning(draft, scene, config.style, strategy, rng) if reasoning else ""
    return EaqaRecord(
        id=f"{scene.id}_{number}_{draft.kind}",
        audio_path=scene.audio_path,
        duration_s=scene.duration_s,
        question=question,
        choices=tuple(choices),
        answer=draft.answer,
        cot=cot,
        kind=draft.kind,
        events=scene.events,
        evidence=tuple((scene.events[i].start_s, scene.events[i].end_s) for i in draft.cites),
        difficulty=len(scene.events),
        split=scene.split,
        source=scene.source,
    )
