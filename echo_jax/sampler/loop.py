"""The interleaved loop: Algorithm 1 of the Echo paper (arXiv 2602.11909) for a batch of rows, on device.

One `lax.while_loop` runs from the prompt to the last token. An iteration is one of two cases:

  insert   enough rows wait for audio, or no row can decode: up to `insertion_slots` waiting rows get their clip. It is
           cut from the row's own waveform, gets its own log-mel, goes through the audio tower in a fixed-length buffer,
           and extends the row's cache in one chunk.
  decode   every row that does not wait takes one token. The tag automaton reads its bytes; a row that closes a valid
           `<seg>a, b</seg>` starts to wait.

In Algorithm 1 generation stops at the string `</seg>`, so a token such as `>,` loses its tail. Here every token whose
bytes begin with the rest of `</seg>` is one *stop event*: a token is drawn from the ordinary distribution, replaced by
the token that spells exactly the rest, and the log-probability is that of the whole event.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.arrays import Params
from echo_jax.model import frontend, language_model, thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.model.language_model import KVCache
from echo_jax.sampler.state import FinishReason, Prompts, Rollout, SamplerState, SamplingOptions
from echo_jax.text import segments
from echo_jax.text.automaton import Automaton
from echo_jax.text.tokenizer import Tokenizer

_NEVER = -1e30


class Sampler:
    """Answers batches of prompts with one model configuration and one set of options.

    Example:
      sampler = Sampler(config, tokenizer, SamplingOptions(temperature=0.0))
      rollout = sampler(params, prompts, jax.random.key(0))
    """

    def __init__(self, config: ThinkerConfig, tokenizer: Tokenizer, options: SamplingOptions):
        """Builds the tables of the vocabulary; nothing is compiled before the first call.

        Raises:
          ValueError: model and tokenizer do not belong together, or the vocabulary cannot stop at `</seg>`.
        """
        for name in ("im_end_id", "audio_token_id", "audio_bos_id", "audio_eos_id"):
            model_id, id_ = getattr(config, name), tokenizer.config_ids[name]
            if model_id != id_:
                raise ValueError(
                    f"the model's {name} is {model_id} but the tokenizer's is {id_}; load both from one checkpoint"
                )
        self.config = config
        self.options = options
        self.automaton = Automaton.build(tokenizer.token_bytes, config.text.vocab_size)
        # No control token but <|im_end|> can be sampled: a literal <|AUDIO|> in an answer would be taken for sound.
        self.sampleable = tokenizer.sampleable(config.text.vocab_size)
        self._start = jax.jit(self._start_impl, static_argnames="num_samples")
        # The state is donated: its cache, by far the largest buffer, is updated in place from call to call.
        self._run = jax.jit(self._run_impl, donate_argnames="state")

    def __call__(
        self, params: Params, prompts: Prompts, key: jax.Array, num_samples: int = 1
    ) -> Rollout:
        """Answers every prompt `num_samples` times.

        Args:
          params: the model's arrays.
          prompts: Q questions.
          key: one typed random key; row r uses `fold_in(key, r)`. Or a key array [Q * num_samples], one a row.
          num_samples: answers a prompt (the G of GRPO); they share one prefill.

        Returns:
          Q * num_samples rows; rows [q * num_samples, (q + 1) * num_samples) answer prompt q.

        Raises:
          ValueError: the keys or the prompts have the wrong shape; see `start`.
        """
        state = self.start(params, prompts, key, num_samples)
        return self.finish(self.run(params, state, prompts))

    def start(
        self, params: Params, prompts: Prompts, key: jax.Array, num_samples: int = 1
    ) -> SamplerState:
        """Prefills the prompts and returns the state before the first sampled token.

        Raises:
          ValueError: num_samples is not positive, `key` is no typed key or not one a row, or the prompts' arrays do
            not fit each other.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples {num_samples} must be at least 1")
        prompts.check_shapes()
        rows = prompts.tokens.shape[0] * num_samples
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"key has dtype {key.dtype}; make a typed key with jax.random.key(seed)"
            )
        if key.ndim == 0:
            key = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
        if key.shape != (rows,):
            raise ValueError(
                f"key has shape {key.shape}; give one key, or one for each of the {rows} rows"
            )
        return self._start(params, prompts, key, num_samples=num_samples)

    def run(
        self, params: Params, state: SamplerState, prompts: Prompts, max_steps: int | None = None
    ) -> SamplerState:
        """Runs until every row is finished, or for `max_steps` loop iterations (streaming). Consumes `state`."""
        return self._run(
            params, state, prompts, np.iinfo(np.int32).max if max_steps is None else max_steps
        )

    @staticmethod
    def finish(state: SamplerState) -> Rollout:
        """Keeps what a trainer or an evaluator needs of a state."""
        return Rollout(**{name: getattr(state, name) for name in Rollout.__dataclass_fields__})

    # ------------------------------------------------------------------------------------------------ start

    def _start_impl(
        self, params: Params, prompts: Prompts, keys: jax.Array, *, num_samples: int
    ) -> SamplerState:
        config, options = self.config, self.options
        num_prompts, prompt_slots = prompts.tokens.shape
        capacity = prompt_slots + options.max_response_tokens
        clips = thinker.AudioClips(
            jnp.asarray(prompts.waveforms),
            jnp.asarray(prompts.num_samples),
            jnp.arange(num_prompts),
            jnp.asarray(prompts.audio_start),
        )
        # All but the last token: the last one is the first pending token.
        _, cache = thinker.prefill(
            config,
            params,
            jnp.asarray(prompts.tokens),
            jnp.asarray(prompts.length) - 1,
            (clips,),
            capacity,
        )
        repeat = functools.partial(jnp.repeat, repeats=num_samples)
        cache = KVCache(
            repeat(cache.k, axis=1), repeat(cache.v, axis=1), repeat(cache.length, axis=0)
        )
        rows = num_prompts * num_samples
        slots = max(options.max_insertions, 1)
        tokens = jnp.pad(
            jnp.asarray(prompts.tokens),
            ((0, 0), (0, options.max_response_tokens)),
            constant_values=config.pad_id,
        )
        length = repeat(jnp.asarray(prompts.length), axis=0)
        return SamplerState(
            cache=cache,
            tokens=repeat(tokens, axis=0),
            prompt_length=length,
            length=length,
            logprob=jnp.zeros((rows, capacity), jnp.float32),
            sampled=jnp.zeros((rows, capacity), bool),
            stop_rest=jnp.full((rows, capacity), -1, jnp.int32),
            tag=self.automaton.init((rows,)),
            waiting=jnp.zeros(rows, bool),
            num_turns=jnp.ones(rows, jnp.int32),
            num_segments=jnp.zeros(rows, jnp.int32),
            segment_samples=jnp.zeros((rows, slots, 2), jnp.int32),
            segment_token_start=jnp.zeros((rows, slots), jnp.int32),
            finish_reason=jnp.full(rows, FinishReason.ACTIVE, jnp.int32),
            keys=keys,
            num_decode_steps=jnp.zeros((), jnp.int32),
            num_insert_steps=jnp.zeros((), jnp.int32),
        )

    # ------------------------------------------------------------------------------------------------ loop

    def _run_impl(
        self, params: Params, state: SamplerState, prompts: Prompts, max_steps: jax.Array
    ) -> SamplerState:
        first_step = state.num_decode_steps + state.num_insert_steps

        def unfinished(state: SamplerState) -> jax.Array:
            steps = state.num_decode_steps + state.num_insert_steps - first_step
            return state.active.any() & (steps < max_steps)

        def step(state: SamplerState) -> SamplerState:
            decode = functools.partial(self._decode, params, prompts)
            if not self.options.insert_audio:
                return decode(state)
            waiting = state.waiting.sum()
            insert_now = (waiting >= self.options.insertion_slots) | ~(
                state.active & ~state.waiting
            ).any()
            return jax.lax.cond(
                insert_now, functools.partial(self._insert, params, prompts), decode, state
            )

        return jax.lax.while_loop(unfinished, step, state)

    def _decode(self, params: Params, prompts: Prompts, state: SamplerState) -> SamplerState:
        """One token for every row that is neither finished nor waiting."""
        config, options = self.config, self.options
        rows = jnp.arange(state.tokens.shape[0])
        moving = state.active & ~state.waiting
        pending = state.tokens[rows, state.length - 1]
        logits, cache = thinker.decode_step(config, params, state.cache, pending, moving)
        logits = jnp.where(self.sampleable, logits, _NEVER)
        # A row's randomness depends on its own key and position alone, not on the step of the loop.
        keys = jax.vmap(jax.random.fold_in)(state.keys, state.length - state.prompt_length)
        token, log_probs = sample(logits, keys, options)
        rest = jnp.full_like(token, -1)
        if options.insert_audio:
            rest = self.automaton.rest_index(state.tag)
            token = self.automaton.stop_event(rest, token)
            # Kept only where the token is the stop event, so that a replay needs no second look at the tables.
            rest = jnp.where(token == jnp.asarray(self.automaton.canonical)[rest], rest, -1)
        logprob = self.automaton.event_log_prob(log_probs, rest, token)

        write_at = jnp.where(moving, state.length, state.tokens.shape[1])
        length = state.length + moving
        tag = jax.tree.map(
            lambda new, old: jnp.where(moving, new, old),
            self.automaton.advance(state.tag, token),
            state.tag,
        )
        finish = state.finish_reason
        num_turns, waiting, segment_samples = state.num_turns, state.waiting, state.segment_samples
        if options.insert_audio:
            closed = moving & tag.closed
            last_turn = closed & (num_turns >= options.max_turns)
            num_turns = num_turns + (closed & ~last_turn)
            num_samples = jnp.repeat(
                jnp.asarray(prompts.num_samples), rows.size // prompts.length.shape[0]
            )
            begin, end, reason = segments.check_clip(tag.reason, tag.begin, tag.end, num_samples)
            insert = closed & ~last_turn & (reason == segments.Reason.VALID)
            audio_tokens = frontend.num_audio_tokens(end - begin)
            # <|audio_bos|>, the audio and <|audio_eos|> fit whole or not at all, with room for a token after them.
            fits = length - state.prompt_length + audio_tokens + 2 < options.max_response_tokens
            waiting = waiting | (insert & fits)
            slot = jnp.where(insert & fits, state.num_segments, segment_samples.shape[1])
            segment_samples = segment_samples.at[rows, slot].set(
                jnp.stack([begin, end], -1), mode="drop"
            )
            finish = jnp.where(insert & ~fits, FinishReason.TOKEN_BUDGET, finish)
            finish = jnp.where(last_turn, FinishReason.TURN_LIMIT, finish)
        used_up = moving & (length - state.prompt_length >= options.max_response_tokens)
        ended = moving & (token == config.im_end_id)
        finish = jnp.where(
            used_up & (finish == FinishReason.ACTIVE), FinishReason.TOKEN_BUDGET, finish
        )
        finish = jnp.where(ended, FinishReason.END, finish)
        return state.replace(
            cache=cache,
            tokens=state.tokens.at[rows, write_at].set(token, mode="drop"),
            length=length,
            logprob=state.logprob.at[rows, write_at].set(logprob, mode="drop"),
            sampled=state.sampled.at[rows, write_at].set(True, mode="drop"),
            stop_rest=state.stop_rest.at[rows, write_at].set(rest, mode="drop"),
            tag=tag,
            waiting=waiting & (finish == FinishReason.ACTIVE),
            num_turns=num_turns,
            segment_samples=segment_samples,
            finish_reason=finish,
            num_decode_steps=state.num_decode_steps + 1,
        )

    def _insert(self, params: Params, prompts: Prompts, state: SamplerState) -> SamplerState:
        """Puts their clip into the context of up to `insertion_slots` waiting rows."""
        batch = state.tokens.shape[0]
        count = min(self.options.insertion_slots, batch)
        # Waiting rows first, in order; the slots that are left over name rows that do not wait and write nothing.
        row = jnp.argsort(~state.waiting, stable=True)[:count]
        used = state.waiting[row]
        span = state.segment_samples[
            row, jnp.minimum(state.num_segments[row], state.segment_samples.shape[1] - 1)
        ]
        begin, num_samples = span[:, 0], jnp.where(used, span[:, 1] - span[:, 0], 0)
        buffers = self.options.segment_buffers(prompts.waveforms.shape[1])
        bucket = jnp.searchsorted(jnp.asarray(buffers), num_samples.max())
        branches = [
            functools.partial(self._insert_clips, params, prompts, buffer) for buffer in buffers
        ]
        return jax.lax.switch(bucket, branches, state, row, begin, num_samples)

    def _insert_clips(
        self,
        params: Params,
        prompts: Prompts,
        buffer_samples: int,
        state: SamplerState,
        row: jax.Array,
        begin: jax.Array,
        num_samples: jax.Array,
    ) -> SamplerState:
        config = self.config
        prompt = row // (state.tokens.shape[0] // prompts.length.shape[0])
        clip = cut_segments(prompts, prompt, begin, num_samples, buffer_samples)
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
            segment_token_start=state.segment_token_start.at[row, slot].set(
                state.length[row] + 1, mode="drop"
            ),
            num_segments=state.num_segments.at[row].add(num_samples > 0),
            num_insert_steps=state.num_insert_steps + 1,
        )


