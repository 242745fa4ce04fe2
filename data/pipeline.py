"""Grain pipelines that turn records and scenes into the fixed-shape batches of each stage.

    base    chats of data.listening         -> chat batches
    sft     records with reasoning          -> chat batches, audio once, loss on the assistant's tokens
    rl      records                         -> prompt batches, endless, shuffled
    eval    records                         -> prompt batches, once, in order, the last one filled up

A chat batch is a dict: tokens i32[B, L] (right padded), loss_mask f32[B, L] (1 where tokens[b, t] is a target),
waveforms f32[C, S], num_samples i32[C] (0 = unused slot), clip_row i32[C], clip_start i32[C] (index of the
clip's first <|AUDIO|> in its row), ids (list of B strings).
A prompt batch: prompt_tokens i32[Q, P], prompt_length i32[Q], waveforms f32[Q, S], num_samples i32[Q],
clip_start i32[Q], records (list of at most Q `EaqaRecord`; rows beyond it repeat row 0 and are to be ignored).

`iter(dataset)` gives iterators with `get_state` and `set_state`; order, shuffles and random crops depend on the
seed and on the step only, so a restored iterator goes on exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from data import listening
from data.audio_files import SAMPLING_RATE, AudioFileError
from data.audio_store import AudioStore
from data.records import EaqaRecord, Scene
from echo_jax.text import prompts
from echo_jax.text.tokenizer import Tokenizer

TOKEN_MULTIPLE = 16
FRAME_SAMPLES = 160
# Decoding runs in this process: two threads hide the disk, and a short buffer keeps memory small.
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=32)

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Example:
    id: str
    chat: prompts.EncodedChat
    waves: tuple[np.ndarray, ...]
    record: EaqaRecord | None = None


class TooLong(ValueError):
    """An example does not fit the batch shape; the message says which and what to raise."""


# ----------------------------------------------------------------------------- messages


def num_samples_of(duration_s: float) -> int:
    """Samples at 16 kHz of a file of that length."""
    return round(duration_s * SAMPLING_RATE)


def prompt_messages(record: EaqaRecord, prompt: str) -> list[prompts.Message]:
    """The user's side of a record: clip, question and choices; without choices the question is a whole prompt."""
    samples = num_samples_of(record.duration_s)
    if not record.choices:
        system = prompts.preset(prompt).system
        head = [prompts.Message("system", system)] if system else []
        return [*head, prompts.Message("user", [prompts.Audio(samples), record.question])]
    return prompts.question_messages(prompt, record.question, record.choices, samples)


def sft_messages(records: Sequence[EaqaRecord], prompt: str) -> list[prompts.Message]:
    """Questions about one recording with their reasoning, a turn each; the audio stands in the first.

    Raises:
      ValueError: a record has no reasoning.
    """
    messages: list[prompts.Message] = []
    for record in records:
        if not record.cot:
            raise ValueError(f"record {record.id!r} has no reasoning; SFT needs the field `cot`")
        if messages:
            text = prompts.preset(prompt).user_text(record.question, record.choices)
            messages.append(prompts.Message("user", text))
        else:
            messages += prompt_messages(record, prompt)
        messages.append(prompts.Message("assistant", record.cot))
    return messages


def chats_of(records: Sequence[EaqaRecord], questions_per_chat: int) -> list[list[EaqaRecord]]:
    """Groups records about the same recording, in their order, at most so many a group."""
    by_path: dict[str, list[EaqaRecord]] = {}
    for record in records:
        by_path.setdefault(record.audio_path, []).append(record)
    return [
        group[i : i + questions_per_chat]
        for group in by_path.values()
        for i in range(0, len(group), questions_per_chat)
    ]


