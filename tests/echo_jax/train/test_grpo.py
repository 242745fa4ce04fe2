import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.train import grpo


def released_loss(
    logprob,
    old,
    reference,
    advantage,
    mask,
    *,
    low,
    high,
    dual,
    beta,
    kl_kind,
    aggregation,
    budget=0,
    sampler=None,
    cap=0.0,
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
            if cap:
                loss *= min(np.exp(old[b, t] - sampler[b, t]), cap)
            d = reference[b, t] - logprob[b, t]
            k3 = np.exp(d) - d - 1
            kl = {"k1": -d, "k2": d * d / 2, "k3": k3, "low_variance": min(max(k3, -10), 10)}
            row.append(loss + beta * kl[kl_kind])
        rows.append(row)
    tokens = [value for row in rows for value in row]
    return {
        "sequence_mean": float(np.mean([np.mean(row) for row in rows if row])),
        "token_mean": float(np.mean(tokens)),
        "constant_length": sum(tokens) / (budget * sum(map(bool, rows))) if budget else 0.0,
    }[aggregation]


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
@pytest.mark.parametrize("cap", [0.0, 1.1])
def test_loss_equals_released_formulas(aggregation, kl_kind, dual, cap):
    case = random_case(seed=len(aggregation) + len(kl_kind) + int(10 * dual))
    sampler = case[1] + np.random.default_rng(1).normal(0, 0.3, case[1].shape)
    options = grpo.GrpoOptions(0.2, 0.3, dual, 0.04, kl_kind, aggregation, cap, 40)
    result = grpo.policy_loss(*as_f32(*case), options, *(as_f32(sampler) if cap else ()))
    want = released_loss(
        *case,
        low=0.2,
        high=0.3,
        dual=dual,
        beta=0.04,
        kl_kind=kl_kind,
        aggregation=aggregation,
        budget=40,
        sampler=sampler,
        cap=cap,
    )
    total, denominator = result["loss"]
    np.testing.assert_allclose(total / denominator, want, rtol=2e-5)


# k1 is logprob - reference; in the others the slope at the bounds of +-20 and 10 is cut.
@pytest.mark.parametrize("aggregation", sorted(grpo.AGGREGATIONS))
@pytest.mark.parametrize("kl_kind", sorted(grpo.KL_ESTIMATORS))
def test_gradient_equals_finite_differences(aggregation, kl_kind):
    case = random_case(seed=11)
    sampler = case[1] + 0.2
    rules = {"low": 0.2, "high": 0.28, "dual": 2.0, "beta": 0.1, "cap": 1.15, "sampler": sampler}
    options = grpo.GrpoOptions(0.2, 0.28, 2.0, 0.1, kl_kind, aggregation, 1.15, 40)

    def loss(logprob):
        rest = as_f32(*case[1:])
        total, denominator = grpo.policy_loss(logprob, *rest, options, *as_f32(sampler))["loss"]
        return total / denominator

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(case[0], jnp.float32)))
    step = 1e-6
    for b, t in np.ndindex(case[0].shape):
        around = []
        for sign in (1, -1):
            moved = case[0].copy()
            moved[b, t] += sign * step
            around.append(
                released_loss(
                    moved, *case[1:], kl_kind=kl_kind, aggregation=aggregation, budget=40, **rules
                )
            )
        slope = (around[0] - around[1]) / (2 * step)
        np.testing.assert_allclose(gradient[b, t], slope, rtol=2e-4, atol=1e-6)
    assert (gradient[~case[4]] == 0).all()
    assert (gradient[case[4]] != 0).mean() > 0.5


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


def two_tokens(log_ratio: float, advantage: float, **options: float) -> dict[str, float]:
    """Means over one answer of two tokens, of which the second was as likely as before."""
    logprob, old = jnp.array([[log_ratio, -1.0]]), jnp.array([[0.0, -1.0]])
    result = grpo.policy_loss(
        logprob,
        old,
        None,
        jnp.array([advantage]),
        jnp.ones((1, 2)),
        grpo.GrpoOptions(kl_coefficient=0.0, **options),
    )
    return {name: float(total / count) for name, (total, count) in result.items()}


def test_clip_higher_by_hand():
    # Ratio 1.25, A = 2: clipped to 1.2, or not at all with 1.28; the second token gives 2.
    assert two_tokens(np.log(1.25), 2.0)["loss"] == pytest.approx(-(2.4 + 2.0) / 2)
    higher = two_tokens(np.log(1.25), 2.0, clip_high=0.28)
    assert higher["loss"] == pytest.approx(-(2.5 + 2.0) / 2)
    assert higher["clipped"] == 0.0
    # Ratio 0.75, A = -2: the lower bound is 0.8 as before, min(-1.5, -1.6).
    lower = two_tokens(np.log(0.75), -2.0, clip_high=0.28)
    assert lower["loss"] == pytest.approx((1.6 + 2.0) / 2)
    assert lower["clipped"] == 0.5


def test_dual_clip_by_hand():
    # Ratio 5, A = -2: min(-10, -2.4) = -10, bounded at 3 x -2; the second token gives -2.
    assert two_tokens(np.log(5.0), -2.0)["loss"] == pytest.approx((10.0 + 2.0) / 2)
    dual = two_tokens(np.log(5.0), -2.0, dual_clip=3.0)
    assert dual["loss"] == pytest.approx((6.0 + 2.0) / 2)
    assert dual["dual_clipped"] == 0.5
    # A positive advantage is left alone.
    positive = two_tokens(np.log(5.0), 2.0, dual_clip=3.0)
    assert positive["loss"] == pytest.approx(-(2.4 + 2.0) / 2)
    assert positive["dual_clipped"] == 0.0


