import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.train import grpo


def released_loss(
    logprob, old, reference, advantage, mask, *, low, high, dual, beta, kl_kind, aggregation
) -> float:
    """The released formulas, token by token in float64."""
    rows = []
    for b in range(logprob.shape[0]):
        row = []
        for t in range(logprob.shape[1]):
            if not mask[b, t]:
                continue
            ratio = np.exp(logprob[b, t] - old[b, t])
            a = advantage[b]
            loss = max(-a * ratio, -a * min(max(ratio, 1 - low), 1 + high))
            if dual and a < 0:
                loss = min(loss, -a * dual)
            d = reference[b, t] - logprob[b, t]
            kl = {"k1": -d, "k2": d * d / 2, "k3": min(max(np.exp(d) - d - 1, -10), 10)}[kl_kind]
            row.append(loss + beta * kl)
        rows.append(row)
    if aggregation == "sequence_mean":
        return float(np.mean([np.mean(row) for row in rows if row]))
    return float(np.mean([value for row in rows for value in row]))


def random_case(seed: int, rows: int = 6, length: int = 11):
    rng = np.random.default_rng(seed)
    logprob = -rng.exponential(1.0, (rows, length))
    old = logprob + rng.normal(0, 0.6, (rows, length))
    reference = logprob + rng.normal(0, 1.5, (rows, length))
    advantage = rng.normal(0, 1, rows)
    mask = rng.random((rows, length)) < 0.6
    mask[:, 2] = True
    return logprob, old, reference, advantage, mask


def as_f32(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


def test_advantages_by_hand():
    # Mean 0.5; squared deviations 0.25 x 4, over n - 1 = 3: std 0.57735.
    got = grpo.group_normalized(np.array([[1.0, 0.0, 1.0, 0.0], [0.3, 0.3, 0.3, 0.3]]))
    np.testing.assert_allclose(got[0], [0.8660239, -0.8660239, 0.8660239, -0.8660239], atol=1e-6)
    assert (got[1] == 0).all()
    centred = grpo.group_centred(np.array([[1.5, -0.5, 0.5, 0.5]]))
    np.testing.assert_allclose(centred, [[1.0, -1.0, 0.0, 0.0]])


def test_equal_rewards_that_are_not_representable_give_exact_zero():
    assert (grpo.group_normalized(np.full((3, 7), 0.1)) == 0).all()


def test_advantage_needs_a_group():
    with pytest.raises(ValueError, match="at least 2 rollouts"):
        grpo.group_normalized(np.zeros((4, 1)))


@pytest.mark.parametrize("aggregation", sorted(grpo.AGGREGATIONS))
@pytest.mark.parametrize("kl_kind", sorted(grpo.KL_ESTIMATORS))
@pytest.mark.parametrize("dual", [0.0, 3.0, 1.2])
def test_loss_equals_released_formulas(aggregation, kl_kind, dual):
    case = random_case(seed=len(aggregation) + len(kl_kind) + int(10 * dual))
    options = grpo.GrpoOptions(0.2, 0.3, dual, 0.04, kl_kind, aggregation)
    total, denominator = grpo.policy_loss(*as_f32(*case), options)["loss"]
    want = released_loss(
        *case, low=0.2, high=0.3, dual=dual, beta=0.04, kl_kind=kl_kind, aggregation=aggregation
    )
    np.testing.assert_allclose(total / denominator, want, rtol=2e-5)


def test_loss_by_hand():
    # Row 0: A = 1, ratios e^0.5 (clipped to 1.2) and 1; row 1: A = -2, one token, ratio e^-1
    # (clipped to 0.8: -1.6 < -0.7358).
    logprob = jnp.array([[0.0, -0.5, -1.0], [0.0, -2.0, -9.0]])
    old = jnp.array([[0.0, -1.0, -1.0], [0.0, -1.0, -9.0]])
    mask = jnp.array([[0, 1, 1], [0, 1, 0]])
    options = grpo.GrpoOptions(kl_coefficient=0.0)
    result = grpo.policy_loss(logprob, old, None, jnp.array([1.0, -2.0]), mask, options)
    np.testing.assert_allclose(result["loss"][0], -(1.2 + 1.0) / 2 + 1.6, rtol=1e-6)
    assert result["loss"][1] == 2
    tokens = grpo.policy_loss(
        logprob,
        old,
        None,
        jnp.array([1.0, -2.0]),
        mask,
        grpo.GrpoOptions(kl_coefficient=0.0, aggregation="token_mean"),
    )
    np.testing.assert_allclose(tokens["loss"][0], -2.2 + 1.6, rtol=1e-6)
    assert tokens["loss"][1] == 3
    np.testing.assert_allclose(result["logprob_gap"][0], 0.5 + 0.0 + 1.0, rtol=1e-6)
    np.testing.assert_allclose(result["logprob_bias"][0], -0.5 + 0.0 + 1.0, rtol=1e-6)
    np.testing.assert_allclose(result["clipped"][0], 2.0)
    assert "kl" not in result


def test_k3_is_clamped_and_its_gradient_finite():
    value = grpo.kl_k3(jnp.array([0.0, -50.0, 0.0]), jnp.array([0.0, 0.0, -1e4]))
    np.testing.assert_allclose(value, [0.0, 10.0, 10.0])
    gradient = jax.grad(lambda x: grpo.kl_k3(x, jnp.array(0.0)))(jnp.array(-500.0))
    assert gradient == 0.0
    np.testing.assert_allclose(
        grpo.kl_k3(jnp.array(-1.0), jnp.array(-2.0)), np.exp(-1) + 1 - 1, rtol=1e-6
    )


def test_micro_batches_add_up_exactly():
    case = as_f32(*random_case(3, rows=8))
    for aggregation in grpo.AGGREGATIONS:
        options = grpo.GrpoOptions(aggregation=aggregation)
        whole = grpo.policy_loss(*case, options)["loss"]
        parts = [
            grpo.policy_loss(*(a[i : i + 2] for a in case), options)["loss"] for i in range(0, 8, 2)
        ]
        np.testing.assert_allclose(sum(p[0] for p in parts), whole[0], rtol=1e-5)
        assert sum(p[1] for p in parts) == whole[1]


def test_masked_positions_never_matter():
    logprob, old, reference, advantage, mask = as_f32(*random_case(4))
    options = grpo.GrpoOptions(dual_clip=3.0)

    def loss(x):
        total, denominator = grpo.policy_loss(x, old, reference, advantage, mask, options)["loss"]
        return total / denominator

    spoiled = jnp.where(mask > 0, logprob, jnp.inf)
    assert loss(spoiled) == loss(logprob)
    gradient = jax.grad(loss)(spoiled)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[np.asarray(mask) == 0] == 0).all()


