"""Any number of questions through a fixed batch: rows that finish are refilled without waiting for the slowest."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.arrays import Params
from echo_jax.sampler.sampler import Sampler
from echo_jax.sampler.state import FinishReason, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class Request:
    """A question to stream.

    Attributes:
      prompts: one prompt (Q = 1), its arrays as long as they need to be.
      key: typed random key, the question's own; answer g draws with `fold_in(key, g)`.
    """

    prompts: Prompts
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
      index: of its request, counted from 0.
      sample: which of the request's answers it is.
      rollout: its one row (B = 1), in numpy; the counters of steps are the whole stream's so far.
    """

    index: int
    sample: int
    rollout: Rollout


def stream(
    sampler: Sampler,
    params: Params,
    requests: Iterable[Request],
    *,
    rows: int,
    prompt_tokens: Sequence[int],
    samples: int,
    num_samples: int = 1,
    refill: int | None = None,
) -> Iterator[Answer]:
    """Answers questions as rows become free, and yields the answers as they finish.

    Each question is prefilled once, as soon as there is a free row for every one of its answers. While the device
    works, the next questions are read. What is compiled: a prefill for each of `prompt_tokens` that is needed, and one
    loop.

    Args:
      sampler: the model and how to sample.
      params: the model's arrays.
      requests: the questions, taken as they are needed; all with the same optional fields, and as many other clips of
        the same length. What it raises is raised once the questions before are answered.
      rows: B, answers in the making at a time; a multiple of `num_samples`, or some stay idle.
      prompt_tokens: lengths to which prompts are padded, ascending. Questions that are admitted together take the
        shortest that holds them all.
      samples: room for a recording, a multiple of 160.
      num_samples: answers a question.
      refill: questions that are admitted together; None for an eighth of what the batch holds. A small number keeps
        rows busy, a large one makes better use of a prefill.

    Raises:
      ValueError: the rows do not hold one question's answers in each data shard, or a question does not fit; the
        message names it by its index.
    """
    shards = sampler.num_shards
    if rows % shards or rows // shards < num_samples:
        raise ValueError(
            f"rows={rows} must be a multiple of the mesh's {shards} data shards, each with room for "
            f"num_samples={num_samples} answers"
        )
    held = rows // num_samples
    # Prompts of one prefill, as many for each shard.
    width = max(1, min(held, held // 8 if refill is None else refill) // shards) * shards
    seats = _Seats(rows, shards, num_samples)
    queue = _Queue(requests, prompt_tokens, samples)
    state = None
    answers: list[Answer] = []
    while True:
        while queue.fill(width):
            slots = seats.free_slots(width)
            # A prefill that is nearly empty costs as much as a full one.
            if 2 * len(slots) < min(width, len(queue)):
                break
            wave = [(slot, *queue.take()) for slot in slots[: len(queue)]]
            # Slots that stay empty repeat a question, and write nothing.
            filled = [wave[0][2]] * width
            at = np.full((width, num_samples), rows, np.int32)
            for slot, index, request in wave:
                filled[slot] = request
                at[slot] = seats.take(slot * shards // width, index)
            longest = max(request.prompts.tokens.shape[1] for request in filled)
            padded = next(length for length in prompt_tokens if length >= longest)
            prompts = stack([request.prompts for request in filled], padded, samples)
            keys = _answer_keys(jnp.stack([request.key for request in filled]), num_samples)
            if state is None:
                state = sampler.empty(params, rows, max(prompt_tokens), samples, keys[0, 0])
            state = sampler.admit(params, state, prompts, keys, at)
        if state is not None and seats.answers:
            state = sampler.run(params, state, min_finished=width * num_samples)
        # While the device works: what was ready before, and what comes next.
        yield from answers
        if state is None or not seats.answers:
            if queue.error is not None:
                raise queue.error
            return
        answers = []
        queue.fill(width)
        finished = np.flatnonzero(np.asarray(state.finish_reason) >= FinishReason.END)
        count = width * num_samples
        for begin in range(0, len(finished), count):
            part = finished[begin : begin + count]
            state, taken = sampler.take(state, np.append(part, np.full(count - len(part), rows)))
            taken = jax.device_get(taken)
            for place, row in enumerate(part.tolist()):
                answers.append(Answer(*seats.leave(row), _one_row(taken, place)))


def stack(parts: Sequence[Prompts], prompt_tokens: int, samples: int) -> Prompts:
    """Puts prompts of different lengths into one, in numpy.

    Args:
      parts: prompts with the same optional fields.
      prompt_tokens: P of the result.
      samples: S of the result.

    Raises:
      ValueError: some have an optional field and others do not, or one is longer than that.
    """

    def join(*arrays: Any) -> np.ndarray:
        lengths = {np.shape(x)[1:] for x in arrays}
        if len(lengths) == 1:
            return np.concatenate(arrays)
        widest = max(np.shape(x)[1] for x in arrays)
        return np.concatenate([_widened(x, widest) for x in arrays])

    if len({_kind(part) for part in parts}) > 1:
        raise ValueError(_OTHER_KIND)
    joined = jax.tree.map(join, *parts)
    if joined.other_clips is not None:
        slots = len(joined.other_clips.row)
        in_order = np.repeat(np.arange(len(joined.length)), slots // len(joined.length))
        joined = joined.replace(other_clips=joined.other_clips.replace(row=in_order))
    widths = {
        "tokens": prompt_tokens,
        "waveforms": samples,
        **({} if joined.insert_waveforms is None else {"insert_waveforms": samples}),
    }
    return joined.replace(
        **{name: _widened(getattr(joined, name), width) for name, width in widths.items()}
    )


_OTHER_KIND = (
    "prompts that are sampled together need the same optional fields, and as many other clips of the same length; some "
    "have insert_waveforms, insert_shift_samples, other_clips or a limit, others have not"
)


def _kind(prompts: Prompts) -> tuple[Any, ...]:
    """What must be equal in prompts that are sampled together."""
    others = prompts.other_clips
    clips = (
        () if others is None else (len(others.row) / len(prompts.length), others.waveforms.shape[1])
    )
    return jax.tree.structure(prompts), clips


def _widened(x: Any, width: int) -> np.ndarray:
    x = np.asarray(x)
    if x.shape[1] > width:
        raise ValueError(f"an array of {x.shape[1]} columns does not fit into {width}")
    return np.pad(x, ((0, 0), (0, width - x.shape[1])))


@functools.partial(jax.jit, static_argnums=1)
def _answer_keys(keys: jax.Array, num_samples: int) -> jax.Array:
    """Keys [Q] -> [Q, G]."""
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(fold_in, (0, None))(keys, jnp.arange(num_samples))


def _one_row(rollout: Rollout, row: int) -> Rollout:
    return jax.tree.map(lambda x: x[row : row + 1] if np.ndim(x) else x, rollout)


class _Queue:
    """Requests that have been read and not yet admitted."""

    def __init__(self, requests: Iterable[Request], prompt_tokens: Sequence[int], samples: int):
        self._source = enumerate(requests)
        self._limits = (max(prompt_tokens), samples)
        self._read: list[tuple[int, Request]] = []
        self._kind: tuple[Any, ...] | None = None
        self.error: Exception | None = None

    def __len__(self) -> int:
        return len(self._read)

    def fill(self, count: int) -> bool:
        """Reads on until there are `count`, and says whether there is any; an error ends the reading and is kept."""
        try:
            self._fill(count)
        except Exception as error:  # whatever the caller's iterator raises
            self.error, self._source = error, enumerate(())
        return bool(self._read)

    def _fill(self, count: int) -> None:
        for index, request in itertools.islice(self._source, max(0, count - len(self._read))):
            prompts = request.prompts
            try:
                prompts.check()
                self._kind = self._kind or _kind(prompts)
                if _kind(prompts) != self._kind:
                    raise ValueError(_OTHER_KIND)
            except ValueError as error:
                raise ValueError(f"request {index}: {error}") from None
            have = (prompts.tokens.shape[1], prompts.waveforms.shape[1])
            if len(prompts.tokens) != 1 or any(
                n > most for n, most in zip(have, self._limits, strict=True)
            ):
                raise ValueError(
                    f"request {index} has {len(prompts.tokens)} prompts of {have[0]} tokens and {have[1]} samples; "
                    f"give one of at most {self._limits[0]} tokens and {self._limits[1]} samples"
                )
            self._read.append((index, request))

    def take(self) -> tuple[int, Request]:
        return self._read.pop(0)


class _Seats:
    """Which answer each row is making. Rows are numbered through, but a shard counts its own from 0."""

    def __init__(self, rows: int, shards: int, num_samples: int):
        self._per_shard, self._num_samples = rows // shards, num_samples
        self._free = [list(range(self._per_shard)) for _ in range(shards)]
        self.answers: dict[int, tuple[int, int]] = {}

    def free_slots(self, width: int) -> list[int]:
        """Of a wave of `width` prompts, those for whose answers there are rows in their shard."""
        each = width // len(self._free)
        room = [len(free) // self._num_samples for free in self._free]
        slots = [slot for slot in range(width) if slot % each < room[slot // each]]
        return sorted(slots, key=lambda slot: slot % each)  # fills all shards alike

    def take(self, shard: int, index: int) -> list[int]:
        """Gives a request its rows."""
        rows = [self._free[shard].pop(0) for _ in range(self._num_samples)]
        for sample, row in enumerate(rows):
            self.answers[shard * self._per_shard + row] = (index, sample)
        return rows

    def leave(self, row: int) -> tuple[int, int]:
        """Frees a row, and says whose it was."""
        self._free[row // self._per_shard].append(row % self._per_shard)
        return self.answers.pop(row)