def cut_segments(
    prompts: Prompts,
    prompt: jax.Array,
    begin: jax.Array,
    num_samples: jax.Array,
    buffer_samples: int,
) -> jax.Array:
    """Cuts clips from the prompts' recordings.

    Args:
      prompts: the recordings, with the replacement and the shift of a control if it has one.
      prompt: i32[C], whose recording.
      begin: i32[C], first sample.
      num_samples: i32[C], length, at most buffer_samples.
      buffer_samples: length of the result.

    Returns:
      f32[C, buffer_samples], zero beyond num_samples.
    """
    if prompts.insert_shift_samples is not None:
        places = jnp.maximum(jnp.asarray(prompts.num_samples)[prompt] - num_samples + 1, 1)
        begin = (begin + jnp.asarray(prompts.insert_shift_samples)[prompt]) % places
    source = prompts.waveforms if prompts.insert_waveforms is None else prompts.insert_waveforms
    offsets = jnp.arange(buffer_samples)
    clip = (
        jnp.asarray(source)
        .at[prompt[:, None], begin[:, None] + offsets]
        .get(mode="fill", fill_value=0.0)
    )
    return jnp.where(offsets < num_samples[:, None], clip, 0.0)


def sampling_log_probs(logits: jax.Array, options: SamplingOptions) -> jax.Array:
    """Log-probabilities of the distribution that tokens are drawn from; f32[B, V] -> f32[B, V].

    Temperature, then top-k, then top-p, renormalized. At temperature 0 the token is the arg-max and the log-probability
    is the untempered model's.
    """
    if options.temperature == 0:
        return jax.nn.log_softmax(logits)
    logits = logits / options.temperature
    if options.top_k:
        kth = jax.lax.top_k(logits, min(options.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, _NEVER, logits)
    if options.top_p < 1:
        # The smallest set that holds top_p: a token stays while the more probable ones hold less than top_p.
        # Compared as logits, which are the same numbers in both orders, while probabilities are rounded twice.
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered)
        kept = jnp.cumsum(probs, axis=-1) - probs < options.top_p
        smallest = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, _NEVER, logits)
    return jax.nn.log_softmax(logits)


def sample(
    logits: jax.Array, keys: jax.Array, options: SamplingOptions
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row, with a key a row; returns i32[B] tokens and the f32[B, V] log-probabilities."""
    log_probs = sampling_log_probs(logits, options)
    if options.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), log_probs
    return jax.vmap(jax.random.categorical)(keys, log_probs).astype(jnp.int32), log_probs
