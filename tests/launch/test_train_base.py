"""The base stage: from labelled scenes to a model directory that the next stage starts from."""

from __future__ import annotations

import json

import pytest

from configs import base as base_config
from data import drafts, questions, scenes
from data.records import write_jsonl
from echo_jax import huggingface
from echo_jax.text.tokenizer import Tokenizer
from launch import inputs, train


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    made = scenes.SceneConfig(
        counts={"train": 4}, duration_s=(4.0, 4.0), event_s=(0.5, 0.6), num_events=(3, 3)
    )
    scenes.write_scenes(made, root, num_processes=1)
    asked = drafts.QuestionConfig(style="short", min_choices=2)
    records = questions.make_questions(scenes.read_scenes(root, "train"), asked)
    write_jsonl(root / "records.jsonl", [record.to_json() for record in records])
    config = base_config.get_config("test")
    config.data.root = str(root)
    config.data.records = str(root / "records.jsonl")
    config.data.clip_seconds = 4.0
    config.total_steps = 2
    return config


def test_the_compact_vocabulary_spells_the_dataset(config):
    tokenizer = inputs.new_tokenizer(config, inputs.load_scenes(config))
    whole = Tokenizer.from_qwen_wheel()
    for record in inputs.load_records(config):
        for text in (record.cot, record.question):
            pieces = [tokenizer.token_bytes[index] for index in tokenizer.encode(text)]
            assert b"".join(pieces) == text.encode()
        same = [whole.token_bytes[index] for index in whole.encode(record.question)]
        assert [tokenizer.token_bytes[i] for i in tokenizer.encode(record.question)] == same


def test_scenes_of_another_split_are_missed_by_name(config):
    other = config.copy_and_resolve_references()
    other.data.split = "test"
    with pytest.raises(FileNotFoundError, match="holds no scenes of split 'test'"):
        inputs.load_scenes(other)


@pytest.mark.slow
def test_base_leaves_a_model_for_the_next_stage(config, tmp_path):
    train.train(config, tmp_path / "w")
    lines = (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    thinker_config, _ = huggingface.load_pretrained(tmp_path / "w")
    tokenizer = Tokenizer.from_directory(tmp_path / "w" / "export")
    assert thinker_config.text.vocab_size == tokenizer.vocab_size
    assert thinker_config.im_end_id == tokenizer.im_end_id
