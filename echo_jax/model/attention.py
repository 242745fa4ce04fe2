"""Grouped-query attention: plain for any device, and the splash kernel for training on TPU."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from echo_jax.model.execution import Execution

# Queries that attend together: the scores of a prompt of 300 s would be gigabytes, and those of a 30 s clip in a row of
# 4,096 slots, as a whole, do not stay in a TPU's VMEM.
_QUERY_BLOCK = 256
# Lengths that the splash kernel cuts queries and keys into; the longest that divides them.
_SPLASH_BLOCKS = (512, 256, 128)


def attention(
    q_bthk: jax.Array, k_bsgk: jax.Array, v_bsgk: jax.Array, mask_bts: jax.Array
) -> jax.Array:
    """Grouped-query attention with an explicit mask (True = may attend); softmax in float32.

    Args:
      q_bthk: [B, T, H, head_dim].
      k_bsgk, v_bsgk: [B, S, kv_heads, head_dim].
      mask_bts: bool[B or 1, T, S].

    Returns:
      [B, T, H, head_dim].
    """
    b, t, h, k = q_bthk.shape
    groups = k_bsgk.shape[2]
    # The queries that share a key head stand below each other, so that each product is one plain batched matmul; on
    # CPU that is three times as fast as one more batch dimension.
    q_bgnk = (q_bthk * k**-0.5).reshape(b, t, groups, h // groups, k)
    q_bgnk = q_bgnk.transpose(0, 2, 3, 1, 4).reshape(b, groups, h // groups * t, k)
    scores = jnp.einsum("bgnk,bsgk->bgns", q_bgnk, k_bsgk, preferred_element_type=jnp.float32)
    mask_bns = jnp.tile(mask_bts, (1, h // groups, 1))
    weights = jax.nn.softmax(jnp.where(mask_bns[:, None], scores, -1e30), axis=-1)
    out_bgnk = jnp.einsum("bgns,bsgk->bgnk", weights.astype(v_bsgk.dtype), v_bsgk)
    out = out_bgnk.reshape(b, groups, h // groups, t, k).transpose(0, 3, 1, 2, 4)
    return out.reshape(b, t, h, k)


def in_order(
    q_bthk: jax.Array, k_bsgk: jax.Array, v_bsgk: jax.Array, positions_bt: jax.Array
) -> jax.Array:
    """`attention` of queries that see the slots up to their position, a block of queries at a time where they are long.

    positions_bt is i32[B or 1, T].
    """
    slots = jnp.arange(k_bsgk.shape[1])
    length = q_bthk.shape[1]
    if length <= _QUERY_BLOCK:
        return attention(q_bthk, k_bsgk, v_bsgk, slots <= positions_bt[..., None])
    blocks = -(-length // _QUERY_BLOCK)
    missing = blocks * _QUERY_BLOCK - length
    queries = jnp.pad(q_bthk, ((0, 0), (0, missing), (0, 0), (0, 0)))
    positions = jnp.pad(positions_bt, ((0, 0), (0, missing)))

    def attend(first: jax.Array) -> jax.Array:
        block_q, block_positions = (
            jax.lax.dynamic_slice_in_dim(x, first, _QUERY_BLOCK, axis=1)
            for x in (queries, positions)
        )
        return attention(block_q, k_bsgk, v_bsgk, slots <= block_positions[..., None])

    # [blocks, B, block, H, head_dim]
    attended = jax.lax.map(attend, jnp.arange(blocks) * _QUERY_BLOCK)
    return jnp.moveaxis(attended, 0, 1).reshape(queries.shape)[:, :length]


def by_segment(
    q_bthk: jax.Array,
    k_bsgk: jax.Array,
    v_bsgk: jax.Array,
    segments_bt: jax.Array,
    segments_bs: jax.Array,
    execution: Execution,
) -> jax.Array:
    """Causal attention inside segments: the last T of S places query the S, each those of its segment up to itself.

    Args:
      q_bthk: [B, T, H, head_dim].
      k_bsgk, v_bsgk: [B, S, kv_heads, head_dim], T <= S.
      segments_bt, segments_bs: i32[B, T], i32[B, S].
      execution: says which kernel.

    Returns:
      [B, T, H, head_dim].

    Raises:
      ValueError: splash attention is asked for lengths that are no multiple of 128.
    """
    if execution.attention != "plain":
        return _splash(q_bthk, k_bsgk, v_bsgk, segments_bt, segments_bs, execution)
    queries, keys = q_bthk.shape[1], k_bsgk.shape[1]
    earlier = jnp.arange(keys) <= jnp.arange(queries)[:, None] + keys - queries
    mask_bts = earlier & (segments_bt[:, :, None] == segments_bs[:, None])
    return attention(q_bthk, k_bsgk, v_bsgk, mask_bts)


def _splash(
    q_bthk: jax.Array,
    k_bsgk: jax.Array,
    v_bsgk: jax.Array,
    segments_bt: jax.Array,
    segments_bs: jax.Array,
    execution: Execution,
) -> jax.Array:
    # Here, because Pallas takes a second to import, and only a training step on TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys = q_bthk.shape[1], k_bsgk.shape[1]
    blocks = [
        next((block for block in _SPLASH_BLOCKS if size % block == 0), 0)
        for size in (queries, keys)
    ]
    if not all(blocks):
        raise ValueError(
            f"splash attention of {queries} queries and {keys} keys: both must be multiples of {_SPLASH_BLOCKS[-1]}; "
            "change the sequence length, or give --config.attention=plain"
        )
    block_q, block_kv = blocks
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    placement = execution.placement
    shards = placement.num_shards("heads")
    if k_bsgk.shape[2] % shards:
        # Every shard of the query heads gets the one key/value head that it needs.
        each = shards // k_bsgk.shape[2]
        k_bsgk, v_bsgk = (jnp.repeat(x, each, axis=2) for x in (k_bsgk, v_bsgk))

    def on_shard(
        q: jax.Array, k: jax.Array, v: jax.Array, ids_q: jax.Array, ids_kv: jax.Array
    ) -> jax.Array:
        b, t, h, d = q.shape
        groups = k.shape[2]
        causal = masks.CausalMask((t, k.shape[1]), offset=k.shape[1] - t)
        kernel = splash.make_splash_mqa_single_device(
            masks.MultiHeadMask([causal] * (h // groups)),
            block_sizes=sizes,
            interpret=execution.attention == "splash_interpreted",
        )
        q = (q * d**-0.5).reshape(b, t, groups, h // groups, d).transpose(0, 2, 3, 1, 4)
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        rows = jax.vmap(jax.vmap(kernel, (0, 0, 0, None)))
        out = rows(q, k, v, splash.SegmentIds(ids_q, ids_kv))
        return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)

    if placement.mesh is not None:
        rules = placement.rules
        heads = PartitionSpec(rules.batch, None, rules.heads, None)
        ids = PartitionSpec(rules.batch, None)
        # Under a kernel of its own every device works on its rows and heads; the compiler cannot divide it.
        on_shard = jax.shard_map(
            on_shard,
            mesh=placement.mesh,
            in_specs=(heads, heads, heads, ids, ids),
            out_specs=heads,
            check_vma=False,
        )
    return on_shard(q_bthk, k_bsgk, v_bsgk, segments_bt, segments_bs)
