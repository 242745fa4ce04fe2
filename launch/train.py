"""Trains one stage: base, SFT or GRPO, whichever the config says.

    python -m launch.train --config=configs/sft.py:tiny --workdir=DIR --config.data.root=DATA \
        --config.init_from=BASE [--config.optimizer.learning_rate=1e-3]

Where a run starts, in this order:
  1. WORKDIR/done.json says that all steps are done: return at once.
  2. WORKDIR/checkpoints holds a checkpoint: go on from the newest, as if the run had never stopped.
  3. config.init_from names a model: start from it. Without it the base stage starts from random numbers.

A workdir holds run.json (the config), metrics.jsonl, timings.jsonl, tensorboard/, checkpoints/ and,
at the end, export/ (a Hugging Face model directory) and done.json.

Exit status:
  0    the run is finished.
  2    one line says what is wrong: a flag, a field, the data, no checkpoint that is whole, a loss that is not finite, a
       full disk. Starting again without a change ends the same way.
  75   SIGTERM or Ctrl-C: the step was finished and saved; the same command goes on.
  143, 130   a second SIGTERM or Ctrl-C: ended at once, as by a kill; the same command goes on from the last checkpoint.
  1    a fault of the program, with its trace.
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
from absl import flags, logging
from ml_collections import ConfigDict

from data.audio_store import TooManyBadFiles
from data.command_line import define_config, run
from data.pipeline import TooLong
from echo_jax import arrays, disk, huggingface
from echo_jax.model import thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.text.tokenizer import Tokenizer
from echo_jax.train import step
from echo_jax.train.checkpoint import CheckpointError, Checkpoints, TrainState
from echo_jax.train.metrics import METRICS_FILE, MetricWriter
from launch import chat_stage, devices, grpo_stage, inputs, runs
from launch.checks import check_config, retention
from launch.preemption import EXIT_STATUS, Preempted, StopRequest
from launch.stage import Metrics, Model, NonFiniteError, StepFunction, Updater, place

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


def train(config: ConfigDict, workdir: Path, stop: StopRequest | None = None) -> None:
    """Runs the stage to its end.

    Raises:
        Preempted: `stop` asked for it; the last finished step is saved.
    """
    check_config(config)
    runs.keep_commit(config, workdir)
    if runs.is_done(config, workdir):
        print(f"{workdir} is finished; its model is {workdir / 'export'}")
        return
    model = load_model(config)
    updater, run_step = STAGES[config.stage](config, model)
    iterator = inputs.batches(config, model.tokenizer)
    workdir.mkdir(parents=True, exist_ok=True)
    kept = retention(config)
    with Checkpoints(workdir / "checkpoints", kept, config.checkpoint.asynchronous) as saved:
        state = start(config, workdir, model, updater, saved, iterator)
        if jax.process_index() == 0:
            runs.write_settings(config, workdir)
        print(describe(config, model, updater), flush=True)
        state = loop(config, workdir, state, iterator, run_step, saved, stop or StopRequest())
    print("exporting the model")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    then = "the checkpoints are intact: free space, and start again to export"
    with disk.naming(workdir / "export", size, then):
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
    # The model's own arrays: they are given up with the first step, in which the state is donated.
    fresh = TrainState(
        step=0,
        params=model.params,
        opt_state=updater.init(model.params),
        key=devices.random_key(config.seed, model.placement),
    )
    if saved.latest_step() is None:
        if (workdir / METRICS_FILE).is_file():
            logging.warning("%s holds no finished checkpoint: starting from step 0", workdir)
        return fresh
    state = saved.restore(
        fresh, iterator, lambda before, step: runs.check_continues(before, step, config, workdir)
    )
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
    stop: StopRequest,
) -> TrainState:
    """All remaining steps, with metrics and checkpoints.

    Raises:
        Preempted: `stop` asked for it; the last finished step is saved.
    """
    total = config.total_steps
    active = jax.process_index() == 0
    kept = retention(config)
    metrics: Metrics = {}
    with MetricWriter(workdir, total, state.step, SHOWN[config.stage], active) as writer:
        while True:
            if name := stop.agreed():
                if state.step:
                    saved.save(state, iterator, runs.plain(config), metrics)
                    saved.wait()
                raise Preempted(
                    f"{name} after step {state.step} of {total}; start again to go on from there"
                )
            if state.step >= total:
                break
            started = time.monotonic()
            batch = next(iterator)
            timings = {"data_s": time.monotonic() - started}
            state, result = run_step(state, batch, functools.partial(next, iterator))
            seconds = time.monotonic() - started
            progress = dataclasses.replace(
                state.progress, train_seconds=state.progress.train_seconds + seconds
            )
            state = dataclasses.replace(state, step=state.step + 1, progress=progress)
            timings |= {
                **result.timings,
                "step_s": seconds,
                "tokens_per_s": result.tokens / seconds,
                "train_total_s": progress.train_seconds,
                "restarts": progress.restarts,
            }
            metrics = result.metrics
            if config.non_finite == "skip":
                metrics["skipped_updates"] = progress.skipped_updates
            kept.check_metrics(metrics)
            if state.step % config.log_every_steps == 0 or state.step == total:
                writer.write(state.step, metrics, timings, result.ids)
            saved.check()
            if state.step % config.checkpoint.every_steps == 0 or state.step == total:
                saved.save(state, iterator, runs.plain(config), metrics)
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
    """Runs the command line; returns the exit status, see the top of this file."""

    def start_or_go_on(values: flags.FlagValues) -> None:
        # Before the signals are ours: what joins the processes has a handler of its own.
        devices.initialize()
        with StopRequest() as stop:
            train(values.config, Path(values.workdir), stop)

    try:
        return run(
            argv,
            program=PROGRAM,
            description=__doc__,
            define=define,
            main=start_or_go_on,
            required=("config", "workdir"),
            expected=(KeyError, CheckpointError, NonFiniteError, TooLong, TooManyBadFiles),
        )
    except Preempted as stopped:
        print(f"{PROGRAM}: {stopped}", file=sys.stderr)
        return EXIT_STATUS


if __name__ == "__main__":
    sys.exit(main(sys.argv))
