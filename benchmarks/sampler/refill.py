"""Section `refill`: rows that are refilled as they finish, against batches that wait for their slowest answer.

The model is untaught and never ends by itself, so that an answer is as long as its own budget: most are short and few
are long, as answers are. The weights, shapes and prompts are those of the other sections.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.sampler import workload
from echo_jax.sampler import Prompts, Request, Sampler, SamplingOptions, stream

QUESTIONS_A_ROW = 4
LONGEST = 400
RECORDING_SECONDS = 4


def run(args: argparse.Namespace) -> None:
    """Prints the seconds of both and their ratio, and checks that the answers are the same."""
    load = workload.build(RECORDING_SECONDS)
    rows, count = args.batch, args.batch * QUESTIONS_A_ROW
    lengths = np.random.default_rng(0).lognormal(np.log(48), 1.0, count)
    budgets = np.clip(lengths, 4, LONGEST).astype(np.int32)
    options = SamplingOptions(
        max_response_tokens=LONGEST, temperature=0.0, segment_seconds=(2.0, 3.0)
    )
    sampler = Sampler(load.config, load.tokenizer, options)
    params = jax.device_put(workload.random_params(load.config))
    keys = jax.random.split(jax.random.key(0), count)

    def static(prompts: Prompts) -> list[list[int]]:
        answers = []
        for begin in range(0, len(prompts.length), rows):
            batch = jax.tree.map(lambda x, i=begin: x[i : i + rows], prompts)
            rollout = jax.device_get(sampler(params, batch, keys[begin : begin + rows]))
            answers += [rollout.tokens[row, : rollout.length[row]].tolist() for row in range(rows)]
        return answers

    def refilled(prompts: Prompts) -> list[list[int]]:
        requests = [
            Request(jax.tree.map(lambda x, i=i: x[i : i + 1], prompts), keys[i])
            for i in range(len(prompts.length))
        ]
        answers: dict[int, list[int]] = {}
        for answer in stream(
            sampler,
            params,
            requests,
            rows=rows,
            prompt_tokens=(prompts.tokens.shape[1],),
            samples=prompts.waveforms.shape[1],
        ):
            rollout = answer.rollout
            answers[answer.index] = rollout.tokens[0, : rollout.length[0]].tolist()
        return [answers[index] for index in range(len(requests))]

    prompts = load.batch(count).replace(max_response_tokens=budgets)
    print(
        f"{count} questions of {prompts.tokens.shape[1]} tokens through {rows} rows; answers of {budgets.min()} to "
        f"{budgets.max()} tokens, {np.median(budgets):.0f} in the middle, {budgets.mean():.0f} on average",
        flush=True,
    )
    static_s, static_answers = _timed(static, prompts, rows)
    refilled_s, refilled_answers = _timed(refilled, prompts, rows)
    if static_answers != refilled_answers:
        raise SystemExit("static batches and refilled rows answer differently")
    steps = sum(int(budgets[i : i + rows].max()) for i in range(0, count, rows))
    print(
        f"static batches {static_s:.1f} s, refilled rows {refilled_s:.1f} s; without prefills, and with rows that are "
        f"never idle, the ratio would be {steps * rows / budgets.sum():.2f}"
    )
    print(f"refill {static_s / refilled_s:.2f} x")


def _timed(
    way: Callable[[Prompts], list[list[int]]], prompts: Prompts, rows: int
) -> tuple[float, list[list[int]]]:
    """Seconds and answers; what is compiled is compiled before, with the longest answer in the first batch."""
    first = jax.tree.map(lambda x: x[:rows], prompts)
    budgets = np.full(rows, 4, np.int32)
    budgets[0] = LONGEST
    way(first.replace(max_response_tokens=budgets))
    start = time.perf_counter()
    answers = way(prompts)
    return time.perf_counter() - start, answers
