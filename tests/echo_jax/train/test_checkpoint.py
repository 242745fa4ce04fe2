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
        with pytest.raises(CheckpointError, match="does not fit this config") as error:
            checkpoints.restore(state(0, width=5), pipeline())
        assert "\n" not in str(error.value)
