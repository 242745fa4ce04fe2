"""The interleaved sampler: one jitted loop that thinks, listens again and goes on, for many rows at once."""

from echo_jax.sampler.loop import Sampler
from echo_jax.sampler.state import FinishReason, Prompts, Rollout, SamplerState, SamplingOptions

__all__ = ["FinishReason", "Prompts", "Rollout", "Sampler", "SamplerState", "SamplingOptions"]
