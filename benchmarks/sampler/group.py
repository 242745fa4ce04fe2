"""One prefill for the answers of a group, against one for each answer."""

from __future__ import annotations

import argparse
import functools

import jax
import numpy as np

from benchmarks.sampler import workload as workloads
from benchmarks.timing import best_of, finished
from echo_jax.sampler import Prompts, Sampler, SamplingOptions

GROUP = 8


def run(args: argparse.Namespace) -> None:
    """Prints the seconds of both and their ratio."""
    work = workloads.build(args.seconds)
    options = SamplingOptions(max_response_tokens=256, segment_seconds=(5.0,))
    sampler = Sampler(work.config, work.tokenizer, options)
    queries = max(1, args.batch // GROUP)
    prompts = work.batch(queries)
    repeated = jax.tree.map(lambda x: np.repeat(x, GROUP, axis=0), prompts)
    keys = jax.random.split(jax.random.key(0), queries * GROUP)

    def prefill(prompts: Prompts, num_samples: int) -> tuple[np.ndarray, float]:
        start = functools.partial(sampler.start, work.params, prompts, keys, num_samples)
        state, seconds = best_of(args.repeats, functools.partial(finished, start))
        return np.asarray(state.cache.k), seconds

    shared, shared_s = prefill(prompts, GROUP)
    separate, separate_s = prefill(repeated, 1)
    np.testing.assert_allclose(shared, separate, atol=1e-4)
    print(
        f"{queries} prompts of {prompts.tokens.shape[1]} tokens, {GROUP} answers each: separate {separate_s:.2f} s, "
        f"shared {shared_s:.2f} s"
    )
    print(f"group prefill {separate_s / shared_s:.1f} x")
