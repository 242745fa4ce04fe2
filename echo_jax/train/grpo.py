"""Group-relative policy optimization: advantages, token log-probabilities, and the clipped loss
with a KL term.

All functions are pure. The loss returns sums and their denominators, so that the sums of k
micro-batches over the denominators of the whole batch are exactly the batch's loss. Formulas: Echo
paper, section on GRPO; where the paper gives only a symbol, the released training code (a patched
verl) decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax import ranges
from echo_jax.train.sft import SumAndDenominator

Entry = TypeVar("Entry")

STD_EPSILON = 1e-6
KL_BOUND = 10.0
# exp() of a larger difference would overflow in the backward pass; far beyond the ratio clip, the cap
# of an importance weight and KL_BOUND, so no clipped value changes.
LOG_RATIO_BOUND = 20.0
# A logit that is never drawn; finite, so that no gradient becomes 0 x inf.
NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class GrpoOptions:
    """Hyperparameters of the loss; every field is a config value.

    Attributes:
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: c > 1 bounds the loss of a negative advantage at c |A|; 0 turns it off.
        kl_coefficient: beta; 0 needs no reference log-probabilities.
        kl_kind: name in KL_ESTIMATORS.
        aggregation: name in AGGREGATIONS.
        importance_cap: C > 0 weighs the policy term of each token with min(pi_old / pi_sampler, C)
            (truncated importance sampling); 0 turns it off.
        max_response_tokens: the budget of an answer, for the aggregation "constant_length".

    Raises:
        ValueError: an unknown name or a number out of its range; the message names the field.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coefficient: float = 0.04
    kl_kind: str = "k3"
    aggregation: str = "sequence_mean"
    importance_cap: float = 0.0
    max_response_tokens: int = 0

    def __post_init__(self) -> None:
        _lookup(KL_ESTIMATORS, self.kl_kind, "kl_kind")
        _lookup(AGGREGATIONS, self.aggregation, "aggregation")
        for name in ("clip_low", "clip_high", "dual_clip", "kl_coefficient"):
            ranges.check(f"config.loss.{name}", getattr(self, name), ranges.NOT_NEGATIVE)
        if self.dual_clip and self.dual_clip <= 1.0:
            raise ValueError(
                f"config.loss.dual_clip={self.dual_clip} must be 0 (off) or more than 1"
            )
        ranges.check("config.importance_cap", self.importance_cap, ranges.NOT_NEGATIVE)
        if self.aggregation == "constant_length":
            ranges.check(
                "config.sampling.max_response_tokens", self.max_response_tokens, ranges.COUNT
            )


def _lookup(registry: Mapping[str, Entry], name: str, field: str) -> Entry:
    if name not in registry:
        raise ValueError(f"unknown {field} {name!r}; known: {', '.join(sorted(registry))}")
    return registry[name]


# -------------------- advantages --------------------


def group_normalized(rewards: np.ndarray) -> np.ndarray:
    """(R - mean) / (std + 1e-6) over the last axis, unbiased std; exactly 0 where a group's rewards
    are all equal.

    Args:
        rewards: f[..., G].

    Returns:
        f32[..., G].
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.shape[-1] < 2:
        raise ValueError(
            "a group needs at least 2 rollouts for a standard deviation; raise rollouts_per_query"
        )
    centred = rewards - rewards.mean(-1, keepdims=True)
    std = rewards.std(-1, ddof=1, keepdims=True)
    constant = np.ptp(rewards, axis=-1, keepdims=True) == 0
    return np.where(constant, 0.0, centred / (std + STD_EPSILON)).astype(np.float32)


def group_centred(rewards: np.ndarray) -> np.ndarray:
    """R - mean over the last axis, without division by the standard deviation (Dr. GRPO). Shapes as
    `group_normalized`."""
    rewards = np.asarray(rewards, np.float64)
    constant = np.ptp(rewards, axis=-1, keepdims=True) == 0
    return np.where(constant, 0.0, rewards - rewards.mean(-1, keepdims=True)).astype(np.float32)


ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "group_normalized": group_normalized,
    "group_centred": group_centred,
}


def get_advantage(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The advantage function registered under ``name``; a ValueError lists the names when there is
    none."""
    return _lookup(ADVANTAGES, name, "advantage")


# -------------------- log-probabilities --------------------


