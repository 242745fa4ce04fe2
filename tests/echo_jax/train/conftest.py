"""Rollouts of a small model with citations, insertions and several ways to end."""

from __future__ import annotations

import jax
import pytest

from echo_jax.sampler import Prompts, Sampler, SamplingOptions
from echo_jax.text.tokenizer import Tokenizer
from tests.models import citing_model, citing_tokenizer, noise_prompts

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
    texts = (" What?", " What? What?", "?")
    questions = [(round(s * 16_000), text) for s, text in zip(SECONDS, texts, strict=True)]
    return noise_prompts(tokenizer, questions, seed=2, capacity=64_000)


@pytest.fixture(scope="session")
def sampler(model, tokenizer) -> Sampler:
    return Sampler(model[0], tokenizer, OPTIONS)


@pytest.fixture(scope="session")
def rollout(model, sampler, prompts):
    found = jax.device_get(sampler(model[1], prompts, jax.random.key(7), GROUP))
    assert found.num_segments.sum() >= 4, found.num_segments
    assert (found.stop_rest >= 0).sum() >= 4
    return found
