"""What the interleaved loop costs beyond the work that it cannot avoid, and how that depends on when it inserts.

Unavoidable is: as many plain decode steps (`thinker.decode_step` and an arg-max, nothing recorded), reading as much of
the cache; and one batched encode-and-prefill of the clips that were inserted, all padded to the longest. Each is timed
alone in the same run.
"""

from __future__ import annotations

import argparse
import collections
import functools
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sampler import workload as workloads
from benchmarks.sampler.workload import Workload
from benchmarks.timing import finished
from echo_jax.arrays import Params
from echo_jax.model import frontend, language_model, thinker
from echo_jax.model.language_model import KVCache
from echo_jax.sampler import Prompts, Rollout, Sampler, SamplerState, SamplingOptions
from echo_jax.sampler.loop import cache_steps

# (insertion_slots, insertion_patience) to compare; the first is the one whose overhead counts.
POLICIES = ((8, 64), (8, 8), (4, 64), (16, 64), (32, 64))


def run(args: argparse.Namespace) -> None:
    """Prints a line for each policy, then the overhead of the first."""
    work = workloads.build(args.seconds)
    print(work.describe())
    prompts = work.batch(args.batch)
    overhead = 0.0
    for number, (slots, patience) in enumerate(POLICIES[: args.policies]):
        options = SamplingOptions(
            max_response_tokens=512,
            temperature=0.0,
            segment_seconds=(2.0, 3.0),
            insertion_slots=slots,
            insertion_patience=patience,
        )
        sampler = Sampler(work.config, work.tokenizer, options)
        rollout, seconds = _time_loop(sampler, work.params, prompts, args.repeats)
        work.check(rollout)
        reads, waited = _step_by_step(sampler, work.params, prompts)
        decode = _time_plain_decode(sampler, work.params, prompts, reads, args.repeats)
        encode = _time_insertion(work, rollout, args.repeats)
        clips, inserts = int(rollout.num_segments.sum()), int(rollout.num_insert_steps)
        print(
            f"slots {slots:2}, patience {patience:2}: {seconds:6.2f} s, {int(rollout.num_decode_steps)} decode and "
            f"{inserts} insert steps for {clips} clips ({100 * clips / (inserts * slots):.0f} % of the slots used, "
            f"{100 * waited:.0f} % of the rows waiting); "
            f"unavoidable {decode:.2f} + {encode:.2f} s, overhead {100 * (seconds / (decode + encode) - 1):.0f} %",
            flush=True,
        )
        if number == 0:
            overhead = seconds / (decode + encode) - 1
    print(f"overhead {100 * overhead:.0f} %")


def _time_loop(
    sampler: Sampler, params: Params, prompts: Prompts, repeats: int
) -> tuple[Rollout, float]:
    """The finished rollout, and the shortest time of the loop alone, without the prompts' prefill."""
    times = []
    for _ in range(repeats + 1):
        state = finished(functools.partial(sampler.start, params, prompts, jax.random.key(0)))
        start = time.perf_counter()
        state = jax.block_until_ready(sampler.run(params, state))
        times.append(time.perf_counter() - start)
    return jax.device_get(sampler.finish(state)), min(times[1:])


def _step_by_step(
    sampler: Sampler, params: Params, prompts: Prompts
) -> tuple[Mapping[int, int], float]:
    """How many decode steps read how many slots of the cache, and in what share of their rows one waited for audio."""
    state = sampler.start(params, prompts, jax.random.key(0))
    steps = cache_steps(state.tokens.shape[1])
    found: collections.Counter[int] = collections.Counter()
    waited = 0
    while (active := np.asarray(state.active)).any():
        longest = int(np.where(active, np.asarray(state.length), 0).max())
        waiting = int((active & np.asarray(state.waiting)).sum())
        before = int(state.num_decode_steps)
        state = sampler.run(params, state, max_steps=1)
        if int(state.num_decode_steps) > before:
            found[next(visible for visible in steps if longest <= visible)] += 1
            waited += waiting
    return found, waited / (found.total() * len(state.tokens))


def _time_plain_decode(
    sampler: Sampler, params: Params, prompts: Prompts, reads: Mapping[int, int], repeats: int
) -> float:
    """Seconds of as many decode steps that read as much, on a cache of the same size."""
    config = sampler.config
    state: SamplerState = sampler.start(params, prompts, jax.random.key(0))
    rows = len(state.tokens)

    @functools.partial(jax.jit, static_argnums=(3,), donate_argnums=(1,))
    def decode(
        params: Params, cache: KVCache, tokens: jax.Array, visible: int, count: jax.Array
    ) -> tuple[KVCache, jax.Array]:
        length = cache.length

        def step(_: jax.Array, carry: tuple[KVCache, jax.Array]) -> tuple[KVCache, jax.Array]:
            cache, tokens = carry
            logits, cache = thinker.decode_step(
                config, params, cache, tokens, jnp.ones(rows, bool), visible
            )
            # The same slot again: what is there does not matter, and every step reads the same.
            return cache.replace(length=length), jnp.argmax(logits, -1).astype(jnp.int32)

        return jax.lax.fori_loop(0, count, step, (cache, tokens))

    seconds = 0.0
    cache, tokens = state.cache, jnp.zeros(rows, jnp.int32)
    for visible, count in reads.items():
        cache = cache.replace(length=jnp.full(rows, visible - 1, jnp.int32))
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            cache, tokens = jax.block_until_ready(decode(params, cache, tokens, visible, count))
            times.append(time.perf_counter() - start)
        seconds += min(times[1:])
    return seconds


def _time_insertion(work: Workload, rollout: Rollout, repeats: int) -> float:
    """Seconds to encode all inserted clips in one batch and to put them behind as much as stood before them."""
    cited = [
        (row, *rollout.segment_samples[row, i], rollout.segment_token_start[row, i])
        for row in range(len(rollout.tokens))
        for i in range(int(rollout.num_segments[row]))
    ]
    rows, begin, end, start = np.array(cited, np.int32).T
    num_samples = end - begin
    longest = -(-int(num_samples.max()) // frontend.HOP_SAMPLES) * frontend.HOP_SAMPLES
    waveforms = np.zeros((len(cited), longest), np.float32)
    source = work.batch(len(rollout.tokens)).waveforms
    for slot, (row, first, last) in enumerate(zip(rows, begin, end, strict=True)):
        waveforms[slot, : last - first] = source[row, first:last]
    # A cache row for each clip, filled up to where it was inserted.
    slots = int((start + frontend.num_audio_tokens(num_samples)).max()) + 1
    cache = KVCache.empty(work.config.text, len(cited), slots).replace(length=jnp.asarray(start))

    # Donated, as in the loop: a copy of the cache is no part of the work.
    @functools.partial(jax.jit, donate_argnums=(1,))
    def insert(
        params: Params, cache: KVCache, waveforms: jax.Array, num_samples: jax.Array
    ) -> tuple[KVCache, jax.Array]:
        audio = thinker.encode_audio(work.config, params, waveforms, num_samples)
        num_new = frontend.num_audio_tokens(num_samples)
        hidden, grown = language_model.extend(
            work.config.text, params["language_model"], cache, audio, num_new
        )
        return grown.replace(length=cache.length), hidden.sum()

    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        cache, _ = jax.block_until_ready(insert(work.params, cache, waveforms, num_samples))
        times.append(time.perf_counter() - began)
    return min(times[1:])