def token_logprobs(
    logits_bkv: jax.Array,
    tokens_bk: jax.Array,
    temperature: float,
    sampleable_v: jax.Array,
    stop_rest_bk: jax.Array,
    stop_mask_rv: np.ndarray,
) -> jax.Array:
    """Log-probability of every token under the distribution it was sampled from.

    Where a sampled token closes ``</seg>`` the sampler keeps the event "the tag was closed" and
    canonicalizes the token, so the log-probability there is the log-sum over all tokens of that
    event.

    Args:
        logits_bkv: f[B, K, V], each predicting tokens_bk[b, k].
        tokens_bk: i32[B, K].
        temperature: of the rollout, more than 0.
        sampleable_v: bool[V], what the sampler can draw; the rest has probability 0.
        stop_rest_bk: i32[B, K], row of `stop_mask_rv` where the token was a stop event, -1 elsewhere.
        stop_mask_rv: bool[R, V], the tokens of every event; a constant of the compiled function.

    Returns:
        f32[B, K].
    """
    logits_bkv = jnp.where(sampleable_v, logits_bkv.astype(jnp.float32), NEVER) / temperature
    logp_bkv = jax.nn.log_softmax(logits_bkv, axis=-1)
    chosen_bk = jnp.take_along_axis(logp_bkv, tokens_bk[..., None], axis=-1)[..., 0]
    for rest, members_v in enumerate(stop_mask_rv):
        if members_v.sum() < 2:
            continue  # the event is its canonical token
        event_bk = jax.nn.logsumexp(jnp.where(members_v, logp_bkv, NEVER), axis=-1)
        chosen_bk = jnp.where(stop_rest_bk == rest, event_bk, chosen_bk)
    return chosen_bk


# -------------------- KL, loss --------------------


def kl_k1(logprob: jax.Array, reference: jax.Array) -> jax.Array:
    """log p - log p_ref: unbiased, signed."""
    return logprob - reference


def kl_k2(logprob: jax.Array, reference: jax.Array) -> jax.Array:
    """(log p - log p_ref)^2 / 2."""
    return 0.5 * jnp.square(logprob - reference)


def kl_k3(logprob: jax.Array, reference: jax.Array) -> jax.Array:
    """r - log r - 1 with r = p_ref / p: unbiased, never negative, of low variance (Schulman,
    "Approximating KL divergence"; DeepSeekMath, eq. 4)."""
    log_r = jnp.clip(reference - logprob, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return jnp.exp(log_r) - log_r - 1.0


def kl_low_variance(logprob: jax.Array, reference: jax.Array) -> jax.Array:
    """`kl_k3` clamped to +-10, as in the released code."""
    return jnp.clip(kl_k3(logprob, reference), -KL_BOUND, KL_BOUND)


KL_ESTIMATORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
    "low_variance": kl_low_variance,
}


