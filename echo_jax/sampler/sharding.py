"""How the sampler is laid out on a mesh."""

import math

from jax.sharding import AbstractMesh, Mesh

from echo_jax.arrays import ShardingRules
from echo_jax.model.config import TextConfig


def decode_rules(
    config: TextConfig, mesh: Mesh | AbstractMesh, data: str = "data", tensor: str = "tensor"
) -> ShardingRules:
    """Shardings for sampling: rows over `data`; heads, FFN and vocabulary over `tensor`; the rest on every device.

    Where the mesh has more tensor shards than the model has key/value heads, their projections are on every device, and
    the cache holds each head once for every shard that needs it. A vocabulary that the shards do not divide is on every
    device, too.
    """
    shards = mesh.shape[tensor]
    few = shards > config.num_kv_heads
    return ShardingRules(
        batch=data,
        vocab=None if config.vocab_size % shards else tensor,
        heads=tensor,
        kv_heads=None if few else tensor,
        cache_heads=tensor,
        mlp=tensor,
    )


def head_copies(config: TextConfig, mesh: Mesh | AbstractMesh | None, rules: ShardingRules) -> int:
    """How often the cache holds a key/value head: once, or as often as shards of the cache share it."""
    axes = rules.cache_heads or ()
    names = (axes,) if isinstance(axes, str) else axes
    shards = math.prod(mesh.shape[axis] for axis in names) if mesh else 1
    if config.num_heads % shards:
        raise ValueError(
            f"{config.num_heads} heads cannot be divided over {shards} shards of the cache; use a smaller tensor axis"
        )
    if config.num_kv_heads % shards == 0:
        return 1
    if shards % config.num_kv_heads == 0:
        return shards // config.num_kv_heads
    raise ValueError(
        f"{config.num_kv_heads} key/value heads and {shards} shards of the cache do not divide each other; use another "
        "tensor axis"
    )
