"""The interleaved sampler: one jitted loop that thinks, listens again and goes on, for many rows at once."""

from echo_jax.sampler.sampler import Sampler
from echo_jax.sampler.sharding import decode_rules
from echo_jax.sampler.state import FinishReason, Prompts, Rollout, SamplerState, SamplingOptions
from echo_jax.sampler.stream import Answer, Request, stream

__all__ = [
    "Answer",
    "FinishReason",
    "Prompts",
    "Request",
    "Rollout",
    "Sampler",
    "SamplerState",
    "SamplingOptions",
    "decode_rules",
    "stream",
]
