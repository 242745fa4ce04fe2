"""What every command does with its flags, on a command that only keeps what it was given."""

from __future__ import annotations

import sys

import pytest
from absl import flags

from data.command_line import define_config, run

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg="tiny"):
    if arg not in ("tiny", "small"):
        raise ValueError(f"no variant {arg!r}")
    return ConfigDict({"steps": 1 if arg == "tiny" else 2, "data": {"root": "", "seconds": 3.0}})
"""


class Command:
    """A command with a config and --name, which must be given."""

    def __init__(self, folder, raises: Exception | None = None, default_config: bool = False):
        self.path = folder / "config.py"
        self.path.write_text(CONFIG)
        self.default = f"{self.path}:small" if default_config else None
        self.raises = raises
        self.config = self.name = None

    def define(self, values: flags.FlagValues) -> None:
        define_config(values, "The config.")
        flags.DEFINE_string("name", None, "A name.", flag_values=values)

    def main(self, values: flags.FlagValues) -> None:
        if self.raises:
            raise self.raises
        self.config, self.name = values.config, values.name

    def __call__(self, *given: str) -> int:
        return run(
            ["anything", *(part.format(config=self.path) for part in given)],
            program="the.program",
            description="What it is for.",
            define=self.define,
            main=self.main,
            required=("name",) if self.default else ("config", "name"),
            default_config=self.default,
            expected=(KeyError,),
        )


@pytest.fixture
def command(tmp_path) -> Command:
    return Command(tmp_path)


GOOD = ("--config={config}", "--name=n")


@pytest.mark.parametrize(
    "given",
    [
        (*GOOD, "--config.steps=5", "--config.data.root=here"),
        ("--config", "{config}", "-name=n", "--config.steps", "5", "--config.data.root=here"),
    ],
)
def test_a_config_with_overrides(command, given):
    before = list(sys.argv)
    assert command(*given) == 0
    assert command.name == "n"
    assert command.config.steps == 5
    assert command.config.data.to_dict() == {"root": "here", "seconds": 3.0}
    assert sys.argv == before


def test_the_default_config_can_be_changed_and_replaced(tmp_path):
    command = Command(tmp_path, default_config=True)
    assert command("--name=n") == 0
    assert command.config.steps == 2
    assert command("--name=n", "--config.data.root=here") == 0
    assert (command.config.steps, command.config.data.root) == (2, "here")
    assert command(*GOOD) == 0
    assert command.config.steps == 1
    assert command("--name=n", "--config.stebs=1") == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "--config is missing"),
        (("--config.steps=1",), "--config is missing"),
        (("--config={config}",), "--name is missing"),
        (("--config={config}", "--name="), "--name is empty"),
        ((*GOOD, "extra"), "unexpected argument 'extra'"),
        ((*GOOD, "--nonsense=1"), "Unknown command line flag 'nonsense'"),
        (("--config={config}x", "--name=n"), "--config: there is no file '{config}x'"),
        (("--name=n", "--config"), "--config: there is no file ''"),
        (("--name=n", "--config={config}:huge"), "--config={config}:huge: no variant 'huge'"),
        ((*GOOD, "--config.stebs=1"), "no such field; did you mean --config.steps?"),
        (
            (*GOOD, "--config.data.rot", "1"),
            "--config.data.rot: the config has no such field; did you mean --config.data.root?",
        ),
        ((*GOOD, "--config.zzz=1"), "--config.zzz: the config has no such field\n"),
        ((*GOOD, "--config.steps=many"), "many"),
        (("--config.steps=5", *GOOD), "before a value for --config was specified"),
    ],
)
def test_a_mistake_is_one_line(command, capsys, given, message):
    assert command(*given) == 2
    said = capsys.readouterr().err
    assert said.startswith("the.program: ")
    assert message.format(config=command.path) in said
    assert said.count("\n") == 1
    assert command.config is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(:", "the file is broken: SyntaxError: "),
        ("import no_such_module_at_all", "the file is broken: ModuleNotFoundError: No module"),
        ("x = 1 / 0", "the file is broken: ZeroDivisionError: division by zero"),
        ("def get_config():\n  return wrong", "the file is broken: NameError: name 'wrong' is"),
        ("x = 1", "it has no function get_config"),
        ("def get_config():\n  return {}", "get_config does not return a ConfigDict"),
    ],
)
def test_a_broken_config_file_is_named(command, capsys, content, message):
    command.path.write_text(content)
    assert command(*GOOD) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"the.program: --config={command.path}: {message}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_all_flags(command, capsys, flag):
    assert command(flag) == 0
    said = capsys.readouterr().out
    for part in ("What it is for.", "--config", "--name", "--[no]traceback", "A name."):
        assert part in said


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "the.program: two lines\n"),
        (KeyError("field 'x'"), "the.program: field 'x'\n"),
        (FileNotFoundError(2, "No such file", "f"), "the.program: [Errno 2] No such file: 'f'\n"),
        (OSError(), "the.program: OSError\n"),
    ],
)
def test_what_is_expected_is_one_line_or_a_trace(tmp_path, capsys, error, line):
    command = Command(tmp_path, error)
    assert command(*GOOD) == 2
    assert capsys.readouterr().err == line
    with pytest.raises(type(error)):
        command(*GOOD, "--traceback")


def test_our_own_faults_keep_their_trace(tmp_path):
    with pytest.raises(RuntimeError, match="a fault"):
        Command(tmp_path, RuntimeError("a fault"))(*GOOD)


def test_a_command_may_have_no_config(capsys):
    def command(*given: str) -> int:
        return run(
            ["demo", *given],
            program="demo",
            description=None,
            define=lambda values: None,
            main=lambda values: None,
        )

    assert command() == 0
    assert command("--config.x=1") == 2
    assert capsys.readouterr().err == "demo: Unknown command line flag 'config.x'\n"
