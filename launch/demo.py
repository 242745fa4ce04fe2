"""The whole of Echo at tiny scale: `make demo`.

    python -m launch.demo [--workdir=runs/demo] [--variant=tiny] [--seed=0]

Sound files on disk, questions about them, the base model that hears, SFT that teaches citing segments, GRPO with and
without audio insertion, and the ablation with its controls and report. Every stage is a command that a person could
type, run as its own process; a stage that is finished says so and takes no time, so the demo goes on where it was
stopped. `--variant=small` is the evidence run with longer clips and more classes.
"""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from configs import eval as eval_config
from data.command_line import run
from eval import ablation, curves

PROGRAM = "launch.demo"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training command: its config file and the stage whose model it starts from."""

    name: str
    title: str
    config: str
    init_from: str | None = None
    overrides: tuple[str, ...] = ()


STAGES = (
    Stage("base", "base: a tiny model learns to hear (stands in for Qwen2.5-Omni)", "base"),
    Stage("sft", "SFT: the cold start learns to cite segments", "sft", "base"),
    Stage("grpo", "GRPO with audio insertion: Echo", "grpo", "sft"),
    Stage("grpo_grounded", "GRPO without insertion", "grpo", "sft", ("--config.format=grounded",)),
)

# Letter, name, stage, format, control: the rows of the paper's ablation that the demo trains, then the controls.
ROWS = (
    ("A", "base", "base", "conditioned", "none"),
    ("B", "cold start", "sft", "grounded", "none"),
    ("C", "cold start", "sft", "interleaved", "none"),
    ("B′", "RL without insertion", "grpo_grounded", "grounded", "none"),
    ("D", "Echo", "grpo", "interleaved", "none"),
    ("D-silence", "cited clips silenced", "grpo", "interleaved", "silence"),
    ("D-other", "other spans instead", "grpo", "interleaved", "other_span"),
)


class StageError(RuntimeError):
    """A command of the demo failed; it has said why."""


def run_command(title: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Runs one command of the project and says how long it took."""
    print(f"\n== {title}\n   python -m {' '.join(arguments)}", flush=True)
    started = time.monotonic()
    code = subprocess.run(
        [sys.executable, "-m", *arguments], env=environment, check=False
    ).returncode
    if code:
        raise StageError(
            f"python -m {arguments[0]} ended with status {code}; run the demo again to go on"
        )
    print(f"   took {time.monotonic() - started:.0f} s", flush=True)


def run_demo(workdir: Path, variant: str, seed: int) -> ablation.Ablation:
    """Runs what is not done yet and returns the table."""
    data = workdir / "data"
    # Programs compiled by one stage, or by a run that was stopped, are read by the next.
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str((workdir / "compiled").resolve()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        **os.environ,
    }
    os.environ.update(environment)
    run_command(
        "data: scenes with timed labels, questions and reasoning",
        [
            "data.build",
            f"--config=configs/scenes.py:{variant}",
            f"--config.scenes.seed={seed}",
            f"--root={data}",
        ],
        environment,
    )
    for stage in STAGES:
        arguments = [
            "launch.train",
            f"--config=configs/{stage.config}.py:{variant}",
            f"--workdir={workdir / stage.name}",
            f"--config.data.root={data}",
            f"--config.seed={seed}",
            *stage.overrides,
        ]
        if stage.init_from:
            arguments.append(f"--config.init_from={workdir / stage.init_from}")
        run_command(stage.title, arguments, environment)
    print("\n== evaluation: ablation and controls on held-out sounds", flush=True)
    config = eval_config.get_config(variant)
    config.seed = seed
    rows = [
        ablation.AblationRow(letter, name, str(workdir / stage), how, control)
        for letter, name, stage, how, control in ROWS
    ]
    shown = curves.read({stage.name: workdir / stage.name for stage in STAGES})
    return ablation.run(rows, config.to_dict(), data, workdir / "eval", "D", shown)


def define(values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    flags.DEFINE_string(
        "workdir", "runs/demo", "Where everything the demo makes is kept.", flag_values=values
    )
    flags.DEFINE_string(
        "variant", "tiny", "Variant of the configs: tiny or small.", flag_values=values
    )
    flags.DEFINE_integer(
        "seed", 0, "Seed of data, initial weights, sampling and questions.", flag_values=values
    )


def show(values: flags.FlagValues) -> None:
    """Runs the demo and prints its table."""
    started = time.monotonic()
    made = run_demo(Path(values.workdir), values.variant, values.seed)
    print(f"\n{made.table}\n\nreport: {made.report}")
    print(f"took {(time.monotonic() - started) / 60:.1f} min")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after one line about what is wrong."""
    return run(
        argv,
        program=PROGRAM,
        description=__doc__,
        define=define,
        main=show,
        required=("workdir", "variant"),
        expected=(StageError,),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
