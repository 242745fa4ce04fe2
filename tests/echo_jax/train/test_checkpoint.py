import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.train.checkpoint import CheckpointError, Checkpoints, Progress, TrainState


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
    progress = Progress(train_seconds=1.1, restarts=3, skipped_updates=2, skipped_in_a_row=1)
    saved = state(5).replace(progress=progress)
    with Checkpoints(tmp_path / "c", asynchronous=asynchronous) as checkpoints:
        checkpoints.save(saved, data, {"name": "x", "rules": [("a", "b")]})
        checkpoints.save(saved, data, {"name": "again"})
    following = [next(data) for _ in range(7)]
    again = pipeline()
    seen = []
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() == 5
        abstract = jax.eval_shape(lambda: state(0))
        restored = checkpoints.restore(
            abstract, again, lambda config, step: seen.append((config, step))
        )
    assert_same(restored, state(5))
    assert restored.progress == dataclasses.replace(progress, restarts=4)
    assert seen == [({"name": "x", "rules": [["a", "b"]]}, 5)]
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


def test_errors_are_one_line(tmp_path):
    with Checkpoints(tmp_path / "empty") as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(CheckpointError, match=r"no checkpoint in .*empty"):
            checkpoints.restore(state(0), pipeline())
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(state(1), pipeline(), {})
    for template, message in (
        (state(0, width=5), r"\(opt_state/0/mu is bfloat16\(3,\), bfloat16\(5,\) in this run\)"),
        (state(0).replace(opt_state=()), r"\(opt_state/0/count is int32\(\), not in this run\)"),
        (
            state(0).replace(params={"layer": {"kernel": jnp.zeros((4, 3), jnp.bfloat16)}}),
            r"\(params/layer/kernel is float32\(4, 3\), bfloat16\(4, 3\) in this run\)",
        ),
    ):
        with (
            Checkpoints(tmp_path / "other") as checkpoints,
            pytest.raises(CheckpointError, match=message) as error,
        ):
            checkpoints.restore(template, pipeline())
        assert str(error.value).startswith(f"checkpoint {tmp_path / 'other' / '1'} does not fit")
        assert "\n" not in str(error.value)


def test_a_refused_config_is_raised_as_it_is_and_changes_nothing(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state(1), pipeline(), {"seed": 1})

    def refuse(config, step):
        raise ValueError(f"seed {config['seed']} at {step}")

    data = pipeline()
    before = data.get_state()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="seed 1 at 1"):
        checkpoints.restore(state(0), data, refuse)
    assert data.get_state() == before
    assert (tmp_path / "1").is_dir()


def test_the_data_of_other_processes_is_not_taken(tmp_path):
    with pytest.raises(ValueError, match="data_shards=2 must be 1 or the number of processes, 1"):
        Checkpoints(tmp_path, data_shards=2)
