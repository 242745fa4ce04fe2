"""Parses flags and config overrides; what is wrong comes back as one line."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict


def parse(argv: Sequence[str], required: Sequence[str]) -> str | None:
    """Parses `argv` into `flags.FLAGS`; the flag ``config``, if it is given, is a config file with overrides.

    Args:
        argv: as `sys.argv`.
        required: flags that must be given.

    Returns:
        What is wrong, in one line, or None.
    """
    names = {argument.lstrip("-").partition("=")[0] for argument in argv[1:]}
    for name in required:
        if name not in names:
            return f"--{name} is missing"
    try:
        fields = set(_field_names(_load(argv))) if "config" in names else set()
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    for name in sorted(names):
        if name.startswith("config.") and name.removeprefix("config.") not in fields:
            return f"--{name}: the config has no such field{_hint(name, fields)}"
    # The config library looks for overrides of fields there and nowhere else.
    before, sys.argv = sys.argv, list(argv)
    try:
        rest = flags.FLAGS(list(argv))[1:]
    except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        return " ".join(str(error).split())
    finally:
        sys.argv = before
    if rest:
        return f"unexpected argument {rest[0]!r}"
    empty = [name for name in required if not flags.FLAGS[name].value]
    return f"--{empty[0]} is empty" if empty else None


def _load(argv: Sequence[str]) -> ConfigDict:
    """The config without overrides, for the names of its fields.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no config, or has no such variant.
    """
    value = ""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        name, separator, given = argument.partition("=")
        if name.lstrip("-") == "config":
            value = given if separator else following
    path, _, variant = value.partition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config: there is no file {path!r}")
    spec = importlib.util.spec_from_file_location("requested_config", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError) as error:
        raise ValueError(f"--config: {path} is broken: {error}") from None
    if not hasattr(module, "get_config"):
        raise ValueError(f"--config: {path} has no function get_config")
    config = module.get_config(*([variant] if variant else []))
    if not isinstance(config, ConfigDict):
        raise ValueError(f"--config: get_config of {path} does not return a ConfigDict")
    return config


def _field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    names = []
    for name, value in config.items():
        names.append(prefix + name)
        if isinstance(value, ConfigDict):
            names += _field_names(value, f"{prefix}{name}.")
    return names


def _hint(name: str, fields: set[str]) -> str:
    near = difflib.get_close_matches(name.removeprefix("config."), sorted(fields), 1, 0.5)
    return f"; did you mean --config.{near[0]}?" if near else ""
