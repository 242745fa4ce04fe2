import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from echo_jax.model.config import ThinkerConfig
from launch import devices


@pytest.mark.slow
def test_all_meshes_of_eight_devices_compute_what_one_does():
    """In a process of its own, since the number of devices is fixed when jax starts."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.launch.on_mesh"], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 7


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((-1, 4, 2), (1, 4, 2)),
        ((8, 1, 1), (8, 1, 1)),
    ],
)
def test_the_rest_goes_to_the_free_axis(sizes, shape):
    config = ConfigDict(dict(zip(devices.AXES, sizes, strict=True)))
    assert devices.mesh_shape(config, devices.AXES, 8, "mesh") == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, -1, 1), r"config\.mesh=.* is no mesh of the 8 devices"),
        ((2, 2, 1), "is no mesh of the 8 devices"),
        ((-1, -1, 1), "one of them -1 at most"),
        ((0, -1, 1), "at least 1"),
        ((1.5, -1, 1), "whole numbers"),
        ((16, -1, 1), "is no mesh of the 8 devices"),
    ],
)
def test_meshes_that_do_not_fit_are_named(sizes, message):
    config = ConfigDict(dict(zip(devices.AXES, sizes, strict=True)), convert_dict=False)
    with pytest.raises(ValueError, match=message):
        devices.mesh_shape(config, devices.AXES, 8, "mesh")


def test_arrays_that_a_mesh_does_not_divide_are_named():
    model = ThinkerConfig.preset("qwen2.5-omni-7b")
    mesh = AbstractMesh((1, 2, 8), devices.AXES)
    with pytest.raises(
        ValueError, match=r"audio_tower/layers/k/kernel has a dimension heads of 20, which 8"
    ):
        devices.placed_on(mesh, model)
    assert devices.placed_on(AbstractMesh((1, 4, 4), devices.AXES), model).num_shards("batch") == 4


def test_every_axis_has_a_place():
    few = ThinkerConfig.preset("qwen2.5-omni-3b").text
    assert devices.train_rules(few, 2).kv_heads == "tensor"
    assert devices.train_rules(few, 4).kv_heads is None
    assert devices.train_rules(few, 1).batch == ("data", "fsdp")


@pytest.mark.parametrize("missing", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_half_named_processes_are_refused(monkeypatch, missing):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=missing):
        devices.initialize()


def test_one_device_needs_no_mesh():
    x = {"a": np.arange(4.0), "b": None}
    placed = devices.put(x, devices.ONE_DEVICE, None)
    assert isinstance(placed["a"], jax.Array)
    np.testing.assert_array_equal(devices.to_host(placed)["a"], x["a"])
