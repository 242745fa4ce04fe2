import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from echo_jax.train import optimizer
from echo_jax.train.optimizer import OptimizerOptions


def params():
    return {
        "tower": {"conv": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
        "lm": {"norm": {"scale": jnp.ones(4)}, "q": {"kernel": jnp.ones((4, 4))}},
    }


def test_cosine_with_warmup():
    schedule = optimizer.make_schedule(
        OptimizerOptions(1.0, "cosine", warmup_fraction=0.2, final_fraction=0.1), 20
    )
    np.testing.assert_allclose([schedule(i) for i in range(4)], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose(schedule(4), 1.0)
    np.testing.assert_allclose(schedule(12), 0.55, rtol=1e-6)
    np.testing.assert_allclose(schedule(20), 0.1, rtol=1e-6)


def test_constant_and_linear():
    constant = optimizer.make_schedule(OptimizerOptions(0.5), 3)
    assert [float(constant(i)) for i in (0, 2, 9)] == [0.5, 0.5, 0.5]
    linear = optimizer.make_schedule(OptimizerOptions(1.0, "linear"), 10)
    np.testing.assert_allclose([linear(0), linear(5), linear(10)], [1.0, 0.5, 0.0], atol=1e-7)


@pytest.mark.parametrize(
    ("field", "value", "must"),
    [
        ("schedule", "cosin", "be one of constant, cosine, linear"),
        *(
            (field, value, "be a finite number, at least 0")
            for field in ("learning_rate", "eps", "weight_decay", "clip_norm")
            for value in (-1e-9, math.nan, math.inf)
        ),
        *(
            (field, value, "be a finite number in [0, 1]")
            for field in ("warmup_fraction", "final_fraction")
            for value in (-0.1, 1.1, math.nan)
        ),
        *(
            (field, value, "be a finite number in [0, 1)")
            for field in ("b1", "b2")
            for value in (-0.1, 1.0)
        ),
    ],
)
def test_options_that_mean_nothing_are_named(field, value, must):
    with pytest.raises(
        ValueError, match=re.escape(f"config.optimizer.{field}={value!r} must {must}")
    ):
        OptimizerOptions(**{"learning_rate": 1.0, field: value})


def test_a_schedule_needs_an_update():
    with pytest.raises(ValueError, match="at least 1 update"):
        optimizer.make_schedule(OptimizerOptions(1.0), 0)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (("foo",), "config.parameter_rules holds 'foo'; give pairs such as"),
        (((".*", "train", "x"),), "holds ('.*', 'train', 'x'); give pairs"),
        (((3, "train"),), "holds (3, 'train'); give pairs"),
        ((3,), "holds 3; give pairs"),
        ((("(", "train"),), "'(' is not a regular expression: missing )"),
        ((("a{99999999999}", "train"),), "is not a regular expression"),
        (((".*", "frozen"),), "'.*' has label 'frozen'; it must be one of train, freeze"),
    ],
)
def test_rules_that_are_none_are_named(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.label_parameters(params(), rules)


def test_every_parameter_matches_exactly_one_rule():
    labels = optimizer.label_parameters(params(), [("tower/.*", "freeze"), ("lm/.*", "train")])
    assert labels["tower"]["conv"] == {"kernel": "freeze", "bias": "freeze"}
    assert labels["lm"]["q"]["kernel"] == "train"
    with pytest.raises(ValueError, match=r"parameter lm/norm/scale .* matches none"):
        optimizer.label_parameters(params(), [("tower/.*", "freeze"), ("lm/q/.*", "train")])
    with pytest.raises(ValueError, match=r"parameter lm/norm/scale .* matches .*, lm"):
        optimizer.label_parameters(params(), [(".*", "train"), ("lm/.*", "train")])
    with pytest.raises(ValueError, match=r"'visual/.\*' matches no parameter"):
        optimizer.label_parameters(params(), [(".*", "train"), ("visual/.*", "freeze")])


def test_split_and_merge():
    labels = optimizer.label_parameters(params(), [("tower/.*", "freeze"), ("lm/.*", "train")])
    trainable, frozen = optimizer.split(params(), labels)
    assert len(jax.tree.leaves(trainable)) == 2
    assert len(jax.tree.leaves(frozen)) == 2
    assert jax.tree.structure(optimizer.merge(trainable, frozen)) == jax.tree.structure(params())
    jax.tree.map(np.testing.assert_array_equal, optimizer.merge(trainable, frozen), params())


def test_decay_spares_norms_and_biases_and_frozen_parts_cost_nothing():
    assert optimizer.decay_mask(params()) == {
        "tower": {"conv": {"kernel": True, "bias": False}},
        "lm": {"norm": {"scale": False}, "q": {"kernel": True}},
    }
    tx = optimizer.make_optimizer(OptimizerOptions(0.1, weight_decay=0.5), 10)
    labels = optimizer.label_parameters(params(), [("tower/.*", "freeze"), ("lm/.*", "train")])
    trainable, _ = optimizer.split(params(), labels)
    state = tx.init(trainable)
    zero = jax.tree.map(jnp.zeros_like, trainable)
    updates, _ = tx.update(zero, state, trainable)
    np.testing.assert_allclose(updates["lm"]["q"]["kernel"], -0.05, rtol=1e-6)
    assert (updates["lm"]["norm"]["scale"] == 0).all()
    assert updates["tower"]["conv"]["kernel"] is None
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(m.shape for m in moments) == [(4,), (4,), (4, 4), (4, 4)]


def test_adamw_with_clipping_equals_numpy():
    options = OptimizerOptions(0.01, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    tx = optimizer.make_optimizer(options, 5)
    rng = np.random.default_rng(0)
    w = rng.normal(size=(3, 2))
    tree = {"kernel": jnp.asarray(w, jnp.float32)}
    state = tx.init(tree)
    m = v = np.zeros_like(w)
    for i in range(1, 4):
        g = rng.normal(size=w.shape) * 3
        updates, state = tx.update({"kernel": jnp.asarray(g, jnp.float32)}, state, tree)
        tree = optax.apply_updates(tree, updates)
        g = g / max(1.0, np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w - 0.01 * ((m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.95**i)) + 1e-8) + 0.1 * w)
    np.testing.assert_allclose(tree["kernel"], w, rtol=1e-5)
