"""Command lines of all rooms: flags and config overrides in, one line out when something is wrong."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

_HELP = ("--help", "-help", "-h")


def run(
    argv: Sequence[str],
    *,
    program: str,
    description: str | None,
    define: Callable[[flags.FlagValues], None],
    main: Callable[[flags.FlagValues], None],
    required: Sequence[str] = (),
    default_config: str | None = None,
    expected: tuple[type[Exception], ...] = (),
) -> int:
    """Parses flags and runs a command.

    Args:
        argv: as `sys.argv`.
        program: what to call it in an error.
        description: what --help prints above the flags.
        define: adds the command's flags; a config file with overrides comes from `define_config`.
        main: does it.
        required: flags that must be given, and not empty.
        default_config: the config file where --config is not given.
        expected: what a wrong path, value or data set raises in `main` beside ValueError and OSError. Everything else
            is a fault of ours and keeps its trace.

    Returns:
        The exit status: 0, or 2 after one line on stderr about what is wrong.
    """
    # Flags of its own, so that a process can run several commands.
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", flag_values=values)
    flags.DEFINE_bool(
        "traceback", False, "Show where in the code an error was found.", flag_values=values
    )
    define(values)
    if any(argument in _HELP for argument in argv[1:]):
        print(f"{description or ''}\n{values.get_help()}")
        return 0
    # The log asks the flags of the process, and warns when nobody has parsed them.
    flags.FLAGS.mark_as_parsed()
    try:
        _parse(list(argv), values, required, default_config)
    except (flags.Error, ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        return _fail(program, error)
    mistakes: tuple[type[Exception], ...] = (ValueError, OSError, *expected)
    try:
        main(values)
    except mistakes as error:
        if values["traceback"].value:
            raise
        return _fail(program, error)
    return 0


def define_config(values: flags.FlagValues, description: str) -> None:
    """Adds the flag --config, a config file whose fields --config.FIELD=VALUE changes."""
    # Without a default: the library would read it, with its overrides, before errors can be caught.
    config_flags.DEFINE_config_file("config", None, description, flag_values=values)


def _parse(
    argv: list[str],
    values: flags.FlagValues,
    required: Sequence[str],
    default_config: str | None,
) -> None:
    """Parses `argv` into `values`.

    Raises:
        ValueError, OSError: one line about a flag, a field or the config file.
        flags.Error, TypeError, KeyError, AttributeError: from the libraries, about a value.
    """
    if "config" in values:
        if default_config is not None and _given_config(argv) is None:
            argv.insert(1, f"--config={default_config}")
        given = _given_config(argv)
        if given is not None:
            _check_fields(argv, set(_field_names(_load(given))))
        elif "config" in required:
            raise ValueError("--config is missing")
    # The config library looks for overrides of fields in sys.argv and nowhere else.
    before, sys.argv = sys.argv, argv
    try:
        rest = values(argv)[1:]
    finally:
        sys.argv = before
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}")
    for name in required:
        if values[name].value is None:
            raise ValueError(f"--{name} is missing")
        if not values[name].value:
            raise ValueError(f"--{name} is empty")


def _given_config(argv: Sequence[str]) -> str | None:
    """The value of the last --config, "" if nothing follows it, None if there is none."""
    found = None
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, separator, value = argument.partition("=")
        if name in ("--config", "-config"):
            found = value if separator else following
    return found


def _load(given: str) -> ConfigDict:
    """The config of PATH or PATH:VARIANT without overrides, for the names of its fields.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no config, or has no such variant.
    """
    path, _, variant = given.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config: there is no file {path!r}")
    spec = importlib.util.spec_from_file_location("requested_config", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Whatever a config file raises is about that file.
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ValueError("it has no function get_config")
        config = module.get_config(*([variant] if variant else []))
    except ValueError as error:
        raise ValueError(f"--config={given}: {error}") from error
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"--config={given}: the file is broken: {kind}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config={given}: get_config does not return a ConfigDict")
    return config


def _field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    names = []
    for name, value in config.items():
        names.append(prefix + name)
        if isinstance(value, ConfigDict):
            names += _field_names(value, f"{prefix}{name}.")
    return names


def _check_fields(argv: Sequence[str], fields: set[str]) -> None:
    """Raises ValueError about the first override of a field that does not exist."""
    for argument in argv[1:]:
        name = argument.lstrip("-").partition("=")[0]
        field = name.removeprefix("config.")
        if argument.startswith("-") and field != name and field not in fields:
            near = difflib.get_close_matches(field, sorted(fields), 1, 0.5)
            hint = f"; did you mean --config.{near[0]}?" if near else ""
            raise ValueError(f"--{name}: the config has no such field{hint}")


def _fail(program: str, error: BaseException) -> int:
    # str() of a KeyError is the repr of its message.
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    print(f"{program}: {' '.join(message.split()) or type(error).__name__}", file=sys.stderr)
    return 2
