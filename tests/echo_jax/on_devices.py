"""Loads a checkpoint onto meshes of simulated devices, compares with the same in numpy, and saves it again.

python -m tests.echo_jax.on_devices CHECKPOINT FOLDER MESH,... [PROCESS PROCESSES COORDINATOR]

Run by `test_loading.py`, in processes of their own, since the number of devices is fixed when jax starts.
"""

import math
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from echo_jax import arrays, huggingface, transfer
from echo_jax.arrays import ShardingRules
from echo_jax.model import thinker
from tests.echo_jax.checkpoints import CONFIG, SHARD_BYTES

# Name -> sizes of the axes a and b, and what lies on them.
MESHES = {
    "fsdp": ((8, 1), ShardingRules(embed="a")),
    "replicated": ((8, 1), ShardingRules()),
    "data-fsdp": ((2, 4), ShardingRules(embed="b")),
    "fsdp-tensor": ((2, 4), ShardingRules(embed="a", vocab="b", heads="b", mlp="b")),
    "tensor-fsdp": ((4, 2), ShardingRules(embed="b", heads="a", kv_heads=None, mlp="a", vocab="a")),
    "both": ((2, 4), ShardingRules(embed=("a", "b"))),
    "layers": ((4, 2), ShardingRules(layers="a", kv_heads="b", heads="b")),
    # An axis that is merged behind another one on disk: more is read than is kept.
    "head-dim": ((2, 4), ShardingRules(embed="a", head_dim="b")),
}


def main() -> None:
    """Prints one line a mesh.

    Raises:
      AssertionError: something differs.
    """
    checkpoint, folder, names, *process = sys.argv[1:]
    if process:
        number, processes, coordinator = process
        jax.distributed.initialize(coordinator, int(processes), int(number))
    for name in names.split(","):
        shape, rules = MESHES[name]
        mesh = Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))
        print(f"{name}: {check(Path(checkpoint), Path(folder) / name, mesh, rules)}", flush=True)


def check(checkpoint: Path, folder: Path, mesh: Mesh, rules: ShardingRules) -> str:
    """Loads in both dtypes, whole shards at a time and in parts, and saves the last one, which is in float32."""
    specs = thinker.param_specs(CONFIG)
    wanted = arrays.shardings(specs, mesh, rules)
    least = jax.tree.map(bytes_to_read, specs, wanted, is_leaf=arrays.is_spec)
    staged_bytes = transfer.STAGED_BYTES
    for dtype in ("bfloat16", "float32"):
        _, expected = huggingface.load_pretrained(checkpoint, dtype)
        for transfer.STAGED_BYTES in (staged_bytes, 3_000):
            read: list[int] = []
            config, params = huggingface.load_pretrained(checkpoint, dtype, wanted, read.append)
            assert config == CONFIG
            jax.tree.map(assert_shards, params, wanted, expected)
            assert sum(read) >= sum(jax.tree.leaves(least))
            assert sum(read) == sum(jax.tree.leaves(least)) or rules.head_dim
        transfer.STAGED_BYTES = staged_bytes
    huggingface.save_pretrained(folder, config, params, max_shard_bytes=SHARD_BYTES)
    return f"read {sum(read)} of {4 * arrays.count_parameters(specs)} bytes"


def assert_shards(array: jax.Array, sharding: NamedSharding, expected: np.ndarray) -> None:
    """Every shard that is here holds its part, bit for bit."""
    assert array.sharding == sharding
    assert array.dtype == expected.dtype
    for shard in array.addressable_shards:
        assert np.asarray(shard.data).tobytes() == expected[shard.index].tobytes()


def bytes_to_read(spec: arrays.ArraySpec, sharding: NamedSharding) -> int:
    """Of a float32 checkpoint: each part that a device of this process holds, once."""
    parts = {
        tuple(cut.indices(size)[:2] for cut, size in zip(index, spec.shape, strict=True))
        for index in sharding.addressable_devices_indices_map(spec.shape).values()
    }
    return len(parts) * math.prod(sharding.shard_shape(spec.shape)) * 4


if __name__ == "__main__":
    main()
