"""Puts questions into rows of the sampler's state: prompts are prefilled, everything else is as at a beginning."""

from typing import Any

import jax
import jax.numpy as jnp

from echo_jax.arrays import Params
from echo_jax.model import language_model, thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler.state import FinishReason, Prompts, SamplerState, SamplingOptions
from echo_jax.text.automaton import Automaton


def admit(
    config: ThinkerConfig,
    options: SamplingOptions,
    automaton: Automaton,
    params: Params,
    state: SamplerState,
    prompts: Prompts,
    keys: jax.Array,
    rows: jax.Array,
) -> SamplerState:
    """`Sampler.admit` for the rows of one data shard."""
    count, group = rows.shape
    tokens = jnp.asarray(prompts.tokens)
    padding = jnp.arange(tokens.shape[1]) >= jnp.asarray(prompts.length)[:, None]
    tokens = jnp.where(padding, config.pad_id, tokens)
    clips = [
        thinker.AudioClips(
            jnp.asarray(prompts.waveforms),
            jnp.asarray(prompts.num_samples),
            jnp.arange(count),
            jnp.asarray(prompts.audio_start),
        )
    ]
    if prompts.other_clips is not None:
        others = prompts.other_clips
        clips.append(others.replace(row=jnp.arange(len(others.row)) // (len(others.row) // count)))
    x = thinker.embed_tokens(config, params, tokens, tuple(clips))
    # All but the last token: the last one is the first pending token.
    _, cache = language_model.prefill(
        config.text,
        params["language_model"],
        state.cache,
        x,
        jnp.asarray(prompts.length) - 1,
        rows,
    )
    at = rows.reshape(-1)

    def put(old: jax.Array, new: Any, fill: int = 0) -> jax.Array:
        """Writes a value a prompt, [Q, ...], into the rows; shorter ones are filled up."""
        new = jnp.asarray(new)
        missing = [have - len_ for have, len_ in zip(old.shape[1:], new.shape[1:], strict=True)]
        new = jnp.pad(new, [(0, 0), *((0, n) for n in missing)], constant_values=fill)
        return old.at[at].set(jnp.repeat(new, group, axis=0), mode="drop")

    def reset(old: jax.Array, value: Any) -> jax.Array:
        return old.at[at].set(value, mode="drop")

    def limit(given: Any, most: int) -> jax.Array:
        return jnp.full(count, most, jnp.int32) if given is None else jnp.asarray(given)

    shift = prompts.insert_shift_samples
    return state.replace(
        cache=cache,
        waveforms=put(
            state.waveforms,
            prompts.waveforms if prompts.insert_waveforms is None else prompts.insert_waveforms,
        ),
        num_samples=put(state.num_samples, prompts.num_samples),
        insert_shift=put(
            state.insert_shift, jnp.zeros(count, jnp.int32) if shift is None else shift
        ),
        budget=put(state.budget, limit(prompts.max_response_tokens, options.max_response_tokens)),
        max_turns=put(state.max_turns, limit(prompts.max_turns, options.max_turns)),
        tokens=put(state.tokens, tokens, config.pad_id),
        prompt_length=put(state.prompt_length, prompts.length),
        length=put(state.length, prompts.length),
        logprob=reset(state.logprob, 0.0),
        model_logprob=reset(state.model_logprob, 0.0),
        sampled=reset(state.sampled, False),
        stop_rest=reset(state.stop_rest, -1),
        stop_reason=reset(state.stop_reason, -1),
        tag=jax.tree.map(reset, state.tag, automaton.init(())),
        waiting=reset(state.waiting, False),
        waited=reset(state.waited, 0),
        num_turns=reset(state.num_turns, 1),
        num_segments=reset(state.num_segments, 0),
        segment_samples=reset(state.segment_samples, 0),
        segment_token_start=reset(state.segment_token_start, 0),
        finish_reason=reset(state.finish_reason, int(FinishReason.ACTIVE)),
        keys=reset(state.keys, keys.reshape(-1)),
    )
