import os
import subprocess
import sys

import jax
import jax.numpy as jnp

from echo_jax.model import attention
from echo_jax.model.execution import Execution
from launch import operations


def counted(function, *arguments) -> int:
    return operations.count(jax.jit(function).trace(*arguments).jaxpr)


def scanned(remat):
    def layer(x, w):
        return jnp.sin(x @ w), None

    def loss(w, x):
        return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, w)[0].sum()

    return loss


def test_scans_and_recomputation_count_as_often_as_they_run():
    w, x = jnp.zeros((6, 16, 16)), jnp.zeros((8, 16))
    forward = 2 * 8 * 16 * 16 * 6
    assert counted(scanned(False), w, x) == forward
    assert counted(jax.grad(scanned(False), (0, 1)), w, x) == 3 * forward
    assert counted(jax.grad(scanned(True), (0, 1)), w, x) == 4 * forward


def test_convolutions_and_conditionals():
    def convolve(x, k):
        names = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, k, (2,), "SAME", dimension_numbers=names)

    x, k = jnp.zeros((2, 100, 4)), jnp.zeros((5, 4, 16))
    assert counted(convolve, x, k) == 2 * 2 * 50 * 16 * 5 * 4

    def either(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert counted(either, True, jnp.zeros((4, 4))) == 2 * 2 * 4**3


def test_the_splash_kernel_counts_its_blocks():
    q, k = jnp.zeros((2, 256, 4, 128)), jnp.zeros((2, 512, 2, 128))
    ids_q, ids_k = jnp.zeros((2, 256), jnp.int32), jnp.zeros((2, 512), jnp.int32)
    scores_and_values = 2 * 2 * 2 * 4 * 256 * 512 * 128
    for kind in ("plain", "splash"):

        def attend(q, k, kind=kind):
            return attention.by_segment(q, k, k, ids_q, ids_k, Execution(attention=kind)).sum()

        assert counted(attend, q, k) == scores_and_values


def test_devices_count_together():
    script = """
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
import numpy as np
from launch import operations
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
for axes in ({"a"}, {"a", "b"}):
    spec = P(tuple(sorted(axes)))
    f = jax.shard_map(lambda x: x @ x.T @ x, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes, check_vma=False)
    print(operations.count(jax.jit(f).trace(jnp.zeros((8, 4))).jaxpr))
"""
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
        },
    )
    assert found.returncode == 0, found.stderr
    # 2 shards of 4 rows, and 4 shards of 2 rows, in products of both orders.
    assert found.stdout.split() == [str(2 * 2 * 2 * 4 * 4 * 4), str(4 * 2 * 2 * 2 * 2 * 4)]
