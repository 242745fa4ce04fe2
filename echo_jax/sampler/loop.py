"""The interleaved loop: Algorithm 1 of the Echo paper (arXiv 2602.11909) for a batch of rows, on device.

One `lax.while_loop` runs from the prompt to the last token, and goes back and forth between two things:

  decode   every row that does not wait takes one token. The tag automaton reads its bytes; a row that closes a valid
           `<seg>a, b</seg>` starts to wait. Only that part of the cache is read which the longest row has reached,
           in steps of an eighth of its length.
  insert   once enough rows wait for audio, or one has waited long, or none can decode: up to `insertion_slots` waiting
           rows get their clip. It is cut from the row's own waveform, gets its own log-mel, goes through the audio
           tower in a fixed-length buffer, and extends the row's cache in one chunk.

In Algorithm 1 generation stops at the string `</seg>`, so a token such as `>,` loses its tail. Here every token whose
bytes begin with the rest of `</seg>` is one *stop event*: a token is drawn from the ordinary distribution, replaced by
the token that spells exactly the rest, and the log-probability is that of the whole event.

On a mesh every data shard runs this loop on its own rows, with its own insertion slots. What to do next is decided
together (a few numbers are reduced each step), so that all devices run the same programs at the same time.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.arrays import Params
from echo_jax.model import frontend, language_model, thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler.sampling import NEVER, draw, sampling_logits
from echo_jax.sampler.state import FinishReason, SamplerState, SamplingOptions
from echo_jax.text import segments
from echo_jax.text.automaton import Automaton

NO_LIMIT = np.iinfo(np.int32).max
# The cache is read in steps of an eighth of its length, but not in smaller ones than this.
_LEAST_CACHE_STEP = 256


@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop over the rows of one data shard.

    Attributes:
      config: sizes of the model.
      options: how to sample.
      automaton: the tag grammar over the vocabulary.
      sampleable: bool[V], the tokens that an answer may hold.
      data_axes: mesh axes over which the rows are divided; () on one device.
    """

    config: ThinkerConfig
    options: SamplingOptions
    automaton: Automaton
    sampleable: np.ndarray
    data_axes: tuple[str, ...] = ()

    def run(self, params: Params, state: SamplerState, limits: jax.Array) -> SamplerState:
        """Runs until no row is active, for limits[0] steps, or until limits[1] rows have finished."""
        last_step = state.num_decode_steps + state.num_insert_steps
        last_step = jnp.where(limits[0] < NO_LIMIT - last_step, last_step + limits[0], NO_LIMIT)

        def goes_on(state: SamplerState, now: "_Situation") -> jax.Array:
            steps = state.num_decode_steps + state.num_insert_steps
            return now.active & (steps < last_step) & (now.finished < limits[1])

        def decode_while_short(
            visible: int, carry: tuple[SamplerState, _Situation]
        ) -> tuple[SamplerState, _Situation]:
            def short(carry: tuple[SamplerState, _Situation]) -> jax.Array:
                now = carry[1]
                return goes_on(*carry) & ~now.insert & (now.longest <= visible)

            def decode(carry: tuple[SamplerState, _Situation]) -> tuple[SamplerState, _Situation]:
                state = self._decode(params, carry[0], visible)
                return state, self._situation(state)

            return jax.lax.while_loop(short, decode, carry)

        def insert_while_due(
            carry: tuple[SamplerState, _Situation],
        ) -> tuple[SamplerState, _Situation]:
            def due(carry: tuple[SamplerState, _Situation]) -> jax.Array:
                return goes_on(*carry) & carry[1].insert

            def insert(carry: tuple[SamplerState, _Situation]) -> tuple[SamplerState, _Situation]:
                state = self._insert(params, carry[0])
                return state, self._situation(state)

            # A loop and no `cond`: it works on the cache in place for certain.
            return jax.lax.while_loop(due, insert, carry)

        def round_(carry: tuple[SamplerState, _Situation]) -> tuple[SamplerState, _Situation]:
            for visible in cache_steps(state.tokens.shape[1]):
                carry = decode_while_short(visible, carry)
            return insert_while_due(carry) if self.options.insert_audio else carry

        state, _ = jax.lax.while_loop(
            lambda carry: goes_on(*carry), round_, (state, self._situation(state))
        )
        return state

    def _situation(self, state: SamplerState) -> "_Situation":
        waiting = state.waiting & state.active
        full = waiting.sum() >= min(self.options.insertion_slots, len(waiting))
        late = jnp.where(waiting, state.waited, 0).max() >= self.options.insertion_patience
        most = jnp.stack(
            [
                state.active.any().astype(jnp.int32),
                (state.active & ~waiting).any().astype(jnp.int32),
                (full | late).astype(jnp.int32),
                jnp.where(state.active, state.length, 0).max(),
            ]
        )
        finished = (state.finish_reason >= FinishReason.END).sum()
        if self.data_axes:
            most = jax.lax.pmax(most, self.data_axes)
            finished = jax.lax.psum(finished, self.data_axes)
        active, moving, due, longest = most
        return _Situation(active > 0, (due > 0) | (moving == 0), longest, finished)

    def _decode(self, params: Params, state: SamplerState, visible: int) -> SamplerState:
        """One token for every row that is neither finished nor waiting; all are at most `visible` tokens long."""
        config, options = self.config, self.options
        rows = jnp.arange(len(state.tokens))
        moving = state.active & ~state.waiting
        pending = state.tokens[rows, state.length - 1]
        logits, cache = thinker.decode_step(config, params, state.cache, pending, moving, visible)
        logits = jnp.where(self.sampleable, logits, NEVER)
        drawn_from = sampling_logits(logits, options)
        # A row's randomness depends on its own key and position alone, not on the step of the loop.
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.length - state.prompt_length)
        token = draw(drawn_from, keys, options)
        rest = jnp.full_like(token, -1)
        if options.insert_audio:
            rest = self.automaton.rest_index(state.tag)
            token = self.automaton.stop_event(rest, token)
            # Kept only where the token is the stop event, so that a replay needs no second look at the tables.
            rest = jnp.where(token == jnp.asarray(self.automaton.canonical)[rest], rest, -1)

        def log_prob(logits: jax.Array) -> jax.Array:
            return self.automaton.event_logit(logits, rest, token) - jax.nn.logsumexp(logits, -1)

        logprob = log_prob(drawn_from)
        model_logprob = logprob if drawn_from is logits else log_prob(logits)

        write_at = jnp.where(moving, state.length, state.tokens.shape[1])
        length = state.length + moving
        tag = jax.tree.map(
            lambda new, old: jnp.where(moving, new, old),
            self.automaton.advance(state.tag, token),
            state.tag,
        )
        finish = state.finish_reason
        num_turns, waiting, segment_samples = state.num_turns, state.waiting, state.segment_samples
        reason = jnp.full_like(token, -1)
        if options.insert_audio:
            closed = moving & tag.closed
            last_turn = closed & (num_turns >= state.max_turns)
            num_turns = num_turns + (closed & ~last_turn)
            begin, end, reason = segments.check_clip(
                tag.reason, tag.begin, tag.end, state.num_samples
            )
            audio_tokens = frontend.num_audio_tokens(end - begin)
            # <|audio_bos|>, the audio and <|audio_eos|> fit whole or not at all, with room for a token after them.
            fits = length - state.prompt_length + audio_tokens + 2 < state.budget
            reason = jnp.where(
                reason != segments.Reason.VALID,
                reason,
                jnp.where(
                    last_turn,
                    segments.Reason.NO_TURNS_LEFT,
                    jnp.where(fits, segments.Reason.VALID, segments.Reason.NO_ROOM),
                ),
            )
            reason = jnp.where(closed, reason, -1)
            insert = reason == segments.Reason.VALID
            waiting = waiting | insert
            slot = jnp.where(insert, state.num_segments, segment_samples.shape[1])
            segment_samples = segment_samples.at[rows, slot].set(
                jnp.stack([begin, end], -1), mode="drop"
            )
            finish = jnp.where(reason == segments.Reason.NO_ROOM, FinishReason.TOKEN_BUDGET, finish)
            finish = jnp.where(last_turn, FinishReason.TURN_LIMIT, finish)
        used_up = moving & (length - state.prompt_length >= state.budget)
        ended = moving & (token == config.im_end_id)
        finish = jnp.where(
            used_up & (finish == FinishReason.ACTIVE), FinishReason.TOKEN_BUDGET, finish
        )
        finish = jnp.where(ended, FinishReason.END, finish)

        def written(record: jax.Array, value: Any) -> jax.Array:
            return record.at[rows, write_at].set(value, mode="drop")

        return state.replace(
            cache=cache,
            tokens=written(state.tokens, token),
            length=length,
            logprob=written(state.logprob, logprob),
            model_logprob=written(state.model_logprob, model_logprob),
            sampled=written(state.sampled, True),
            stop_rest=written(state.stop_rest, rest),
            stop_reason=written(state.stop_reason, reason),
            tag=tag,
            waiting=waiting & (finish == FinishReason.ACTIVE),
            waited=jnp.where(state.waiting, state.waited + 1, 0),
            num_turns=num_turns,
            segment_samples=segment_samples,
            finish_reason=finish,
            num_decode_steps=state.num_decode_steps + 1,
        )

    def _insert(self, params: Params, state: SamplerState) -> SamplerState:
        """Puts their clip into the context of up to `insertion_slots` waiting rows, those that wait longest first."""
        count = min(self.options.insertion_slots, len(state.tokens))
        # The slots that are left over name rows that do not wait, and write nothing.
        row = jnp.argsort(jnp.where(state.waiting, -state.waited, 1), stable=True)[:count]
        used = state.waiting[row]
        span = state.segment_samples[
            row, jnp.minimum(state.num_segments[row], state.segment_samples.shape[1] - 1)
        ]
        begin, num_samples = span[:, 0], jnp.where(used, span[:, 1] - span[:, 0], 0)
        longest = num_samples.max()
        if self.data_axes:
            longest = jax.lax.pmax(longest, self.data_axes)
        buffers = self.options.segment_buffers(state.waveforms.shape[1])
        # Without the bound, a clip longer than all buffers would be waited for without end; none is.
        bucket = jnp.minimum(jnp.searchsorted(jnp.asarray(buffers), longest), len(buffers) - 1)
        for number, buffer in enumerate(buffers):
            # A loop that runs once or not at all, and no `switch`: inside the loop over rounds the TPU compiler copies
            # the cache in every layer of all but one branch of a conditional.
            def due(carry: tuple[jax.Array, SamplerState], number: int = number) -> jax.Array:
                return carry[0] == number

            def insert(
                carry: tuple[jax.Array, SamplerState], buffer: int = buffer
            ) -> tuple[jax.Array, SamplerState]:
                state = self._insert_clips(params, buffer, carry[1], row, begin, num_samples)
                return jnp.full_like(carry[0], -1), state

            bucket, state = jax.lax.while_loop(due, insert, (bucket, state))
        return state

    def _insert_clips(
        self,
        params: Params,
        buffer_samples: int,
        state: SamplerState,
        row: jax.Array,
        begin: jax.Array,
        num_samples: jax.Array,
    ) -> SamplerState:
        config = self.config
        clip = cut_segments(
            state.waveforms,
            state.num_samples,
            state.insert_shift,
            row,
            begin,
            num_samples,
            buffer_samples,
        )
        audio = thinker.encode_audio(config, params, clip, num_samples)
        num_audio = jnp.where(num_samples > 0, frontend.num_audio_tokens(num_samples), 0)

        # The chunk that is fed: the pending `>` of the tag, <|audio_bos|>, the clip. <|audio_eos|> becomes pending.
        pending = state.tokens[row, state.length[row] - 1]
        head = jnp.stack([pending, jnp.full_like(pending, config.audio_bos_id)], axis=1)
        head = language_model.embed(params["language_model"], head)
        x = jnp.concatenate([head, audio.astype(head.dtype)], axis=1)
        num_new = jnp.where(num_samples > 0, num_audio + 2, 0)
        _, cache = language_model.extend(
            config.text, params["language_model"], state.cache, x, num_new, rows=row
        )

        offsets = jnp.arange(audio.shape[1] + 2)
        inserted = jnp.where(offsets == 0, config.audio_bos_id, config.audio_token_id)
        inserted = jnp.where(offsets == num_audio[:, None] + 1, config.audio_eos_id, inserted)
        columns = jnp.where(
            offsets < num_new[:, None], state.length[row][:, None] + offsets, state.tokens.shape[1]
        )
        slot = jnp.where(
            num_samples > 0, state.num_segments[row], state.segment_token_start.shape[1]
        )
        return state.replace(
            cache=cache,
            tokens=state.tokens.at[row[:, None], columns].set(inserted, mode="drop"),
            length=state.length.at[row].add(num_new),
            waiting=state.waiting.at[row].set(False),
            waited=state.waited.at[row].set(0),
            segment_token_start=state.segment_token_start.at[row, slot].set(
                state.length[row] + 1, mode="drop"
            ),
            num_segments=state.num_segments.at[row].add(num_samples > 0),
            num_insert_steps=state.num_insert_steps + 1,
        )


