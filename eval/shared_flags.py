"""Flags that all commands of this room have."""

from pathlib import Path

from absl import flags

from data.command_line import define_config
from eval import curves

DEFAULT_CONFIG = str(Path(__file__).parents[1] / "configs" / "eval.py:tiny")


def define(values: flags.FlagValues) -> None:
    """Adds them."""
    define_config(
        values,
        "How to ask: configs/eval.py:tiny, :small or :echo_7b; --config.FIELD=VALUE changes a field.",
    )
    flags.DEFINE_string(
        "data",
        None,
        "Folder that data.build wrote, or a .jsonl file of records.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output",
        None,
        "Folder to write to; a run that was cut short goes on in it.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "limit",
        None,
        "Ask only so many questions; 0 asks all.",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "curves",
        [],
        "NAME=WORKDIR of a training stage whose curves the report shows; repeatable.",
        flag_values=values,
    )


def read_curves(values: flags.FlagValues) -> list[curves.Curve]:
    """Returns the training curves of the stages named by --curves."""
    stages = {}
    for entry in values.curves:
        name, _, path = entry.partition("=")
        if not (name and path):
            raise ValueError(f"--curves {entry!r} is not NAME=WORKDIR")
        if not Path(path).is_dir():
            raise ValueError(f"--curves {entry!r}: no such folder")
        stages[name] = Path(path)
    return curves.read(stages)
