"""One small model, three questions, and samplers that are compiled once for all tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from echo_jax.arrays import Params
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler import Prompts, Rollout, Sampler, SamplingOptions
from echo_jax.text import prompts as prompts_lib
from echo_jax.text.tokenizer import Tokenizer
from tests.echo_jax.sampler import oracle, scripts

# Three segment buffers: half a second, one second, and the whole of the longest recording.
OPTIONS = SamplingOptions(
    max_response_tokens=128,
    max_turns=4,
    temperature=0.0,
    insertion_slots=2,
    segment_seconds=(0.5, 1.0),
)
_QUESTIONS = ((25_600, " What?"), (20_480, " Which <seg>0.1, 0.9 sound?"), (16_640, "?"))


def make_prompts(tokenizer: Tokenizer, seed: int = 0) -> Prompts:
    """Noise of 1.6, 1.28 and 1.04 seconds and a question about each; one holds an open tag."""
    rng = np.random.default_rng(seed)
    chats = []
    for num_samples, text in _QUESTIONS:
        user = prompts_lib.Message("user", [prompts_lib.Audio(num_samples), text])
        chats.append(prompts_lib.encode_chat(tokenizer, [user], add_generation_prompt=True))
    num_samples = np.array([samples for samples, _ in _QUESTIONS], np.int32)
    length = np.array([len(chat.tokens) for chat in chats], np.int32)
    tokens = np.full((len(chats), length.max()), tokenizer.pad_id, np.int32)
    waveforms = np.zeros((len(chats), num_samples.max()), np.float32)
    for row, chat in enumerate(chats):
        tokens[row, : length[row]] = chat.tokens
        waveforms[row, : num_samples[row]] = rng.normal(0, 0.1, num_samples[row])
    starts = np.array([chat.audio_starts[0] for chat in chats], np.int32)
    return Prompts(tokens, length, waveforms, num_samples, starts)


@dataclasses.dataclass(frozen=True)
class World:
    """What most tests need.

    Attributes:
      sampler: a sampler with these options, the same one each time.
    """

    tokenizer: Tokenizer
    config: ThinkerConfig
    params: Params
    prompts: Prompts
    sampler: Callable[[SamplingOptions], Sampler]

    def expand(self, *parts: scripts.Part) -> scripts.Expected:
        """A script as token ids."""
        return scripts.expand(self.tokenizer, parts)

    def teach(self, *expected: scripts.Expected, logit: float = 8.0) -> Params:
        """The model that answers the questions with these."""
        return scripts.teach(self.config, self.params, self.prompts, expected, logit)

    def run(
        self,
        options: SamplingOptions,
        params: Params,
        prompts: Prompts | None = None,
        key: jax.Array | None = None,
        num_samples: int = 1,
    ) -> Rollout:
        """A finished rollout in numpy."""
        key = jax.random.key(0) if key is None else key
        return jax.device_get(
            self.sampler(options)(params, prompts or self.prompts, key, num_samples)
        )

    def check(
        self,
        options: SamplingOptions,
        params: Params,
        rollout: Rollout,
        prompts: Prompts | None = None,
        cut: oracle.Cut | None = None,
    ) -> None:
        """Asserts that a rollout is what Algorithm 1 allows."""
        oracle.check_rollout(
            self.config, params, self.tokenizer, options, prompts or self.prompts, rollout, cut
        )


@pytest.fixture(scope="session")
def world() -> World:
    tokenizer = Tokenizer.from_qwen_wheel().compact(scripts.CORPUS)
    config, params = scripts.micro_model(tokenizer)
    sampler = functools.cache(functools.partial(Sampler, config, tokenizer))
    return World(tokenizer, config, params, make_prompts(tokenizer), sampler)


@pytest.fixture(scope="session")
def talkative(world) -> Params:
    """A model that surely cites a clip first, but for the last row, and then says anything at all."""
    return world.teach(
        world.expand(
            "<think>I hear <seg>0.1, 0.5</seg", scripts.Drawn(">,"), scripts.Clip(0.1, 0.5)
        ),
        world.expand("a <seg>0, 1.2</seg>", scripts.Clip(0, 1.2)),
        world.expand(),
        logit=12.0,
    )
