"""One small data set on disk for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from data import drafts, pipeline, questions, scenes
from data.listening import ListeningConfig
from echo_jax.text.tokenizer import Tokenizer

CONFIG = scenes.SceneConfig(
    counts={"train": 12, "validation": 2, "test": 6},
    duration_s=(6.0, 8.0),
    event_s=(0.5, 0.8),
    num_events=(4, 5),
)
LISTENING = ListeningConfig(style="short", naming_turns=3)


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scenes.write_scenes(CONFIG, folder, num_processes=1)
    return folder


@pytest.fixture(scope="session")
def train_scenes(root):
    return scenes.read_scenes(root, "train")


@pytest.fixture(scope="session")
def records(train_scenes):
    return list(questions.make_questions(train_scenes, drafts.QuestionConfig(style="short")))


@pytest.fixture(scope="session")
def tokenizer(records) -> Tokenizer:
    texts = pipeline.corpus_texts(records, ["tiny"], CONFIG.class_names, LISTENING)
    return Tokenizer.from_qwen_wheel().compact(texts)
