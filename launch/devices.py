"""The devices of a run: processes, meshes, and what goes to and comes from them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from echo_jax.arrays import ONE_DEVICE, ArraySpec, Placement, ShardingRules, map_with_path
from echo_jax.model import thinker
from echo_jax.model.config import TextConfig, ThinkerConfig
from echo_jax.sampler import decode_rules

PyTree = Any
AXES = ("data", "fsdp", "tensor")
# Under these variables a process is one of several that start each other's meshes; on a TPU pod JAX finds out itself.
_COORDINATOR, _COUNT, _ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def initialize() -> None:
    """Joins the other processes of the run, if there are any; call it before JAX looks for devices.

    On a TPU pod slice the processes find each other. Elsewhere JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID say who they are.

    Raises:
        ValueError: one of the variables is missing or no number.
    """
    if os.environ.get(_COORDINATOR):
        numbers: list[int] = []
        for name in (_COUNT, _ID):
            if not os.environ.get(name, "").isdigit():
                raise ValueError(
                    f"{name}={os.environ.get(name)!r} must be a whole number where {_COORDINATOR} is set"
                )
            numbers.append(int(os.environ[name]))
        jax.distributed.initialize(os.environ[_COORDINATOR], numbers[0], numbers[1])
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        jax.distributed.initialize()


def train_rules(config: TextConfig, tensor: int) -> ShardingRules:
    """Shardings for training: rows over data and fsdp; weights over fsdp by their width, over tensor by the rest.

    The rest is heads, FFN and vocabulary.
    """
    return ShardingRules(
        batch=("data", "fsdp"),
        embed="fsdp",
        # A vocabulary that the shards do not divide is on every one.
        vocab=None if config.vocab_size % tensor else "tensor",
        heads="tensor",
        # Fewer heads than shards are on every one.
        kv_heads="tensor" if config.num_kv_heads % tensor == 0 else None,
        mlp="tensor",
    )


def mesh_shape(sizes: ConfigDict, axes: Sequence[str], devices: int, field: str) -> tuple[int, ...]:
    """The mesh that a config asks for; an axis of -1 takes what the others leave.

    Raises:
        ValueError: it is no mesh of so many devices; the message names the field.
    """
    wanted = {axis: sizes[axis] for axis in axes}
    free = [axis for axis, size in wanted.items() if size == -1]
    if len(free) > 1 or any(
        not isinstance(size, int) or (size < 1 and size != -1) for size in wanted.values()
    ):
        raise ValueError(
            f"config.{field}={wanted} must hold whole numbers of at least 1, one of them -1 at most (what is left)"
        )
    known = math.prod(size for size in wanted.values() if size != -1)
    if free:
        wanted[free[0]] = max(devices // known, 1)
    if math.prod(wanted.values()) != devices:
        raise ValueError(
            f"config.{field}={dict(sizes)} is no mesh of the {devices} devices there are; their product must be "
            f"{devices}, or leave one axis at -1"
        )
    return tuple(wanted.values())


def train_placement(config: ConfigDict, model: ThinkerConfig) -> Placement:
    """Mesh and rules of the training steps. On several slices, `data` spans them and the rest stays inside one.

    Raises:
        ValueError: config.mesh does not fit the devices or the model.
    """
    devices = jax.devices()
    shape = mesh_shape(config.mesh, AXES, len(devices), "mesh")
    if len(devices) == 1:
        return ONE_DEVICE
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if shape[0] % slices:
            raise ValueError(
                f"config.mesh.data={shape[0]} must be a multiple of the {slices} slices, which only data spans"
            )
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices)
    return placed_on(Mesh(grid, AXES), model)


def placed_on(mesh: Mesh, model: ThinkerConfig) -> Placement:
    """The rules of the training steps for a mesh of AXES.

    Raises:
        ValueError: it does not divide an array of the model; the message names both.
    """
    placement = Placement(mesh, train_rules(model.text, mesh.shape["tensor"]))

    def check(path: str, spec: ArraySpec) -> None:
        for size, axis in zip(spec.shape, spec.logical_axes, strict=True):
            shards = placement.num_shards(axis) if axis else 1
            if size % shards:
                raise ValueError(
                    f"config.mesh: {path} has a dimension {axis} of {size}, which {shards} shards do not divide; make "
                    f"config.mesh.{getattr(placement.rules, axis or '')} smaller"
                )

    map_with_path(check, thinker.param_specs(model))
    return placement


def decode_placement(config: ConfigDict, text: TextConfig, training: Placement) -> Placement:
    """Mesh and rules of the rollouts, on the devices of `training` in their order.

    Raises:
        ValueError: config.rollout_mesh does not fit the devices.
    """
    if training.mesh is None:
        return ONE_DEVICE
    devices = np.asarray(training.mesh.devices).reshape(-1)
    shape = mesh_shape(config.rollout_mesh, ("data", "tensor"), len(devices), "rollout_mesh")
    mesh = Mesh(devices.reshape(shape), ("data", "tensor"))
    return Placement(mesh, decode_rules(text, mesh))


def put(tree: PyTree, placement: Placement, *leading: str | None) -> PyTree:
    """Arrays to the devices: the axis after `leading` is the batch.

    Numpy arrays are the same in every process; each device gets its rows, the others' do not leave the host.
    """
    if placement.mesh is None:
        return jax.device_put(tree)
    sharding = placement.sharding(*leading, "batch")

    def place(x: Any) -> jax.Array:
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)


def random_key(seed: int, placement: Placement) -> jax.Array:
    """A typed key, on every device."""
    if placement.mesh is None:
        return jax.random.key(seed)
    # Made where it belongs: a process cannot put an array on the devices of another.
    return jax.jit(lambda: jax.random.key(seed), out_shardings=placement.sharding())()


def to_host(tree: PyTree) -> PyTree:
    """Arrays in numpy, whole in every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)
