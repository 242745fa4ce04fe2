"""launch.ask on a model whose answer is known."""

import pathlib

import jax
import numpy as np
import pytest
import soundfile

from echo_jax import huggingface
from echo_jax.sampler import FinishReason, Sampler, SamplingOptions
from echo_jax.text.tokenizer import Tokenizer
from launch import ask
from tests.models import scripted_model, single_tokens

# What follows the prompt's last newline, then what follows inserted audio. No token occurs twice with different
# successors, which is why the last tags are spelled in unusual pieces.
BEFORE = ["\n", "<", "seg", ">", "0", ",", " ", "1", "</", "seg", ">"]
AFTER = [" <", "answer", ">\n", "bell", " </", "a", "n", "s", "w", "e", "r", ">\n\n"]
QUESTION = "Which sound comes first?"
CHOICES = ["bell", "buzz"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    prompt = f"user\n{QUESTION} bell, buzz. Cite. assistant\n"
    return Tokenizer.from_qwen_wheel().compact([prompt, *BEFORE, *AFTER])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> pathlib.Path:
    before, after = (single_tokens(tokenizer, pieces) for pieces in (BEFORE, AFTER))
    after = [tokenizer.audio_eos_id, *after, tokenizer.im_end_id]
    config, params = scripted_model(tokenizer, [before, after])
    directory = tmp_path_factory.mktemp("model")
    return huggingface.save_pretrained(directory, config, params, tokenizer)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("audio") / "beep.wav"
    soundfile.write(path, 0.3 * np.sin(np.arange(44_100) / 10), 22_050)
    return path


def arguments(checkpoint: object, recording: object, *more: str) -> list[str]:
    named = ["--checkpoint", str(checkpoint), "--audio", str(recording), "--question", QUESTION]
    return [*named, "--max_tokens", "48", *more, "--choices", *CHOICES]


def test_prints_reasoning_marks_and_answer(
    checkpoint: pathlib.Path, recording: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask.main(arguments(checkpoint, recording, "--max_tokens", "64")) == 0
    out = capsys.readouterr().out
    assert out == (
        "<seg>0, 1</seg> [listening again 0.0–1.0 s] <answer>\nbell </answer>\n\n\nAnswer: bell\n"
    )


def test_grounded_inserts_nothing_and_says_why_it_stopped(
    checkpoint: pathlib.Path, recording: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask.main(arguments(checkpoint, recording, "--format", "grounded")) == 0
    out = capsys.readouterr().out
    assert "listening again" not in out
    assert out.endswith(
        "[stopped: the budget of 48 tokens is used up]\nAnswer: none of the choices\n"
    )


@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_stream_does_not_depend_on_the_chunk(
    checkpoint: pathlib.Path, tokenizer: Tokenizer, steps: int
) -> None:
    config, params = huggingface.load_pretrained(checkpoint)
    options = SamplingOptions(max_response_tokens=64, temperature=0.0, insertion_slots=1)
    wave = np.sin(np.arange(32_000) / 10).astype(np.float32)
    prompts = ask.encode_prompt(tokenizer, "tiny", QUESTION, CHOICES, wave)
    sampler = Sampler(config, tokenizer, options)
    events = list(ask.stream(sampler, tokenizer, params, prompts, jax.random.key(0), steps))
    text = "".join(event.text for event in events if isinstance(event, ask.Text))
    assert text == "<seg>0, 1</seg> <answer>\nbell </answer>\n\n"
    assert [event for event in events if isinstance(event, ask.Listening)] == [
        ask.Listening(0.0, 1.0)
    ]
    assert events[-1] == ask.Finished(FinishReason.END)
    texts = [
        e.text for e in events[: events.index(ask.Listening(0.0, 1.0))] if isinstance(e, ask.Text)
    ]
    assert "".join(texts) == "<seg>0, 1</seg>"


def test_mistakes_are_one_line_each(
    checkpoint: pathlib.Path,
    recording: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF\x00\x00\x00\x00WAVEjunk")
    short = tmp_path / "short.wav"
    soundfile.write(short, np.ones(200) / 2, 16_000)
    cut = tmp_path / "cut.wav"
    cut.write_bytes(recording.read_bytes()[:-44_100])
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {
        "no.wav": arguments(checkpoint, tmp_path / "no.wav"),
        "broken.wav": arguments(checkpoint, broken),
        "cut.wav: truncated audio file (its header promises 2.00 s (88200 bytes), "
        "the file holds 1.00 s (44100))": arguments(checkpoint, cut),
        "short.wav: a clip of 200 samples": arguments(checkpoint, short),
        str(empty): arguments(empty, recording),
        "nowhere": arguments(tmp_path / "nowhere", recording),
        "temperature": arguments(checkpoint, recording, "--temperature", "-1"),
    }
    for named, argv in cases.items():
        assert ask.main(argv) == 2, named
        err = capsys.readouterr().err
        assert named in err
        assert err.startswith("launch.ask: ")
        assert err.count("\n") == 1, err


def test_bad_flags_are_one_line_each(
    checkpoint: pathlib.Path, recording: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = arguments(checkpoint, recording)
    cases = {
        "at least two": good[:-1],
        "the same choice twice, as 'bell' and 'bell'": [*good, "bell"],
        "the same choice twice, as 'bell' and ' bell '": [*good, " bell "],
        "the same choice twice, as 'bell' and 'Bell.'": [*good, "Bell."],
        "the same choice twice, as '?' and '? '": [*good, "?", "? "],
        "--choices holds bytes that are not UTF-8": [*good, "gr\udcfcn"],
        "--question holds bytes that are not UTF-8": [*good, "--question", "\udcff?"],
        "--seed -1 must be a whole number in [0, 4294967295]": [
            *good,
            "--seed",
            "-1",
        ],
        "--seed 4294967296 must be": [*good, "--seed", "4294967296"],
        "--max_tokens 0 must be a whole number, at least 1": [*good, "--max_tokens", "0"],
        "empty choice": [*good, " "],
        "--question is empty": [*good, "--question", " "],
        "--audio": [part for part in good if part not in ("--audio", str(recording))],
        "--format": [*good, "--format", "spoken"],
    }
    for named, argv in cases.items():
        with pytest.raises(SystemExit) as stopped:
            ask.main(argv)
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert named in err
        assert err.count("\n") == 1, err
