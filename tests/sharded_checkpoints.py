"""Saves and restores one known state under any mesh, in one or several processes; asserts that every bit is the same.

python -m tests.sharded_checkpoints save    DIR --devices=8 --mesh=2,2,2
python -m tests.sharded_checkpoints restore DIR --devices=8 --mesh=1,8,1 [--process=0 --processes=2 --port=PORT]
python -m tests.sharded_checkpoints stop    DIR [...]   # counts steps until any of the processes is asked to stop
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

AXES = ("data", "fsdp", "tensor")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("save", "restore", "stop"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--devices", type=int, default=8, help="of this process")
    parser.add_argument("--mesh", action="append", help="sizes of data, fsdp, tensor")
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1, help="parts of the data")
    parser.add_argument("--step", type=int, default=3, help="that is expected")
    given = parser.parse_args(argv)
    # Read once, when jax is imported.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={given.devices}"
    import jax

    if given.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{given.port}", given.processes, given.process)
    if given.what == "stop":
        stop(given)
    for sizes in given.mesh or ():
        mesh = tuple(map(int, sizes.split(",")))
        (save if given.what == "save" else restore)(given, mesh)
        print(f"{given.what} {sizes} ok", flush=True)
    return 0


def pipeline(process: int):
    import grain

    return iter(grain.MapDataset.range(process * 100, process * 100 + 50).to_iter_dataset())


def state_on(mesh_sizes: tuple[int, ...], step: int):
    """The state of a step; nothing but the step decides its values, nothing but the mesh where they lie."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from echo_jax.train.checkpoint import TrainState

    devices = np.array(jax.devices()[: int(np.prod(mesh_sizes))])
    mesh = jax.sharding.Mesh(devices.reshape(mesh_sizes), AXES)
    rng = np.random.default_rng(step)

    def put(value, *spec):
        value = np.asarray(value)
        return jax.make_array_from_callback(
            value.shape, NamedSharding(mesh, P(*spec)), lambda index: value[index]
        )

    kernel = rng.normal(size=(16, 64)).astype(np.float32)
    params = {
        "kernel": put(kernel, "fsdp", "tensor"),
        "embedding": put(rng.normal(size=(64, 8)).astype(np.float32), ("data", "fsdp"), None),
        "scale": put(rng.normal(size=8).astype(np.float32)),
    }
    moment = jnp.asarray(kernel, jnp.bfloat16)
    # As optax leaves it: a scalar that no device owns. Several processes have no such arrays.
    count = jnp.int32(step) if jax.process_count() == 1 else put(np.int32(step))
    opt_state = {"mu": put(np.asarray(moment), "fsdp", "tensor"), "count": count}
    key = jax.random.key(step)
    data = put(jax.random.key_data(key))
    return TrainState(step, params, opt_state, jax.random.wrap_key_data(data))


def save(given, mesh_sizes) -> None:
    from echo_jax.train.checkpoint import Checkpoints
    from echo_jax.train.retention import Retention

    data = pipeline(given.process if given.shards > 1 else 0)
    with Checkpoints(given.directory, Retention(3), data_shards=given.shards) as checkpoints:
        for step in (1, 2, 3):
            next(data)
            if given.process == 1 and given.shards > 1:
                next(data)
            checkpoints.save(state_on(mesh_sizes, step), data, {"name": "x"})


def restore(given, mesh_sizes) -> None:
    import jax
    import numpy as np

    from echo_jax.train.checkpoint import Checkpoints

    own = given.process if given.shards > 1 else 0
    data = pipeline(own)
    right = state_on(mesh_sizes, given.step)
    for abstract in (False, True):
        template = state_on(mesh_sizes, 0)
        if abstract:
            template = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template
            )
        with Checkpoints(given.directory, data_shards=given.shards) as checkpoints:
            found = checkpoints.restore(template, data)
        assert found.step == given.step, found.step
        expected = given.step * (2 if own == 1 else 1) + own * 100
        assert next(data) == expected
        for x, y in zip(
            jax.tree.leaves(found.replace(key=jax.random.key_data(found.key))),
            jax.tree.leaves(
                right.replace(key=jax.random.key_data(right.key), progress=found.progress)
            ),
            strict=True,
        ):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
            for here, there in zip(x.addressable_shards, y.addressable_shards, strict=True):
                assert here.device == there.device
                one, two = np.asarray(here.data), np.asarray(there.data)
                assert one.dtype == two.dtype
                assert one.tobytes() == two.tobytes()
        if not abstract:
            # What no device owned may still meet what lies on all of them.
            step = jax.jit(lambda state: state.params["kernel"].sum() * state.opt_state["count"])
            jax.block_until_ready(step(found.replace(key=None)))


def stop(given) -> None:
    from launch.preemption import StopRequest

    with StopRequest() as request:
        step = 0
        while not (name := request.agreed()):
            step += 1
            if step == 10:
                (given.directory / f"ready{given.process}").touch()
            time.sleep(0.001 * given.process)
        print(f"{name} at {step}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
