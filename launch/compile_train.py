"""The programs of a training config, with the shapes and shardings of a real run and nothing in them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from echo_jax import arrays
from echo_jax.arrays import Placement
from echo_jax.model import thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler import Prompts
from echo_jax.text.tokenizer import Tokenizer
from echo_jax.train import replay, sft
from launch import inputs
from launch.stage import Model, Updater, stored_specs

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Lowerable:
    """A jitted function and abstract arguments for it.

    Attributes:
      name: for the table.
      function: jitted.
      arguments: `jax.ShapeDtypeStruct`, sharded.
      tokens: positions of the language model that it runs forward and, if `trains`, backward.
    """

    name: str
    function: Any
    arguments: tuple[PyTree, ...]


def abstract_model(
    config: ConfigDict, thinker_config: ThinkerConfig, tokenizer: Tokenizer, placement: Placement
) -> Model:
    """A model whose arrays are shapes."""
    specs = stored_specs(config, thinker_config)
    params = arrays.abstract_params(specs, placement.mesh, placement.rules)
    return Model(thinker_config, params, tokenizer, placement)


def update_arguments(updater: Updater, model: Model, batch: PyTree) -> tuple[PyTree, ...]:
    """Arguments of `Updater.update`: trainable, frozen, optimizer state, micro-batches."""
    trainable = updater.trainable(model.params)
    frozen = jax.tree.map(
        lambda leaf, kept: leaf if kept is None else None,
        model.params,
        trainable,
        is_leaf=lambda leaf: leaf is None,
    )
    return trainable, frozen, updater.abstract_state(model.params), batch


def abstract_batch(placement: Placement, *leading: str | None) -> Any:
    """A function (dtype, *shape) -> array whose axis after `leading` is the batch."""
    sharding = placement.sharding(*leading, "batch")

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return array


def chat_batch(config: ConfigDict, placement: Placement) -> sft.ChatBatch:
    """Micro-batches of the SFT stage: rows of data.max_tokens, one clip each, half of them targets."""
    count = config.micro_batches
    rows, length = config.batch_size // count, config.data.max_tokens
    array = abstract_batch(placement, None)
    targets = length // 2
    return sft.ChatBatch(
        tokens=array(jnp.int32, count, rows, length),
        positions=array(jnp.int32, count, rows, targets),
        clips=thinker.AudioClips(
            waveforms=array(jnp.float32, count, rows, inputs.clip_samples(config)),
            num_samples=array(jnp.int32, count, rows),
            row=array(jnp.int32, count, rows),
            start=array(jnp.int32, count, rows),
        ),
    )


def replay_batch(
    config: ConfigDict, placement: Placement, options: replay.ReplayOptions
) -> replay.ReplayBatch:
    """Micro-batches of the GRPO stage: full prompts, full answers, the least slots for clips."""
    queries = config.queries_per_microbatch
    count = config.queries_per_minibatch // queries
    rows = queries * options.group
    array = abstract_batch(placement, None)
    length = config.sampling.max_response_tokens + 1
    length = -(-length // options.token_multiple) * options.token_multiple
    sampled = config.sampling.max_response_tokens
    sampled = -(-sampled // options.target_multiple) * options.target_multiple
    shards = placement.num_shards("batch")
    local = rows // shards
    least = options.least_slots or (local, *[max(local // 8, 1)] * (len(options.buffers) - 1))
    segments = tuple(
        replay.SegmentSlots(*(array(jnp.int32, count, shards * slots) for _ in range(4)))
        for slots in least
    )
    return replay.ReplayBatch(
        prompts=Prompts(
            tokens=array(jnp.int32, count, queries, config.data.max_tokens),
            length=array(jnp.int32, count, queries),
            waveforms=array(jnp.float32, count, queries, inputs.clip_samples(config)),
            num_samples=array(jnp.int32, count, queries),
            audio_start=array(jnp.int32, count, queries),
        ),
        tokens=array(jnp.int32, count, rows, length),
        positions=array(jnp.int32, count, rows, sampled),
        stop_rest=array(jnp.int32, count, rows, sampled),
        old_logprob=array(jnp.float32, count, rows, sampled),
        advantage=array(jnp.float32, count, rows),
        segments=segments,
    )
