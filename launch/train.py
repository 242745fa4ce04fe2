"""Trains one stage: base, SFT or GRPO, whichever the config says.

    python -m launch.train --config=configs/sft.py:tiny --workdir=DIR --config.data.root=DATA \
        --config.init_from=BASE [--config.optimizer.learning_rate=1e-3]

Where a run starts, in this order:
  1. WORKDIR/done.json says that all steps are done: return at once.
  2. WORKDIR/checkpoints holds a checkpoint: go on from the newest, as if the run had never stopped.
  3. config.init_from names a model: start from it. Without it the base stage starts from random numbers.

A workdir holds run.json (the config), metrics.jsonl, timings.jsonl, tensorboard/, checkpoints/ and,
at the end, export/ (a Hugging Face model directory) and done.json.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict

from data.audio_store import TooManyBadFiles
from data.command_line import define_config, run
from data.pipeline import TooLong
from echo_jax import arrays, huggingface
from echo_jax.model import thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler import FinishReason, Prompts, Rollout, Sampler
from echo_jax.text.tokenizer import Tokenizer
from echo_jax.train import grpo, replay, rewards, sft, step
from echo_jax.train import optimizer as optimizer_lib
from echo_jax.train.checkpoint import CheckpointError, Checkpoints, TrainState
from echo_jax.train.metrics import MetricWriter
from launch import inputs, runs
from launch.checks import check_config, replay_options, sampling_options

PROGRAM = "launch.train"
SHOWN = {
    "base": ("loss", "accuracy"),
    "sft": ("loss", "accuracy"),
    "grpo": (
        "reward/total",
        "reward/format",
        "reward/accuracy",
        "reward/segment",
        "reward/consistency",
        "kl",
    ),
}

Metrics = dict[str, float]


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; the message names the step and the records of its batch."""


@dataclasses.dataclass
class Model:
    """What a stage starts from: sizes, arrays and vocabulary."""

    config: ThinkerConfig
    params: arrays.Params
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step leaves beside the new state.

    Attributes:
        metrics: determined by seed, data and config.
        timings: seconds of the parts of the step, by name.
        tokens: tokens that were processed, for tokens/s.
        ids: records of the batch.
    """

    metrics: Metrics
    timings: dict[str, float]
    tokens: int
    ids: list[str]


StepFunction = Callable[[TrainState, dict[str, Any]], tuple[TrainState, StepResult]]


# ------------------------------------------------------------------------------------------------
# Model and optimizer
# ------------------------------------------------------------------------------------------------


def load_model(config: ConfigDict) -> Model:
    """The model a stage starts from (3. above)."""
    if config.init_from:
        directory = huggingface.resolve(config.init_from)
        thinker_config, params = huggingface.load_pretrained(directory)
        return Model(thinker_config, params, Tokenizer.from_directory(directory))
    if config.stage != "base":
        raise ValueError(
            f"config.init_from is empty; give the {config.stage} stage a model directory or the workdir of a "
            "finished stage"
        )
    tokenizer = inputs.new_tokenizer(config, inputs.load_scenes(config))
    thinker_config = ThinkerConfig.preset(
        config.model_preset, vocab_size=tokenizer.vocab_size, **tokenizer.config_ids
    )
    specs = thinker.param_specs(thinker_config)
    return Model(thinker_config, arrays.init_params(specs, jax.random.key(config.seed)), tokenizer)


class Updater:
    """Schedule, frozen parts and the jitted update of a stage."""

    def __init__(
        self,
        config: ConfigDict,
        params: arrays.Params,
        loss_fn: step.LossFunction,
        updates_per_step: int,
    ):
        options = optimizer_lib.OptimizerOptions(**config.optimizer.to_dict())
        total = config.total_steps * updates_per_step
        self._schedule = optimizer_lib.make_schedule(options, total)
        self._optimizer = optimizer_lib.make_optimizer(options, total)
        self._labels = optimizer_lib.label_parameters(params, config.parameter_rules)
        # Donated: the new trainable parameters and optimizer state take the place of the old ones.
        self._update = jax.jit(
            step.make_update(loss_fn, self._optimizer), donate_argnames=("trainable", "opt_state")
        )

    def init(self, params: arrays.Params) -> optax.OptState:
        """The optimizer state before the first update."""
        return self._optimizer.init(self.trainable(params))

    def trainable(self, params: arrays.Params) -> arrays.Params:
        """The part that is trained, None elsewhere."""
        return optimizer_lib.split(params, self._labels)[0]

    def __call__(
        self, state: TrainState, micro_batches: Any, update_number: int
    ) -> tuple[TrainState, Metrics]:
        """One update; consumes `state`. `update_number` counts from 0, for the logged learning rate."""
        trainable, frozen = optimizer_lib.split(state.params, self._labels)
        micro_batches = jax.device_put(micro_batches)
        # What is not on the device by now would be moved there anew in every step.
        with jax.transfer_guard("disallow"):
            trainable, opt_state, metrics = self._update(
                trainable, frozen, state.opt_state, micro_batches
            )
        found = {name: float(value) for name, value in jax.device_get(metrics).items()}
        found["learning_rate"] = float(self._schedule(update_number))
        params = optimizer_lib.merge(trainable, frozen)
        return dataclasses.replace(state, params=params, opt_state=opt_state), found


def check_finite(metrics: Mapping[str, float], step_number: int, ids: Sequence[str]) -> None:
    """Raises NonFiniteError when loss or gradient norm is not finite."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise NonFiniteError(
                f"step {step_number}: {name} is {metrics[name]}; records of the batch: {', '.join(ids)}"
            )


