"""Checkpoints straight into sharded arrays and back: the same bits as in numpy, and no more read than is kept."""

import filecmp
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from echo_jax import arrays, huggingface, huggingface_tensors, transfer
from echo_jax.arrays import ShardingRules
from echo_jax.huggingface_files import CheckpointFiles, write_file
from echo_jax.model import thinker
from tests.echo_jax.checkpoints import CONFIG, SHARD_BYTES, assert_same_bits, random_params

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A float32 model in several files; tests do not change it."""
    directory = tmp_path_factory.mktemp("checkpoint")
    return huggingface.save_pretrained(
        directory, CONFIG, random_params(), max_shard_bytes=SHARD_BYTES
    )


def assert_same_files(directory: Path, other: Path) -> None:
    names = sorted(file.name for file in other.iterdir())
    assert sorted(file.name for file in directory.iterdir()) == names
    assert sum(name.endswith(".safetensors") for name in names) > 3
    same, different, failed = filecmp.cmpfiles(directory, other, names, shallow=False)
    assert (different, failed) == ([], [])
    assert len(same) == len(names)


def start(*arguments: object, devices: int = 8) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.echo_jax.on_devices", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict[str, tuple[int, int]]:
    """What it printed: mesh -> bytes it read, bytes of the checkpoint."""
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    lines = [re.fullmatch(r"(\S+): read (\d+) of (\d+) bytes", x) for x in output.splitlines()]
    return {found[1]: (int(found[2]), int(found[3])) for found in lines if found}


# ---------------------------------------------------------------------------------------- many devices


def test_eight_devices_hold_what_numpy_holds(checkpoint, tmp_path):
    """Divided two ways; of each array only what the devices hold is read, and once."""
    found = finish(start(checkpoint, tmp_path, "fsdp-tensor"))
    (read, whole) = found["fsdp-tensor"]
    assert read == whole
    assert_same_files(tmp_path / "fsdp-tensor", checkpoint)


@pytest.mark.slow
def test_every_mesh_holds_what_numpy_holds(checkpoint, tmp_path):
    meshes = ["fsdp", "replicated", "data-fsdp", "tensor-fsdp", "both", "layers", "head-dim"]
    found = finish(start(checkpoint, tmp_path, ",".join(meshes)))
    assert list(found) == meshes
    for name, (read, whole) in found.items():
        assert (read > whole) if name == "head-dim" else (read == whole)
        assert_same_files(tmp_path / name, checkpoint)


@pytest.mark.slow
def test_two_processes_read_a_part_each_and_save_together(checkpoint, tmp_path):
    meshes = ["fsdp", "replicated", "data-fsdp", "fsdp-tensor", "layers"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        start(checkpoint, tmp_path, ",".join(meshes), process, 2, coordinator, devices=4)
        for process in range(2)
    ]
    for found in [finish(process) for process in both]:
        assert list(found) == meshes
        for name in ("replicated", "data-fsdp"):
            read, whole = found[name]
            assert read == whole
        for name in ("fsdp", "fsdp-tensor", "layers"):
            read, whole = found[name]
            assert 0.5 * whole <= read < 0.65 * whole
    for name in meshes:
        assert_same_files(tmp_path / name, checkpoint)


# ---------------------------------------------------------------------------------------- one device


def mesh_of_one() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("a", "b"))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("staged_bytes", [transfer.STAGED_BYTES, 1_000])
def test_dtypes(stored, dtype, staged_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "STAGED_BYTES", staged_bytes)
    params = random_params(stored)
    huggingface.save_pretrained(tmp_path, CONFIG, params)
    mesh, rules = mesh_of_one(), ShardingRules(embed="a", mlp="b")
    config, loaded = huggingface.load_pretrained(
        tmp_path, dtype, lambda config: arrays.shardings(thinker.param_specs(config), mesh, rules)
    )
    assert config == CONFIG
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    assert_same_bits(loaded, jax.tree.map(lambda x: x.astype(dtype), params))
    assert_same_bits(loaded, huggingface.load_pretrained(tmp_path, dtype)[1])


def test_parts_of_a_tensor():
    """Every block of every kind of tensor, through the layout of the disk and back."""
    rng = np.random.default_rng(0)
    for tensor in huggingface_tensors.tensors(CONFIG).values():
        if tensor.layer:
            continue
        array = rng.standard_normal(tensor.shape, np.float32)
        disk = np.ascontiguousarray(tensor.to_disk(array))
        assert disk.shape == tensor.shape_on_disk
        np.testing.assert_array_equal(tensor.from_disk(disk), array)
        for _ in range(20):
            index = tuple(
                slice(*sorted(rng.choice(size + 1, 2, replace=False).tolist()))
                for size in tensor.shape
            )
            slices, within = tensor.on_disk(index)
            np.testing.assert_array_equal(tensor.from_disk(disk[slices])[within], array[index])
            rows = [tensor.to_disk(array[block]) for block in tensor.blocks(index, 100)]
            np.testing.assert_array_equal(np.concatenate(rows), tensor.to_disk(array[index]))
            assert all(row.size <= 100 or len(row) == len(rows[0]) for row in rows)


def test_a_mixed_tree_keeps_its_dtypes(tmp_path):
    """A frozen audio tower in bfloat16 beside a float32 language model, with an odd number of scalars between."""
    params = random_params()
    params["audio_tower"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["audio_tower"])
    huggingface.save_pretrained(tmp_path, CONFIG, params)
    stored = load_file(tmp_path / "model.safetensors")
    assert {str(array.dtype) for array in stored.values()} == {"float32", "bfloat16"}
    assert_same_bits(
        huggingface.load_pretrained(tmp_path)[1],
        jax.tree.map(lambda x: np.asarray(x, np.float32), params),
    )


def test_a_save_leaves_no_copies_on_the_host(tmp_path):
    """An array keeps the copy that it once gave to numpy, for as long as it lives."""
    params = jax.tree.map(jnp.asarray, random_params())
    huggingface.save_pretrained(tmp_path, CONFIG, params)
    assert all(leaf._npy_value is None for leaf in jax.tree.leaves(params))


# ---------------------------------------------------------------------------------------- refusals


def refuse_reading(count: int) -> None:
    raise AssertionError(f"{count} bytes were read")


def sharded(**rules):
    return lambda config: arrays.shardings(
        thinker.param_specs(config), mesh_of_one(), ShardingRules(**rules)
    )


@pytest.mark.parametrize("shardings", [None, sharded(embed="a")], ids=["numpy", "sharded"])
def test_what_is_wrong_is_found_before_anything_is_read(shardings, tmp_path):
    huggingface.save_pretrained(tmp_path, CONFIG, random_params())
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    last = "lm_head.weight"
    cases = {
        rf"missing, the first is {last}": {k: v for k, v in good.items() if k != last},
        r"unknown tensor model\.extra": {**good, "model.extra": np.zeros(2, np.float32)},
        r"model\.norm\.weight is present twice": {
            **good,
            "thinker.model.norm.weight": good["model.norm.weight"],
        },
        rf"{last} has shape \(96, 63\), config\.json asks for \(96, 64\)": {
            **good,
            last: good[last][:, 1:].copy(),
        },
        rf"model\.safetensors: {last} holds I8 numbers": {**good, last: good[last].astype(np.int8)},
    }
    for message, content in cases.items():
        save_file(content, file)
        with pytest.raises(ValueError, match=message):
            huggingface.load_pretrained(tmp_path, np.float32, shardings, refuse_reading)
    save_file(good, file)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole + b"\0"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is not a readable"):
            huggingface.load_pretrained(tmp_path, np.float32, shardings, refuse_reading)


def test_shardings_that_do_not_fit_are_named(checkpoint):
    def lacking(config):
        tree = sharded()(config)
        del tree["language_model"]["final_norm"]
        return tree

    with pytest.raises(ValueError, match="shardings lacks array language_model/final_norm/scale"):
        huggingface.load_pretrained(checkpoint, np.float32, lacking, refuse_reading)

    mesh = jax.sharding.AbstractMesh((3,), ("a",))

    def indivisible(config):
        tree = sharded()(config)
        tree["audio_tower"]["ln_post"]["scale"] = NamedSharding(mesh, PartitionSpec("a"))
        return tree

    with pytest.raises(
        ValueError, match=r"audio_tower/ln_post/scale of shape \(32,\) cannot be divided"
    ):
        huggingface.load_pretrained(checkpoint, np.float32, indivisible, refuse_reading)


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path):
    """It is opened anew after some hundred MB; here at once."""
    huggingface.save_pretrained(tmp_path, CONFIG, random_params())
    table = huggingface_tensors.tensors(CONFIG)
    files = CheckpointFiles(tmp_path, table)
    tensor = table["lm_head.weight"]
    out = np.empty(tensor.shape, np.float32)
    files.read(tensor, huggingface_tensors.whole(tensor.shape), out)
    np.testing.assert_array_equal(out, random_params()["language_model"]["lm_head"]["kernel"])
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "shorter")
    os.truncate(tmp_path / "shorter", 5_000)
    os.replace(tmp_path / "shorter", tmp_path / "model.safetensors")
    files._mapped_bytes = 1 << 40
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable"):
        files.read(tensor, huggingface_tensors.whole(tensor.shape), out)


def test_integers_are_no_parameters(tmp_path):
    params = random_params()
    params["language_model"]["final_norm"]["scale"] = np.zeros(64, np.int32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds int32"):
        huggingface.save_pretrained(tmp_path, CONFIG, params)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        huggingface.load_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------- crashes


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_is_one_clear_line():
    with pytest.raises(OSError, match=r"^/dev/full cannot be written: No space left on device$"):
        write_file(Path("/dev/full"), [("x", np.float32, (2,))], [np.zeros(2, np.float32)])


KILLS = 8
SAVES = """
import sys
from echo_jax import huggingface
from tests.echo_jax.checkpoints import CONFIG, SHARD_BYTES, random_params
params = [random_params(seed=seed) for seed in range(2)]
print("ready", flush=True)
while True:
    for tree in params:
        huggingface.save_pretrained(sys.argv[1], CONFIG, tree, max_shard_bytes=SHARD_BYTES)
