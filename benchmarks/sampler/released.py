"""Section `released`: the jitted loop against the released method in torch, on the same weights and questions.

The released code answers one request at a time with Hugging Face `generate`, stops at `</seg>`, and at each turn
extracts the features of all clips anew, each padded to 300 s, and prefills the whole prefix anew
(`tests/transformers_algorithm1.py`). Both compute in float32 with the threads they take by default.
"""

from __future__ import annotations

import argparse
import collections
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from benchmarks.sampler import workload
from benchmarks.timing import best_of, finished
from echo_jax import arrays, huggingface
from echo_jax.model import audio_tower, frontend, language_model
from echo_jax.sampler import Prompts, Rollout, Sampler, SamplingOptions
from tests.transformers_algorithm1 import TransformersAlgorithm1

# Answers to a question in reinforcement learning, which the released method gives one at a time, too.
GROUP = 8
OPTIONS = SamplingOptions(
    max_response_tokens=512, temperature=0.0, insertion_slots=8, segment_seconds=(2.0, 3.0)
)


def run(args: argparse.Namespace) -> None:
    """Prints both rates with where the time goes, and their ratio; then that for groups of answers to a question."""
    load = workload.build(args.seconds)
    print(load.describe())
    print(f"settings of the jitted loop: {OPTIONS}", flush=True)
    questions = min(args.requests, workload.NUM_QUESTIONS)
    theirs_s = _released(load, questions, args.repeats)
    ours_s = _jitted(load, args.batch, questions, args.repeats)
    print(f"released {theirs_s / ours_s:.1f} x", flush=True)
    if args.batch % GROUP == 0:
        grouped_s = _in_groups(load, args.batch, questions, args.repeats)
        print(f"in groups of {GROUP} {theirs_s / grouped_s:.1f} x")


# ------------------------------------------------------------------------------------------------ theirs


