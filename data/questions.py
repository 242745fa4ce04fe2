"""Questions, choices, answers and reasoning from timed labels, without any language model.

`data/drafts.py` decides what is asked and what proves the answer; here it is put into words, so that one draft can
be told in several styles and reasoning strategies:

  * style "full": 30 to 90 words that say why a span is needed and what it shows; "short": a few words per citation.
  * strategy "direct": cites the evidence; "scan": names the scene's events in time order until the answer is
    known; "mixed": one of the two per record.

The text follows echo.md section 6: a span is cited before what it shows is discussed, times have one decimal,
and the answer is the text of one choice.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data import sounds, wordings
from data.drafts import DRAFTS, Draft, QuestionConfig, Rng, seconds_text
from data.records import EaqaRecord, Event, Scene


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
