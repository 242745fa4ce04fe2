"""Asks a checkpoint held-out questions and reports how often it is right, how sure that is, and
where it listened.

    python -m eval --config=configs/eval.py:tiny --checkpoint DIR --data DIR --output DIR
        [--format conditioned|grounded|interleaved] [--control NAME] [--limit N]
        [--curves SFT=WORKDIR …]

The output folder gets `results.json`, `samples.jsonl` (every question, answer and judgement),
`responses.jsonl` (what the model wrote; a run that was cut short goes on from it), `timing.json`
and `report.html`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from data.audio_store import TooManyBadFiles
from data.command_line import run
from eval import ablation, questions, report, shared_flags
from eval.controls import CONTROLS, FORMATS
from eval.runner import Model, Runner, Settings

PROGRAM = "python -m eval"


def define(values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    shared_flags.define(values)
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Model directory, finished workdir, or owner/name.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "format",
        None,
        FORMATS,
        "How the model reasons; replaces the config's.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "control", None, list(CONTROLS), "What it hears; replaces the config's.", flag_values=values
    )


def ask(values: flags.FlagValues) -> None:
    """Asks, scores and reports."""
    config = values.config
    for name in ("format", "control", "limit"):
        if values[name].value is not None:
            config[name] = values[name].value
    settings = Settings.from_config(config)
    checkpoint, output = values.checkpoint, Path(values.output)
    # What is quick to check comes first: a wrong flag must not wait for a model to load.
    shown_curves = shared_flags.read_curves(values)
    asked = questions.load(Path(values.data), config.split).limited(config.limit)
    runner = Runner(asked)
    outcome = runner.run(Model.load(checkpoint), settings, output)
    row = report.Row("1", checkpoint, settings.format, settings.control, outcome.results)
    page = output / "report.html"
    report.write(
        page,
        f"{asked.name}: {checkpoint}",
        [row],
        [],
        shown_curves,
        report.to_listen(outcome.samples, runner.store.read, config.num_answers),
        ablation.facts(outcome.results),
    )
    print(ablation.line(row))
    if outcome.results["num_skipped"]:
        reasons = outcome.results["skipped_by_reason"]
        print(f"not asked, counted as wrong: {reasons} (named in {output / 'results.json'})")
    print(f"results: {output / 'results.json'}")
    print(f"report: {page}")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after one line about what is wrong."""
    return run(
        argv,
        program=PROGRAM,
        description=__doc__,
        define=define,
        main=ask,
        required=("checkpoint", "data", "output"),
        default_config=shared_flags.DEFAULT_CONFIG,
        expected=(KeyError, TooManyBadFiles),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
