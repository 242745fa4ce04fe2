"""A few short recordings with questions, and a tokenizer that spells them."""

import json

import numpy as np
import pytest
import soundfile

from configs import eval as eval_config
from data import pipeline
from echo_jax.text.tokenizer import Tokenizer
from eval.runner import Settings
from tests.eval.examples import make_record


@pytest.fixture
def data(tmp_path):
    """Eleven questions in a JSON-lines file, one recording each."""
    (tmp_path / "audio").mkdir()
    rng = np.random.default_rng(0)
    records = [make_record(number) for number in range(11)]
    for record in records:
        wave = 0.1 * rng.standard_normal(round(record.duration_s * 16_000))
        soundfile.write(tmp_path / record.audio_path, wave, 16_000)
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def tokenizer():
    texts = pipeline.corpus_texts([make_record(0)], ["tiny", "tiny_conditioned"])
    return Tokenizer.from_qwen_wheel().compact(texts)


@pytest.fixture
def settings():
    def make(**changes):
        return Settings.from_config({**eval_config.get_config("test"), **changes})

    return make
