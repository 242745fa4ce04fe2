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
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from data.audio_store import TooManyBadFiles
from data.command_line import define_config, run
from data.pipeline import TooLong
from echo_jax import arrays, huggingface
from echo_jax.model import thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.text.tokenizer import Tokenizer
from echo_jax.train import step
from echo_jax.train.checkpoint import CheckpointError, Checkpoints, TrainState
from echo_jax.train.metrics import MetricWriter
from launch import chat_stage, devices, grpo_stage, inputs, runs
from launch.checks import check_config
from launch.stage import Model, NonFiniteError, StepFunction, Updater, place

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


# ------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------


def load_model(config: ConfigDict) -> Model:
    """The model a stage starts from (3. above), on the devices of config.mesh."""
    if config.init_from:
        found = huggingface.find(config.init_from)
        config.init_from = found.name  # names the commit of a repository from here on
        directory = found.directory
        thinker_config = ThinkerConfig.from_hf(directory / "config.json")
        tokenizer = Tokenizer.from_directory(directory)
    elif config.stage == "base":
        directory = None
        tokenizer = inputs.new_tokenizer(config, inputs.load_scenes(config))
        thinker_config = ThinkerConfig.preset(
            config.model_preset, vocab_size=tokenizer.vocab_size, **tokenizer.config_ids
        )
    else:
        raise ValueError(
            f"config.init_from is empty; give the {config.stage} stage a model directory or the workdir of a "
            "finished stage"
        )
    placement = devices.train_placement(config, thinker_config)
    specs = thinker.param_specs(thinker_config)
    if directory is None:
        params = arrays.init_params(specs, jax.random.key(config.seed))
    else:
        shardings = None
        if placement.mesh is not None:
            shardings = arrays.shardings(specs, placement.mesh, placement.rules)
        dtype = step.PRECISIONS[config.precision].master
        params = huggingface.load_pretrained(directory, dtype, shardings)[1]
    params = place(config, thinker_config, params, placement)
    return Model(thinker_config, params, tokenizer, placement)


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[ConfigDict, Model], tuple[Updater, StepFunction]]] = {
    "base": chat_stage.build,
    "sft": chat_stage.build,
    "grpo": grpo_stage.build,
}


def train(config: ConfigDict, workdir: Path) -> None:
    """Runs the stage to its end."""
    check_config(config)
    devices.initialize()
    runs.keep_commit(config, workdir)
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
        if jax.process_index() == 0:
            runs.write_settings(config, workdir)
        print(describe(config, model, updater), flush=True)
        state = loop(config, workdir, state, iterator, run_step, saved)
    print("exporting the model")
    huggingface.save_pretrained(workdir / "export", model.config, state.params, model.tokenizer)
    if jax.process_index() == 0:
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
    # The model's own arrays: they are given up with the first step, in which the state is donated.
    fresh = TrainState(
        step=0,
        params=model.params,
        opt_state=updater.init(model.params),
        key=devices.replicated(jax.random.key(config.seed), model.placement),
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
            state, result = run_step(state, batch, functools.partial(next, iterator))
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
