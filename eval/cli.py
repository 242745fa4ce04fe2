"""Command lines of this room: flags in, one line out when something is wrong."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from data.audio_store import TooManyBadFiles
from eval import curves

DEFAULT_CONFIG = str(Path(__file__).parents[1] / "configs" / "eval.py:tiny")

# What a wrong path, file, field or value raises in our rooms and in the file system.
_EXPECTED = (ValueError, KeyError, OSError, TooManyBadFiles)
# What a config file and an override of one of its fields may raise besides.
_CONFIG_ERRORS = (flags.Error, AttributeError, TypeError, ImportError, SyntaxError, *_EXPECTED)


def run(
    program: str,
    description: str | None,
    define: Callable[[flags.FlagValues], None],
    main: Callable[[flags.FlagValues], None],
    argv: Sequence[str],
) -> int:
    """Parses flags and runs a command.

    Args:
        program: what to call it in an error.
        description: what --help prints above the flags.
        define: adds the command's own flags.
        main: does it.
        argv: as `sys.argv`, which it becomes: the config library looks for overrides of fields
            there and nowhere else.

    Returns:
        0, or 2 after one line about what is wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", flag_values=values)
    _define_common(values)
    define(values)
    if any(argument in ("--help", "-help", "-h") for argument in argv):
        print(f"{description or ''}\n{values.get_help()}")
        return 0
    try:
        sys.argv = _with_config(argv)
        rest = values(sys.argv)[1:]
    except _CONFIG_ERRORS as error:
        return _fail(program, error)
    if rest:
        return _fail(program, ValueError(f"unexpected argument {rest[0]!r}"))
    try:
        main(values)
    except _EXPECTED as error:
        if values["traceback"].value:
            raise
        return _fail(program, error)
    return 0


def _define_common(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file(
        "config",
        None,
        "How to ask: configs/eval.py:tiny, :small or :echo_7b; --config.FIELD=VALUE changes a field.",
        flag_values=values,
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
    flags.DEFINE_bool(
        "traceback", False, "Show where in the code an error was found.", flag_values=values
    )


def value(values: flags.FlagValues, name: str) -> Any:
    """Returns the value of a flag."""
    return values[name].value


def required(values: flags.FlagValues, name: str) -> str:
    """Returns the value of a flag that must be given."""
    if not value(values, name):
        raise ValueError(f"--{name} is required")
    return value(values, name)


def read_curves(values: flags.FlagValues) -> list[curves.Curve]:
    """Returns the training curves of the stages named by --curves."""
    stages = {}
    for entry in value(values, "curves"):
        name, _, path = entry.partition("=")
        if not (name and path):
            raise ValueError(f"--curves {entry!r} is not NAME=WORKDIR")
        if not Path(path).is_dir():
            raise ValueError(f"--curves {entry!r}: no such folder")
        stages[name] = Path(path)
    return curves.read(stages)


def _with_config(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with the default config where none is named.

    A default of the flag itself would be read, with its overrides, before errors can be caught.
    """
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, separator, value = argument.partition("=")
        if name in ("--config", "-config"):
            path = (value if separator else following).partition(":")[0]
            if not Path(path).is_file():
                raise FileNotFoundError(f"--config: there is no file {path!r}")
            return list(argv)
    return [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]


def _fail(program: str, error: BaseException) -> int:
    # str() of a KeyError is the repr of its message.
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if isinstance(error, AttributeError):
        # The config library hands on the repr of the repr of a field's name, and a proposal.
        name, _, proposal = message.replace("\\n", "\n").replace("\\", "").partition("\n")
        lines = [
            f"the config has no field {name.strip(chr(34) + chr(39))!r}.",
            proposal.strip("'\""),
        ]
    elif any("Traceback (most recent call last)" in line for line in lines):
        # It hands on the whole trace of an error in a config file: the end says it.
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    print(f"{program}: {' '.join(lines).strip() or type(error).__name__}", file=sys.stderr)
    return 2
