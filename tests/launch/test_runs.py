"""When a workdir counts as finished: the same stage, config, cold start and scenes, and no fewer steps."""

import json
import re
from pathlib import Path

import pytest

from configs import sft
from launch import runs


@pytest.fixture
def config(tmp_path):
    made = sft.get_config("test")
    for name in ("base", "data"):
        (tmp_path / name).mkdir()
    (tmp_path / "base" / "run.json").write_text('{"stage": "base", "seed": 0}')
    (tmp_path / "data" / "scenes.json").write_text('{"seed": 0}')
    made.init_from, made.data.root = str(tmp_path / "base"), str(tmp_path / "data")
    return made


@pytest.fixture
def finished(config, tmp_path) -> Path:
    workdir = tmp_path / "w"
    workdir.mkdir()
    runs.write_settings(config, workdir)
    assert not runs.is_done(config, workdir)
    runs.write_done(config, workdir, config.total_steps)
    assert runs.is_done(config, workdir)
    return workdir


def test_changed_fields():
    old = {"a": 1, "b": {"c": [1, 2], "d": 3}}
    assert runs.changed_fields(old, {"a": 1, "b": {"c": [1, 2], "d": 4}, "e": 0}) == ["b.d", "e"]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"optimizer.learning_rate": 7.0}, {"total_steps": 1}, {"init_from": "x/y"}],
)
def test_a_finished_run_of_another_config_is_named(change, config, finished):
    config.update_from_flattened_dict(change)
    with pytest.raises(
        ValueError, match=f"holds a finished run with another {next(iter(change))};"
    ):
        runs.is_done(config, finished)


def test_more_steps_prolong_a_finished_run(config, finished):
    config.total_steps += 1
    assert not runs.is_done(config, finished)


def test_what_decides_nothing_may_change(config, finished, tmp_path, monkeypatch):
    config.log_every_steps, config.checkpoint.every_steps, config.data.cache_bytes = 7, 9, 1
    monkeypatch.chdir(tmp_path)
    config.init_from, config.data.root = "base", "./data"
    assert runs.is_done(config, finished)


@pytest.mark.parametrize(
    ("path", "field"), [("base/run.json", "init_from"), ("data/scenes.json", "data.root")]
)
def test_what_a_finished_run_was_made_from_must_be_the_same(
    path, field, config, finished, tmp_path
):
    (tmp_path / path).write_text(json.dumps({"stage": "base", "seed": 1}))
    with pytest.raises(ValueError, match=f"config.{field} was made anew since; give another"):
        runs.is_done(config, finished)


@pytest.mark.parametrize("given", ["owner/name", "owner/name@" + "a" * 40])
def test_a_run_keeps_the_commit_that_it_began_with(given, config, tmp_path):
    """The hub is not asked: main may have moved, and the network be down."""
    workdir = tmp_path / "w"
    workdir.mkdir()
    config.init_from = f"owner/name@{'a' * 40}"
    runs.write_settings(config, workdir)
    runs.write_done(config, workdir, config.total_steps)
    config.init_from = given
    runs.keep_commit(config, workdir)
    assert config.init_from == f"owner/name@{'a' * 40}"
    assert runs.is_done(config, workdir)


@pytest.mark.parametrize("given", ["other/name", "owner/name@" + "b" * 40, "", "base"])
def test_another_model_is_not_taken_for_it(given, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "w"
    workdir.mkdir()
    config.init_from = f"owner/name@{'a' * 40}"
    runs.write_settings(config, workdir)
    config.init_from = given
    runs.keep_commit(config, workdir)
    assert config.init_from == given


@pytest.fixture
def steady(config):
    config.optimizer.schedule, config.optimizer.warmup_fraction = "constant", 0.0
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1, "total_steps": 9}, "config.seed=0, not 1; give another --workdir, or the old"),
        ({"optimizer.learning_rate": 7.0}, "config.optimizer.learning_rate=0.001, not 7.0;"),
        (
            {"listening.weights": {"naming": 1.0}},
            "config.listening.weights.choice=1.0, not (none);",
        ),
        ({"init_from": "x/y"}, "base', not 'x/y';"),
        ({"total_steps": 1}, "config.total_steps=4, not 1;"),
        (
            {"total_steps": 9, "optimizer.schedule": "linear"},
            "config.optimizer.schedule='constant'",
        ),
    ],
)
def test_an_unfinished_run_goes_on_with_its_config_only(change, message, steady, tmp_path):
    before = runs.plain(steady)
    for name, value in change.items():
        if isinstance(value, dict):
            steady[name.split(".")[0]][name.split(".")[1]] = value
        else:
            steady.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        runs.check_continues(before, 2, steady, tmp_path / "w")
    assert str(caught.value).startswith(f"{tmp_path / 'w'} holds a run with config.")
    assert "\n" not in str(caught.value)


def test_what_decides_nothing_may_change_before_the_end(steady, tmp_path, monkeypatch):
    before = runs.plain(steady)
    steady.log_every_steps, steady.checkpoint.every_steps, steady.data.cache_bytes = 7, 9, 1
    steady.checkpoint.keep_last, steady.checkpoint.asynchronous = 1, False
    monkeypatch.chdir(tmp_path)
    steady.init_from, steady.data.root = "base", "./data"
    for total in (9, 2):
        steady.total_steps = total
        runs.check_continues(before, 2, steady, tmp_path / "w")


@pytest.mark.parametrize(
    "schedule", [{"schedule": "cosine"}, {"schedule": "linear"}, {"warmup_fraction": 0.1}]
)
def test_the_number_of_steps_may_not_change_the_learning_rate(schedule, steady, tmp_path):
    steady.optimizer.update(schedule)
    before = runs.plain(steady)
    runs.check_continues(before, 2, steady, tmp_path)
    steady.total_steps = 9
    with pytest.raises(ValueError, match=r"config.total_steps=4, not 9; give another"):
        runs.check_continues(before, 2, steady, tmp_path)


def test_a_workdir_that_is_a_file_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file, not a folder; give another --workdir"):
        runs.is_done(config, tmp_path / "file")


@pytest.mark.parametrize("content", ["", "{", '{"step": 4', "[]", "{}", "\x00" * 9])
@pytest.mark.parametrize("name", ["done.json", "run.json"])
def test_a_torn_file_is_named(name, content, config, finished):
    (finished / name).write_text(content)
    with pytest.raises(ValueError, match=rf"w/{name} is damaged \(.*\); remove it and") as caught:
        runs.is_done(config, finished)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["base/run.json", "data/scenes.json"])
def test_a_torn_file_of_what_it_was_made_from_is_named(name, config, finished, tmp_path):
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        runs.is_done(config, finished)


def test_a_run_without_its_settings_is_not_taken_as_finished(config, finished):
    (finished / "run.json").unlink()
    assert not runs.is_done(config, finished)
