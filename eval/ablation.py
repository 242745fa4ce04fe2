"""Runs several models and controls on the same questions and prints one table.

    python -m eval.ablation --config=configs/eval.py:tiny --data DIR --output DIR
        --row "B,cold start,DIR,grounded" --row "D,Echo,DIR,interleaved"
        --row "D-silence,Echo,DIR,interleaved,silence" [--main D]

A row is LETTER,NAME,CHECKPOINT,FORMAT[,CONTROL]. Each is asked in its own folder below the output,
so a run that was cut short goes on. The output folder gets `ablation.txt` (the table),
`ablation.json` and `report.html`.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from data import command_line
from data.audio_store import TooManyBadFiles
from echo_jax import huggingface
from eval import controls, curves, questions, report, results, shared_flags
from eval.runner import Model, Outcome, Runner, Settings

PROGRAM = "python -m eval.ablation"


@dataclasses.dataclass(frozen=True)
class AblationRow:
    """One line of the table: a checkpoint, how it is asked, and what it hears."""

    letter: str
    name: str
    checkpoint: str
    format: str
    control: str = "none"

    def __post_init__(self) -> None:
        # The row's folder has this name.
        if self.letter in ("", ".", "..") or any(sign in self.letter for sign in " \t/\\\n"):
            raise ValueError(f"row {self.letter!r}: the letter must be one word without a slash")
        controls.get(self.control, self.format)

    @classmethod
    def parse(cls, text: str) -> "AblationRow":
        """Reads LETTER,NAME,CHECKPOINT,FORMAT[,CONTROL]."""
        parts = [part.strip() for part in text.split(",")]
        if len(parts) not in (4, 5):
            raise ValueError(f"--row {text!r} is not LETTER,NAME,CHECKPOINT,FORMAT[,CONTROL]")
        return cls(*parts)


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A finished table.

    Attributes:
        rows: in the order given, with their results.
        comparisons: the main row against each other one.
        table: plain text, a row a line, without a heading.
        report: the HTML file.
    """

    rows: list[report.Row]
    comparisons: list[report.Comparison]
    table: str
    report: Path


def run(
    rows: Sequence[AblationRow],
    config: Mapping[str, Any],
    data: Path,
    output: Path,
    main_letter: str | None = None,
    shown_curves: Sequence[curves.Curve] = (),
    title: str = "Does listening again help?",
    progress: Callable[[str], None] = print,
) -> Ablation:
    """Runs every row and writes the table, its JSON and the report.

    Args:
        rows: letters must differ.
        config: as `configs/eval.py` makes it; format and control come from the rows.
        data: see `questions.load`.
        output: rows go into folders of their letters.
        main_letter: the row to compare the others with and to listen to; the last one without a
            control by default.
        shown_curves: training curves for the report.
        title: of the report.
        progress: takes progress lines.

    Raises:
        ValueError, FileNotFoundError: one line about what is wrong with rows, config, data or a
            checkpoint.
    """
    letters = [row.letter for row in rows]
    if not rows or len(set(letters)) < len(letters):
        raise ValueError(f"an ablation needs rows with different letters, got {letters}")
    plain = [row.letter for row in rows if row.control == "none"]
    main_letter = main_letter or (plain or letters)[-1]
    if main_letter not in letters:
        raise ValueError(f"there is no row {main_letter!r}; rows: {', '.join(letters)}")
    settings = [
        Settings.from_config({**config, "format": row.format, "control": row.control})
        for row in rows
    ]
    asked = questions.load(data, config["split"]).limited(config["limit"])
    # A wrong path in the last row must not wait for the answers of the others.
    for checkpoint in dict.fromkeys(row.checkpoint for row in rows):
        huggingface.resolve(checkpoint)
    runner = Runner(asked, progress)
    outcomes: dict[str, Outcome] = {}
    loaded: tuple[str, Model] | None = None
    for row, how in zip(rows, settings, strict=True):
        progress(f"row {row.letter}: {row.name}, {row.format}, control {row.control}")
        if loaded is None or loaded[0] != row.checkpoint:
            loaded = None  # two models at once would double the memory
            loaded = (row.checkpoint, Model.load(row.checkpoint))
        outcomes[row.letter] = runner.run(loaded[1], how, output / row.letter)

    shown = [
        report.Row(row.letter, row.name, row.format, row.control, outcomes[row.letter].results)
        for row in rows
    ]
    comparisons = []
    for letter in letters:
        if letter != main_letter:
            test = results.paired(outcomes[main_letter].samples, outcomes[letter].samples)
            comparisons.append(report.Comparison(main_letter, letter, **dataclasses.asdict(test)))
    table = "\n".join(line(row) for row in shown)
    page = output / "report.html"
    report.write(
        page,
        title,
        shown,
        comparisons,
        shown_curves,
        report.to_listen(outcomes[main_letter].samples, runner.store.read, config["num_answers"]),
        {letter: facts(outcome.results) for letter, outcome in outcomes.items()},
    )
    saved = {
        "main": main_letter,
        "rows": [
            {**dataclasses.asdict(row), "results": outcomes[row.letter].results} for row in rows
        ],
        "comparisons": [dataclasses.asdict(comparison) for comparison in comparisons],
    }
    (output / "ablation.txt").write_text(table + "\n", encoding="utf-8")
    (output / "ablation.json").write_text(
        json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    return Ablation(shown, comparisons, table, page)


def line(row: report.Row) -> str:
    """Returns one line of the table: letter, accuracy in %, its interval, then the rest."""
    found, where = row.results, row.results["grounding"]
    low, high = found["interval"]

    def number(value: float | None, digits: int, scale: float = 1.0) -> str:
        return "-" if value is None else f"{scale * value:.{digits}f}"

    parts = [
        f"{row.letter:<11}{number(found['accuracy'], 1, 100):>5}  [{100 * low:.1f}, {100 * high:.1f}]".ljust(
            34
        ),
        f"{row.format:<11}",
        f"{row.control:<12}",
        f"parsed {number(found['parse_rate'], 1, 100):>5}",
        f"segments {number(where['segments_per_answer'], 2)}",
        f"length {number(where['mean_length_s'], 2)} s",
        f"overlap {number(where['overlap'], 2)}",
        f"IoU {number(where['mean_iou'], 3)}",
        f"tokens {number(found['mean_num_tokens'], 0)}",
        f"n {found['num_questions']}",
        row.name,
    ]
    return "  ".join(parts)


def facts(found: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of a run's results says how it was made."""
    names = ("task", "model", "control", "run", "settings", "versions", "unusable_at_build")
    return {name: found[name] for name in names}


def define(values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    shared_flags.define(values)
    flags.DEFINE_multi_string(
        "row", [], "LETTER,NAME,CHECKPOINT,FORMAT[,CONTROL]; repeatable.", flag_values=values
    )
    flags.DEFINE_string(
        "main", None, "Letter of the row that the others are compared with.", flag_values=values
    )


def compare(values: flags.FlagValues) -> None:
    """Runs every row and prints the table."""
    config = values.config
    if values.limit is not None:
        config["limit"] = values.limit
    rows = [AblationRow.parse(text) for text in values.row]
    shown_curves = shared_flags.read_curves(values)
    made = run(rows, config, Path(values.data), Path(values.output), values.main, shown_curves)
    print(made.table)
    print(f"report: {made.report}")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after one line about what is wrong."""
    return command_line.run(
        argv,
        program=PROGRAM,
        description=__doc__,
        define=define,
        main=compare,
        required=("data", "output"),
        default_config=shared_flags.DEFAULT_CONFIG,
        expected=(KeyError, TooManyBadFiles),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
