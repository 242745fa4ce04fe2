"""One declaration per array: shape, dtype, logical axes and initializer.

Everything else about an array derives from its `ArraySpec`: random initialization, abstract trees for lowering and
restoring, shardings (through `ShardingRules`) and the mapping from checkpoint files.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Params = Any
"""A nested dict whose leaves are arrays; its structure equals the tree of `ArraySpec` it was made from."""


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Declares one array.

    Attributes:
      shape: dimensions; stacked layer arrays carry the layer axis first.
      logical_axes: a name (or None) for each dimension; `ShardingRules` maps names to mesh axes.
      init: "fan_in" (normal with variance 1 / fan-in), "unit" (normal with variance 1), "zeros" or "ones".
      fan_in_axes: the contracted dimensions, for "fan_in".
      dtype: storage dtype.
    """

    shape: tuple[int, ...]
    logical_axes: tuple[str | None, ...]
    init: Literal["fan_in", "unit", "zeros", "ones"] = "fan_in"
    fan_in_axes: tuple[int, ...] = ()
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.logical_axes):
            raise ValueError(
                f"shape {self.shape} has {len(self.shape)} dimensions but {len(self.logical_axes)} "
                f"logical axes {self.logical_axes} were given"
            )
        if self.init == "fan_in" and not self.fan_in_axes:
            raise ValueError("init='fan_in' needs fan_in_axes")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Maps each logical axis to a mesh axis, a tuple of mesh axes, or None (replicated)."""

    batch: str | tuple[str, ...] | None = None
    layers: str | tuple[str, ...] | None = None
    vocab: str | tuple[str, ...] | None = None
    embed: str | tuple[str, ...] | None = None
    heads: str | tuple[str, ...] | None = None
    kv_heads: str | tuple[str, ...] | None = None
    cache_heads: str | tuple[str, ...] | None = None
    head_dim: str | tuple[str, ...] | None = None
    mlp: str | tuple[str, ...] | None = None

    def partition_spec(self, logical_axes: tuple[str | None, ...]) -> PartitionSpec:
        """Returns the mesh axes of an array.

        Raises:
          ValueError: an axis name has no rule, or two dimensions of the array map to the same mesh axis.
        """
        entries: list[str | tuple[str, ...] | None] = []
        used: dict[str, str] = {}
        for axis in logical_axes:
            if axis is None:
                entries.append(None)
                continue
            if not hasattr(self, axis):
                raise ValueError(f"no sharding rule for logical axis {axis!r}")
            entry = getattr(self, axis)
            for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
                if mesh_axis in used:
                    raise ValueError(
                        f"logical axes {used[mesh_axis]!r} and {axis!r} of one array both map to mesh "
                        f"axis {mesh_axis!r}"
                    )
                used[mesh_axis] = axis
            entries.append(entry)
        return PartitionSpec(*entries)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where arrays lie: a mesh and the rules for it, or one device.

    Attributes:
      mesh: devices; None for one device, where nothing is constrained.
      rules: logical axis -> mesh axis.
    """

    mesh: Mesh | AbstractMesh | None = None
    rules: ShardingRules = dataclasses.field(default_factory=ShardingRules)

    def sharding(self, *logical_axes: str | None) -> NamedSharding:
        """The sharding of an array with these axes; the placement must have a mesh."""
        if self.mesh is None:
            raise ValueError("one device has no shardings; give the placement a mesh")
        return NamedSharding(self.mesh, self.rules.partition_spec(logical_axes))

    def constrain(self, x: jax.Array, *logical_axes: str | None) -> jax.Array:
        """Fixes the sharding of an activation inside a jitted function."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(*logical_axes))

    def gathered(
        self, x: jax.Array, stored: tuple[str | None, ...], used: tuple[str | None, ...]
    ) -> jax.Array:
        """A weight with fewer of its axes divided, as a computation uses it.

        Its gradient goes back divided as the weight is stored: devices add up their parts and keep their own. (The
        transpose of `constrain` would give every device the whole sum.)
        """
        if self.mesh is None:
            return x

        @jax.custom_vjp
        def gather(x: jax.Array) -> jax.Array:
            return self.constrain(x, *used)

        gather.defvjp(lambda x: (gather(x), None), lambda _, g: (self.constrain(g, *stored),))
        result: jax.Array = gather(x)
        return result

    def num_shards(self, logical_axis: str) -> int:
        """Over how many devices an axis is divided."""
        axes = getattr(self.rules, logical_axis) or ()
        names = (axes,) if isinstance(axes, str) else axes
        return math.prod(self.mesh.shape[axis] for axis in names) if self.mesh else 1


ONE_DEVICE = Placement()


def is_spec(x: Any) -> bool:
    """True for the leaves of a declaration tree; pass as `is_leaf` to `jax.tree` functions."""
    return isinstance(x, ArraySpec)


def map_with_path(fn: Callable[[str, ArraySpec], Any], specs: Any) -> Any:
    """Maps `fn(path, spec)` over a declaration tree; a path is the keys joined by '/'."""

    def call(path: tuple[Any, ...], spec: ArraySpec) -> Any:
        return fn("/".join(str(key.key) for key in path), spec)

    return jax.tree_util.tree_map_with_path(call, specs, is_leaf=is_spec)


def init_params(specs: Any, key: jax.Array) -> Params:
    """Draws all arrays. Each array's key depends on its path alone, so adding one array changes no other."""

    def init(path: str, spec: ArraySpec) -> jax.Array:
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, spec.dtype)
        if spec.init == "ones":
            return jnp.ones(spec.shape, spec.dtype)
        std = 1.0
        if spec.init == "fan_in":
            std = 1.0 / math.sqrt(math.prod(spec.shape[axis] for axis in spec.fan_in_axes))
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        return std * jax.random.normal(path_key, spec.shape, spec.dtype)

    return map_with_path(init, specs)


def abstract_params(
    specs: Any, mesh: Mesh | AbstractMesh | None = None, rules: ShardingRules | None = None
) -> Any:
    """Returns `jax.ShapeDtypeStruct` leaves, with shardings when a mesh and rules are given."""

    def abstract(path: str, spec: ArraySpec) -> jax.ShapeDtypeStruct:
        del path
        if mesh is None or rules is None:
            return jax.ShapeDtypeStruct(spec.shape, spec.dtype)
        sharding = NamedSharding(mesh, rules.partition_spec(spec.logical_axes))
        return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)

    return map_with_path(abstract, specs)


def shardings(specs: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> Any:
    """Returns how each array lies on a mesh, as `NamedSharding` leaves."""
    return jax.tree.map(lambda array: array.sharding, abstract_params(specs, mesh, rules))


def count_parameters(specs: Any) -> int:
    """Number of scalars in a declaration tree."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=is_spec))
