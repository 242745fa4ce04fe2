"""Checksums of arrays, computed where they lie: what is read back is what was written, on any mesh.

Tensorstore checks its own tables but not the numbers, so one flipped bit in a file of a checkpoint would be read
without a word.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Array name, slash-separated, -> leaf."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def checksums(tree: PyTree) -> dict[str, int]:
    """Array name -> checksum in [0, 2^32).

    The sum modulo 2^32, over all elements, of the element's bits times an odd number that depends on its index. A
    change of one element always shows, since odd numbers have inverses; any other change is missed once in 2^32. Sums
    of integers do not depend on their order, so neither does it on how the array is divided among devices.

    Args:
        tree: arrays of at most 32 bits an element, on the host or on devices.
    """
    leaves = named_leaves(tree)
    groups: dict[Any, list[str]] = {}
    for name, leaf in leaves.items():
        # One program must not hold arrays that were put on different devices.
        devices = frozenset(leaf.sharding.device_set) if isinstance(leaf, jax.Array) else None
        groups.setdefault(devices, []).append(name)
    found: dict[str, int] = {}
    for names in groups.values():
        sums = np.asarray(_sums([leaves[name] for name in names]))
        found |= dict(zip(names, sums.tolist(), strict=True))
    return {name: found[name] for name in leaves}


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    # The index in the flattened array, from one number an axis: a reshape would gather a sharded array.
    index = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = math.prod(leaf.shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(stride)
    # Mixed (the finalizer of MurmurHash3), so that elements that change places show too.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = (index ^ (index >> shift)) * np.uint32(factor)
    weights = (index ^ (index >> 16)) | np.uint32(1)
    return jnp.sum(bits.astype(jnp.uint32) * weights, dtype=jnp.uint32)
