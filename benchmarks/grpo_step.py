"""Where the time of a tiny GRPO step goes: questions, weights to the sampler, answers, rewards, log-probs, updates.

  python -m benchmarks.grpo_step [--variants paper released ...] [--steps 5] [--queries 8] [--group 8]

The trainer's own step function runs on sound files that are written for it, with a model of the tiny preset's sizes
that cites, listens again and stops by chance. Each line is a config variant, its numbers the seconds of the step whose
whole time is the median, after two that compile. `sync` brings the trained weights to the sampler; they are the same
arrays, and the last line counts how many were copied all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile
from ml_collections import ConfigDict

from configs import grpo as grpo_config
from data.records import EaqaRecord
from echo_jax.model.config import ThinkerConfig
from echo_jax.train.checkpoint import TrainState
from launch import grpo_stage, inputs
from launch.checks import check_config
from launch.stage import Model
from tests.models import citing_model, citing_tokenizer

# Changes of configs/grpo.py:tiny; the losses are those of the presets with the same names.
VARIANTS: dict[str, Mapping[str, Any]] = {
    "paper": {},
    "released": {
        "reward.name": "6",
        "reward.pay_uninsertable": True,
        "loss.dual_clip": 3.0,
        "loss.kl_kind": "low_variance",
        "loss.aggregation": "token_mean",
    },
    "drgrpo": {
        "advantage": "group_centred",
        "loss.aggregation": "constant_length",
        "loss.kl_coefficient": 0.0,
    },
    "dapo": {
        "loss.clip_high": 0.28,
        "loss.aggregation": "token_mean",
        "loss.kl_coefficient": 0.0,
        "dynamic_sampling.max_rounds": 3,
        "reward.overlong_buffer": 26,
    },
    "recomputed": {"old_logprobs": "recomputed", "importance_cap": 2.0},
    "bf16 reference": {"reference.dtype": "bfloat16"},
    "grounded": {"format": "grounded"},
}
WARM_UP = 2
_SECONDS = 6.0


def write_questions(folder: Path, count: int) -> Path:
    """Recordings of noise and a question about each; returns the file of the questions."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        record = EaqaRecord(
            id=f"q{number}",
            audio_path=f"{number}.wav",
            duration_s=_SECONDS,
            question="What?",
            choices=("ok", "A"),
            answer="ok",
            cot="",
            kind="order",
            events=(),
            evidence=(),
            difficulty=1,
            split="train",
            source="noise",
        )
        samples = rng.normal(0, 0.1, round(_SECONDS * 16_000))
        soundfile.write(folder / record.audio_path, samples, 16_000)
        lines.append(json.dumps(record.to_json()) + "\n")
    path = folder / "records.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_model() -> Model:
    """A model of the tiny preset's sizes that cites by chance."""
    tokenizer = citing_tokenizer()
    config = ThinkerConfig.preset("tiny", vocab_size=tokenizer.vocab_size, **tokenizer.config_ids)
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, tie_embeddings=False)
    )
    return Model(*citing_model(tokenizer, config), tokenizer)


def make_config(args: argparse.Namespace, records: Path, changes: Mapping[str, Any]) -> ConfigDict:
    """configs/grpo.py:tiny with the changes of a variant."""
    config = grpo_config.get_config("tiny")
    config.init_from = "made here"
    config.data.root = str(records.parent)
    config.data.records = str(records)
    config.reward.name = "1"  # something that answers by chance differ in
    config.rollouts_per_query = args.group
    config.queries_per_step = config.queries_per_minibatch = args.queries
    config.queries_per_microbatch = args.queries
    config.total_steps = WARM_UP + args.steps
    config.update_from_flattened_dict(dict(changes))
    check_config(config)
    return config


def run_variant(config: ConfigDict, model: Model) -> tuple[dict[str, float], int, int]:
    """Runs all steps.

    Returns:
        Seconds of the median step by part, with the ``total``; arrays that `sync` copied; arrays in all.
    """
    updater, run_step = grpo_stage.build(config, model)
    params = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), model.params)
    state = TrainState(0, params, updater.init(params), jax.random.key(config.seed))
    iterator = inputs.batches(config, model.tokenizer)
    steps = []
    for number in range(config.total_steps):
        started = time.perf_counter()
        batch = next(iterator)
        drawn = time.perf_counter()
        state, result = run_step(state, batch, functools.partial(next, iterator))
        state = dataclasses.replace(state, step=number + 1)
        seconds = {"data_s": drawn - started, **result.timings}
        steps.append({**seconds, "total": time.perf_counter() - started})
    measured = sorted(steps[WARM_UP:], key=lambda seconds: seconds["total"])
    before, after = (jax.tree.leaves(tree) for tree in (state.params, jax.device_put(state.params)))
    copied = sum(
        one.unsafe_buffer_pointer() != two.unsafe_buffer_pointer()
        for one, two in zip(before, after, strict=True)
    )
    return measured[len(measured) // 2], copied, len(before)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for each variant."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.grpo_step", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=5, help="measured, after two that compile")
    parser.add_argument("--queries", type=int, default=8, help="questions a step")
    parser.add_argument("--group", type=int, default=8, help="answers a question")
    args = parser.parse_args(argv)
    model = make_model()
    parts = ("data", "redraw", "sync", "rollout", "reward", "logprob", "train")
    print(f"| variant | {' | '.join(f'{part} s' for part in parts)} | step s | sync % |")
    print("|---" * (len(parts) + 3) + "|")
    moved = total = 0
    with tempfile.TemporaryDirectory() as folder:
        records = write_questions(Path(folder), 4 * args.queries)
        for name in args.variants:
            seconds, copied, count = run_variant(make_config(args, records, VARIANTS[name]), model)
            moved, total = moved + copied, total + count
            cells = [f"{seconds[f'{part}_s']:.4f}" for part in parts]
            share = 100 * seconds["sync_s"] / seconds["total"]
            print(
                f"| {name} | {' | '.join(cells)} | {seconds['total']:.3f} | {share:.3f} |",
                flush=True,
            )
    print(f"sync copied {moved} of {total} arrays")


if __name__ == "__main__":
    main()
