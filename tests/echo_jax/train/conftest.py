"""Rollouts of a small model with citations, insertions and several ways to end."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from echo_jax.sampler import Prompts, Sampler, SamplingOptions
from echo_jax.text import prompts as prompts_lib
from echo_jax.text.tokenizer import Tokenizer
from tests.citing import citing_model, citing_tokenizer

SECONDS = (4.0, 2.5, 3.1)
OPTIONS = SamplingOptions(
    max_response_tokens=144, max_turns=4, insertion_slots=2, segment_seconds=(1.0, 2.0)
)
GROUP = 2


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return citing_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    return citing_model(tokenizer)


@pytest.fixture(scope="session")
def prompts(tokenizer) -> Prompts:
    rng = np.random.default_rng(2)
    capacity = 64_000
    texts = [" What?", " What? What?", "?"]
    chats = []
    for seconds, text in zip(SECONDS, texts, strict=True):
        content = [prompts_lib.Audio(round(seconds * 16_000)), text]
        messages = [prompts_lib.Message("user", content)]
        chats.append(prompts_lib.encode_chat(tokenizer, messages, add_generation_prompt=True))
    length = np.array([len(chat.tokens) for chat in chats], np.int32)
    tokens = np.full((len(chats), length.max()), tokenizer.pad_id, np.int32)
    waveforms = np.zeros((len(chats), capacity), np.float32)
    num_samples = np.array([round(s * 16_000) for s in SECONDS], np.int32)
    for row, chat in enumerate(chats):
        tokens[row, : length[row]] = chat.tokens
        waveforms[row, : num_samples[row]] = rng.normal(0, 0.1, num_samples[row])
    starts = np.array([chat.audio_starts[0] for chat in chats], np.int32)
    return Prompts(tokens, length, waveforms, num_samples, starts)


@pytest.fixture(scope="session")
def sampler(model, tokenizer) -> Sampler:
    return Sampler(model[0], tokenizer, OPTIONS)


@pytest.fixture(scope="session")
def rollout(model, sampler, prompts):
    found = jax.device_get(sampler(model[1], prompts, jax.random.key(7), GROUP))
    assert found.num_segments.sum() >= 4, found.num_segments
    assert (found.stop_rest >= 0).sum() >= 4
    return found
