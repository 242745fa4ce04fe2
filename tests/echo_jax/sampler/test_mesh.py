"""Sharded sampling: one device and eight agree."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from echo_jax.arrays import ShardingRules
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler import Sampler, decode_rules
from echo_jax.sampler.sharding import head_copies
from tests.echo_jax.sampler.conftest import OPTIONS


@pytest.mark.slow
def test_eight_devices_answer_like_one():
    """In a process of its own, since the number of devices is fixed when jax starts."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.echo_jax.sampler.on_mesh"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert [line.split(":")[0] for line in found.stdout.splitlines()] == [
        "one device",
        "data 8 x tensor 1",
        "data 4 x tensor 2",
        "data 2 x tensor 4",
    ]


@pytest.mark.parametrize(
    ("preset", "tensor", "kv_heads", "copies"),
    [
        ("qwen2.5-omni-7b", 1, "tensor", 1),
        ("qwen2.5-omni-7b", 4, "tensor", 1),
        ("qwen2.5-omni-3b", 4, None, 2),
        ("qwen2.5-omni-3b", 8, None, 4),
    ],
)
def test_few_heads_are_held_by_every_shard(preset, tensor, kv_heads, copies):
    mesh = jax.sharding.AbstractMesh((2, tensor), ("data", "tensor"))
    text = ThinkerConfig.preset(preset).text
    rules = decode_rules(text, mesh)
    assert rules.kv_heads == kv_heads
    assert head_copies(text, mesh, rules) == copies


def test_meshes_that_do_not_divide_the_model_are_refused(world):
    one = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = Mesh(one, ("data", "tensor"))
    with pytest.raises(ValueError, match="mesh and rules go together"):
        Sampler(world.config, world.tokenizer, OPTIONS, mesh)
    explicit = jax.make_mesh(
        (1, 1), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    with pytest.raises(ValueError, match=r"make it with jax\.sharding\.Mesh"):
        Sampler(world.config, world.tokenizer, OPTIONS, explicit, ShardingRules(batch="data"))
    seven = ThinkerConfig.preset("qwen2.5-omni-7b").text
    for tensor, message in (
        (8, "28 heads cannot be divided over 8"),
        (14, "4 key/value heads and 14"),
    ):
        mesh = jax.sharding.AbstractMesh((1, tensor), ("data", "tensor"))
        with pytest.raises(ValueError, match=message):
            head_copies(seven, mesh, decode_rules(seven, mesh))
