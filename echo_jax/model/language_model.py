"""The language model of the thinker: Qwen2.5 decoder layers under one `lax.scan`, with and without a KV cache.

With audio and text only, the three axes of Qwen's M-RoPE carry equal positions, so it is ordinary rotary embedding over
the running index. A row's cache is filled from slot 0 without gaps: slot, position and index in the row are one number,
and each row has its own cursor.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from echo_jax.arrays import ONE_DEVICE, ArraySpec, Params, Placement, is_spec
from echo_jax.model import attention
from echo_jax.model.config import TextConfig
from echo_jax.model.execution import PLAIN, Execution

_UNROLLED_LAYERS = 4


def param_specs(config: TextConfig) -> dict:
    """Declares the language model's arrays."""
    n, e, h, g, k, f = (
        config.num_layers,
        config.hidden_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.ffn_dim,
    )

    def projection(heads: int, axis: str) -> dict:
        return {
            "kernel": ArraySpec(
                (n, e, heads, k), ("layers", "embed", axis, "head_dim"), "fan_in", (1,)
            ),
            "bias": ArraySpec((n, heads, k), ("layers", axis, "head_dim"), "zeros"),
        }

    # A token must not drown in what the first layer adds to it (of order 1): with a standard deviation of 0.02 a small
    # model did not learn to copy a digit from the question in 19,000 examples. A tied table is also the head, whose
    # logits should start at order 1.
    embedding = ArraySpec((config.vocab_size, e), ("vocab", "embed"), "unit")
    if config.tie_embeddings:
        embedding = dataclasses.replace(embedding, init="fan_in", fan_in_axes=(1,))
    mlp_in = ArraySpec((n, e, f), ("layers", "embed", "mlp"), "fan_in", (1,))
    specs = {
        "embed": {"embedding": embedding},
        "layers": {
            "attn_norm": {"scale": ArraySpec((n, e), ("layers", "embed"), "ones")},
            "q": projection(h, "heads"),
            "k": projection(g, "kv_heads"),
            "v": projection(g, "kv_heads"),
            "o": {
                "kernel": ArraySpec(
                    (n, h, k, e), ("layers", "heads", "head_dim", "embed"), "fan_in", (1, 2)
                )
            },
            "mlp_norm": {"scale": ArraySpec((n, e), ("layers", "embed"), "ones")},
            "gate": {"kernel": mlp_in},
            "up": {"kernel": mlp_in},
            "down": {"kernel": ArraySpec((n, f, e), ("layers", "mlp", "embed"), "fan_in", (1,))},
        },
        "final_norm": {"scale": ArraySpec((e,), ("embed",), "ones")},
    }
    if not config.tie_embeddings:
        specs["lm_head"] = {
            "kernel": ArraySpec((e, config.vocab_size), ("embed", "vocab"), "fan_in", (0,))
        }
    return specs


class Packing(struct.PyTreeNode):
    """Several sequences in a row.

    Attributes:
      positions: i32[B, L], from 0 in each sequence.
      segments: i32[B, L], which sequence of its row an entry belongs to; padding has a number of its own.
    """

    positions: Any
    segments: Any


class KVCache(struct.PyTreeNode):
    """Keys and values of all layers.

    Invariant: slots [0, length[b]) of row b hold the keys and values of its first length[b] tokens; what lies beyond is
    never read.
    """

    k: Any  # [layers, B, S, kv_heads * copies, head_dim]
    v: Any  # [layers, B, S, kv_heads * copies, head_dim]
    length: Any  # i32[B]

    @staticmethod
    def specs(
        config: TextConfig,
        batch: int,
        slots: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
        copies: int = 1,
    ) -> "KVCache":
        """Declares the buffers.

        Args:
          config: sizes.
          batch: rows B.
          slots: tokens S a row.
          dtype: of keys and values.
          copies: each key/value head is held so often, beside itself. Where there are fewer heads than shards of the
            query heads, every shard then holds the one head that its queries need.
        """
        shape = (config.num_layers, batch, slots, config.num_kv_heads * copies, config.head_dim)
        axes = ("layers", "batch", None, "cache_heads", "head_dim")
        buffer = ArraySpec(shape, axes, "zeros", dtype=dtype)
        return KVCache(buffer, buffer, ArraySpec((batch,), ("batch",), "zeros", dtype=jnp.int32))

    @staticmethod
    def empty(
        config: TextConfig, batch: int, slots: int, dtype: jax.typing.DTypeLike = jnp.float32
    ) -> "KVCache":
        """Returns a cache that holds nothing yet."""
        specs = KVCache.specs(config, batch, slots, dtype)
        return jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs, is_leaf=is_spec)


