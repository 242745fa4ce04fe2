"""Which positions a loss needs: only those get logits.

Most of a sequence is prompt and audio. Unembedding the marked positions alone saves the larger part of the
vocabulary projection, and the [batch, length, vocabulary] array that nobody reads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def positions_of(mask_bl: np.ndarray, multiple: int) -> np.ndarray:
    """Indices of the marked tokens of each row, in order.

    Args:
        mask_bl: bool[B, L]; the first column has no prediction and is ignored.
        multiple: the width of the result is rounded up to it, so that few shapes are compiled.

    Returns:
        i32[B, K]; 0 fills up, so ``positions > 0`` is the mask.
    """
    mask_bl = np.asarray(mask_bl, bool).copy()
    mask_bl[:, 0] = False
    counts = mask_bl.sum(-1)
    width = max(-(-int(counts.max(initial=0)) // multiple), 1) * multiple
    positions = np.zeros((len(mask_bl), width), np.int32)
    for row, marked in enumerate(mask_bl):
        positions[row, : counts[row]] = np.flatnonzero(marked)
    return positions


def at(values_bl: np.ndarray, positions_bk: np.ndarray) -> np.ndarray:
    """values_bl[b, positions_bk[b, k]]."""
    return np.take_along_axis(np.asarray(values_bl), positions_bk, axis=1)


def predicting(hidden_ble: jax.Array, positions_bk: jax.Array) -> jax.Array:
    """The hidden states that predict the tokens at `positions_bk`: [B, K, E], those one position earlier."""
    before = jnp.maximum(positions_bk - 1, 0)
    return jnp.take_along_axis(hidden_ble, before[..., None], axis=1)
