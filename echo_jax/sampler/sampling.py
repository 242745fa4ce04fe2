"""The distribution that tokens are drawn from, and draws with a key a row."""

import jax
import jax.numpy as jnp

from echo_jax.sampler.state import SamplingOptions

NEVER = -1e30
"""Logit of a token that cannot be drawn; finite, so that no difference of two of them is NaN."""
_BLOCK = 128


def sampling_logits(logits: jax.Array, options: SamplingOptions) -> jax.Array:
    """Logits of the sampling distribution, not normalized; f32[B, V] -> f32[B, V].

    Temperature, then top-k, then top-p, then min-p, each on what the one before it left (the order of Hugging Face's
    logits processors). At temperature 0, where the token is the arg-max, they are the model's own.
    """
    if options.temperature == 0:
        return logits
    logits = logits / options.temperature
    if options.top_k:
        kth = jax.lax.top_k(logits, min(options.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, NEVER, logits)
    if options.top_p < 1:
        # The smallest set that holds top_p: a token stays while the more probable ones hold less than top_p.
        # Compared as logits, which are the same numbers in both orders, while probabilities are rounded twice.
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered)
        kept = jnp.cumsum(probs, axis=-1) - probs < options.top_p
        smallest = jnp.where(kept, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < smallest, NEVER, logits)
    if options.min_p:
        # p >= min_p * p_max, as a difference of logits.
        least = logits.max(axis=-1, keepdims=True) + jnp.log(options.min_p)
        logits = jnp.where(logits < least, NEVER, logits)
    return logits


def draw(logits: jax.Array, keys: jax.Array, options: SamplingOptions) -> jax.Array:
    """Draws one token a row from `sampling_logits`, with a key a row; f32[B, V], keys [B] -> i32[B].

    The arg-max of logits plus Gumbel noise has the distribution of their softmax (`jax.random.categorical`).
    """
    if options.temperature > 0:
        vocabulary = logits.shape[-1:]
        logits = logits + jax.vmap(lambda key: jax.random.gumbel(key, vocabulary))(keys)
    return argmax(logits)


def argmax(x: jax.Array) -> jax.Array:
    """Index of the first largest entry of each row; f32[B, V] -> i32[B].

    In two steps, of which only the small ones look for an index: on CPU that is 18 times as fast as `jnp.argmax` of a
    row of 152,000, since a maximum is vectorized and an arg-max is not.
    """
    rows, size = x.shape
    blocks = -(-size // _BLOCK)
    padded = jnp.pad(x, ((0, 0), (0, blocks * _BLOCK - size)), constant_values=-jnp.inf)
    padded = padded.reshape(rows, blocks, _BLOCK)
    block = jnp.argmax(padded.max(-1), axis=-1)
    inside = jnp.argmax(padded[jnp.arange(rows), block], axis=-1)
    return (block * _BLOCK + inside).astype(jnp.int32)
