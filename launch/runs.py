"""What a workdir says about the run in it: its config, whether it is done, and what it was made from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from echo_jax import disk, huggingface

SETTINGS_FILE = "run.json"
DONE_FILE = "done.json"

# Fields that change how a run is kept, shown, stopped and laid out on devices, not what it learns.
_INDIFFERENT = (
    "log_every_steps",
    "data.cache_bytes",
    "attention",
    "remat",
    "vocabulary_chunk",
    "non_finite",
    "non_finite_limit",
)
_INDIFFERENT_SECTIONS = ("checkpoint.", "mesh.", "rollout_mesh.")


def plain(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values."""
    content: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return content


def changed_fields(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of the fields whose values differ between two configs."""
    names = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            names += changed_fields(before, after, f"{prefix}{name}.")
        elif before != after:
            names.append(f"{prefix}{name}")
    return names


def write_settings(config: ConfigDict, workdir: Path) -> None:
    """Writes the config of the run."""
    _write_json(workdir / SETTINGS_FILE, plain(config))


def keep_commit(config: ConfigDict, workdir: Path) -> None:
    """Lets a run go on from the commit it began with, wherever the hub's main has moved since.

    The settings of a run name that commit, `init_from` on the command line need not.
    """
    before = str(_read_json(workdir / SETTINGS_FILE).get("init_from", ""))
    repo_id, _, revision = config.init_from.partition("@")
    if not revision and huggingface.is_pinned(before) and before.startswith(f"{repo_id}@"):
        config.init_from = before
    elif revision and not huggingface.is_pinned(config.init_from):  # compared by its commit
        config.init_from = huggingface.find(config.init_from).name


def write_done(config: ConfigDict, workdir: Path, step: int) -> None:
    """Marks the run as finished after `step` steps."""
    _write_json(
        workdir / DONE_FILE, {"stage": config.stage, "step": step, "made_from": _made_from(config)}
    )


def is_done(config: ConfigDict, workdir: Path) -> bool:
    """Whether `workdir` holds this run, finished. A run of fewer steps is not: it is prolonged.

    Raises:
        ValueError: it is no folder, or holds a damaged file, a run of another stage, or a finished run that another
            config, another cold start or other scenes made.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"{workdir} is a file, not a folder; give another --workdir")
    before = _read_json(workdir / SETTINGS_FILE, ("stage", "init_from", "data"))
    if before and before["stage"] != config.stage:
        raise ValueError(
            f"{workdir} is the workdir of a {before['stage']} run, not of {config.stage}; give another --workdir"
        )
    done = _read_json(workdir / DONE_FILE, ("step",))
    # Without its settings it may be any run: the config in its newest checkpoint tells.
    if not done or not before or done["step"] < config.total_steps:
        return False
    if deciding := _deciding_changes(before, plain(config)):
        raise ValueError(
            f"{workdir} holds a finished run with another {', '.join(deciding)}; give another --workdir, "
            "or remove it to train anew"
        )
    for what, content in _made_from(config).items():
        if done.get("made_from", {}).get(what, content) != content:
            raise ValueError(
                f"{workdir} holds a finished run, but {what} was made anew since; give another --workdir, "
                "or remove it to train anew"
            )
    return True


def check_continues(
    before: Mapping[str, Any], step: int, config: ConfigDict, workdir: Path
) -> None:
    """Checks that `config` may go on with a run that `before` has brought to a checkpoint at `step`.

    Its steps would be of two kinds otherwise, and its end not that of an undisturbed run. The number of steps may
    change where the learning rate does not depend on it.

    Raises:
        ValueError: a field differs; the message names the first one with both values.
    """
    after = plain(config)
    fields = _deciding_changes(before, after)
    schedule = config.optimizer
    if (
        schedule.schedule == "constant"
        and not schedule.warmup_fraction
        and config.total_steps >= step
    ):
        fields = [name for name in fields if name != "total_steps"]
    if fields:
        name = fields[0]
        raise ValueError(
            f"{workdir} holds a run with config.{name}={_value(before, name)}, not {_value(after, name)}; give "
            "another --workdir, or the old value to go on with it"
        )


def _deciding_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of the fields that differ and decide what is learned."""
    return [
        name
        for name in changed_fields(_placed(before), _placed(after))
        if name not in _INDIFFERENT and not name.startswith(_INDIFFERENT_SECTIONS)
    ]


def _value(settings: Mapping[str, Any], name: str) -> str:
    """How to show the value of a field, "(none)" where the config has no such field."""
    value: Any = settings
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return "(none)"
        value = value[part]
    return repr(value)


def _made_from(config: ConfigDict) -> dict[str, Any]:
    """Settings of the run that `init_from` names and of the scenes, {} where unknown: a path may hold new content."""
    return {
        "config.init_from": _read_json(Path(config.init_from) / SETTINGS_FILE)
        if config.init_from
        else {},
        "config.data.root": _read_json(Path(config.data.root) / "scenes.json"),
    }


def _placed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with absolute paths, so that the same folder has one name."""

    def place(name: str) -> str:
        return str(Path(name).resolve()) if name and Path(name).exists() else name

    data = settings["data"]
    places = {name: place(data[name]) for name in ("root", "records")}
    return {**settings, "init_from": place(settings["init_from"]), "data": {**data, **places}}


def _read_json(path: Path, fields: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a file, {} if there is none.

    Raises:
        ValueError: it holds no JSON object with these fields; the message names the file.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        reason = ""
    except ValueError as error:
        content, reason = None, str(error)
    if not isinstance(content, dict):
        reason = reason or "no JSON object"
    elif missing := [name for name in fields if name not in content]:
        reason = f"no field {missing[0]!r}"
    if reason:
        raise ValueError(
            f"{path} is damaged ({reason}); remove it and run the command that writes it again"
        )
    return content


def _write_json(path: Path, content: Any) -> None:
    """Writes a file that is either whole or not there."""
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    with disk.naming(path, len(text), "free space, and start again to go on"):
        partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
