"""Supervised loss: cross-entropy over assistant tokens, as sums and denominators."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.arrays import Params
from echo_jax.model import language_model, thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.model.execution import Execution
from echo_jax.train import head, targets

TARGET_MULTIPLE = 32

SumAndDenominator = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class ChatBatch:
    """Chats to learn from. In a stack of micro-batches every field has a leading axis more.

    Attributes:
        tokens: i32[B, L], right padded.
        positions: i32[B, K], indices of the target tokens, 0 where there are fewer (`targets.positions_of`).
        clips: the audio of all rows; the slots belong to the rows in order, as many each.
        packing: where rows hold several chats; None where each holds one.
    """

    tokens: Any
    positions: Any
    clips: thinker.AudioClips
    packing: language_model.Packing | None = None


def stack_micro_batches(batch: dict[str, Any], count: int) -> ChatBatch:
    """Cuts a chat batch into `count` micro-batches along a new first axis.

    Args:
        batch: tokens i32[B, L], loss_mask [B, L], waveforms f32[C, S], num_samples, clip_row, clip_start i32[C]; the C
            clip slots belong to the rows in order, C / B each.
        count: divides B.

    Raises:
        ValueError: it does not.
    """
    rows = batch["tokens"].shape[0]
    if rows % count:
        raise ValueError(f"micro_batches={count} does not divide the batch of {rows} rows")

    def stack(values: np.ndarray) -> Any:
        return values.reshape(count, values.shape[0] // count, *values.shape[1:])

    return ChatBatch(
        tokens=stack(batch["tokens"]),
        positions=stack(targets.positions_of(batch["loss_mask"] > 0, TARGET_MULTIPLE)),
        clips=thinker.AudioClips(
            waveforms=stack(batch["waveforms"]),
            num_samples=stack(batch["num_samples"]),
            row=stack(batch["clip_row"] % (rows // count)),
            start=stack(batch["clip_start"]),
        ),
    )


def cross_entropy(
    logits_bkv: jax.Array, tokens_bk: jax.Array, mask_bk: jax.Array
) -> dict[str, SumAndDenominator]:
    """Cross-entropy over the marked targets (Echo paper, SFT stage).

    Args:
        logits_bkv: f[B, K, V], each predicting tokens_bk[b, k].
        tokens_bk: i32[B, K].
        mask_bk: f32 or bool[B, K].

    Returns:
        ``loss`` (nats, targets), ``accuracy`` (targets that are the likeliest token, targets): sums and their
        denominators.
    """
    return _summed(_log_probability_and_hit(logits_bkv, tokens_bk), mask_bk)


def _log_probability_and_hit(
    logits_bkv: jax.Array, tokens_bk: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and whether it is the likeliest token; two f32[B, K]."""
    logits_bkv = logits_bkv.astype(jnp.float32)
    at_token = jnp.take_along_axis(logits_bkv, tokens_bk[..., None], axis=-1)[..., 0]
    # Counted, since an arg-max gathers a vocabulary that is divided over devices; a tie is no hit.
    hit = (logits_bkv >= at_token[..., None]).sum(-1) == 1
    return at_token - jax.nn.logsumexp(logits_bkv, axis=-1), hit.astype(jnp.float32)


def _summed(
    found_bk: tuple[jax.Array, jax.Array], mask_bk: jax.Array
) -> dict[str, SumAndDenominator]:
    logp_bk, right_bk = found_bk
    mask_bk = mask_bk.astype(jnp.float32)
    denominator = mask_bk.sum()
    return {
        "loss": (-(logp_bk * mask_bk).sum(), denominator),
        "accuracy": ((right_bk * mask_bk).sum(), denominator),
    }


def chat_loss(
    config: ThinkerConfig,
    execution: Execution,
    vocabulary_chunk: int,
    params: Params,
    batch: ChatBatch,
) -> dict[str, SumAndDenominator]:
    """`cross_entropy` of the thinker on one micro-batch, the logits of `vocabulary_chunk` positions a row at a time."""
    hidden_ble = thinker.forward_hidden(
        config, params, batch.tokens, (batch.clips,), batch.packing, execution
    )
    found = head.map_logits(
        params["language_model"],
        targets.predicting(hidden_ble, batch.positions),
        (jnp.take_along_axis(batch.tokens, batch.positions, axis=1),),
        _log_probability_and_hit,
        vocabulary_chunk,
        execution.placement,
    )
    return _summed(found, batch.positions > 0)
