"""Replays rollouts in the trainer: the same ids, the same clips, the same positions, nothing tokenized again.

One forward pass gives the log-probability of every sampled token. The clips are cut from the recording once more, by
the sample ranges that the sampler returned. A prompt, most of whose length is audio, is run once for all answers of its
group: with 8 answers of 60 tokens to a prompt of 200, a third of the positions of whole rows is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from echo_jax import ranges
from echo_jax.arrays import Params
from echo_jax.model import language_model, thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.model.execution import PLAIN, Execution
from echo_jax.sampler import loop
from echo_jax.sampler.state import Prompts, Rollout
from echo_jax.train import grpo, head, targets
from echo_jax.train.sft import SumAndDenominator

# By how much the room for clips grows where the least is not enough: a few large steps, few compilations.
_SLOT_GROWTH = 4


@dataclasses.dataclass(frozen=True)
class ReplayOptions:
    """How rollouts are put into arrays, and what the log-probabilities depend on.

    Attributes:
        group: answers to a question that share the run of its prompt.
        copies: how often a prompt is run, each time for `group` of its answers: the more, the fewer rows a device must
            hold at once, and the more devices a batch can be divided over.
        buffers: lengths of the segment buffers in samples, ascending; the last holds any segment.
        least_slots: clips that each buffer of a micro-batch's shard has room for at least; () = one a row for the first
            buffer, one for eight rows for the others.
        token_multiple: T is rounded up to it.
        target_multiple: K is rounded up to it.
        temperature: of the rollout.
        vocabulary_chunk: positions a row whose logits are in memory at once; 0 for all.
        execution: how the forward pass is run.

    Raises:
        ValueError: a number out of its range, or not one least per buffer; the message names the field.
    """

    group: int
    buffers: tuple[int, ...]
    copies: int = 1
    least_slots: tuple[int, ...] = ()
    token_multiple: int = 128
    target_multiple: int = 64
    temperature: float = 1.0
    vocabulary_chunk: int = 0
    execution: Execution = PLAIN

    def __post_init__(self) -> None:
        for name in ("token_multiple", "target_multiple"):
            ranges.check(f"config.replay.{name}", getattr(self, name), ranges.COUNT)
        ranges.check("config.vocabulary_chunk", self.vocabulary_chunk, ranges.NATURAL)
        if not all(isinstance(least, int) and least >= 1 for least in self.least_slots):
            raise ValueError(
                f"config.replay.least_slots={self.least_slots} must hold whole numbers, each at least 1"
            )
        if self.least_slots and len(self.least_slots) != len(self.buffers):
            raise ValueError(
                f"config.replay.least_slots has {len(self.least_slots)} entries for {len(self.buffers)} segment buffers"
            )
        ranges.check("config.sampling.temperature", self.temperature, ranges.POSITIVE)


@flax.struct.dataclass
class SegmentSlots:
    """The inserted clips of a micro-batch that share a buffer length; slots without a clip have num_samples 0.

    Attributes:
        row: i32[C], the row that heard the clip.
        begin: i32[C], its first sample in the recording.
        num_samples: i32[C].
        start: i32[C], index in the answer's row of the clip's first <|AUDIO|>.
    """

    row: Any
    begin: Any
    num_samples: Any
    start: Any


@flax.struct.dataclass
class ReplayBatch:
    """Answers to learn from. In a stack of micro-batches every field has a leading axis more.

    Attributes:
        prompts: Q prompts and their recordings.
        tokens: i32[B, T], B = Q x group answers, those of a prompt (or one of its copies) together. A row starts with
            its prompt's last token, which predicts the answer's first.
        positions: i32[B, K], indices of the sampled tokens, 0 where there are fewer.
        stop_rest: i32[B, K], the stop event at each of them, -1 for none.
        old_logprob: f32[B, K], from the sampler, or computed anew (`recomputed`).
        advantage: f32[B].
        segments: the inserted clips, one entry a buffer length.
        sampler_logprob: f32[B, K], from the sampler, where `old_logprob` is not; else None.
    """

    prompts: Prompts
    tokens: Any
    positions: Any
    stop_rest: Any
    old_logprob: Any
    advantage: Any
    segments: tuple[SegmentSlots, ...]
    sampler_logprob: Any = None


# -------------------- host: rollout to arrays --------------------


def _slots(needed: int, least: int) -> int:
    while least < needed:
        least *= _SLOT_GROWTH
    return least


def _segment_slots(
    rollout: Rollout, rows: Sequence[np.ndarray], begin_b: np.ndarray, options: ReplayOptions
) -> tuple[SegmentSlots, ...]:
    """The clips of each micro-batch (an array of row numbers), stacked, one entry a buffer length.

    Every shard of a micro-batch has as many slots, and in them the clips of its own rows. begin_b[row] is the index in
    the rollout's row at which the answer's row begins.
    """
    shards = options.execution.placement.num_shards("batch")
    num_rows = len(rows[0]) // shards
    least = options.least_slots or (num_rows, *[max(num_rows // 8, 1)] * (len(options.buffers) - 1))
    # [micro-batch and shard][buffer] -> list of (row, begin, num_samples, start)
    found: list[list[list[tuple[int, int, int, int]]]] = []
    for members in rows:
        for first in range(0, len(members), num_rows):
            by_buffer: list[list[tuple[int, int, int, int]]] = [[] for _ in options.buffers]
            for local, row in enumerate(members[first : first + num_rows], first):
                for i in range(int(rollout.num_segments[row])):
                    begin, end = (int(x) for x in rollout.segment_samples[row, i])
                    buffer = int(np.searchsorted(options.buffers, end - begin))
                    start = int(rollout.segment_token_start[row, i] - begin_b[row])
                    by_buffer[buffer].append((local, begin, end - begin, start))
            found.append(by_buffer)
    result = []
    for buffer in range(len(options.buffers)):
        width = _slots(max(len(part[buffer]) for part in found), least[buffer])
        table = np.zeros((len(found), width, 4), np.int32)
        for number, part in enumerate(found):
            if part[buffer]:
                table[number, : len(part[buffer])] = part[buffer]
        table = table.reshape(len(rows), shards * width, 4)
        result.append(SegmentSlots(*(np.ascontiguousarray(table[..., k]) for k in range(4))))
    return tuple(result)


def stack_micro_batches(
    rollout: Rollout,
    prompts: Prompts,
    advantage: np.ndarray,
    queries: np.ndarray,
    micro_batches: int,
    options: ReplayOptions,
) -> ReplayBatch:
    """Arrays of one mini-batch, cut into micro-batches along a new first axis.

    Args:
        rollout: all rows of the step, numpy; row q * copies * group + g answers prompt q.
        prompts: all prompts of the step, numpy.
        advantage: f32[rows of the step].
        queries: the prompts of this mini-batch.
        micro_batches: divides their number.
        options: shapes.

    Raises:
        ValueError: it does not, or the prompts were sampled with a control or with other clips.
    """
    changed = ("insert_waveforms", "insert_shift_samples", "other_clips")
    if given := [name for name in changed if getattr(prompts, name) is not None]:
        raise ValueError(f"prompts.{given[0]} is given, which a replay does not know; leave it out")
    if len(queries) % micro_batches:
        raise ValueError(f"{micro_batches} micro-batches do not divide {len(queries)} queries")
    # Each copy of a prompt has a run of consecutive rows.
    runs = np.asarray(queries)[:, None] * options.copies + np.arange(options.copies)
    runs = runs.reshape(micro_batches, -1)
    chosen = runs // options.copies
    rows = (runs[..., None] * options.group + np.arange(options.group)).reshape(micro_batches, -1)
    flat = rows.reshape(-1)
    begin_b = np.repeat(np.asarray(prompts.length) - 1, options.group * options.copies)
    longest = int(np.max((np.asarray(rollout.length) - begin_b)[rows]))
    length = -(-longest // options.token_multiple) * options.token_multiple
    columns = np.minimum(begin_b[flat, None] + np.arange(length), rollout.tokens.shape[1] - 1)
    positions = targets.positions_of(np.asarray(rollout.sampled)[flat], options.target_multiple)

    def stacked(values: np.ndarray) -> np.ndarray:
        return values.reshape(*rows.shape, *values.shape[1:])

    def sampled(values: Any) -> np.ndarray:
        return stacked(targets.at(np.asarray(values)[flat], positions))

    return ReplayBatch(
        prompts=jax.tree.map(lambda x: np.asarray(x)[chosen], prompts),
        tokens=stacked(targets.at(np.asarray(rollout.tokens)[flat], columns)),
        positions=stacked(np.where(positions > 0, positions - begin_b[flat, None], 0)),
        stop_rest=sampled(rollout.stop_rest),
        old_logprob=sampled(rollout.logprob),
        advantage=np.asarray(advantage, np.float32)[rows],
        segments=_segment_slots(rollout, list(rows), begin_b, options),
    )


# -------------------- device: arrays to log-probabilities --------------------


def hidden_states(
    config: ThinkerConfig, params: Params, batch: ReplayBatch, options: ReplayOptions
) -> jax.Array:
    """Final hidden states of the answers: [B, T, hidden_size]."""
    prompts, placement = batch.prompts, options.execution.placement
    num_samples = jnp.asarray(prompts.num_samples)
    recordings = thinker.AudioClips(
        waveforms=jnp.asarray(prompts.waveforms),
        num_samples=num_samples,
        row=jnp.arange(len(num_samples)),
        start=jnp.asarray(prompts.audio_start),
    )
    tokens_qp = jnp.asarray(prompts.tokens)
    x_qpe = thinker.embed_tokens(config, params, tokens_qp, (recordings,), placement)
    cut = tuple(
        thinker.AudioClips(
            waveforms=_cut(recordings, slots, buffer, options),
            num_samples=slots.num_samples,
            row=slots.row,
            start=slots.start,
        )
        for slots, buffer in zip(batch.segments, options.buffers, strict=True)
    )
    x_bte = thinker.embed_tokens(config, params, batch.tokens, cut, placement)
    return language_model.forward_continuations(
        config.text,
        params["language_model"],
        x_qpe,
        jnp.asarray(prompts.length) - 1,
        x_bte,
        options.execution,
    )


def _cut(
    recordings: thinker.AudioClips, slots: SegmentSlots, buffer: int, options: ReplayOptions
) -> jax.Array:
    """The clips of some slots, f32[C, buffer]; each shard cuts its own from its own recordings."""
    parts = options.execution.placement.num_shards("batch")
    queries = len(recordings.num_samples) // parts

    def cut(
        waveforms: jax.Array, lengths: jax.Array, row: jax.Array, begin: jax.Array, num: jax.Array
    ) -> jax.Array:
        query = row // options.group % queries
        return loop.cut_segments(
            waveforms, lengths, jnp.zeros_like(lengths), query, begin, num, buffer
        )

    split = (
        x.reshape(parts, len(x) // parts, *x.shape[1:])
        for x in (
            recordings.waveforms,
            recordings.num_samples,
            slots.row,
            slots.begin,
            slots.num_samples,
        )
    )
    return jax.vmap(cut)(*split).reshape(-1, buffer)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the sampling distribution depends on beside the logits.

    Attributes:
        sampleable: bool[V], tokens that can be drawn.
        stop_mask: bool[R, V], the tokens of each stop event.
    """

    sampleable: np.ndarray
    stop_mask: np.ndarray


