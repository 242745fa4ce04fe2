"""Chats of the base stage: name the sound of a short clip, choose its name, caption a scene, say if a sound is present.

They hold no times and no reasoning. A naming chat has several turns, each with its own clip, cropped around one
event of one scene with some jitter, because that is what a re-inserted clip will look like to the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from data import wordings
from data.records import Scene

Role = Literal["user", "assistant"]
TASKS = ("naming", "choice", "caption", "presence")
MIN_HEARD_S = 0.3
NUM_CHOICES = 4


@dataclasses.dataclass(frozen=True)
class ListeningConfig:
    """What base-stage chats look like.

    Attributes:
      style: "full" or "short" wordings.
      weights: task -> share of the chats.
      naming_turns: most clips in a naming chat. A choice takes about twice the text, so those chats have half as many.
      inline_fraction: share of the naming and choice chats that put the clips into the assistant's text, where it goes
        on behind each: the audio-text documents that a large model has seen in its pretraining.
      jitter_s: largest shift of each border of a clip, in steps of 0.1 s.
      max_clip_s: longest clip of a naming or choice chat.
      caption_order: "alphabetical" or "random"; never the order in time.
    """

    style: str = "full"
    weights: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"naming": 1.0, "choice": 1.0, "caption": 1.0, "presence": 1.0}
    )
    naming_turns: int = 4
    inline_fraction: float = 0.0
    jitter_s: float = 0.2
    max_clip_s: float = 2.0
    caption_order: str = "alphabetical"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ListeningConfig:
        """From a config section; an unknown field raises and is named."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"listening.{unknown[0]} is not a field; use one of {sorted(names)}")
        plain = dict(values)
        if "weights" in plain:
            plain["weights"] = dict(plain["weights"])
        return cls(**plain)

    def __post_init__(self) -> None:
        if self.style not in wordings.NAMING_PROMPTS:
            raise ValueError(f"listening.style {self.style!r}: use 'full' or 'short'")
        if unknown := [task for task in self.weights if task not in TASKS]:
            raise ValueError(f"listening.weights.{unknown[0]} is unknown; use {list(TASKS)}")
        if not 0 <= self.inline_fraction <= 1:
            raise ValueError(f"listening.inline_fraction={self.inline_fraction} is not in [0, 1]")
        if self.caption_order not in ("alphabetical", "random"):
            raise ValueError("listening.caption_order: use 'alphabetical' or 'random'")


@dataclasses.dataclass(frozen=True)
class Clip:
    """A span of a file in seconds, the whole file if `end_s` is None."""

    audio_path: str
    start_s: float = 0.0
    end_s: float | None = None


@dataclasses.dataclass(frozen=True)
class Turn:
    """One message: a role and its parts, text or clips."""

    role: Role
    parts: tuple[str | Clip, ...]


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation; `id` names its scene and task."""

    id: str
    turns: tuple[Turn, ...]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def crop_around(
    scene: Scene, index: int, rng: np.random.Generator, config: ListeningConfig
) -> Clip:
    """A clip around event `index`, jittered, that holds at least 0.3 s of it and nothing of its neighbours."""
    event = scene.events[index]
    steps = round(config.jitter_s * 10)
    start, end = round(event.start_s * 10), round(event.end_s * 10)
    jitter = rng.integers(-steps, steps + 1, 2)
    left = max((round(e.end_s * 10) for e in scene.events[:index]), default=0)
    right = min(
        (round(e.start_s * 10) for e in scene.events[index + 1 :]),
        default=round(scene.duration_s * 10),
    )
    begin, finish = max(start + int(jitter[0]), left), min(end + int(jitter[1]), right)
    if min(finish, end) - max(begin, start) < round(MIN_HEARD_S * 10):
        begin, finish = start, end
    longest = round(config.max_clip_s * 10)
    if finish - begin > longest:
        begin = int(rng.integers(max(begin, start), max(finish - longest, max(begin, start)) + 1))
        finish = begin + longest
    return Clip(scene.audio_path, begin / 10, finish / 10)


def _events_alone(scene: Scene, rng: np.random.Generator, most: int) -> list[int]:
    """Indices of up to `most` events that overlap with no other, in random order."""
    alone = [
        i
        for i, event in enumerate(scene.events)
        if all(
            j == i or other.end_s <= event.start_s or other.start_s >= event.end_s
            for j, other in enumerate(scene.events)
        )
    ]
    return [int(i) for i in rng.permutation(alone)[:most]]


def _inline(
    scene: Scene, index: int, rng: np.random.Generator, config: ListeningConfig
) -> list[str | Clip]:
    """A lead, the clip of event `index`, and its name: assistant's text that runs on behind a clip."""
    tail = _pick(rng, wordings.INLINE_TAILS[config.style]).format(y=scene.events[index].label)
    lead = _pick(rng, wordings.INLINE_LEADS[config.style])
    return [lead, crop_around(scene, index, rng, config), tail]


def naming_chat(scene: Scene, rng: np.random.Generator, config: ListeningConfig) -> Chat:
    """Clips of single events in random order, each named: in a user turn of its own, or inside the assistant's text."""
    chosen = _events_alone(scene, rng, config.naming_turns)
    if rng.random() < config.inline_fraction:
        parts: list[str | Clip] = []
        for i in chosen:
            lead, *rest = _inline(scene, i, rng, config)
            parts += [f" {lead}" if parts else lead, *rest]
        prompt = _pick(rng, wordings.INLINE_PROMPTS[config.style])
        inline = (Turn("user", (prompt,)), Turn("assistant", tuple(parts)))
        return Chat(f"{scene.id}_inline", inline)
    turns: list[Turn] = []
    for i in chosen:
        prompt = _pick(rng, wordings.NAMING_PROMPTS[config.style])
        answer = _pick(rng, wordings.NAMING_ANSWERS[config.style])
        turns.append(Turn("user", (crop_around(scene, i, rng, config), prompt)))
        turns.append(Turn("assistant", (answer.format(y=scene.events[i].label),)))
    return Chat(f"{scene.id}_naming", tuple(turns))


