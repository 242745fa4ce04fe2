"""Which checkpoints stay, with real saves."""

import itertools

import grain
import jax
import jax.numpy as jnp
import pytest

from echo_jax.train.checkpoint import Checkpoints, TrainState
from echo_jax.train.retention import Retention

REWARDS = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.9, 5: 0.2, 6: float("nan"), 7: 0.3, 8: 0.4}


def state(step: int) -> TrainState:
    return TrainState(step, {"x": jnp.full(3, step)}, (), jax.random.key(step))


def kept(folder, retention: Retention, asynchronous: bool, restart_after: int = 0) -> list[int]:
    """The steps that are there after 8 saves; `restart_after` so many of them by another process, so to speak."""
    data = iter(grain.MapDataset.range(4).to_iter_dataset())
    for steps in (range(1, restart_after + 1), range(restart_after + 1, 9)):
        with Checkpoints(folder, retention, asynchronous) as checkpoints:
            for step in steps:
                checkpoints.save(
                    state(step), data, {}, {"reward/total": REWARDS[step], "loss": step}
                )
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
    ("retention", "steps"),
    [
        (Retention(keep_last=1), [8]),
        (Retention(keep_last=3), [6, 7, 8]),
        # Of the two best ones with 0.9 the newer; nan is never the best.
        (Retention(1, keep_best=1, best_metric="reward/total"), [4, 8]),
        (Retention(1, keep_best=3, best_metric="reward/total"), [2, 3, 4, 8]),
        (Retention(1, keep_best=2, best_metric="reward/total", best_mode="min"), [1, 5, 8]),
        (Retention(2, keep_best=1, best_metric="loss", best_mode="min"), [1, 7, 8]),
        (Retention(1, keep_every=3), [3, 6, 8]),
        (Retention(1, keep_best=1, best_metric="reward/total", keep_every=5), [4, 5, 8]),
    ],
)
def test_the_newest_the_best_and_every_so_many_stay(retention, steps, tmp_path):
    for asynchronous, restart_after in itertools.product((False, True), (0, 4)):
        folder = tmp_path / f"{asynchronous}{restart_after}"
        assert kept(folder, retention, asynchronous, restart_after) == steps


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_last": 0}, "config.checkpoint.keep_last=0 must be a whole number, at least 1"),
        ({"keep_best": -1}, "config.checkpoint.keep_best=-1 must be a whole number, at least 0"),
        ({"keep_every": 1.5}, "config.checkpoint.keep_every=1.5 must be a whole number"),
        ({"best_mode": "most"}, "config.checkpoint.best_mode='most' must be one of max, min"),
        ({"keep_best": 2}, "config.checkpoint.keep_best=2 needs config.checkpoint.best_metric"),
    ],
)
def test_what_means_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Retention(**fields)


def test_a_metric_that_is_not_there_is_named():
    retention = Retention(keep_best=1, best_metric="reward")
    with pytest.raises(ValueError, match=r"best_metric='reward' is no metric .* one of kl, loss"):
        retention.check_metrics({"loss": 1.0, "kl": 0.0})
    Retention().check_metrics({})
