"""GRPO: groups of sampled answers, their rewards and advantages, then one update a mini-batch."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from echo_jax.sampler import FinishReason, Prompts, Rollout, Sampler
from echo_jax.text.tokenizer import Tokenizer
from echo_jax.train import grpo, replay, rewards
from echo_jax.train.checkpoint import TrainState
from launch.checks import replay_options, sampling_options
from launch.stage import Metrics, Model, StepFunction, StepResult, Updater


def score_rollout(
    config: ConfigDict, tokenizer: Tokenizer, rollout: Rollout, batch: dict[str, Any]
) -> list[dict[str, float]]:
    """The reward of every row with its parts and statistics, from the text of its sampled tokens."""
    fields = config.reward.to_dict()
    name = fields.pop("name")
    reward, options = rewards.get_reward(name), rewards.RewardOptions(**fields)
    scores = []
    for row in range(rollout.tokens.shape[0]):
        query = row // config.rollouts_per_query
        truth = batch["records"][query].answer
        sampled = rollout.sampled[row]
        tokens = rollout.tokens[row][sampled].tolist()
        probability = None
        if rewards.needs_probability(name):
            logprobs = rollout.logprob[row][sampled].tolist()
            probability = rewards.answer_probability(tokens, logprobs, tokenizer.token_bytes, truth)
        response = rewards.Response(
            text=tokenizer.decode(tokens),
            truth=truth,
            num_samples=int(batch["num_samples"][query]),
            probability=probability,
            num_inserted=int(rollout.num_segments[row]) if config.format == "interleaved" else None,
        )
        scores.append(reward(response, options))
    return scores


def rollout_metrics(scores: list[dict[str, float]], rollout: Rollout, group: int) -> Metrics:
    """The curves of a step: reward parts, cited segments, lengths, insertions, how answers end."""
    means = rewards.summarize(scores)
    of_reward = ("total", "correct", *rewards.PARTS)
    metrics = {f"reward/{name}": means[name] for name in of_reward}
    metrics |= {name: value for name, value in means.items() if name not in of_reward}
    totals = np.array([score["total"] for score in scores]).reshape(-1, group)
    metrics["groups_without_signal"] = float((np.ptp(totals, axis=-1) == 0).mean())
    metrics["response_tokens"] = float(rollout.sampled.sum(-1).mean())
    metrics["response_length"] = float((rollout.length - rollout.prompt_length).mean())
    metrics["insertions"] = float(rollout.num_segments.mean())
    for reason in (FinishReason.END, FinishReason.TOKEN_BUDGET, FinishReason.TURN_LIMIT):
        metrics[f"finish/{reason.name.lower()}"] = float((rollout.finish_reason == reason).mean())
    return metrics


def build(config: ConfigDict, model: Model) -> tuple[Updater, StepFunction]:
    """Groups of sampled answers, their rewards and advantages, then one update a mini-batch."""
    group, minibatch = config.rollouts_per_query, config.queries_per_minibatch
    sampler = Sampler(model.config, model.tokenizer, sampling_options(config))
    advantage_fn = grpo.get_advantage(config.advantage)
    loss_options = grpo.GrpoOptions(**config.loss.to_dict())
    options = replay_options(config)
    vocabulary = replay.Vocabulary(sampler.sampleable, np.asarray(sampler.automaton.stop_mask))
    loss_fn = functools.partial(replay.replay_loss, model.config, options, vocabulary, loss_options)
    updates = config.queries_per_step // minibatch
    updater = Updater(config, model.params, loss_fn, updates)
    # The cold start, kept as it is: the trained parameters are donated from update to update, these never.
    reference = jax.device_put(model.params) if loss_options.kl_coefficient else None
    logprob_fn = functools.partial(replay.logprobs, model.config, options, vocabulary)
    # One micro-batch at a time, as in the update.
    reference_fn = jax.jit(
        lambda params, batches: jax.lax.map(functools.partial(logprob_fn, params), batches)
    )

    def run_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, StepResult]:
        clock = [time.monotonic()]
        timings = {"rollout_s": 0.0, "reward_s": 0.0, "logprob_s": 0.0, "train_s": 0.0}

        def lap(name: str) -> None:
            clock.append(time.monotonic())
            timings[name] += clock[-1] - clock[-2]

        ids = [record.id for record in batch["records"]]
        prompts = Prompts(
            tokens=batch["prompt_tokens"],
            length=batch["prompt_length"],
            waveforms=batch["waveforms"],
            num_samples=batch["num_samples"],
            audio_start=batch["clip_start"],
        )
        # Rollout.
        key = jax.random.fold_in(state.key, state.step)
        rollout = jax.device_get(sampler(state.params, jax.device_put(prompts), key, group))
        lap("rollout_s")
        # Rewards and advantages.
        scores = score_rollout(config, model.tokenizer, rollout, batch)
        totals = np.array([score["total"] for score in scores]).reshape(-1, group)
        advantage = advantage_fn(totals).reshape(-1)
        metrics = rollout_metrics(scores, rollout, group)
        lap("reward_s")
        # Updates, in the order of the queries.
        per_update: list[Metrics] = []
        for number in range(updates):
            replayed = replay.stack_micro_batches(
                rollout,
                prompts,
                advantage,
                np.arange(number * minibatch, (number + 1) * minibatch),
                minibatch // config.queries_per_microbatch,
                options,
            )
            replayed = jax.device_put(replayed)
            reference_logprob = None
            if reference is not None:
                reference_logprob = jax.block_until_ready(reference_fn(reference, replayed))
            lap("logprob_s")
            state, found = updater(
                state,
                (replayed, reference_logprob),
                state.step * updates + number,
                ids[number * minibatch : (number + 1) * minibatch],
            )
            per_update.append(found)
            lap("train_s")
        metrics |= {name: sum(u[name] for u in per_update) / updates for name in per_update[0]}
        # Before the first update policy and sampler hold the same parameters: what differs is float error.
        for name in ("logprob_gap", "logprob_bias"):
            metrics[name] = per_update[0][name]
        return state, StepResult(metrics, timings, int(rollout.length.sum()), ids)

    return updater, run_step
