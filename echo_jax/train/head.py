"""The vocabulary in chunks: logits of a few positions at a time, so that [batch, length, vocabulary] never exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from echo_jax.arrays import ONE_DEVICE, Params, Placement
from echo_jax.model import language_model

PyTree = Any


def map_logits(
    params: Params,
    hidden_bke: jax.Array,
    values: tuple[jax.Array, ...],
    function: Callable[..., PyTree],
    chunk: int = 0,
    placement: Placement = ONE_DEVICE,
) -> PyTree:
    """`function(logits, *values)` for all positions, a chunk of them at a time.

    The backward pass makes the logits of a chunk again instead of keeping them.

    Args:
      params: the language model's arrays.
      hidden_bke: [B, K, hidden_size] final hidden states.
      values: arrays [B, K, ...] that go with them.
      function: (f32[B, C, V], *[B, C, ...]) -> a tree of arrays [B, C]; each position by itself.
      chunk: C; 0 takes all positions at once.
      placement: rows lie over its `batch`, the vocabulary over its `vocab`.

    Returns:
      A tree of arrays [B, K].
    """
    batch, positions = hidden_bke.shape[:2]
    # Gathered once and not in every chunk: over its width the head is divided like any other weight.
    gathered = language_model.gathered_head(params, placement)

    def of_chunk(hidden: jax.Array, *values: jax.Array) -> PyTree:
        logits = language_model.unembed(gathered, hidden)
        return function(placement.constrain(logits, "batch", None, "vocab"), *values)

    if not chunk or chunk >= positions:
        return of_chunk(hidden_bke, *values)
    count = -(-positions // chunk)

    def cut(x: jax.Array) -> jax.Array:
        padding = ((0, 0), (0, count * chunk - positions), *((0, 0),) * (x.ndim - 2))
        x = jnp.pad(x, padding).reshape(batch, count, chunk, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    kept_nothing = jax.checkpoint(lambda args: of_chunk(*args))
    chunks = jax.lax.map(kept_nothing, (cut(hidden_bke), *map(cut, values)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :positions], chunks)
