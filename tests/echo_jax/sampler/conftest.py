"""One small model, three questions, and samplers that are compiled once for all tests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import pytest

from echo_jax.arrays import Params
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler import Prompts, Rollout, Sampler, SamplingOptions
from echo_jax.text.tokenizer import Tokenizer
from tests.echo_jax.sampler import oracle, scripts
from tests.models import noise_prompts

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
    return noise_prompts(tokenizer, _QUESTIONS, seed)


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