def test_empty_rows_do_not_count():
    logprob, old, reference, advantage, mask = as_f32(*random_case(5))
    options = grpo.GrpoOptions()
    padded = [jnp.concatenate([a, a[:1]]) for a in (logprob, old, reference, advantage)]
    result = grpo.policy_loss(*padded, jnp.concatenate([mask, jnp.zeros_like(mask[:1])]), options)
    whole = grpo.policy_loss(logprob, old, reference, advantage, mask, options)
    assert result["loss"] == whole["loss"]


def test_gradient_of_first_update_is_the_policy_gradient():
    logprob, _, _, advantage, mask = as_f32(*random_case(6))
    options = grpo.GrpoOptions(kl_coefficient=0.0, aggregation="token_mean")
    gradient = jax.grad(
        lambda x: grpo.policy_loss(x, logprob, None, advantage, mask, options)["loss"][0]
    )(logprob)
    np.testing.assert_allclose(gradient, -advantage[:, None] * mask, rtol=1e-6)


def test_token_logprobs_with_temperature_events_and_forbidden_tokens():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (2, 5, 9))
    tokens = rng.integers(0, 8, (2, 5))
    rest = np.full((2, 5), -1)
    rest[1, 3], rest[0, 1] = 1, 0
    masks = np.zeros((3, 9), bool)
    masks[0, [1, 4]] = masks[1, [0, 2, 7]] = masks[2, 3] = True
    sampleable = np.arange(9) != 8
    got = grpo.token_logprobs(
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(tokens),
        0.7,
        jnp.asarray(sampleable),
        jnp.asarray(rest),
        masks,
    )
    p = np.exp(logits / 0.7) * sampleable
    p /= p.sum(-1, keepdims=True)
    for b in range(2):
        for t in range(5):
            members = masks[rest[b, t]] if rest[b, t] >= 0 else np.arange(9) == tokens[b, t]
            np.testing.assert_allclose(got[b, t], np.log(p[b, t][members].sum()), rtol=1e-5)


@pytest.mark.parametrize("field", ["clip_low", "clip_high", "dual_clip", "kl_coefficient"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_options_that_mean_nothing_are_named(field, value):
    message = f"config.loss.{field}={value!r} must be a finite number, at least 0"
    with pytest.raises(ValueError, match=message):
        grpo.GrpoOptions(**{field: value})


def test_a_dual_clip_inside_the_clip_is_named():
    with pytest.raises(
        ValueError, match=r"config.loss.dual_clip=0.5 must be 0 \(off\) or more than 1"
    ):
        grpo.GrpoOptions(dual_clip=0.5)


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="unknown kl_kind 'k4'; known: k1, k2, k3"):
        grpo.GrpoOptions(kl_kind="k4")
    with pytest.raises(ValueError, match="unknown aggregation"):
        grpo.GrpoOptions(aggregation="mean")
    with pytest.raises(ValueError, match="unknown advantage"):
        grpo.get_advantage("gae")
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="reference"):
        grpo.policy_loss(x, x, None, jnp.zeros(1), jnp.ones((1, 2)), grpo.GrpoOptions())