def corpus_texts(
    records: Sequence[EaqaRecord],
    prompt_names: Sequence[str],
    vocabulary: Sequence[str] = (),
    listening_config: listening.ListeningConfig | None = None,
) -> Iterator[str]:
    """Every string that these stages hand to the BPE, for `Tokenizer.compact`."""
    for record in records:
        for name in prompt_names:
            yield from prompts.text_runs(prompt_messages(record, name), add_generation_prompt=True)
        if record.cot:
            yield from prompts.text_runs(sft_messages([record, record], prompt_names[0]))
    if listening_config:
        for role, text in listening.all_texts(vocabulary, listening_config):
            clip = [prompts.Audio(SAMPLING_RATE)] if role == "user" else []
            yield from prompts.text_runs([prompts.Message(role, [*clip, text])])


def _fit(wave: np.ndarray, samples: int) -> np.ndarray:
    """Trim or zero-pad the few samples by which resampling misses the nominal length."""
    return wave[:samples] if len(wave) >= samples else np.pad(wave, (0, samples - len(wave)))


# ----------------------------------------------------------------------------- batches


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check(example: _Example, max_tokens: int, samples: int, clips: int, field: str) -> None:
    if len(example.chat.tokens) > max_tokens:
        raise TooLong(
            f"{example.id}: {len(example.chat.tokens)} tokens do not fit {field}={max_tokens}; raise it"
        )
    if len(example.waves) > clips:
        raise TooLong(
            f"{example.id}: {len(example.waves)} clips do not fit {clips} a row; raise it"
        )
    for wave in example.waves:
        if len(wave) > samples:
            raise TooLong(
                f"{example.id}: a clip of {len(wave) / SAMPLING_RATE:.2f} s does not fit "
                f"{samples / SAMPLING_RATE:.2f} s; raise the clip seconds"
            )


def _chat_batch(
    examples: Sequence[_Example],
    pad_id: int,
    max_tokens: int,
    samples: int,
    clips_per_row: int,
    field: str = "max_tokens",
) -> Batch:
    """`field` is the name of the config field that `max_tokens` comes from."""
    rows, slots = len(examples), len(examples) * clips_per_row
    batch: Batch = {
        "tokens": np.full((rows, max_tokens), pad_id, np.int32),
        "loss_mask": np.zeros((rows, max_tokens), np.float32),
        "waveforms": np.zeros((slots, samples), np.float32),
        "num_samples": np.zeros(slots, np.int32),
        "clip_row": np.zeros(slots, np.int32),
        "clip_start": np.zeros(slots, np.int32),
        "ids": [example.id for example in examples],
    }
    for row, example in enumerate(examples):
        _check(example, max_tokens, samples, clips_per_row, field)
        chat = example.chat
        batch["tokens"][row, : len(chat.tokens)] = chat.tokens
        batch["loss_mask"][row, : len(chat.tokens)] = chat.loss_mask
        for i, (wave, start) in enumerate(zip(example.waves, chat.audio_starts, strict=True)):
            slot = row * clips_per_row + i
            batch["waveforms"][slot, : len(wave)] = wave
            batch["num_samples"][slot] = len(wave)
            batch["clip_row"][slot] = row
            batch["clip_start"][slot] = start
    return batch


def _prompt_batch(
    examples: Sequence[_Example], pad_id: int, max_tokens: int, samples: int, rows: int
) -> Batch:
    batch: Batch = {
        "prompt_tokens": np.full((rows, max_tokens), pad_id, np.int32),
        "prompt_length": np.zeros(rows, np.int32),
        "waveforms": np.zeros((rows, samples), np.float32),
        "num_samples": np.zeros(rows, np.int32),
        "clip_start": np.zeros(rows, np.int32),
        "records": [example.record for example in examples],
    }
    for row in range(rows):
        example = examples[row] if row < len(examples) else examples[0]
        _check(example, max_tokens, samples, 1, "max_tokens")
        chat, wave = example.chat, example.waves[0]
        batch["prompt_tokens"][row, : len(chat.tokens)] = chat.tokens
        batch["prompt_length"][row] = len(chat.tokens)
        batch["waveforms"][row, : len(wave)] = wave
        batch["num_samples"][row] = len(wave)
        batch["clip_start"][row] = chat.audio_starts[0]
    return batch