def logprobs(
    config: ThinkerConfig,
    options: ReplayOptions,
    vocabulary: Vocabulary,
    params: Params,
    batch: ReplayBatch,
) -> jax.Array:
    """Log-probabilities of the sampled tokens under `params`: f32[B, K], anything where positions is 0."""
    hidden_bte = hidden_states(config, params, batch, options)

    def of_logits(logits: jax.Array, tokens: jax.Array, stop_rest: jax.Array) -> jax.Array:
        return grpo.token_logprobs(
            logits,
            tokens,
            options.temperature,
            jnp.asarray(vocabulary.sampleable),
            stop_rest,
            vocabulary.stop_mask,
        )

    return head.map_logits(
        params["language_model"],
        targets.predicting(hidden_bte, batch.positions),
        (jnp.take_along_axis(batch.tokens, batch.positions, axis=1), jnp.asarray(batch.stop_rest)),
        of_logits,
        options.vocabulary_chunk,
        options.execution.placement,
    )


def recomputed(batch: ReplayBatch, old_logprob: jax.Array) -> ReplayBatch:
    """The batch with the trainer's log-probabilities, f32[B, K], for the sampler's, which it keeps beside them."""
    return dataclasses.replace(batch, old_logprob=old_logprob, sampler_logprob=batch.old_logprob)


def replay_loss(
    config: ThinkerConfig,
    options: ReplayOptions,
    vocabulary: Vocabulary,
    loss_options: grpo.GrpoOptions,
    params: Params,
    batch: tuple[ReplayBatch, jax.Array | None],
) -> dict[str, SumAndDenominator]:
    """`grpo.policy_loss` of one micro-batch and its reference log-probabilities f32[B, K] (None without KL)."""
    replayed, reference = batch
    return grpo.policy_loss(
        logprobs(config, options, vocabulary, params, replayed),
        replayed.old_logprob,
        reference,
        replayed.advantage,
        replayed.positions > 0,
        loss_options,
        replayed.sampler_logprob,
    )
