"""The stages that learn from chats: base and SFT."""

from __future__ import annotations

import functools
import time
from typing import Any

from ml_collections import ConfigDict

from echo_jax.train import sft
from echo_jax.train.checkpoint import TrainState
from launch.stage import Draw, Model, StepFunction, StepResult, Updater


def build(config: ConfigDict, model: Model) -> tuple[Updater, StepFunction]:
    """Cross-entropy on the assistant's tokens."""
    shards = model.placement.num_shards("batch")
    if config.batch_size // config.micro_batches % shards:
        raise ValueError(
            f"config.batch_size={config.batch_size} in config.micro_batches={config.micro_batches} cannot be divided "
            f"over the mesh's {shards} shards of the batch (data x fsdp); give another number, or another config.mesh"
        )
    loss_fn = functools.partial(
        sft.chat_loss, model.config, model.execution(config), config.vocabulary_chunk
    )
    updater = Updater(config, model, loss_fn, updates_per_step=1)

    def run_step(
        state: TrainState, batch: dict[str, Any], draw: Draw
    ) -> tuple[TrainState, StepResult]:
        started = time.monotonic()
        micro_batches = sft.stack_micro_batches(batch, config.micro_batches)
        state, metrics = updater(state, micro_batches, state.step, batch["ids"])
        tokens = int((batch["tokens"] != model.config.pad_id).sum())
        timings = {"train_s": time.monotonic() - started}
        return state, StepResult(metrics, timings, tokens, list(batch["ids"]))

    return updater, run_step
