"""GRPO: groups of sampled answers, their rewards and advantages, then one update a mini-batch."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from echo_jax import arrays
from echo_jax.arrays import Params, Placement
from echo_jax.model import thinker
from echo_jax.sampler import Sampler
from echo_jax.train import grpo, replay, step
from echo_jax.train.checkpoint import TrainState
from launch import devices, rollouts
from launch.checks import loss_options, replay_options, sampling_options
from launch.stage import (
    Draw,
    Metrics,
    Model,
    StepFunction,
    StepResult,
    Updater,
)
from launch.validation import Validator

# Parts of a step: weights to where the sampler wants them, questions beyond the first batch, answers, their rewards,
# log-probabilities before the updates, updates, validation.
PARTS = ("sync", "redraw", "rollout", "reward", "logprob", "train", "validation")
# A round of dynamic sampling has a key of its own; the sampler folds row numbers into it, which stay far below.
_LAST_ROUND = 2**32 - 1


class Laps:
    """Seconds of the parts of a step, each up to the moment it is named."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((f"{part}_s" for part in PARTS), 0.0)
        self._last = time.monotonic()

    def __call__(self, part: str) -> None:
        """Ends a lap that was of this part."""
        now = time.monotonic()
        self.seconds[f"{part}_s"] += now - self._last
        self._last = now