def test_importance_weights_by_hand():
    # The trainer gives 0.5 and 0.25 where the sampler drew with 0.25 and 0.5: weights 2, cut to 1.5, and 0.5.
    logprob = np.log([[0.5, 0.25]])
    sampler = np.log([[0.25, 0.5]])
    case = as_f32(logprob, logprob, np.zeros((1, 2)), np.array([1.0]), np.ones((1, 2)))
    options = grpo.GrpoOptions(kl_coefficient=0.5, kl_kind="k1", importance_cap=1.5)
    result = grpo.policy_loss(*case, options, *as_f32(sampler))
    np.testing.assert_allclose(result["policy"][0], -(1.5 + 0.5) / 2, rtol=1e-6)
    # The KL is not weighed: (log 0.5 + log 0.25) / 2.
    kl = (np.log(0.5) + np.log(0.25)) / 2
    np.testing.assert_allclose(result["kl"][0], kl, rtol=1e-6)
    np.testing.assert_allclose(result["loss"][0], -1.0 + 0.5 * kl, rtol=1e-6)
    np.testing.assert_allclose(result["ratio"][0], 2.0)
    np.testing.assert_allclose(result["logprob_gap"][0], 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(result["logprob_bias"][0], 0.0, atol=1e-6)
    found = grpo.importance_metrics(logprob, sampler, np.array([[True, True]]), 1.5)
    assert found["importance_mean"] == pytest.approx(1.25)
    assert found["importance_max"] == pytest.approx(2.0)
    assert found["importance_truncated"] == 0.5
    one = grpo.importance_metrics(logprob, sampler, np.array([[False, True]]), 0.0)
    assert one == pytest.approx(
        {"importance_mean": 0.5, "importance_max": 0.5, "importance_truncated": 0.0}
    )


def test_recomputed_without_a_cap_changes_the_log_only():
    case = as_f32(*random_case(9))
    sampler = case[1] - 0.25
    plain = grpo.policy_loss(*case, grpo.GrpoOptions())
    told = grpo.policy_loss(*case, grpo.GrpoOptions(), sampler)
    assert plain["loss"] == told["loss"]
    difference = (plain["logprob_bias"][0] - told["logprob_bias"][0]) / plain["logprob_bias"][1]
    np.testing.assert_allclose(difference, 0.25, rtol=1e-5)


def test_constant_length_by_hand():
    # Tokens 1 and 2 of two answers, a third without any: (1 + 2 + 4) / (2 answers x 10).
    values = jnp.array([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert grpo.constant_length(values, mask, 10) == (7.0, 20.0)
    assert grpo.token_mean(values, mask, 10) == (7.0, 3.0)
    assert grpo.sequence_mean(values, mask, 10) == (5.5, 2.0)


def test_kl_estimators_by_hand():
    # p = 0.5, p_ref = 0.25: log p - log p_ref = log 2, r = 0.5.
    logprob, reference = jnp.log(0.5), jnp.log(0.25)
    want = {
        "k1": np.log(2),
        "k2": np.log(2) ** 2 / 2,
        "k3": 0.5 + np.log(2) - 1,
        "low_variance": 0.5 + np.log(2) - 1,
    }
    assert set(want) == set(grpo.KL_ESTIMATORS)
    for name, value in want.items():
        np.testing.assert_allclose(grpo.KL_ESTIMATORS[name](logprob, reference), value, rtol=1e-6)


def test_low_variance_is_clamped_and_its_gradient_finite():
    logprob, reference = jnp.array([0.0, -50.0, 0.0]), jnp.array([0.0, 0.0, -1e4])
    np.testing.assert_allclose(grpo.kl_low_variance(logprob, reference), [0.0, 10.0, 10.0])
    np.testing.assert_allclose(
        grpo.kl_k3(logprob, reference), [0.0, np.exp(20) - 21, 19.0], rtol=1e-6
    )
    for estimator in (grpo.kl_k3, grpo.kl_low_variance):
        assert jax.grad(estimator)(jnp.array(-500.0), jnp.array(0.0)) == 0.0


def test_micro_batches_add_up_exactly():
    case = as_f32(*random_case(3, rows=8))
    for aggregation in grpo.AGGREGATIONS:
        options = grpo.GrpoOptions(aggregation=aggregation, max_response_tokens=64)
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
    with pytest.raises(ValueError, match="unknown kl_kind 'k4'; known: k1, k2, k3, low_variance"):
        grpo.GrpoOptions(kl_kind="k4")
    with pytest.raises(ValueError, match="unknown aggregation"):
        grpo.GrpoOptions(aggregation="mean")
    with pytest.raises(ValueError, match="unknown advantage"):
        grpo.get_advantage("gae")
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="sampler's log-probabilities"):
        grpo.policy_loss(
            x, x, x, jnp.zeros(1), jnp.ones((1, 2)), grpo.GrpoOptions(importance_cap=2.0)
        )
    with pytest.raises(
        ValueError, match="max_response_tokens=0 must be a whole number, at least 1"
    ):
        grpo.GrpoOptions(aggregation="constant_length")
    with pytest.raises(ValueError, match=r"config\.importance_cap=-1\.0 must be"):
        grpo.GrpoOptions(importance_cap=-1.0)
    with pytest.raises(ValueError, match="reference"):
        grpo.policy_loss(x, x, None, jnp.zeros(1), jnp.ones((1, 2)), grpo.GrpoOptions())
