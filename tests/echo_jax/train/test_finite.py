"""Updates that are not finite: named by part, and without effect."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from echo_jax.train import finite, step

PARAMS = {
    "a": {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([0.5])},
    "b": {"q": {"kernel": jnp.array([3.0, 4.0])}},
    "c": {"scale": jnp.array([5.0])},
}


def loss_fn(params, batch):
    """Finite everywhere, with a gradient of sqrt(x)' = inf where `batch` takes a group to 0, nan where it is nan."""
    loss = sum(
        jnp.sum(jnp.sqrt(jnp.abs(leaf * batch[group])) + leaf)
        for group in params
        for leaf in jax.tree.leaves(params[group])
    )
    return {"loss": (loss * batch["loss"], jnp.float32(2.0))}


FROZEN = jax.tree.map(lambda leaf: None, PARAMS)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
UPDATE = jax.jit(step.make_update(loss_fn, OPTIMIZER))


def batches(**changed: float):
    values = {"a": 1.0, "b": 1.0, "c": 1.0, "loss": 1.0, **changed}
    return {name: jnp.array([1.0, value]) for name, value in values.items()}


def updated(batch):
    state = OPTIMIZER.init(PARAMS)
    params, state, _ = UPDATE(PARAMS, FROZEN, state, batches())
    return (params, state), UPDATE(params, FROZEN, state, batch)


def words(metrics) -> str:
    return finite.offending(
        np.asarray(metrics["finite_parts"]),
        finite.gradient_groups(PARAMS),
        float(metrics["loss"]),
        float(metrics["grad_norm"]),
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"b": 0.0}, "the gradient of b/q is not finite"),
        ({"a": 0.0, "c": 0.0}, "the gradient of a, c is not finite"),
        ({"loss": np.inf}, "loss is inf, the gradient of all 3 parameter groups is not finite"),
        ({"loss": np.nan}, "loss is nan, the gradient of all 3 parameter groups is not finite"),
        ({"b": np.nan}, "loss is nan, the gradient of b/q is not finite"),
        ({"loss": 1e30}, "grad_norm is inf, of gradients that are finite"),
    ],
)
def test_the_part_is_named_and_nothing_changes(changed, said):
    before, (params, state, metrics) = updated(batches(**changed))
    assert words(metrics) == said
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves((params, state)), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


def test_a_finite_update_is_the_optimizers_own():
    (params, state), (new, _, metrics) = updated(batches())
    assert words(metrics) == ""

    def mean(params):
        halves = [jax.tree.map(lambda x, half=half: x[half], batches()) for half in (0, 1)]
        return sum(loss_fn(params, batch)["loss"][0] for batch in halves) / 4.0

    gradients = jax.grad(mean)(params)
    updates, _ = OPTIMIZER.update(gradients, state, params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
        new,
        optax.apply_updates(params, updates),
    )


def test_many_groups_are_counted():
    groups = [f"layer_{number}" for number in range(20)]
    parts = np.array([True, False, *(number % 2 == 0 for number in range(20))])
    said = finite.offending(parts, groups, 1.0, np.nan)
    assert said.startswith("the gradient of layer_1, layer_3, ")
    assert said.endswith(" and 4 more is not finite")
