"""The commands of this room on a model whose answer is known."""

import json
import pathlib
import subprocess
import sys

import pytest

from configs import eval as eval_config
from echo_jax import huggingface
from echo_jax.text.tokenizer import Tokenizer
from eval import __main__ as eval_main
from eval import ablation
from tests.eval.examples import make_record
from tests.models import scripted_model, single_tokens

# What follows the prompt's last newline, then what follows inserted audio. No token occurs twice with different
# successors, which is why the last tags are spelled in unusual pieces.
BEFORE = ["\n", "<", "seg", ">", "0", ",", " ", "1", "</", "seg", ">"]
AFTER = [" <", "answer", ">\n", "rain", " </", "a", "n", "s", "w", "e", "r", ">\n\n"]
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    record = make_record(0)
    prompt = f"user\n{record.question} {', '.join(record.choices)}. Cite. assistant\n"
    tokenizer = Tokenizer.from_qwen_wheel().compact([prompt, *BEFORE, *AFTER])
    before, after = (single_tokens(tokenizer, pieces) for pieces in (BEFORE, AFTER))
    config, params = scripted_model(
        tokenizer, [before, [tokenizer.audio_eos_id, *after, tokenizer.im_end_id]]
    )
    return huggingface.save_pretrained(tmp_path_factory.mktemp("model"), config, params, tokenizer)


@pytest.fixture
def rain(data):
    """The questions of `data`; "rain" is the answer to every second one."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["answer"] = "rain" if number % 2 else "a bell"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def command(*arguments):
    return eval_main.main(["eval", *map(str, arguments)])


def test_a_checkpoint_is_asked_and_reported(checkpoint, rain, tmp_path, capsys):
    out = tmp_path / "out"
    config = f"--config={ROOT / 'configs' / 'eval.py'}:test"
    arguments = [config, "--checkpoint", checkpoint, "--data", rain]
    assert command(*arguments, "--output", out) == 0
    found = json.loads((out / "results.json").read_text())
    assert (found["num_correct"], found["num_questions"]) == (5, 11)
    assert found["parse_rate"] == 1.0
    assert found["grounding"]["segments_per_answer"] == 1.0
    assert found["grounding"]["mean_iou"] == pytest.approx(0.5 / 1.5)
    assert found["mean_insertions"] == 1.0
    assert found["finish_reasons"] == {"end": 11}
    assert "answered 11/11" in capsys.readouterr().out
    assert (out / "report.html").read_text().count("<article") == 11
    # Again: nothing is asked, and the files are the same.
    before = (out / "results.json").read_bytes()
    assert command(*arguments, "--output", out) == 0
    assert "answered" not in capsys.readouterr().out
    assert (out / "results.json").read_bytes() == before


def test_the_command_of_the_readme():
    done = subprocess.run(
        [sys.executable, "-m", "eval", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--checkpoint" in done.stdout
    assert "--config" in done.stdout


def test_an_ablation_prints_a_row_a_line(checkpoint, rain, tmp_path):
    rows = [
        ablation.AblationRow.parse(f"B,cold start,{checkpoint},grounded"),
        ablation.AblationRow.parse(f"D,Echo,{checkpoint},interleaved"),
        ablation.AblationRow.parse(f"D-silence,Echo,{checkpoint},interleaved,silence"),
    ]
    config = eval_config.get_config("test")
    made = ablation.run(rows, config, rain, tmp_path / "out", progress=lambda line: None)
    lines = (tmp_path / "out" / "ablation.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["B", "D", "D-silence"]
    # Nothing follows the tag in the grounded format: no answer, which is wrong.
    assert [float(line.split()[1]) for line in lines] == [0.0, 45.5, 45.5]
    assert "[21.3, 72.0]" in lines[1]
    assert made.table.splitlines() == lines
    saved = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert saved["main"] == "D"
    assert [row["letter"] for row in saved["rows"]] == ["B", "D", "D-silence"]
    against = {c["second"]: (c["only_first"], c["only_second"]) for c in saved["comparisons"]}
    assert against == {"B": (5, 0), "D-silence": (0, 0)}
    assert made.report.is_file()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("D,Echo,dir", "is not LETTER,NAME,CHECKPOINT,FORMAT"),
        ("D x,Echo,dir,grounded", "must be one word"),
        ("D,Echo,dir,spoken", "unknown format 'spoken'"),
        ("D,Echo,dir,grounded,silence", "needs the format interleaved"),
    ],
)
def test_rows_that_make_no_sense(row, message):
    with pytest.raises(ValueError, match=message):
        ablation.AblationRow.parse(row)


def test_two_rows_of_one_letter(rain, tmp_path):
    row = ablation.AblationRow("D", "Echo", "nowhere", "grounded")
    with pytest.raises(ValueError, match="different letters"):
        ablation.run([row, row], eval_config.get_config("test"), rain, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--checkpoint is missing"),
        (["--config.temprature=1"], "has no such field; did you mean --config.temperature?"),
        (["--config=configs/eval.py:tiy"], "no variant 'tiy'; did you mean tiny?"),
        (["--config=configs/evil.py"], "--config: there is no file 'configs/evil.py'"),
        (["--checkpoint=c", "--output={output}", "--data=nowhere"], "nowhere: no such folder"),
        (
            ["--checkpoint=nowhere", "--output={output}", "--data={data}"],
            "nowhere: no such directory",
        ),
        (["--format=spoken"], "--format=spoken: value should be one of"),
    ],
)
def test_an_error_is_one_line(data, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    arguments = [a.format(data=data, output=tmp_path / "out") for a in arguments]
    assert command(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("python -m eval: ")
    assert said.count("\n") == 1