def _choices(answer: str, others: set[str], rng: np.random.Generator) -> str:
    """The answer and three others in random order, as a prompt lists them."""
    wrong = [str(name) for name in rng.permutation(sorted(others))[: NUM_CHOICES - 1]]
    return ", ".join(str(name) for name in rng.permutation([answer, *wrong]))


def choice_chat(
    scene: Scene, rng: np.random.Generator, config: ListeningConfig, vocabulary: Sequence[str]
) -> Chat:
    """Clips of single events in random order, each with names to choose from; the answer stands in its tags.

    The clip is in the user's turn, or inside the assistant's text ahead of the answer.
    """
    turns: list[Turn] = []
    is_inline = bool(rng.random() < config.inline_fraction)
    for i in _events_alone(scene, rng, max(1, config.naming_turns // 2)):
        label = scene.events[i].label
        prompt = _pick(rng, wordings.CHOICE_PROMPTS[config.style])
        prompt = prompt.format(choices=_choices(label, set(vocabulary) - {label}, rng))
        answer = wordings.CHOICE_ANSWER.format(y=label)
        if is_inline:
            turns.append(Turn("user", (prompt,)))
            turns.append(Turn("assistant", (*_inline(scene, i, rng, config), answer)))
        else:
            turns.append(Turn("user", (crop_around(scene, i, rng, config), prompt)))
            turns.append(Turn("assistant", (answer,)))
    return Chat(f"{scene.id}_choice", tuple(turns))


def caption_chat(scene: Scene, rng: np.random.Generator, config: ListeningConfig) -> Chat:
    """The set of sounds in a scene, without times and not in the order in which they are heard."""
    labels = sorted({event.label for event in scene.events})
    if config.caption_order == "random":
        labels = [str(label) for label in rng.permutation(labels)]
    answer = _pick(rng, wordings.CAPTION_ANSWERS[config.style]).format(list=", ".join(labels))
    prompt = _pick(rng, wordings.CAPTION_PROMPTS[config.style])
    turns = (Turn("user", (Clip(scene.audio_path), prompt)), Turn("assistant", (answer,)))
    return Chat(f"{scene.id}_caption", turns)


def presence_chat(
    scene: Scene, rng: np.random.Generator, config: ListeningConfig, vocabulary: Sequence[str]
) -> Chat:
    """Whether one sound is in the scene (yes and no are equally likely) or, every other time, which of four is."""
    present = sorted({event.label for event in scene.events})
    absent = sorted(set(vocabulary) - set(present))
    if rng.random() < 0.5 and len(absent) >= NUM_CHOICES - 1:
        label = _pick(rng, present)
        prompt = _pick(rng, wordings.SCENE_CHOICE_PROMPTS[config.style])
        prompt = prompt.format(choices=_choices(label, set(absent), rng))
        answer = wordings.CHOICE_ANSWER.format(y=label)
    else:
        there = bool(rng.random() < 0.5) or not absent
        label = _pick(rng, present if there else absent)
        prompt = _pick(rng, wordings.PRESENCE_PROMPTS[config.style]).format(x=label)
        answer = _pick(rng, wordings.PRESENCE_ANSWERS[there]).format(x=label)
    turns = (Turn("user", (Clip(scene.audio_path), prompt)), Turn("assistant", (answer,)))
    return Chat(f"{scene.id}_presence", turns)


def all_texts(vocabulary: Sequence[str], config: ListeningConfig) -> Iterator[tuple[Role, str]]:
    """Every (role, text) the base stage can say about these labels, for a compact vocabulary."""
    for label in vocabulary:
        for prompt in wordings.NAMING_PROMPTS[config.style]:
            yield "user", prompt
        for answer in wordings.NAMING_ANSWERS[config.style]:
            yield "assistant", answer.format(y=label)
        for prompt in wordings.INLINE_PROMPTS[config.style]:
            yield "user", prompt
        for lead in wordings.INLINE_LEADS[config.style]:
            yield from (("assistant", lead), ("assistant", f" {lead}"))
            for tail in wordings.INLINE_TAILS[config.style]:
                yield "assistant", f"{tail.format(y=label)} {lead}"
        for prompts in (wordings.CHOICE_PROMPTS, wordings.SCENE_CHOICE_PROMPTS):
            for prompt in prompts[config.style]:
                yield "user", prompt.format(choices=f"{label}, {label}")
        answer = wordings.CHOICE_ANSWER.format(y=label)
        yield "assistant", answer
        for tail in wordings.INLINE_TAILS[config.style]:
            yield "assistant", tail.format(y=label) + answer
        for prompt in wordings.CAPTION_PROMPTS[config.style]:
            yield "user", prompt
        for answer in wordings.CAPTION_ANSWERS[config.style]:
            yield "assistant", answer.format(list=f"{label}, {label}")
        for prompt in wordings.PRESENCE_PROMPTS[config.style]:
            yield "user", prompt.format(x=label)
        for there in (True, False):
            for answer in wordings.PRESENCE_ANSWERS[there]:
                yield "assistant", answer.format(x=label)
