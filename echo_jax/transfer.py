"""Large arrays between the host and the devices of a mesh, piece by piece: the host never holds a whole one.

Under several processes each moves the pieces of its own devices to them, and all take part in moving one to the host.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding, SingleDeviceSharding

Index = tuple[slice, ...]
"""A part of an array: for each dimension a slice whose start and stop are numbers and whose step is None."""

ReadFunction = Callable[[Sequence[Index]], Sequence[np.ndarray]]
"""Gives parts of an array, each in memory of its own that nobody writes to afterwards."""

# What lies on the host at once on its way to the devices: some shards of an array, or a part of one.
STAGED_BYTES = 512 * 1024**2


def to_devices(
    shape: tuple[int, ...], dtype: Any, sharding: Sharding, read: ReadFunction, part_axis: int
) -> jax.Array:
    """Makes an array of shards that are read one after the other.

    Args:
      shape: of the whole array.
      dtype: of it.
      sharding: how it lies on the devices.
      read: is asked for the shards of this process's devices, for several at once where these are small. A shard that
        several devices hold is asked for once.
      part_axis: a shard larger than `STAGED_BYTES` is asked for in parts along this axis, and joined on its device.
    """
    holders: dict[tuple[tuple[int, int], ...], list[Sharding]] = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))
        holders[bounds].append(SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
    wanted = [
        (tuple(slice(*bound) for bound in bounds), places) for bounds, places in holders.items()
    ]
    shard_bytes = math.prod(sharding.shard_shape(shape)) * np.dtype(dtype).itemsize
    shards: list[jax.Array] = []
    if shard_bytes > STAGED_BYTES:
        for index, places in wanted:
            shards += _in_parts(index, places, dtype, read, part_axis)
    else:
        at_once = STAGED_BYTES // max(1, shard_bytes)
        for first in range(0, len(wanted), at_once):
            shards += _whole_shards(wanted[first : first + at_once], read)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards, dtype=dtype)


def _whole_shards(
    wanted: Sequence[tuple[Index, list[Sharding]]], read: ReadFunction
) -> list[jax.Array]:
    arrived = [
        jax.device_put(shard, place)
        for shard, (_, places) in zip(read([index for index, _ in wanted]), wanted, strict=True)
        for place in places
    ]
    # Else those that are on their way would add up on the host.
    return jax.block_until_ready(arrived)


def _in_parts(
    index: Index, places: Sequence[Sharding], dtype: Any, read: ReadFunction, axis: int
) -> list[jax.Array]:
    shape = [cut.stop - cut.start for cut in index]
    shards = [jnp.zeros(shape, dtype, device=place) for place in places]
    rows = max(1, STAGED_BYTES * shape[axis] // shards[0].nbytes)
    for start in range(0, shape[axis], rows):
        begin = index[axis].start + start
        cut = slice(begin, min(begin + rows, index[axis].stop))
        (part,) = read([(*index[:axis], cut, *index[axis + 1 :])])
        shards = [
            _write(shard, jax.device_put(part, place), start, axis=axis)
            for shard, place in zip(shards, places, strict=True)
        ]
        jax.block_until_ready(shards)
    return shards


# Donated: the shard is written where it is.
@functools.partial(jax.jit, donate_argnums=0, static_argnames="axis")
def _write(shard: jax.Array, part: jax.Array, start: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(shard, part, start, axis)


def layer_of(array: Any, layer: int) -> Any:
    """One layer of a stacked array, where the array is: on the host, or on its devices."""
    return _layer(array, layer) if isinstance(array, jax.Array) else np.asarray(array)[layer]


def to_host(array: Any, index: Index) -> np.ndarray:
    """A part of an array; where the array lies on devices of several processes, all of them must ask for it.

    Each of those devices then holds the part for a moment.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)[index]
    if array.is_fully_addressable:
        return _joined(array, index)
    if any(cut != slice(0, size) for cut, size in zip(index, array.shape, strict=True)):
        array = _cut(array, *_starts_and_sizes(index))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _joined(array: jax.Array, index: Index) -> np.ndarray:
    """A part of an array from the shards that hold some of it."""
    part = np.empty([cut.stop - cut.start for cut in index], array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id:
            continue
        held = [cut.indices(size)[:2] for cut, size in zip(shard.index, array.shape, strict=True)]
        common = [
            (max(start, cut.start), min(stop, cut.stop))
            for (start, stop), cut in zip(held, index, strict=True)
        ]
        if any(start >= stop for start, stop in common):
            continue
        here = tuple(
            slice(start - first, stop - first)
            for (start, stop), (first, _) in zip(common, held, strict=True)
        )
        there = tuple(
            slice(start - cut.start, stop - cut.start)
            for (start, stop), cut in zip(common, index, strict=True)
        )
        # Cut on its device: it would keep on the host all that numpy once got of it.
        data = shard.data if common == held else _cut(shard.data, *_starts_and_sizes(here))
        part[there] = np.asarray(data)
    return part


def _starts_and_sizes(index: Index) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(cut.start for cut in index), tuple(cut.stop - cut.start for cut in index)


@jax.jit
def _layer(array: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)


@functools.partial(jax.jit, static_argnames="sizes")
def _cut(array: jax.Array, starts: tuple[int, ...], sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(array, starts, sizes)