def _usable(
    make: Callable[..., _Example],
) -> Callable[..., _Example | None]:
    """Skip an example whose file is bad; the store has named and counted it."""

    def wrapped(*args: Any) -> _Example | None:
        try:
            return make(*args)
        except AudioFileError:
            return None

    return wrapped


def _shuffled(source: Sequence, seed: int, epochs: int | None, shuffle: bool) -> grain.MapDataset:
    dataset = grain.MapDataset.source(source).seed(seed)
    return (dataset.shuffle() if shuffle else dataset).repeat(epochs)


# ----------------------------------------------------------------------------- the stages


def longest_chat(
    records: Sequence[EaqaRecord],
    tokenizer: Tokenizer,
    prompt: str,
    answers: bool,
    questions_per_chat: int = 1,
) -> int:
    """Tokens of the longest chat, rounded up to a multiple of 16: the least `max_tokens` that fits all.

    Args:
      answers: True measures SFT chats, False the prompts of rl and eval.
      questions_per_chat: as for `sft_dataset`.
    """
    longest = 0
    for chat in chats_of(records, questions_per_chat):
        messages = sft_messages(chat, prompt) if answers else prompt_messages(chat[0], prompt)
        longest = max(longest, len(_encode(tokenizer, messages, prompt, not answers).tokens))
    return _up(longest, TOKEN_MULTIPLE)


def _encode(
    tokenizer: Tokenizer, messages: Sequence[prompts.Message], prompt: str, generate: bool
) -> prompts.EncodedChat:
    split = prompts.preset(prompt).split_tags
    return prompts.encode_chat(
        tokenizer, messages, add_generation_prompt=generate, split_tags=split
    )


def _record_example(
    records: Sequence[EaqaRecord],
    store: AudioStore,
    tokenizer: Tokenizer,
    prompt: str,
    answer: bool,
) -> _Example:
    record = records[0]
    messages = sft_messages(records, prompt) if answer else prompt_messages(record, prompt)
    wave = store.read(record.audio_path, record.duration_s, record.duration_s)
    wave = _fit(wave, num_samples_of(record.duration_s))
    return _Example(record.id, _encode(tokenizer, messages, prompt, not answer), (wave,), record)


def sft_dataset(
    records: Sequence[EaqaRecord],
    store: AudioStore,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    batch_size: int,
    clip_seconds: float,
    max_tokens: int = 0,
    questions_per_chat: int = 1,
    seed: int = 0,
    epochs: int | None = None,
) -> grain.IterDataset:
    """Chat batches of records with reasoning; one clip a row, no inserted audio.

    Args:
      records: any random-access sequence.
      questions_per_chat: so many questions about one recording share its audio and a row, each seeing those before it.
      prompt: a name in `prompts.PRESETS`.
      clip_seconds: S; a longer record raises `TooLong`.
      max_tokens: L; 0 measures the records.
      epochs: passes over the records, each in its own order; None = endless.
    """
    max_tokens = max_tokens or longest_chat(
        records, tokenizer, prompt, answers=True, questions_per_chat=questions_per_chat
    )
    samples = _up(num_samples_of(clip_seconds), FRAME_SAMPLES)
    make = _usable(lambda chat: _record_example(chat, store, tokenizer, prompt, True))
    chats = chats_of(records, questions_per_chat)
    dataset = _shuffled(chats, seed, epochs, True).map(make).to_iter_dataset(READ)
    return dataset.batch(
        batch_size,
        drop_remainder=True,
        batch_fn=lambda examples: _chat_batch(examples, tokenizer.pad_id, max_tokens, samples, 1),
    )


