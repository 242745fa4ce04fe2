"""GRPO: groups of sampled answers, their rewards and advantages, then one update a mini-batch."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from echo_jax.arrays import Params
from echo_jax.sampler import Sampler
from echo_jax.train import grpo, replay
from echo_jax.train.checkpoint import TrainState
from launch import rollouts
from launch.checks import loss_options, replay_options, sampling_options
from launch.stage import (
    Draw,
    Metrics,
    Model,
    StepFunction,
    StepResult,
    Updater,
    check_finite,
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
    """The cold start as the KL's reference, in config.reference.dtype; None where there is no KL."""
    if not config.loss.kl_coefficient:
        return None
    dtype = jnp.dtype(config.reference.dtype)
    return jax.device_put(
        jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), params)
    )


def build(config: ConfigDict, model: Model) -> tuple[Updater, StepFunction]:
    """Groups of sampled answers, their rewards and advantages, then one update a mini-batch."""
    group, minibatch = config.rollouts_per_query, config.queries_per_minibatch
    sampler = Sampler(model.config, model.tokenizer, sampling_options(config))
    scorer = rollouts.Scorer.from_config(config, model.tokenizer)
    advantage_fn = grpo.get_advantage(config.advantage)
    options = replay_options(config)
    vocabulary = replay.Vocabulary(sampler.sampleable, np.asarray(sampler.automaton.stop_mask))
    loss_fn = functools.partial(
        replay.replay_loss, model.config, options, vocabulary, loss_options(config)
    )
    updates = config.queries_per_step // minibatch
    updater = Updater(config, model.params, loss_fn, updates)
    # The trained parameters are donated from update to update, these never.
    reference = reference_params(config, model.params)
    logprob_fn = functools.partial(replay.logprobs, model.config, options, vocabulary)
    # One micro-batch at a time, as in the update.
    logprobs = jax.jit(
        lambda params, batches: jax.lax.map(functools.partial(logprob_fn, params), batches)
    )
    validator = Validator(config, model) if config.validation.every_steps else None

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
                options,
            )
            batch = jax.device_put(batch)
            reference_logprob = None if reference is None else logprobs(reference, batch)
            if config.old_logprobs == "recomputed":
                batch = replay.recomputed(batch, logprobs(params, batch))
            prepared.append((batch, reference_logprob))
        return jax.block_until_ready(prepared)

    def run_step(
        state: TrainState, batch: dict[str, Any], draw: Draw
    ) -> tuple[TrainState, StepResult]:
        laps = Laps()
        key = jax.random.fold_in(state.key, state.step)
        # The sampler's parameters are the trainer's: nothing is copied that is in its place.
        params = jax.block_until_ready(jax.device_put(state.params))
        laps("sync")

        def answer(number: int) -> rollouts.Answered:
            asked, round_key = batch, key
            if number:
                asked = draw()
                round_key = jax.random.fold_in(key, _LAST_ROUND - number)
                laps("redraw")
            prompts = rollouts.prompts_of(asked)
            rollout = jax.device_get(sampler(params, jax.device_put(prompts), round_key, group))
            laps("rollout")
            scores = scorer(rollout, asked["records"], asked["num_samples"])
            laps("reward")
            return rollouts.Answered(asked["records"], prompts, rollout, scores)

        drawn = rollouts.collect(answer, config.dynamic_sampling.max_rounds)
        metrics = rollouts.step_metrics(drawn, group)
        laps("reward")
        prepared = prepare(params, drawn.kept)
        if config.old_logprobs == "recomputed":
            metrics |= importance(prepared, config.importance_cap)
        laps("logprob")
        per_update: list[Metrics] = []
        ids = [record.id for record in drawn.kept.records]
        for number, micro_batches in enumerate(prepared):
            state, found = updater(state, micro_batches, state.step * updates + number)
            check_finite(found, state.step + 1, ids[number * minibatch :][:minibatch])
            per_update.append(found)
        laps("train")
        metrics |= {name: sum(u[name] for u in per_update) / updates for name in per_update[0]}
        # Before the first update policy and sampler hold the same parameters: what differs is float error.
        for name in ("logprob_gap", "logprob_bias"):
            metrics[name] = per_update[0][name]
        if validator and validator.is_due(state.step + 1):
            metrics |= validator(state.params)
            laps("validation")
        tokens = int(drawn.rollout.length.sum())
        return state, StepResult(metrics, laps.seconds, tokens, drawn.ids)

    return updater, run_step


def importance(prepared: list[tuple[replay.ReplayBatch, jax.Array | None]], cap: float) -> Metrics:
    """The importance weights of a step whose log-probabilities were computed anew."""
    batches = jax.device_get([batch for batch, _ in prepared])
    old, sampler, mask = (
        np.concatenate([np.ravel(value) for value in values])
        for values in (
            [batch.old_logprob for batch in batches],
            [batch.sampler_logprob for batch in batches],
            [batch.positions > 0 for batch in batches],
        )
    )
    return grpo.importance_metrics(old, sampler, mask, cap)
