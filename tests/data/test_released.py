from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from data import pipeline
from data.audio_store import AudioStore
from data.records import RecordError
from data.released import is_released, load_released
from echo_jax.text.tokenizer import Tokenizer

COT = "<think>At <seg>0.1, 0.6</seg>, a bell.</think><answer>bell</answer>"
PROMPT = "<audio>What rings?\nChoices: ['bell', 'phone']. Think step by step."
RL_ROW = {
    "id": 7,
    "audio_path": "a.wav",
    "question": "What rings?",
    "multi_choice": ["bell", "phone"],
    "answer": "bell",
}
SFT_ROW = {
    "messages": [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": COT}],
    "audios": ["a.wav"],
}


@pytest.fixture
def folder(tmp_path):
    noise = np.random.default_rng(0).normal(size=22_050) * 0.1
    soundfile.write(tmp_path / "a.wav", noise, 22_050)
    return tmp_path


def _write(folder, *lines) -> str:
    path = folder / "rows.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts))
    return path


def test_rl_rows_load_as_they_are(folder):
    (record,), skipped = load_released(_write(folder, RL_ROW), folder)
    assert not skipped
    assert (record.id, record.answer, record.choices) == ("7", "bell", ("bell", "phone"))
    assert record.duration_s == pytest.approx(1.0)


@pytest.mark.parametrize("as_list", [False, True])
def test_sft_rows_load_as_they_are_and_train(folder, as_list):
    path = _write(folder, json.dumps([SFT_ROW]) if as_list else SFT_ROW)
    (record,), _ = load_released(path, folder)
    assert record.cot == COT
    texts = list(pipeline.corpus_texts([record], ["echo"]))
    tokenizer = Tokenizer.from_qwen_wheel().compact(texts)
    dataset = pipeline.sft_dataset(
        [record], AudioStore(folder), tokenizer, prompt="echo", batch_size=1, clip_seconds=1.0
    )
    batch = next(iter(dataset))
    text = tokenizer.decode(batch["tokens"][0])
    assert PROMPT.removeprefix("<audio>") in text
    assert tokenizer.decode(batch["tokens"][0][batch["loss_mask"][0] > 0]) == COT


def test_broken_rows_are_named_and_the_rest_is_kept(folder):
    broken = [
        "{not json",
        [1, 2],
        RL_ROW | {"answer": "horn"},
        RL_ROW | {"multi_choice": "bell"},
        RL_ROW | {"audio_path": "gone.wav"},
        {key: value for key, value in RL_ROW.items() if key != "question"},
        SFT_ROW | {"audios": []},
        SFT_ROW | {"messages": [{"role": "user", "content": PROMPT}]},
    ]
    path = _write(folder, *broken, RL_ROW, SFT_ROW)
    records, skipped = load_released(path, folder)
    assert len(records) == 2
    assert [row.where for row in skipped] == [f"{path}:{n}" for n in range(1, 9)]
    assert (skipped[4].id, skipped[4].audio_path) == ("7", "gone.wav")
    assert str(skipped[2]).startswith(f"{path}:3: answer 'horn' is 0 times among the choices")
    with pytest.raises(RecordError, match=r"no usable row.*rows\.jsonl:1: not JSON"):
        load_released(_write(folder, *broken), folder)
    with pytest.raises(RecordError, match="is missing"):
        load_released(folder / "none.jsonl", folder)


def test_the_format_of_a_file_is_told_by_its_first_row(folder):
    assert is_released(_write(folder, "", "{not json", RL_ROW))
    assert is_released(_write(folder, json.dumps([SFT_ROW])))
    assert not is_released(_write(folder, "", {"id": "ours"}))
    with pytest.raises(RecordError, match="no line of it is a JSON object"):
        is_released(_write(folder, "# Read me", "some words"))
