"""Make a data set: scenes as audio files with strong labels, then EAQA records about them.

    python -m data.build --config=configs/scenes.py:tiny --root=DIR [--config.questions.per_scene=3 …]

Running it again continues: audio files and records that exist are kept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from data import eaqa_builder, scenes
from data.command_line import define_config, run
from data.drafts import QuestionConfig
from echo_jax import ranges

PROGRAM = "data.build"


def build(config: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Write the scenes and records of `config` under `root`.

    Returns:
      {"scenes": {"written", "kept"}, "records": {split: count}, "skipped": count, "skipped_recordings": count,
      "directory": of the records}.

    Raises:
      ValueError: a config field is wrong, `root` holds another config's scenes, or recordings are unusable.
      TooManySkipped: more files than `config["max_bad_fraction"]` are unusable.
    """
    scene_config = scenes.SceneConfig.from_mapping(config["scenes"])
    questions = QuestionConfig.from_mapping(config["questions"])
    max_bad_fraction = config["max_bad_fraction"]
    ranges.check("num_processes", config["num_processes"], ranges.COUNT)
    ranges.check("max_bad_fraction", max_bad_fraction, ranges.SHARE_BELOW_ONE)
    ranges.check("max_seconds", config["max_seconds"], ranges.Range(least=0.1))
    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - began, 1e-6)
        logging.log_every_n_seconds(logging.INFO, "scenes %d / %d, %.1f/s", 5, done, total, rate)

    written = scenes.write_scenes(
        scene_config, root, config["num_processes"], progress, max_bad_fraction
    )
    made = eaqa_builder.builder(root, questions, max_bad_fraction, config["max_seconds"])
    return {
        "scenes": written,
        "records": eaqa_builder.build_records(made),
        "skipped": _count_lines(root / "skipped.jsonl"),
        "skipped_recordings": _count_lines(root / scenes.SKIPPED_RECORDINGS),
        "directory": made.data_dir,
    }


def _count_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def define(values: flags.FlagValues) -> None:
    """Adds the flags of this command."""
    define_config(values, "What to make, e.g. configs/scenes.py:tiny")
    flags.DEFINE_string(
        "root", None, "Folder to write to; run again, it goes on.", flag_values=values
    )


def make(values: flags.FlagValues) -> None:
    """Builds and says what was made."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    root = Path(values.root)
    result = build(values.config, root)
    print(f"scenes: {result['scenes']['written']} written, {result['scenes']['kept']} kept")
    print("records: " + ", ".join(f"{split} {n}" for split, n in result["records"].items()))
    print(f"skipped audio files: {result['skipped']} (named in {root / 'skipped.jsonl'})")
    if result["skipped_recordings"]:
        named = root / scenes.SKIPPED_RECORDINGS
        print(f"recordings left out: {result['skipped_recordings']} (named in {named})")
    print(f"stored in {result['directory']}")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after one line about what is wrong."""
    return run(
        argv,
        program=PROGRAM,
        description=__doc__,
        define=define,
        main=make,
        required=("config", "root"),
        expected=(eaqa_builder.TooManySkipped,),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
