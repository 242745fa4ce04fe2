"""The vocabulary in chunks: logits of a few positions at a time, so that [batch, length, vocabulary] never exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

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
      placement: rows lie over its `batch`, the head over its `embed` and `vocab`.

    Returns:
      A tree of arrays [B, K].
    """
    name = "lm_head" if "lm_head" in params else "embed"
    head = {name: params[name]}
    if placement.mesh is None:
        return _map_logits(head, hidden_bke, values, function, chunk)
    rules = placement.rules
    width = rules.embed or ()
    axis = 0 if name == "lm_head" else 1

    def on_shard(head: Params, hidden: jax.Array, values: tuple[jax.Array, ...]) -> PyTree:
        # Gathered once and not in every chunk; and each device adds up its own rows' gradient over the chunks before
        # the devices exchange them, which the compiler does not see by itself.
        gathered = jax.tree.map(
            lambda x: jax.lax.all_gather(x, width, axis=axis, tiled=True) if width else x, head
        )
        return _map_logits(gathered, hidden, values, function, chunk)

    rows = PartitionSpec(rules.batch)
    weight = PartitionSpec(*(None,) * axis, rules.embed)
    batch_axes = (rules.batch,) if isinstance(rules.batch, str) else rules.batch or ()
    width_axes = (width,) if isinstance(width, str) else width
    return jax.shard_map(
        on_shard,
        mesh=placement.mesh,
        in_specs=(weight, rows, rows),
        out_specs=rows,
        # The vocabulary's axis is the compiler's.
        axis_names={*batch_axes, *width_axes},
        check_vma=False,
    )(head, hidden_bke, values)


def _map_logits(
    head: Params,
    hidden_bke: jax.Array,
    values: tuple[jax.Array, ...],
    function: Callable[..., PyTree],
    chunk: int,
) -> PyTree:
    batch, positions = hidden_bke.shape[:2]

    def of_chunk(hidden: jax.Array, *values: jax.Array) -> PyTree:
        return function(language_model.unembed(head, hidden), *values)

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