def reference_params(config: ConfigDict, params: Params) -> Params | None:
    """The cold start as the KL's reference, in config.reference.dtype; None where there is no KL.

    A copy: the trained parameters are donated from update to update, these never.
    """
    if not config.loss.kl_coefficient:
        return None
    dtype = jnp.dtype(config.reference.dtype)
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params)


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a GRPO step runs on the devices.

    Attributes:
        decode: mesh and rules of the rollouts.
        sampler: answers questions there.
        sampler_weights: hands the trained parameters over: at most one cast and one change of sharding.
        logprobs: (parameters, micro-batches) -> log-probabilities of the sampled tokens, jitted.
        updater: one update a mini-batch.
        replay_options: shapes of the mini-batches.
    """

    decode: Placement
    sampler: Sampler
    sampler_weights: Callable[[Params], Params]
    logprobs: Callable[[Params, replay.ReplayBatch], jax.Array]
    updater: Updater
    replay_options: replay.ReplayOptions


def programs(config: ConfigDict, model: Model) -> Programs:
    """The programs of a config; the model's arrays may be abstract.

    Raises:
        ValueError: config.mesh or config.rollout_mesh does not divide the batches.
    """
    decode = devices.decode_placement(config, model.config.text, model.placement)
    _check_divisible(config, model.placement, decode)
    sampler = Sampler(
        model.config,
        model.tokenizer,
        sampling_options(config),
        decode.mesh,
        decode.rules if decode.mesh else None,
    )
    options = replay_options(config, model.execution(config))
    vocabulary = replay.Vocabulary(sampler.sampleable, np.asarray(sampler.automaton.stop_mask))
    loss_fn = functools.partial(
        replay.replay_loss, model.config, options, vocabulary, loss_options(config)
    )
    updates = config.queries_per_step // config.queries_per_minibatch
    compute = step.PRECISIONS[config.precision].compute

    def logprobs(params: Params, batches: replay.ReplayBatch) -> jax.Array:
        params = jax.tree.map(lambda x: x.astype(compute), params)
        logprob_fn = functools.partial(replay.logprobs, model.config, options, vocabulary, params)
        # One micro-batch at a time, as in the update.
        return jax.lax.map(logprob_fn, batches)

    on_mesh = model.placement.mesh is not None
    return Programs(
        decode=decode,
        sampler=sampler,
        sampler_weights=_sampler_weights(config, model, decode),
        logprobs=jax.jit(
            logprobs, out_shardings=model.placement.sharding(None, "batch") if on_mesh else None
        ),
        updater=Updater(config, model, loss_fn, updates),
        replay_options=options,
    )


def _sampler_weights(
    config: ConfigDict, model: Model, decode: Placement
) -> Callable[[Params], Params]:
    precision = step.PRECISIONS[config.precision]
    if decode.mesh is None and precision.master == precision.compute:
        # The sampler's parameters are the trainer's: nothing is copied that is in its place.
        return lambda params: params

    def cast(params: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(precision.compute), params)

    if decode.mesh is None:
        return jax.jit(cast)
    specs = thinker.param_specs(model.config)
    shardings = jax.tree.map(
        lambda spec: decode.sharding(*spec.logical_axes), specs, is_leaf=arrays.is_spec
    )
    return jax.jit(cast, out_shardings=shardings)


def _check_divisible(config: ConfigDict, training: Placement, decode: Placement) -> None:
    prompts = config.queries_per_microbatch * config.replay.copies
    for what, count, shards, mesh in (
        (
            f"config.queries_per_microbatch={config.queries_per_microbatch} with config.replay.copies="
            f"{config.replay.copies}",
            prompts,
            training.num_shards("batch"),
            "config.mesh (data x fsdp)",
        ),
        (
            f"config.queries_per_step={config.queries_per_step}",
            config.queries_per_step,
            decode.num_shards("batch"),
            "config.rollout_mesh (data)",
        ),
    ):
        if count % shards:
            raise ValueError(
                f"{what} cannot be divided over the {shards} shards of {mesh}; give a multiple, or another mesh"
            )


def build(config: ConfigDict, model: Model) -> tuple[Updater, StepFunction]:
    """Groups of sampled answers, their rewards and advantages, then one update a mini-batch."""
    group, minibatch = config.rollouts_per_query, config.queries_per_minibatch
    on_device = programs(config, model)
    decode, sampler, updater = on_device.decode, on_device.sampler, on_device.updater
    scorer = rollouts.Scorer.from_config(config, model.tokenizer)
    advantage_fn = grpo.get_advantage(config.advantage)
    updates = config.queries_per_step // minibatch
    reference = reference_params(config, model.params)
    validator = Validator(config, model, decode) if config.validation.every_steps else None

    def prepare(
        params: Params, answered: rollouts.Answered
    ) -> list[tuple[replay.ReplayBatch, jax.Array | None]]:
        """The mini-batches in the order of the queries, with what depends on the parameters before the updates."""
        advantage = advantage_fn(answered.totals).reshape(-1)
        prepared = []
        for queries in np.arange(config.queries_per_step).reshape(updates, minibatch):
            batch = replay.stack_micro_batches(
                answered.rollout,
                answered.prompts,
                advantage,
                queries,
                minibatch // config.queries_per_microbatch,
                on_device.replay_options,
            )
            batch = devices.put(batch, model.placement, None)
            reference_logprob = None
            if reference is not None:
                reference_logprob = on_device.logprobs(reference, batch)
            if config.old_logprobs == "recomputed":
                batch = replay.recomputed(batch, on_device.logprobs(params, batch))
            prepared.append((batch, reference_logprob))
        return jax.block_until_ready(prepared)

    def run_step(
        state: TrainState, batch: dict[str, Any], draw: Draw
    ) -> tuple[TrainState, StepResult]:
        laps = Laps()
        key = jax.random.fold_in(state.key, state.step)
        weights = jax.block_until_ready(on_device.sampler_weights(state.params))
        laps("sync")

        def answer(number: int) -> rollouts.Answered:
            asked, round_key = batch, key
            if number:
                asked = draw()
                round_key = jax.random.fold_in(key, _LAST_ROUND - number)
                laps("redraw")
            prompts = rollouts.prompts_of(asked)
            placed = devices.put(prompts, decode)
            rollout = devices.to_host(sampler(weights, placed, round_key, group))
            laps("rollout")
            scores = scorer(rollout, asked["records"], asked["num_samples"])
            laps("reward")
            return rollouts.Answered(asked["records"], prompts, rollout, scores)

        drawn = rollouts.collect(answer, config.dynamic_sampling.max_rounds)
        metrics = rollouts.step_metrics(drawn, group)
        laps("reward")
        prepared = prepare(state.params, drawn.kept)
        if config.old_logprobs == "recomputed":
            metrics |= importance(prepared, config.importance_cap)
        laps("logprob")
        per_update: list[Metrics] = []
        ids = [record.id for record in drawn.kept.records]
        for number, micro_batches in enumerate(prepared):
            state, found = updater(
                state,
                micro_batches,
                state.step * updates + number,
                ids[number * minibatch :][:minibatch],
            )
            per_update.append(found)
        laps("train")
        metrics |= {name: sum(u[name] for u in per_update) / updates for name in per_update[0]}
        # Before the first update policy and sampler hold the same parameters: what differs is float error.
        for name in ("logprob_gap", "logprob_bias"):
            metrics[name] = per_update[0][name]
        if validator and validator.is_due(state.step + 1):
            metrics |= validator(on_device.sampler_weights(state.params))
            laps("validation")
        tokens = int(drawn.rollout.length.sum())
        return state, StepResult(metrics, laps.seconds, tokens, drawn.ids)

    return updater, run_step


def importance(prepared: list[tuple[replay.ReplayBatch, jax.Array | None]], cap: float) -> Metrics:
    """The importance weights of a step whose log-probabilities were computed anew."""
    batches = devices.to_host([batch for batch, _ in prepared])
    old, sampler, mask = (
        np.concatenate([np.ravel(value) for value in values])
        for values in (
            [batch.old_logprob for batch in batches],
            [batch.sampler_logprob for batch in batches],
            [batch.positions > 0 for batch in batches],
        )
    )
    return grpo.importance_metrics(old, sampler, mask, cap)
