"""What goes into the sampler, what it carries from step to step, and what it returns."""

import dataclasses
import enum
import math

import jax
import numpy as np
from flax import struct

from echo_jax.model import frontend
from echo_jax.model.language_model import KVCache
from echo_jax.text import automaton


class FinishReason(enum.IntEnum):
    """Why a row stopped."""

    ACTIVE = -1
    END = 0
    """The model wrote `<|im_end|>`."""
    TOKEN_BUDGET = 1
    """The response budget is used up, or the next inserted clip would not fit in it."""
    TURN_LIMIT = 2
    """The last allowed generate call ended at a `</seg>`."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Static choices of a sampler; changing one compiles a new loop.

    Attributes:
      max_response_tokens: budget of a response; inserted audio counts (Echo: 2,048).
      max_turns: generate calls an answer, so at most max_turns - 1 insertions (Echo: 8).
      insert_audio: True for the interleaved format; False for grounded and conditioned.
      temperature: 0 picks the most probable token.
      top_k: sample among the k most probable tokens; 0 means all.
      top_p: sample among the smallest set of most probable tokens that holds this much probability; 1 means all.
      insertion_slots: how many rows get audio in one insertion; rows wait until so many are waiting or nothing else
        can move.
      segment_seconds: lengths of the segment buffers in ascending order. An insertion uses the shortest one that holds
        its longest clip; clips longer than the last use a buffer as long as the recording.
    """

    max_response_tokens: int = 2048
    max_turns: int = 8
    insert_audio: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    insertion_slots: int = 8
    segment_seconds: tuple[float, ...] = (2.0, 5.0, 10.0, 30.0)

    def __post_init__(self) -> None:
        if self.max_response_tokens < 1 or self.max_turns < 1 or self.insertion_slots < 1:
            raise ValueError(
                "max_response_tokens, max_turns and insertion_slots must be at least 1"
            )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must lie in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is negative")
        if (
            list(self.segment_seconds) != sorted(set(self.segment_seconds))
            or min(self.segment_seconds, default=1) <= 0
        ):
            raise ValueError(
                f"segment_seconds {self.segment_seconds} must be positive and ascending"
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
    """Questions to answer: Q prompts with one recording each.

    Attributes:
      tokens: i32[Q, P], right padded.
      length: i32[Q].
      waveforms: f32[Q, S], 16 kHz mono, zero beyond num_samples; S a multiple of 160.
      num_samples: i32[Q].
      audio_start: i32[Q], index of the first <|AUDIO|> token of each prompt.
      insert_waveforms: f32[Q, S] or None: the recording that segments are cut from when it is not `waveforms`. Controls
        put silence here; the model still hears the true recording in its prompt.
      insert_shift_samples: i32[Q] or None: segments are cut so much later than cited, wrapping round inside the span of
        start positions that keep the clip whole (a control: another span of the same length).
    """

    tokens: jax.Array | np.ndarray
    length: jax.Array | np.ndarray
    waveforms: jax.Array | np.ndarray
    num_samples: jax.Array | np.ndarray
    audio_start: jax.Array | np.ndarray
    insert_waveforms: jax.Array | np.ndarray | None = None
    insert_shift_samples: jax.Array | np.ndarray | None = None

    def check_shapes(self) -> None:
        """Checks that the arrays fit each other.

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
        }
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and np.shape(value) != shape:
                raise ValueError(
                    f"prompts.{name} has shape {np.shape(value)}, but {shape} is needed"
                )


class SamplerState(struct.PyTreeNode):
    """The loop's state for B rows of at most L tokens and M insertions.

    Invariants: `tokens[b, :length[b]]` is the row so far. Its last token is *pending*: known, but not yet fed to the
    model, so an unfinished row has `cache.length == length - 1`. A row with `waiting` set has just closed a valid tag
    whose sample range stands in `segment_samples[b, num_segments[b]]`; it takes no decode step until its clip is in.
    """

    cache: KVCache
    tokens: jax.Array  # i32[B, L]
    prompt_length: jax.Array  # i32[B]
    length: jax.Array  # i32[B]
    logprob: jax.Array  # f32[B, L]
    sampled: jax.Array  # bool[B, L]
    stop_rest: jax.Array  # i32[B, L]
    tag: automaton.Carry  # one automaton a row
    waiting: jax.Array  # bool[B]
    num_turns: jax.Array  # i32[B]
    num_segments: jax.Array  # i32[B]
    segment_samples: jax.Array  # i32[B, M, 2]
    segment_token_start: jax.Array  # i32[B, M]
    finish_reason: jax.Array  # i32[B]
    keys: jax.Array  # typed random keys [B]
    num_decode_steps: jax.Array  # i32[]
    num_insert_steps: jax.Array  # i32[]

    @property
    def active(self) -> jax.Array:
        """bool[B], rows that are not finished."""
        return self.finish_reason == FinishReason.ACTIVE


class Rollout(struct.PyTreeNode):
    """Finished answers; all a trainer needs to replay the same sequences.

    Attributes:
      tokens: i32[B, L], prompt and response, right padded.
      prompt_length: i32[B].
      length: i32[B], prompt and response.
      logprob: f32[B, L], log-probability of tokens[b, t] under the sampling distribution, of the event where one token
        stands for a stop event; 0 where nothing was sampled.
      sampled: bool[B, L]; inserted audio and the prompt are not.
      stop_rest: i32[B, L], the automaton's `rest_index` before the token at t, with which
        `Automaton.event_log_prob` gives the token's or its event's log-probability; -1 where nothing can stop.
      segment_samples: i32[B, M, 2], begin and end of each inserted clip in the recording's samples.
      segment_token_start: i32[B, M], index of the first <|AUDIO|> of each inserted clip.
      num_segments: i32[B], inserted clips.
      finish_reason: i32[B], a `FinishReason`.
      num_turns: i32[B], generate calls.
      num_decode_steps: i32[], decode steps of the loop.
      num_insert_steps: i32[], insertions of the loop.
    """

    tokens: jax.Array | np.ndarray
    prompt_length: jax.Array | np.ndarray
    length: jax.Array | np.ndarray
    logprob: jax.Array | np.ndarray
    sampled: jax.Array | np.ndarray
    stop_rest: jax.Array | np.ndarray
    segment_samples: jax.Array | np.ndarray
    segment_token_start: jax.Array | np.ndarray
    num_segments: jax.Array | np.ndarray
    finish_reason: jax.Array | np.ndarray
    num_turns: jax.Array | np.ndarray
    num_decode_steps: jax.Array | np.ndarray
    num_insert_steps: jax.Array | np.ndarray
