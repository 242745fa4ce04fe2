"""From a config to records and batches: what is left out is counted, and too much of it stops the run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from configs import grpo as grpo_config
from configs import sft as sft_config
from data.audio_store import TooManyBadFiles
from echo_jax.text.tokenizer import Tokenizer
from launch import inputs

ROW = {"question": "What?", "multi_choice": ["ok", "no"], "answer": "ok"}


@pytest.fixture
def config(tmp_path):
    """GRPO on ten rows in the released format, two of them about a missing file."""
    rng = np.random.default_rng(0)
    rows = [ROW | {"id": f"r{n}", "audio_path": f"{n}.wav"} for n in range(10)]
    for row in rows[:8]:
        soundfile.write(tmp_path / row["audio_path"], rng.normal(0, 0.1, 16_000), 16_000)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = grpo_config.get_config("test")
    config.data.root = str(tmp_path)
    config.data.records = str(tmp_path / "rows.jsonl")
    return config


def test_unusable_rows_are_counted_and_too_many_stop_the_run(config):
    with pytest.raises(ValueError, match=r"2 of 10 rows are unusable.*max_bad_fraction=0.02.*:9: "):
        inputs.load_records(config)
    config.data.max_bad_fraction = 0.2
    assert len(inputs.load_records(config)) == 8


def test_released_rows_have_no_splits(config):
    config.data.max_bad_fraction = 0.2
    config.data.split = "validation"
    with pytest.raises(ValueError, match=r"have no splits, so config.data.split='validation'"):
        inputs.load_records(config)


def test_a_file_that_holds_no_rows_is_named(config, tmp_path):
    config.data.records = str(tmp_path / "README.md")
    (tmp_path / "README.md").write_text("# Sounds\n")
    with pytest.raises(ValueError, match=r"README.md is no file of JSON lines"):
        inputs.load_records(config)


def test_a_run_without_a_usable_file_ends(config, tmp_path):
    config.data.max_bad_fraction = 0.99
    for record in inputs.load_records(config):
        soundfile.write(tmp_path / record.audio_path, np.zeros(16_000), 16_000)
    tokenizer = Tokenizer.from_qwen_wheel().compact(["What? ok no"])
    with pytest.raises(TooManyBadFiles, match="8 audio files could not be used"):
        next(inputs.batches(config, tokenizer))


def test_base_chats_and_questions_share_one_store(config, tmp_path, monkeypatch):
    from data.scenes import SceneConfig, write_scenes

    scenes = SceneConfig(
        counts={"train": 4}, duration_s=(6.0, 6.0), event_s=(0.5, 0.8), num_events=(3, 3)
    )
    write_scenes(scenes, tmp_path, num_processes=1)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<audio>What?"},
                {"role": "assistant", "content": "<think>x</think><answer>ok</answer>"},
            ],
            "audios": [str(path.relative_to(tmp_path))],
        }
        for path in sorted((tmp_path / "audio" / "train").iterdir())
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sft = sft_config.get_config("test")
    sft.data.root, sft.data.records = str(tmp_path), str(tmp_path / "chats.jsonl")
    sft.listening_fraction = 0.5
    stores = []
    make = inputs.AudioStore
    monkeypatch.setattr(
        inputs, "AudioStore", lambda *a, **k: stores.append(make(*a, **k)) or stores[-1]
    )
    tokenizer = Tokenizer.from_qwen_wheel()
    batches = inputs.batches(sft, tokenizer)
    for _ in range(4):
        next(batches)
    assert len(stores) == 1