def prompt_dataset(
    records: Sequence[EaqaRecord],
    store: AudioStore,
    tokenizer: Tokenizer,
    *,
    prompt: str,
    batch_size: int,
    clip_seconds: float,
    max_prompt_tokens: int = 0,
    seed: int = 0,
    epochs: int | None = None,
    shuffle: bool = True,
) -> grain.IterDataset:
    """Prompt batches. RL: the defaults. Evaluation: epochs=1, shuffle=False (the last batch is filled up).

    Args: as `sft_dataset`; max_prompt_tokens is P, 0 measures the records.
    """
    max_tokens = max_prompt_tokens or longest_chat(records, tokenizer, prompt, answers=False)
    samples = _up(num_samples_of(clip_seconds), FRAME_SAMPLES)
    make = _usable(lambda record: _record_example([record], store, tokenizer, prompt, False))
    dataset = _shuffled(records, seed, epochs, shuffle).map(make).to_iter_dataset(READ)
    return dataset.batch(
        batch_size,
        drop_remainder=shuffle,
        batch_fn=lambda examples: _prompt_batch(
            examples, tokenizer.pad_id, max_tokens, samples, batch_size
        ),
    )


def _chat_example(chat: listening.Chat, store: AudioStore, tokenizer: Tokenizer) -> _Example:
    messages, waves = [], []
    for turn in chat.turns:
        parts: list[str | prompts.Audio] = []
        for part in turn.parts:
            if isinstance(part, str):
                parts.append(part)
                continue
            wave = store.read(part.audio_path, least_s=part.end_s or 0.0)
            if part.end_s is not None:
                wave = wave[num_samples_of(part.start_s) : num_samples_of(part.end_s)]
            waves.append(wave)
            parts.append(prompts.Audio(len(wave)))
        messages.append(prompts.Message(turn.role, parts))
    return _Example(chat.id, prompts.encode_chat(tokenizer, messages), tuple(waves))


def base_dataset(
    scenes: Sequence[Scene],
    store: AudioStore,
    tokenizer: Tokenizer,
    *,
    config: listening.ListeningConfig,
    vocabulary: Sequence[str],
    batch_size: int,
    scene_seconds: float,
    naming_tokens: int,
    scene_tokens: int,
    seed: int = 0,
) -> grain.IterDataset:
    """Endless chat batches, each of one of two shapes: clips (naming and choice), or scenes (caption and presence).

    Clip batches have L = naming_tokens, S = config.max_clip_s and config.naming_turns slots a row; scene batches
    have L = scene_tokens, S = scene_seconds and one slot a row. Two shapes, because short clips in slots of a
    scene's length would be mostly padding. The mixture follows config.weights.
    """
    weights = {task: config.weights.get(task, 0.0) for task in listening.TASKS}
    on_clips = weights["naming"] + weights["choice"]
    on_scenes = weights["caption"] + weights["presence"]

    def clips(scene: Scene, rng: np.random.Generator) -> _Example:
        if rng.random() * on_clips < weights["naming"]:
            chat = listening.naming_chat(scene, rng, config)
        else:
            chat = listening.choice_chat(scene, rng, config, vocabulary)
        return _chat_example(chat, store, tokenizer)

    def whole(scene: Scene, rng: np.random.Generator) -> _Example:
        if rng.random() * on_scenes < weights["caption"]:
            chat = listening.caption_chat(scene, rng, config)
        else:
            chat = listening.presence_chat(scene, rng, config, vocabulary)
        return _chat_example(chat, store, tokenizer)

    def batches(
        make: Callable[[Scene, np.random.Generator], _Example],
        number: int,
        tokens: int,
        seconds: float,
        slots: int,
        field: str,
    ) -> grain.IterDataset:
        samples = _up(num_samples_of(seconds), FRAME_SAMPLES)
        mapped = _shuffled(scenes, seed + number, None, True).random_map(_usable(make))
        return mapped.to_iter_dataset(READ).batch(
            batch_size,
            drop_remainder=True,
            batch_fn=lambda examples: _chat_batch(
                examples, tokenizer.pad_id, tokens, samples, slots, field
            ),
        )

    parts, shares = [], []
    if on_clips > 0:
        parts.append(
            batches(
                clips, 0, naming_tokens, config.max_clip_s, config.naming_turns, "naming_tokens"
            )
        )
        shares.append(on_clips)
    if on_scenes > 0:
        parts.append(batches(whole, 1, scene_tokens, scene_seconds, 1, "scene_tokens"))
        shares.append(on_scenes)
    return parts[0] if len(parts) == 1 else grain.IterDataset.mix(parts, shares)