class Stopwatch:
    """Seconds spent in functions of others, and how often they were called, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.calls: collections.Counter[str] = collections.Counter()

    def watch(self, owner: Any, method: str, name: Callable[..., str]) -> None:
        """Times `owner.method` from now on under `name(*args, **kwargs)`."""
        function = getattr(owner, method)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            key, start = name(*args, **kwargs), time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[key] += time.perf_counter() - start
            self.calls[key] += 1
            return result

        setattr(owner, method, timed)


def _released(load: workload.Workload, requests: int, repeats: int) -> float:
    """Seconds an answer."""
    transformers.logging.set_verbosity_error()  # it misses the weights of the image tower
    with tempfile.TemporaryDirectory() as directory:
        huggingface.save_pretrained(Path(directory), load.config, load.params, load.tokenizer)
        theirs = TransformersAlgorithm1(directory, OPTIONS)
    watch = Stopwatch()
    model = theirs.model
    watch.watch(theirs, "features", lambda clips: "features")
    watch.watch(model.model.audio_tower, "forward", lambda *args, **kwargs: "tower")
    for module, key in ((model.model.language_model, "inputs_embeds"), (model.lm_head, "input")):

        def phase(*args: Any, key: str = key, **kwargs: Any) -> str:
            x = args[0] if args else kwargs[key]
            return "decode" if x.shape[1] == 1 else "prefill"

        watch.watch(module, "forward", phase)

    seconds, turns, tokens = 0.0, 0, 0
    parts: dict[str, float] = collections.defaultdict(float)
    for row in range(requests):
        prompt = load.prompts.tokens[row, : load.prompts.length[row]].tolist()
        ask = functools.partial(theirs.answer, prompt, np.asarray(load.prompts.waveforms[row]))
        if not row:
            ask()  # warm up
        best = float("inf")
        for _ in range(repeats):
            watch.seconds.clear()
            watch.calls.clear()
            start = time.perf_counter()
            answer = ask()
            took = time.perf_counter() - start
            if answer.tokens != load.answers[row].tokens:
                raise SystemExit(f"question {row}: transformers does not answer what was taught")
            if took < best:
                best, spent = took, dict(watch.seconds)
        seconds += best
        turns += watch.calls["features"]
        tokens += watch.calls["decode"] // 2  # the layers and the head
        for name, part in spent.items():
            parts[name] += part
    each = {name: total / requests for name, total in parts.items()}
    rest = seconds / requests - sum(each.values())
    print(
        f"released method: {requests} requests, {seconds / requests:.2f} s and {turns / requests:.1f} turns an answer, "
        f"{requests / seconds:.3f} answers/s\n"
        f"  features of all clips, each padded to 300 s: {each['features']:.2f} s an answer\n"
        f"  audio tower: {each['tower']:.2f} s\n"
        f"  prefill: {each['prefill']:.2f} s, {parts['prefill'] / turns:.2f} s a turn\n"
        f"  decode: {each['decode']:.2f} s, {1e3 * parts['decode'] / tokens:.1f} ms a token\n"
        f"  the rest (choice of the token, text, generate's own work): {rest:.2f} s",
        flush=True,
    )
    return seconds / requests


# -------------------------------------------------------------------------------------------------- ours


def _jitted(load: workload.Workload, batch: int, questions: int, repeats: int) -> float:
    """Seconds an answer of a batch, each with a prefill of its own."""
    sampler = Sampler(load.config, load.tokenizer, OPTIONS)
    prompts, key = load.batch(batch, questions), jax.random.key(0)
    params = jax.device_put(load.params)
    rollout, seconds = best_of(
        repeats, functools.partial(finished, functools.partial(sampler, params, prompts, key))
    )
    load.check(rollout, np.arange(batch) % questions)
    print(
        f"jitted loop: batch {batch}, {seconds:.2f} s, {1e3 * seconds / batch:.0f} ms an answer, "
        f"{batch / seconds:.2f} answers/s"
    )
    _profile(load, sampler, params, prompts, rollout, repeats)
    return seconds / batch


def _in_groups(load: workload.Workload, batch: int, questions: int, repeats: int) -> float:
    """Seconds an answer of a batch in which the answers to a question share its prefill."""
    sampler = Sampler(load.config, load.tokenizer, OPTIONS)
    prompts = load.batch(batch // GROUP, questions)
    answer = functools.partial(
        sampler, jax.device_put(load.params), prompts, jax.random.key(0), GROUP
    )
    rollout, seconds = best_of(repeats, functools.partial(finished, answer))
    load.check(rollout, np.repeat(np.arange(batch // GROUP) % questions, GROUP))
    print(
        f"jitted loop, groups of {GROUP}: batch {batch}, {1e3 * seconds / batch:.0f} ms an answer"
    )
    return seconds / batch


def _profile(
    load: workload.Workload,
    sampler: Sampler,
    params: Any,
    prompts: Prompts,
    rollout: Rollout,
    repeats: int,
) -> None:
    """Where the time goes: parts of the prefill timed alone, steps of the loop one by one."""
    config, key = load.config, jax.random.key(0)

    def clock(function: Callable[..., Any], *args: Any) -> float:
        return best_of(repeats, functools.partial(finished, functools.partial(function, *args)))[1]

    mel_of = jax.jit(lambda x, n: frontend.log_mel(x, n, config.audio.num_mel_bins))
    frames = frontend.num_frames(np.asarray(prompts.num_samples))
    encode = jax.jit(functools.partial(audio_tower.encode_clips, config.audio))
    features_s = clock(mel_of, prompts.waveforms, prompts.num_samples)
    mel = mel_of(prompts.waveforms, prompts.num_samples)
    tower_s = clock(encode, params["audio_tower"], mel, frames)
    prefill_s = clock(sampler.start, params, prompts, key)

    state = sampler.start(params, prompts, key)
    state = finished(lambda: sampler.run(params, state, max_steps=0))
    seconds, before = np.zeros(2), 0
    while np.asarray(state.active).any():
        start = time.perf_counter()
        state = sampler.run(params, state, max_steps=1)
        inserts = int(state.num_insert_steps)
        seconds[inserts - before] += time.perf_counter() - start
        before = inserts
    decodes, inserts = int(rollout.num_decode_steps), int(rollout.num_insert_steps)
    sampled, clips = int(rollout.sampled.sum()), int(rollout.num_segments.sum())
    most = int(rollout.sampled.sum(1).max())
    batch = len(rollout.length)
    square = jax.random.normal(jax.random.key(1), (2048, 2048))
    flops = 2 * 2048**3 / clock(jax.jit(jnp.matmul), square, square)
    table = params["language_model"]["embed"]["embedding"]
    copied = 2 * table.nbytes / clock(jax.jit(jnp.negative), table)
    hidden = jax.random.normal(key, (batch, config.text.hidden_size))
    head_s = clock(jax.jit(language_model.unembed), params["language_model"], hidden)
    weights = arrays.count_parameters(language_model.param_specs(config.text))
    step_flops, step_bytes = 2 * batch * weights, 4 * weights
    print(
        f"  prefill: {prefill_s:.2f} s, of it features {features_s:.2f} s and audio tower {tower_s:.2f} s\n"
        f"  decode: {seconds[0]:.2f} s, {decodes} steps of {1e3 * seconds[0] / decodes:.1f} ms, "
        f"{sampled / decodes:.1f} rows each; the longest answer alone takes {most}\n"
        f"    of a step, {1e3 * head_s:.1f} ms are the product with the vocabulary; the limits are "
        f"{1e3 * step_flops / flops:.1f} ms for {step_flops / 1e9:.2f} GFLOP at the {flops / 1e9:.0f} GFLOP/s of a "
        f"large matrix product, and {1e3 * step_bytes / copied:.1f} ms for {step_bytes / 1e6:.0f} MB of weights at the "
        f"{copied / 1e9:.1f} GB/s of a copy\n"
        f"  insert: {seconds[1]:.2f} s, {inserts} steps of {1e3 * seconds[1] / max(inserts, 1):.0f} ms, "
        f"{clips / max(inserts, 1):.1f} clips each",
        flush=True,
    )