def sequence_mean(
    values_bl: jax.Array, mask_bl: jax.Array, max_response_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Sum over rows of each row's mean over its masked-in tokens, and the number of rows that have
    any."""
    counts_b = mask_bl.sum(-1)
    means_b = (values_bl * mask_bl).sum(-1) / jnp.maximum(counts_b, 1.0)
    return means_b.sum(), (counts_b > 0).sum().astype(jnp.float32)


def token_mean(
    values_bl: jax.Array, mask_bl: jax.Array, max_response_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Sum over all masked-in tokens, and their number."""
    return (values_bl * mask_bl).sum(), mask_bl.sum()


def constant_length(
    values_bl: jax.Array, mask_bl: jax.Array, max_response_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Sum over all masked-in tokens, and the number of rows that have any times the budget: no
    answer's tokens weigh less because it is long (Dr. GRPO, arXiv 2503.20783)."""
    rows = (mask_bl.sum(-1) > 0).sum().astype(jnp.float32)
    return (values_bl * mask_bl).sum(), rows * max_response_tokens


AGGREGATIONS: dict[str, Callable[[jax.Array, jax.Array, int], tuple[jax.Array, jax.Array]]] = {
    "sequence_mean": sequence_mean,
    "token_mean": token_mean,
    "constant_length": constant_length,
}


def policy_loss(
    logprob_bl: jax.Array,
    old_logprob_bl: jax.Array,
    reference_bl: jax.Array | None,
    advantage_b: jax.Array,
    mask_bl: jax.Array,
    options: GrpoOptions,
    sampler_logprob_bl: jax.Array | None = None,
) -> dict[str, SumAndDenominator]:
    """The GRPO loss of a (micro-)batch and what is logged with it.

    -(w min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - beta KL), aggregated over the tokens
    the policy sampled; rho = pi / pi_old, and w = 1 or, with `importance_cap` C,
    min(pi_old / pi_sampler, C). Inserted audio must be outside `mask_bl` and the final <|im_end|>
    inside: then both hold for the policy term, the KL and the denominators.

    Args:
        logprob_bl: f32[B, L], of the policy in training.
        old_logprob_bl: f32[B, L], of the policy before the updates of the step.
        reference_bl: f32[B, L], of the cold-start model; None when kl_coefficient is 0.
        advantage_b: f32[B].
        mask_bl: f32 or bool[B, L], 1 where the token was sampled.
        options: the hyperparameters.
        sampler_logprob_bl: f32[B, L], what the sampler drew with, where `old_logprob_bl` was
            computed anew; None where it is the sampler's own.

    Returns:
        name -> (sum, denominator). ``loss`` is the one to differentiate; ``policy``, ``kl``,
        ``clipped`` (share of tokens where the clip is active), ``ratio``, ``logprob_gap`` (|sampler
        - trainer|) and ``logprob_bias`` (sampler - trainer) are for the log, and with a dual clip
        ``dual_clipped``.
    """
    if options.kl_coefficient and reference_bl is None:
        raise ValueError("kl_coefficient is not 0, so the loss needs reference log-probabilities")
    if options.importance_cap and sampler_logprob_bl is None:
        raise ValueError(
            "importance_cap is not 0, so the loss needs the sampler's log-probabilities"
        )

    def aggregate(values_bl: jax.Array) -> SumAndDenominator:
        function = AGGREGATIONS[options.aggregation]
        return function(values_bl, mask_bl, options.max_response_tokens)

    mask_bl = mask_bl.astype(jnp.float32)
    # Values under the mask's zeros may be anything (log-probs of audio placeholders): they must not
    # reach exp().
    logprob_bl = jnp.where(mask_bl > 0, logprob_bl, 0.0)
    old_logprob_bl = jnp.where(mask_bl > 0, old_logprob_bl, 0.0)
    sampler_bl = old_logprob_bl
    if sampler_logprob_bl is not None:
        sampler_bl = jnp.where(mask_bl > 0, sampler_logprob_bl, 0.0)
    advantage_bl = advantage_b[:, None]

    ratio_bl = _ratio(logprob_bl, old_logprob_bl)
    clipped_bl = jnp.clip(ratio_bl, 1.0 - options.clip_low, 1.0 + options.clip_high)
    objective_bl = jnp.minimum(ratio_bl * advantage_bl, clipped_bl * advantage_bl)
    logged = {"clipped": clipped_bl * advantage_bl < ratio_bl * advantage_bl, "ratio": ratio_bl}
    if options.dual_clip:
        bound_bl = options.dual_clip * advantage_bl
        logged["dual_clipped"] = (advantage_bl < 0) & (bound_bl > objective_bl)
        objective_bl = jnp.where(logged["dual_clipped"], bound_bl, objective_bl)
    if options.importance_cap:
        weight_bl = jnp.minimum(_ratio(old_logprob_bl, sampler_bl), options.importance_cap)
        objective_bl = jax.lax.stop_gradient(weight_bl) * objective_bl
    values_bl = -objective_bl
    result = {"policy": aggregate(values_bl)}
    if reference_bl is not None:
        reference_bl = jnp.where(mask_bl > 0, reference_bl, 0.0)
        kl_bl = KL_ESTIMATORS[options.kl_kind](logprob_bl, reference_bl)
        result["kl"] = aggregate(kl_bl)
        values_bl = values_bl + options.kl_coefficient * kl_bl
    result["loss"] = aggregate(values_bl)
    logged["logprob_gap"] = jnp.abs(sampler_bl - logprob_bl)
    logged["logprob_bias"] = sampler_bl - logprob_bl
    for name, logged_bl in logged.items():
        logged_bl = jax.lax.stop_gradient(logged_bl.astype(jnp.float32))
        result[name] = ((logged_bl * mask_bl).sum(), mask_bl.sum())
    return result


def _ratio(logprob_bl: jax.Array, other_bl: jax.Array) -> jax.Array:
    return jnp.exp(jnp.clip(logprob_bl - other_bl, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def importance_metrics(
    old_logprob: np.ndarray, sampler_logprob: np.ndarray, mask: np.ndarray, cap: float
) -> dict[str, float]:
    """What is logged of pi_old / pi_sampler over the sampled tokens of a step, before it is capped.

    Args:
        old_logprob, sampler_logprob: f32[...].
        mask: bool[...], where a token was sampled.
        cap: the largest weight; 0 for none.

    Returns:
        ``importance_mean``, ``importance_max``, and the share of tokens over the cap,
        ``importance_truncated``.
    """
    difference = np.asarray(old_logprob, np.float64)[mask] - np.asarray(sampler_logprob)[mask]
    weights = np.exp(np.clip(difference, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    return {
        "importance_mean": float(weights.mean()),
        "importance_max": float(weights.max()),
        "importance_truncated": float((weights > cap).mean()) if cap else 0.0,
    }