def rms_norm(scale: jax.Array, x: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square normalization in float32."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)
    return (normed.astype(x.dtype)) * scale


def rotary(positions_bt: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles; two f32[B, T, 1, head_dim // 2] (arXiv 2104.09864, eq. 34)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_bt[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x_bthk: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x_bthk.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_bthk.dtype)


def _decoder_layer(
    config: TextConfig,
    p: Params,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    placement: Placement = ONE_DEVICE,
) -> jax.Array:
    """One layer; `attend(q, k, v)` decides what the new queries see."""
    y = rms_norm(p["attn_norm"]["scale"], x, config.rms_norm_eps)
    q = jnp.einsum("bte,ehk->bthk", y, p["q"]["kernel"]) + p["q"]["bias"]
    k = jnp.einsum("bte,egk->btgk", y, p["k"]["kernel"]) + p["k"]["bias"]
    v = jnp.einsum("bte,egk->btgk", y, p["v"]["kernel"]) + p["v"]["bias"]
    q = placement.constrain(q, "batch", None, "heads", None)
    k, v = (placement.constrain(x, "batch", None, "kv_heads", None) for x in (k, v))
    attended = attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
    x = x + jnp.einsum("bthk,hke->bte", attended, p["o"]["kernel"])
    x = placement.constrain(x, "batch", None, None)
    y = rms_norm(p["mlp_norm"]["scale"], x, config.rms_norm_eps)
    # Flat rows: the backward pass of the same products on [B, T, E] is twice as slow on CPU.
    y = y.reshape(-1, y.shape[-1])
    y = jax.nn.silu(y @ p["gate"]["kernel"]) * (y @ p["up"]["kernel"])
    y = placement.constrain(y, "batch", "mlp")
    return placement.constrain(x + (y @ p["down"]["kernel"]).reshape(x.shape), "batch", None, None)


def embed(params: Params, tokens: jax.Array, placement: Placement = ONE_DEVICE) -> jax.Array:
    """Token embeddings; i32[...] -> [..., hidden_size]."""
    table = params["embed"]["embedding"]
    return placement.gathered(table, ("vocab", "embed"), ("vocab", None))[tokens]


def unembed(params: Params, hidden: jax.Array) -> jax.Array:
    """Logits in float32 from final hidden states; [..., hidden_size] -> f32[..., vocab_size]."""
    if "lm_head" in params:
        return jnp.einsum(
            "...e,ev->...v", hidden, params["lm_head"]["kernel"], preferred_element_type=jnp.float32
        )
    return jnp.einsum(
        "...e,ve->...v", hidden, params["embed"]["embedding"], preferred_element_type=jnp.float32
    )


def forward(
    config: TextConfig,
    params: Params,
    x_ble: jax.Array,
    packing: Packing | None = None,
    execution: Execution = PLAIN,
) -> jax.Array:
    """Runs whole rows without a cache (training).

    Args:
      config: sizes.
      params: the language model's arrays.
      x_ble: [B, L, hidden_size] embeddings.
      packing: where a row holds several sequences. Without it a row is one, right padded: padding stands after the end,
        where causality hides it.
      execution: how to run it.

    Returns:
      [B, L, hidden_size] final hidden states, normalized.
    """
    batch, length = x_ble.shape[:2]
    if packing is None:
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        packing = Packing(positions, jnp.zeros_like(positions))
    cos, sin = rotary(packing.positions, config.head_dim, config.rope_theta)
    segments = packing.segments

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.by_segment(q, k, v, segments, segments, execution)

    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        return _decoder_layer(config, p, x, cos, sin, attend, execution.placement), None

    x, _ = jax.lax.scan(
        execution.rematerialized(layer),
        execution.placement.constrain(x_ble, "batch", None, None),
        params["layers"],
        # Stacking the residuals of few small layers costs more than it saves (a fifth of a step on CPU).
        unroll=config.num_layers <= _UNROLLED_LAYERS,
    )
    return rms_norm(params["final_norm"]["scale"], x, config.rms_norm_eps)


def forward_continuations(
    config: TextConfig,
    params: Params,
    x_qpe: jax.Array,
    length_q: jax.Array,
    x_bte: jax.Array,
    execution: Execution = PLAIN,
) -> jax.Array:
    """Runs several continuations of each prefix without a cache (training); the prefix itself is run once.

    Equal to `forward` of the B whole rows, whose first length_q[q] entries are the prefix of their query.

    Args:
      config: sizes.
      params: the language model's arrays.
      x_qpe: [Q, P, hidden_size] embeddings of the prefixes, right padded.
      length_q: i32[Q], entries of each prefix that the continuations see.
      x_bte: [B, T, hidden_size] embeddings of the continuations, B a multiple of Q, those of a prefix together, right
        padded.
      execution: how to run it.

    Returns:
      [B, T, hidden_size] final hidden states of the continuations, normalized.
    """
    (num_prefixes, prefix), (batch, length) = x_qpe.shape[:2], x_bte.shape[:2]
    each = batch // num_prefixes
    placement = execution.placement
    start_b = jnp.repeat(length_q, each)
    before = jnp.broadcast_to(jnp.arange(prefix), (num_prefixes, prefix))
    angles_prefix = rotary(before, config.head_dim, config.rope_theta)
    angles = rotary(start_b[:, None] + jnp.arange(length), config.head_dim, config.rope_theta)
    whole_prefix = jnp.ones((num_prefixes, prefix), jnp.int32)
    ours = jnp.ones((batch, length), jnp.int32)
    # What pads a prefix is a segment of its own.
    seen = (jnp.arange(prefix) < start_b[:, None]).astype(jnp.int32)
    seen = jnp.concatenate([seen, ours], axis=1)

    def layer(
        carry: tuple[jax.Array, jax.Array], p: Params
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        shared: list[jax.Array] = []

        def attend_prefix(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            shared.extend((k, v))
            return attention.by_segment(q, k, v, whole_prefix, whole_prefix, execution)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            keys, values = (
                jnp.concatenate([jnp.repeat(old, each, axis=0), new], axis=1)
                for old, new in zip(shared, (k, v), strict=True)
            )
            return attention.by_segment(q, keys, values, ours, seen, execution)

        x_prefix, x = carry
        x_prefix = _decoder_layer(config, p, x_prefix, *angles_prefix, attend_prefix, placement)
        return (x_prefix, _decoder_layer(config, p, x, *angles, attend, placement)), None

    start = tuple(placement.constrain(x, "batch", None, None) for x in (x_qpe, x_bte))
    (_, x), _ = jax.lax.scan(
        execution.rematerialized(layer),
        start,
        params["layers"],
        unroll=config.num_layers <= _UNROLLED_LAYERS,
    )
    return rms_norm(params["final_norm"]["scale"], x, config.rms_norm_eps)


def prefill(
    config: TextConfig,
    params: Params,
    cache: KVCache,
    x_qpe: jax.Array,
    length_q: jax.Array,
    rows_qg: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """Runs prompts from their first token and puts each into G rows of the cache, whatever they held before.

    Args:
      config: sizes.
      params: the language model's arrays.
      cache: B rows of at least P slots.
      x_qpe: [Q, P, hidden_size] embeddings of the prompts, right padded.
      length_q: i32[Q].
      rows_qg: i32[Q, G], the rows of each prompt; B or more where there are fewer.

    Returns:
      [Q, P, hidden_size] normalized final hidden states (meaningless in the padding) and the cache.
    """
    (num_prompts, length), group = x_qpe.shape[:2], rows_qg.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), (num_prompts, length))
    cos, sin = rotary(positions, config.head_dim, config.rope_theta)
    rows = rows_qg.reshape(-1)

    def layer(
        carry: tuple[jax.Array, jax.Array, jax.Array], scanned: tuple[jax.Array, Params]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        x, keys, values = carry
        index, p = scanned

        def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
            each = jnp.repeat(_copy_heads(new, buffer), group, axis=0).astype(buffer.dtype)
            return buffer.at[index, rows, :length].set(each, mode="drop")

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            nonlocal keys, values
            keys, values = write(keys, k), write(values, v)
            return attention.in_order(q, k, v, positions)

        x = _decoder_layer(config, p, x, cos, sin, attend)
        return (x, keys, values), None

    (x, keys, values), _ = jax.lax.scan(
        layer, (x_qpe, cache.k, cache.v), (jnp.arange(config.num_layers), params["layers"])
    )
    hidden = rms_norm(params["final_norm"]["scale"], x, config.rms_norm_eps)
    lengths = cache.length.at[rows].set(jnp.repeat(length_q, group), mode="drop")
    return hidden, KVCache(keys, values, lengths)


def _copy_heads(new: jax.Array, buffer: jax.Array) -> jax.Array:
    """Key/value heads [..., kv_heads, head_dim] as often as a buffer of the cache holds them."""
    return jnp.repeat(new, buffer.shape[-2] // new.shape[-2], axis=-2)


def extend(
    config: TextConfig,
    params: Params,
    cache: KVCache,
    x_bte: jax.Array,
    num_new_b: jax.Array,
    visible_slots: int | None = None,
    rows: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Appends a chunk to rows of the cache and runs it.

    Args:
      config: sizes.
      params: the language model's arrays.
      cache: the rows so far.
      x_bte: [B, T, hidden_size] embeddings of the chunk, right padded.
      num_new_b: i32[B], how many of the T entries are real for each row; 0 leaves a row untouched.
      rows: i32[B], the cache row of each chunk row when only some rows grow; None means all, in order. A cache row may
        be named more than once as long as at most one of its chunks is not empty.
      visible_slots: attend to the first so many slots only; at least the longest row after this chunk (what lies
        beyond need not be read).

    Returns:
      [B, T, hidden_size] normalized final hidden states (meaningless in the padding) and the grown cache.
    """
    batch, chunk = x_bte.shape[:2]
    slots = cache.k.shape[2]
    visible = slots if visible_slots is None else visible_slots
    offsets = jnp.arange(chunk)
    row_b = rows if rows is not None else jnp.arange(batch)
    start_b = cache.length[row_b]
    positions = start_b[:, None] + offsets
    # Out-of-range writes are dropped: that is how padding leaves the cache alone.
    write_slots = jnp.where(offsets < num_new_b[:, None], positions, slots)
    cos, sin = rotary(positions, config.head_dim, config.rope_theta)
    mask = jnp.arange(visible) <= positions[..., None]

    def layer(
        carry: tuple[jax.Array, jax.Array, jax.Array], scanned: tuple[jax.Array, Params]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        x, keys, values = carry
        index, p = scanned

        def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
            new = _copy_heads(new, buffer).astype(buffer.dtype)
            return buffer.at[index, row_b[:, None], write_slots].set(new, mode="drop")

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            nonlocal keys, values
            if rows is not None:
                chunks = (q, k, v, row_b, start_b, num_new_b)
                (keys, values), attended = jax.lax.scan(
                    functools.partial(_extend_row, index, visible), (keys, values), chunks
                )
                return attended
            # Writing at [layer, row, slot] inside the scan keeps the buffers in place; updating the whole stack after
            # the scan would copy the cache.
            keys, values = write(keys, k), write(values, v)
            return attention.attention(
                q, keys[index, :, :visible], values[index, :, :visible], mask
            )

        x = _decoder_layer(config, p, x, cos, sin, attend)
        return (x, keys, values), None

    (x, keys, values), _ = jax.lax.scan(
        layer, (x_bte, cache.k, cache.v), (jnp.arange(config.num_layers), params["layers"])
    )
    hidden = rms_norm(params["final_norm"]["scale"], x, config.rms_norm_eps)
    return hidden, KVCache(keys, values, cache.length.at[row_b].add(num_new_b))


def _extend_row(
    index: jax.Array,
    visible: int,
    buffers: tuple[jax.Array, jax.Array],
    chunk: tuple[jax.Array, ...],
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Writes one row's chunk into a layer of the cache and attends from it to the row so far.

    One row at a time, and slices instead of indices: a gather of whole rows and a scatter of chunks make the TPU
    compiler copy the cache, several times a layer.

    Args:
      index: the layer.
      visible: the row's first slots, to which it attends.
      buffers: keys and values of the cache.
      chunk: q [T, H, head_dim], k and v [T, kv_heads, head_dim], the row, its length so far, and how many of the T are
        real.

    Returns:
      The buffers and [T, H, head_dim].
    """
    q, k, v, row, start, num_new = chunk
    slots = buffers[0].shape[2]
    width = min(len(k), slots)
    # The window of slots that the chunk falls into; it ends with the row, where padding reaches beyond it.
    first = jnp.minimum(start, slots - width)
    offsets = jnp.arange(width) - (start - first)
    is_new = (offsets >= 0) & (offsets < num_new)

    def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
        new = _copy_heads(new, buffer).astype(buffer.dtype)
        padded = jnp.pad(new[:width], ((width, 0), (0, 0), (0, 0)))
        moved = jax.lax.dynamic_slice_in_dim(padded, width - (start - first), width)
        place = (index, row, first, 0, 0)
        old = jax.lax.dynamic_slice(buffer, place, (1, 1, *moved.shape))
        window = jnp.where(is_new[:, None, None], moved, old)
        return jax.lax.dynamic_update_slice(buffer, window, place)

    def read(buffer: jax.Array) -> jax.Array:
        shape = (1, 1, visible, *buffer.shape[3:])
        return jax.lax.dynamic_slice(buffer, (index, row, 0, 0, 0), shape)[0]

    keys, values = write(buffers[0], k), write(buffers[1], v)
    positions = start + jnp.arange(len(q))
    return (keys, values), attention.in_order(q[None], read(keys), read(values), positions[None])[0]
