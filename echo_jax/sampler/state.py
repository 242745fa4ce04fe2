"""What goes into the sampler, what it carries from step to step, and what it returns."""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from echo_jax import ranges
from echo_jax.arrays import ArraySpec
from echo_jax.model import frontend
from echo_jax.model.config import ThinkerConfig
from echo_jax.model.language_model import KVCache
from echo_jax.model.thinker import AudioClips
from echo_jax.text import automaton


class FinishReason(enum.IntEnum):
    """Why a row stopped."""

    EMPTY = -2
    """The row holds no question."""
    ACTIVE = -1
    END = 0
    """The model wrote `<|im_end|>`."""
    TOKEN_BUDGET = 1
    """The response budget is used up, or the next inserted clip would not fit in it."""
    TURN_LIMIT = 2
    """The last allowed generate call ended at a `</seg>`."""


_RANGES = {
    "max_response_tokens": ranges.COUNT,
    "max_turns": ranges.COUNT,
    "temperature": ranges.NOT_NEGATIVE,
    "top_k": ranges.Range(least=0, whole=True),
    "top_p": ranges.Range(above=0, most=1),
    "min_p": ranges.SHARE,
    "insertion_slots": ranges.COUNT,
    "insertion_patience": ranges.COUNT,
}


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Static choices of a sampler; changing one compiles a new loop.

    Attributes:
      max_response_tokens: budget of a response; inserted audio counts (Echo: 2,048). A prompt may set a lower one.
      max_turns: generate calls an answer, so at most max_turns - 1 insertions (Echo: 8). A prompt may set a lower one.
      insert_audio: True for the interleaved format; False for grounded and conditioned.
      temperature: 0 picks the most probable token.
      top_k: sample among the k most probable tokens; 0 means all.
      top_p: sample among the smallest set of most probable tokens that holds this much probability; 1 means all.
      min_p: sample among the tokens at least so probable as this share of the most probable one; 0 means all.
      insertion_slots: how many rows get audio in one insertion (on a mesh: of each data shard). Rows wait until so many
        are waiting, one has waited long, or nothing else can move.
      insertion_patience: decode steps that a row waits at most while others go on; a low number suits a batch whose
        rows cite seldom. It changes no answer, only how fast they come.
      segment_seconds: lengths of the segment buffers in ascending order. An insertion uses the shortest one that holds
        its longest clip; clips longer than the last use a buffer as long as the recording.
    """

    max_response_tokens: int = 2048
    max_turns: int = 8
    insert_audio: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    insertion_slots: int = 8
    insertion_patience: int = 64
    segment_seconds: tuple[float, ...] = (2.0, 5.0, 10.0, 30.0)

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            ranges.check(name, getattr(self, name), allowed)
        lengths = self.segment_seconds
        if any(value not in ranges.POSITIVE for value in lengths) or list(lengths) != sorted(
            set(lengths)
        ):
            raise ValueError(
                f"segment_seconds={lengths} must hold lengths in seconds, ascending and more than 0"
            )

    @property
    def max_insertions(self) -> int:
        """Most clips that one answer can get."""
        return self.max_turns - 1 if self.insert_audio else 0

    def segment_buffers(self, capacity_samples: int) -> tuple[int, ...]:
        """Buffer lengths in samples for recordings of at most `capacity_samples`; the last holds any segment.

        They are rounded up to whole mel frames.
        """
        frames = [
            -(-round(seconds * frontend.SAMPLE_RATE) // frontend.HOP_SAMPLES)
            for seconds in self.segment_seconds
        ]
        lengths = sorted({count * frontend.HOP_SAMPLES for count in frames})
        return (*(n for n in lengths if n < capacity_samples), capacity_samples)


class Prompts(struct.PyTreeNode):
    """Questions to answer: Q prompts, each about one recording of at most S samples.

    Attributes:
      tokens: i32[Q, P], right padded.
      length: i32[Q].
      waveforms: f32[Q, S], 16 kHz mono, zero beyond num_samples; S a multiple of 160.
      num_samples: i32[Q].
      audio_start: i32[Q], index of the first <|AUDIO|> token of each prompt's recording.
      insert_waveforms: f32[Q, S] or None: the recording that segments are cut from when it is not `waveforms`. Controls
        put silence here; the model still hears the true recording in its prompt.
      insert_shift_samples: i32[Q] or None: segments are cut so much later than cited, wrapping round inside the span of
        start positions that keep the clip whole (a control: another span of the same length).
      other_clips: None, or clips that prompts hold beside their recording, such as an example to compare with. As many
        slots for each prompt, those of a prompt together and in the prompts' order, so `row` is 0, 0, 1, 1, … for two;
        num_samples is 0 where a prompt has fewer. They are heard, and never cut: a citation means the recording.
      max_response_tokens: i32[Q] or None: budgets of single prompts, from 1 to that of the options.
      max_turns: i32[Q] or None, likewise.
    """

    tokens: jax.Array | np.ndarray
    length: jax.Array | np.ndarray
    waveforms: jax.Array | np.ndarray
    num_samples: jax.Array | np.ndarray
    audio_start: jax.Array | np.ndarray
    insert_waveforms: jax.Array | np.ndarray | None = None
    insert_shift_samples: jax.Array | np.ndarray | None = None
    other_clips: AudioClips | None = None
    max_response_tokens: jax.Array | np.ndarray | None = None
    max_turns: jax.Array | np.ndarray | None = None

    def check(self) -> None:
        """Checks that the arrays fit each other; numbers only where they are on the host.

        Raises:
          ValueError: one does not; the message names it.
        """
        if np.ndim(self.tokens) != 2 or np.ndim(self.waveforms) != 2:
            raise ValueError(
                f"prompts need tokens [Q, P] and waveforms [Q, S], not {np.shape(self.tokens)} and "
                f"{np.shape(self.waveforms)}"
            )
        count, samples = len(self.tokens), self.waveforms.shape[1]
        if samples % frontend.HOP_SAMPLES:
            raise ValueError(
                f"prompts.waveforms hold {samples} samples; pad them to a multiple of {frontend.HOP_SAMPLES}"
            )
        shapes = {
            "length": (count,),
            "waveforms": (count, samples),
            "num_samples": (count,),
            "audio_start": (count,),
            "insert_waveforms": (count, samples),
            "insert_shift_samples": (count,),
            "max_response_tokens": (count,),
            "max_turns": (count,),
        }
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and np.shape(value) != shape:
                raise ValueError(
                    f"prompts.{name} has shape {np.shape(value)}, but {shape} is needed"
                )
        self._check_numbers(self.tokens.shape[1], samples)
        if self.other_clips is not None:
            rows = self.other_clips.row
            per_prompt = len(rows) // count
            if len(rows) != per_prompt * count or not per_prompt:
                raise ValueError(
                    f"prompts.other_clips has {len(rows)} slots for {count} prompts; give as many for each"
                )
            in_order = np.repeat(np.arange(count), per_prompt)
            if isinstance(rows, np.ndarray) and not np.array_equal(rows, in_order):
                raise ValueError(
                    f"prompts.other_clips.row is {rows.tolist()}, but {in_order.tolist()} is needed"
                )

    def _check_numbers(self, prompt_tokens: int, samples: int) -> None:
        length, num_samples, start = self.length, self.num_samples, self.audio_start
        for name, value, most in (
            ("length", length, prompt_tokens),
            ("num_samples", num_samples, samples),
        ):
            if isinstance(value, np.ndarray) and ((value < 1) | (value > most)).any():
                raise ValueError(f"prompts.{name} is {value.tolist()}; all must lie in [1, {most}]")
        if all(isinstance(value, np.ndarray) for value in (length, num_samples, start)):
            ends = start + frontend.num_audio_tokens(np.asarray(num_samples))
            if ((start < 0) | (ends > length)).any():
                raise ValueError(
                    f"prompts.audio_start is {np.asarray(start).tolist()}, but the audio then ends at "
                    f"{np.asarray(ends).tolist()} in prompts of {np.asarray(length).tolist()} tokens"
                )


class SamplerState(struct.PyTreeNode):
    """The loop's state for B rows of at most L tokens and M insertions.

    Invariants: `tokens[b, :length[b]]` is the row so far. Its last token is *pending*: known, but not yet fed to the
    model, so an unfinished row has `cache.length == length - 1`. A row with `waiting` set has just closed a valid tag
    whose sample range stands in `segment_samples[b, num_segments[b]]`; it takes no decode step until its clip is in.
    No row reads another's part of anything.
    """

    cache: KVCache
    waveforms: Any  # f32[B, S], what segments are cut from
    num_samples: Any  # i32[B]
    insert_shift: Any  # i32[B]
    budget: Any  # i32[B], most tokens of the response
    max_turns: Any  # i32[B]
    tokens: Any  # i32[B, L]
    prompt_length: Any  # i32[B]
    length: Any  # i32[B]
    logprob: Any  # f32[B, L]
    model_logprob: Any  # f32[B, L]
    sampled: Any  # bool[B, L]
    stop_rest: Any  # i32[B, L]
    stop_reason: Any  # i32[B, L]
    tag: automaton.Carry  # one automaton a row
    waiting: Any  # bool[B]
    waited: Any  # i32[B], decode steps since the row began to wait
    num_turns: Any  # i32[B]
    num_segments: Any  # i32[B]
    segment_samples: Any  # i32[B, M, 2]
    segment_token_start: Any  # i32[B, M]
    finish_reason: Any  # i32[B]
    keys: Any  # typed random keys [B]
    num_decode_steps: Any  # i32[]
    num_insert_steps: Any  # i32[]

    @property
    def active(self) -> jax.Array:
        """bool[B], rows that are not finished."""
        return self.finish_reason == FinishReason.ACTIVE

    @staticmethod
    def specs(
        config: ThinkerConfig,
        options: SamplingOptions,
        rows: int,
        prompt_tokens: int,
        samples: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
        key_dtype: Any = None,
        head_copies: int = 1,
    ) -> "SamplerState":
        """Declares all arrays of the state.

        Args:
          config: sizes of the model.
          options: budgets.
          rows: B.
          prompt_tokens: room for a prompt; L is this and the response's budget.
          samples: S, room for a recording.
          dtype: of the cache.
          key_dtype: of the random keys; None for those of `jax.random.key`.
          head_copies: how often the cache holds each key/value head (`KVCache.specs`).
        """
        length, clips = prompt_tokens + options.max_response_tokens, max(options.max_insertions, 1)

        def per_row(dtype: Any, *shape: int) -> ArraySpec:
            return ArraySpec((rows, *shape), ("batch", *[None] * len(shape)), "zeros", dtype=dtype)

        number, counter = per_row(jnp.int32), ArraySpec((), (), "zeros", dtype=jnp.int32)
        tag: dict[str, Any] = dict.fromkeys(automaton.Carry.__dataclass_fields__, number)
        tag["closed"] = per_row(jnp.bool_)
        return SamplerState(
            cache=KVCache.specs(config.text, rows, length, dtype, head_copies),
            waveforms=per_row(jnp.float32, samples),
            num_samples=number,
            insert_shift=number,
            budget=number,
            max_turns=number,
            tokens=per_row(jnp.int32, length),
            prompt_length=number,
            length=number,
            logprob=per_row(jnp.float32, length),
            model_logprob=per_row(jnp.float32, length),
            sampled=per_row(jnp.bool_, length),
            stop_rest=per_row(jnp.int32, length),
            stop_reason=per_row(jnp.int32, length),
            tag=automaton.Carry(**tag),
            waiting=per_row(jnp.bool_),
            waited=number,
            num_turns=number,
            num_segments=number,
            segment_samples=per_row(jnp.int32, clips, 2),
            segment_token_start=per_row(jnp.int32, clips),
            finish_reason=number,
            keys=per_row(key_dtype or jax.eval_shape(jax.random.key, 0).dtype),
            num_decode_steps=counter,
            num_insert_steps=counter,
        )


class Rollout(struct.PyTreeNode):
    """Finished answers; with the prompts, all a trainer needs to replay the same sequences.

    The position of a token is its index in the row.

    Attributes:
      tokens: i32[B, L], prompt and response, right padded.
      prompt_length: i32[B].
      length: i32[B], prompt and response.
      logprob: f32[B, L], log-probability of tokens[b, t] under the sampling distribution, of the event where one token
        stands for a stop event; 0 where nothing was sampled.
      model_logprob: f32[B, L], the same under the model itself: temperature 1 and all tokens that an answer may hold.
      sampled: bool[B, L]; inserted audio and the prompt are not.
      stop_rest: i32[B, L], the automaton's `rest_index` before the token at t, with which
        `Automaton.event_logit` gives the logit of the token or its event; -1 where nothing can stop.
      stop_reason: i32[B, L], the `segments.Reason` of the `</seg>` that the token at t closes: VALID where its audio
        follows, or why there is none; -1 where none is closed.
      segment_samples: i32[B, M, 2], begin and end of each inserted clip in the recording's samples.
      segment_token_start: i32[B, M], index of the first <|AUDIO|> of each inserted clip.
      num_segments: i32[B], inserted clips.
      finish_reason: i32[B], a `FinishReason`.
      num_turns: i32[B], generate calls begun; one that a `</seg>` at the end of the budget would begin counts.
      num_decode_steps: i32[], decode steps of the loop.
      num_insert_steps: i32[], insertions of the loop.
    """

    tokens: jax.Array | np.ndarray
    prompt_length: jax.Array | np.ndarray
    length: jax.Array | np.ndarray
    logprob: jax.Array | np.ndarray
    model_logprob: jax.Array | np.ndarray
    sampled: jax.Array | np.ndarray
    stop_rest: jax.Array | np.ndarray
    stop_reason: jax.Array | np.ndarray
    segment_samples: jax.Array | np.ndarray
    segment_token_start: jax.Array | np.ndarray
    num_segments: jax.Array | np.ndarray
    finish_reason: jax.Array | np.ndarray
    num_turns: jax.Array | np.ndarray
    num_decode_steps: jax.Array | np.ndarray
    num_insert_steps: jax.Array | np.ndarray
