"""Supervised loss: cross-entropy over assistant tokens, as sums and denominators."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from echo_jax.train.grpo import SumAndDenominator


def cross_entropy(
    logits_blv: jax.Array, tokens_bl: jax.Array, loss_mask_bl: jax.Array
) -> dict[str, SumAndDenominator]:
    """Next-token cross-entropy over the marked tokens (Echo paper, SFT stage; ``<|im_end|>``
    included by the mask).

    Args:
        logits_blv: f[B, L, V]; position t predicts token t + 1.
        tokens_bl: i32[B, L].
        loss_mask_bl: f32[B, L], 1 where tokens_bl[:, t] is a target; the first column has no
            prediction and is ignored.

    Returns:
        ``loss`` (nats, targets), ``accuracy`` (targets that are the likeliest token, targets): sums
        and their denominators.
    """
    mask_bl = loss_mask_bl[:, 1:].astype(jnp.float32)
    targets_bl = tokens_bl[:, 1:]
    logits_blv = logits_blv[:, :-1].astype(jnp.float32)
    logp_bl = jnp.take_along_axis(
        jax.nn.log_softmax(logits_blv, axis=-1), targets_bl[..., None], axis=-1
    )[..., 0]
    right_bl = (jnp.argmax(logits_blv, axis=-1) == targets_bl).astype(jnp.float32)
    denominator = mask_bl.sum()
    return {
        "loss": (-(logp_bl * mask_bl).sum(), denominator),
        "accuracy": ((right_bl * mask_bl).sum(), denominator),
    }