# ------------------------------------------------------------------------------------------------
# Base and SFT
# ------------------------------------------------------------------------------------------------


def chat_stage(config: ConfigDict, model: Model) -> tuple[Updater, StepFunction]:
    """Cross-entropy on the assistant's tokens."""
    loss_fn = functools.partial(sft.chat_loss, model.config, config.remat)
    updater = Updater(config, model.params, loss_fn, updates_per_step=1)

    def run_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, StepResult]:
        started = time.monotonic()
        micro_batches = sft.stack_micro_batches(batch, config.micro_batches)
        state, metrics = updater(state, micro_batches, state.step)
        check_finite(metrics, state.step + 1, batch["ids"])
        tokens = int((batch["tokens"] != model.config.pad_id).sum())
        timings = {"train_s": time.monotonic() - started}
        return state, StepResult(metrics, timings, tokens, list(batch["ids"]))

    return updater, run_step


# ------------------------------------------------------------------------------------------------
# GRPO
# ------------------------------------------------------------------------------------------------


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


def grpo_stage(config: ConfigDict, model: Model) -> tuple[Updater, StepFunction]:
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
                state, (replayed, reference_logprob), state.step * updates + number
            )
            check_finite(found, state.step + 1, ids)
            per_update.append(found)
            lap("train_s")
        metrics |= {name: sum(u[name] for u in per_update) / updates for name in per_update[0]}
        # Before the first update policy and sampler hold the same parameters: what differs is float error.
        for name in ("logprob_gap", "logprob_bias"):
            metrics[name] = per_update[0][name]
        return state, StepResult(metrics, timings, int(rollout.length.sum()), ids)

    return updater, run_step


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[ConfigDict, Model], tuple[Updater, StepFunction]]] = {
    "base": chat_stage,
    "sft": chat_stage,
    "grpo": grpo_stage,
}


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs the stage to its end."""
    check_config(config)
    if runs.is_done(config, workdir):
        print(f"{workdir} is finished; its model is {workdir / 'export'}")
        return
    model = load_model(config)
    updater, run_step = STAGES[config.stage](config, model)
    iterator = inputs.batches(config, model.tokenizer)
    workdir.mkdir(parents=True, exist_ok=True)
    options = config.checkpoint
    with Checkpoints(workdir / "checkpoints", options.keep_last, options.asynchronous) as saved:
        state = start(config, workdir, model, updater, saved, iterator)
        runs.write_settings(config, workdir)
        print(describe(config, model, updater), flush=True)
        state = loop(config, workdir, state, iterator, run_step, saved)
    print("exporting the model")
    huggingface.save_pretrained(
        workdir / "export", model.config, jax.device_get(state.params), model.tokenizer
    )
    runs.write_done(config, workdir, state.step)
    print(f"finished {state.step} steps; the model is {workdir / 'export'}")


def start(
    config: ConfigDict,
    workdir: Path,
    model: Model,
    updater: Updater,
    saved: Checkpoints,
    iterator: Any,
) -> TrainState:
    """The state to go on from, on the device; the iterator is moved along (2. and 3. above)."""
    step = saved.latest_step()
    if step is not None:
        runs.check_continues(saved.stored_config(), step, config, workdir)
    # Copies: the state is donated step by step, the model's own arrays serve as reference.
    params = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), model.params)
    fresh = TrainState(
        step=0, params=params, opt_state=updater.init(params), key=jax.random.key(config.seed)
    )
    if step is None:
        return fresh
    state = saved.restore(fresh, iterator)
    print(f"going on from step {state.step}")
    return state


def describe(config: ConfigDict, model: Model, updater: Updater) -> str:
    """What is about to be trained, in one line."""
    total = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    trained = sum(leaf.size for leaf in jax.tree.leaves(updater.trainable(model.params)))
    what = f"{config.stage} {config.format}" if config.stage == "grpo" else config.stage
    return (
        f"{what}: {total:,} parameters, {trained:,} of them trained, from "
        f"{config.init_from or 'random numbers'}; the first step compiles"
    )


def loop(
    config: ConfigDict,
    workdir: Path,
    state: TrainState,
    iterator: Any,
    run_step: StepFunction,
    saved: Checkpoints,
) -> TrainState:
    """All remaining steps, with metrics and checkpoints."""
    total = config.total_steps
    active = jax.process_index() == 0
    with MetricWriter(workdir, total, state.step, SHOWN[config.stage], active) as writer:
        while state.step < total:
            started = time.monotonic()
            batch = next(iterator)
            timings = {"data_s": time.monotonic() - started}
            state, result = run_step(state, batch)
            state = dataclasses.replace(state, step=state.step + 1)
            seconds = time.monotonic() - started
            timings |= {
                **result.timings,
                "step_s": seconds,
                "tokens_per_s": result.tokens / seconds,
            }
            if state.step % config.log_every_steps == 0 or state.step == total:
                writer.write(state.step, result.metrics, timings, result.ids)
            if state.step % config.checkpoint.every_steps == 0 or state.step == total:
                saved.save(state, iterator, runs.plain(config))
    return state


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def define(values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    define_config(values, "The stage: configs/sft.py:tiny.")
    flags.DEFINE_string(
        "workdir", None, "Where the run lives; run again, it goes on.", flag_values=values
    )


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after one line about what is wrong."""
    return run(
        argv,
        program=PROGRAM,
        description=__doc__,
        define=define,
        main=lambda values: train(values.config, Path(values.workdir)),
        required=("config", "workdir"),
        expected=(KeyError, CheckpointError, NonFiniteError, TooLong, TooManyBadFiles),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