"""


@pytest.mark.slow
def test_a_killed_save_leaves_a_whole_model_or_none(tmp_path):
    """Killed at random places of saves over an older model."""
    rng = random.Random(0)
    trees = [random_params(seed=seed) for seed in range(2)]
    whole = 0
    for kill in range(KILLS):
        directory = tmp_path / str(kill)
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVES, str(directory)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        saver.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.5))
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        saver.stdout.close()
        if not (directory / "config.json").exists():
            with pytest.raises(FileNotFoundError, match=r"holds no model|no such directory"):
                huggingface.load_pretrained(directory)
            continue
        whole += 1
        _, params = huggingface.load_pretrained(directory)
        leaf = np.asarray(params["language_model"]["final_norm"]["scale"])
        (which,) = (
            tree
            for tree in trees
            if np.array_equal(leaf, tree["language_model"]["final_norm"]["scale"])
        )
        assert_same_bits(params, which)
    assert whole < KILLS


@pytest.mark.slow
def test_the_benchmark_measures_and_compares(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", "--model=tiny", f"--folder={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shares = re.findall(r"^process (\d of \d), .*; read .* \((\d+)%\)$", done.stdout, re.MULTILINE)
    assert [process for process, _ in shares] == ["1 of 1", "1 of 2", "2 of 2"]
    one, *two = (int(share) for _, share in shares)
    assert one == 100
    assert all(50 <= share <= 55 for share in two)
    beyond = re.findall(
        r"^  (load|export): beyond the arrays (\d+\.\d+) GB", done.stdout, re.MULTILINE
    )
    assert len(beyond) == 6
    assert all(float(gigabytes) < 2 for _, gigabytes in beyond)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_benchmark_wants_room_on_the_disk():
    """About 250 TB."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loading", "--layers=500000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(r"GB free and \d{6}\.\d GB are needed; give another --folder", done.stderr)
