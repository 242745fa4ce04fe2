import shutil
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.train.checkpoint import CheckpointError, Checkpoints, TrainState


def pipeline():
    return iter(grain.MapDataset.range(20).shuffle(seed=3).repeat(None).batch(4).to_iter_dataset())


def state(step: int, width: int = 3) -> TrainState:
    rng = np.random.default_rng(step)
    params = {"layer": {"kernel": jnp.asarray(rng.normal(size=(4, width)), jnp.float32)}}
    opt_state = ({"mu": jnp.full((width,), step, jnp.bfloat16), "count": jnp.int32(step)}, None)
    return TrainState(step=step, params=params, opt_state=opt_state, key=jax.random.key(step))


def assert_same(a: TrainState, b: TrainState) -> None:
    assert a.step == b.step
    unkeyed = [jax.tree.leaves(s.replace(key=jax.random.key_data(s.key))) for s in (a, b)]
    for x, y in zip(*unkeyed, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_goes_on_exactly(tmp_path, asynchronous):
    data = pipeline()
    next(data), next(data)
    with Checkpoints(tmp_path / "c", keep_last=2, asynchronous=asynchronous) as checkpoints:
        checkpoints.save(state(5), data, {"name": "x", "rules": [("a", "b")]})
        checkpoints.save(state(5), data, {"name": "again"})
    following = [next(data) for _ in range(7)]
    again = pipeline()
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() == 5
        abstract = jax.eval_shape(lambda: state(0))
        restored = checkpoints.restore(abstract, again)
        assert_same(restored, state(5))
        assert checkpoints.stored_config() == {"name": "x", "rules": [["a", "b"]]}
    for batch in following:
        np.testing.assert_array_equal(next(again), batch)


def test_what_is_being_written_may_be_donated(tmp_path):
    step = jax.jit(lambda x: x + 1.0, donate_argnums=0)
    kernel = jnp.zeros((512, 4096))
    with Checkpoints(tmp_path / "c") as checkpoints:
        saved = TrainState(1, {"kernel": kernel}, (), jax.random.key(0))
        checkpoints.save(saved, pipeline(), {})
        for _ in range(50):
            kernel = step(kernel)
        jax.block_until_ready(kernel)
    with Checkpoints(tmp_path / "c") as checkpoints:
        abstract = TrainState(
            0, {"kernel": jax.ShapeDtypeStruct((512, 4096), jnp.float32)}, (), jax.random.key(0)
        )
        restored = checkpoints.restore(abstract, pipeline())
    assert (np.asarray(restored.params["kernel"]) == 0).all()


def test_only_the_last_ones_stay(tmp_path):
    data = pipeline()
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for step in (1, 2, 3):
            next(data)
            checkpoints.save(state(step), data, {})
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["2", "3"]


def test_errors_are_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="keep_last"):
        Checkpoints(tmp_path, keep_last=0)
    with Checkpoints(tmp_path / "empty") as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*empty"):
            checkpoints.restore(state(0), pipeline())
        with pytest.raises(CheckpointError, match="no checkpoint"):
            checkpoints.stored_config()
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(state(1), pipeline(), {})
    with Checkpoints(tmp_path / "other") as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"does not fit this config \(opt_state/0/mu is \(3,\), \(5,\) in"
        ) as error:
            checkpoints.restore(state(0, width=5), pipeline())
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two steps, with arrays that are large enough for files of their own."""
    folder = tmp_path_factory.mktemp("written") / "c"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(step, width=4096), pipeline(), {"name": "x"})
    return folder


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def go_on(checkpoints: Checkpoints) -> TrainState:
    """What a run that goes on reads."""
    assert checkpoints.stored_config() == {"name": "x"}
    return checkpoints.restore(state(0, width=4096), pipeline())


@pytest.mark.parametrize(
    "choose",
    [
        lambda step: largest(step / "arrays"),
        lambda step: step / "arrays" / "manifest.ocdbt",
        lambda step: step / "arrays" / "_METADATA",
        lambda step: step / "iterator" / "process_0-of-1.json",
        lambda step: step / "host" / "metadata",
    ],
    ids=["data", "manifest", "metadata", "iterator", "host"],
)
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named_with_the_way_on(choose, how, written, tmp_path, capfd):
    folder = Path(shutil.copytree(written, tmp_path / "c"))
    file = choose(folder / "2")
    if how == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(CheckpointError) as error:
            go_on(checkpoints)
        said = str(error.value)
        assert said.startswith(f"checkpoint {folder / '2'} is damaged (")
        assert said.endswith("; remove this folder to go on from step 1")
        assert "\n" not in said
    assert "Traceback" not in capfd.readouterr().err
    shutil.rmtree(folder / "2")
    with Checkpoints(folder) as checkpoints:
        assert_same(go_on(checkpoints), state(1, width=4096))


def test_the_only_checkpoint_damaged_means_to_start_anew(written, tmp_path):
    folder = Path(shutil.copytree(written, tmp_path / "c"))
    shutil.rmtree(folder / "1")
    (folder / "2" / "host" / "metadata").write_text("{}")
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointError, match=r"holds no config\); remove this folder to start"),
    ):
        checkpoints.stored_config()