class _Situation(NamedTuple):
    """What decides the next step, the same on all devices.

    Attributes:
      active: bool, whether a row is not finished.
      insert: bool, whether waiting rows get their audio next.
      longest: i32, tokens of the longest active row.
      finished: i32, rows that hold a finished answer.
    """

    active: jax.Array
    insert: jax.Array
    longest: jax.Array
    finished: jax.Array


def cache_steps(capacity: int) -> list[int]:
    """How many slots of a cache of so many a decode step may read, ascending: each has a loop of its own."""
    step = max(_LEAST_CACHE_STEP, -(-capacity // 8))
    return [*range(step, capacity, step), capacity]


def cut_segments(
    waveforms: jax.Array,
    recording_samples: jax.Array,
    shift_samples: jax.Array,
    row: jax.Array,
    begin: jax.Array,
    num_samples: jax.Array,
    buffer_samples: int,
) -> jax.Array:
    """Cuts clips from recordings.

    Args:
      waveforms: f32[R, S], the recordings.
      recording_samples: i32[R], their lengths.
      shift_samples: i32[R], how much later than `begin` to cut, wrapping round so that clips stay whole (a control).
      row: i32[C], whose recording.
      begin: i32[C], first sample.
      num_samples: i32[C], length, at most buffer_samples.
      buffer_samples: length of the result.

    Returns:
      f32[C, buffer_samples], zero beyond num_samples.
    """
    places = jnp.maximum(recording_samples[row] - num_samples + 1, 1)
    begin = (begin + shift_samples[row]) % places
    offsets = jnp.arange(buffer_samples)
    clip = (
        jnp.asarray(waveforms)
        .at[row[:, None], begin[:, None] + offsets]
        .get(mode="fill", fill_value=0.0)
    )
    return jnp.where(offsets < num_samples[:, None], clip, 0.0)
