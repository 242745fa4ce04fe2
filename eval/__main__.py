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
from pathlib import Path

from absl import flags

from eval import ablation, cli, questions, report
from eval.controls import CONTROLS, FORMATS
from eval.runner import Model, Runner, Settings

PROGRAM = "python -m eval"


def define(values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
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


def main(values: flags.FlagValues) -> None:
    """Asks, scores and reports."""
    config = cli.value(values, "config")
    for name in ("format", "control", "limit"):
        if cli.value(values, name) is not None:
            config[name] = cli.value(values, name)
    settings = Settings.from_config(config)
    checkpoint, output = cli.required(values, "checkpoint"), Path(cli.required(values, "output"))
    # What is quick to check comes first: a wrong flag must not wait for a model to load.
    shown_curves = cli.read_curves(values)
    asked = questions.load(Path(cli.required(values, "data")), config.split).limited(config.limit)
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


if __name__ == "__main__":
    sys.exit(cli.run(PROGRAM, __doc__, define, main, sys.argv))
