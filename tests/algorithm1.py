"""The jitted sampler against Algorithm 1 on the host, on a trained model and held-out questions, token for token.

    python -m tests.algorithm1 --checkpoint runs/demo/grpo --data runs/demo/data [--limit 100]

Greedy and interleaved. The host asks one question at a time, keeps no cache and recomputes the whole sequence for every
token (`echo_jax/sampler/reference.py`). Prints how many answers are equal and the first that differ; the exit status is
1 if any does.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from configs import eval as eval_config
from data import pipeline
from data.audio_store import AudioStore
from echo_jax.sampler import Prompts, Sampler, reference
from eval import questions
from eval.runner import Model, Settings


def compare(checkpoint: str, data: Path, limit: int, batch_size: int, variant: str) -> int:
    """Answers the questions both ways; returns how many answers differ."""
    model = Model.load(checkpoint)
    asked = questions.load(data, "test").limited(limit)
    settings = Settings.from_config(eval_config.get_config(variant).to_dict())
    if settings.temperature != 0 or settings.format != "interleaved":
        raise ValueError(f"configs/eval.py:{variant} is not greedy and interleaved")
    dataset = pipeline.prompt_dataset(
        asked.records,
        AudioStore(asked.audio_root, max_bytes=1 << 28, max_bad=0),
        model.tokenizer,
        prompt=settings.prompt,
        batch_size=batch_size,
        clip_seconds=settings.clip_seconds[-1],
        epochs=1,
        shuffle=False,
    )
    sampler = Sampler(model.config, model.tokenizer, settings.sampling)
    compared = different = insertions = 0
    for batch in dataset:
        prompts = Prompts(
            tokens=batch["prompt_tokens"],
            length=batch["prompt_length"],
            waveforms=batch["waveforms"],
            num_samples=batch["num_samples"],
            audio_start=batch["clip_start"],
        )
        rollout = jax.device_get(sampler(model.params, prompts, jax.random.key(0)))
        for row, record in enumerate(batch["records"]):
            length = int(batch["prompt_length"][row])
            expected = reference.answer(
                model.config,
                model.params,
                model.tokenizer,
                settings.sampling,
                batch["prompt_tokens"][row, :length].tolist(),
                batch["waveforms"][row, : int(batch["num_samples"][row])],
                int(batch["clip_start"][row]),
            )
            answer = rollout.tokens[row, length : int(rollout.length[row])].tolist()
            compared += 1
            insertions += len(expected.segments)
            if answer != expected.tokens or rollout.finish_reason[row] != expected.finish_reason:
                different += 1
                print(f"{record.id}: sampler {model.tokenizer.decode(answer)!r}")
                print(f"{record.id}: host    {model.tokenizer.decode(expected.tokens)!r}")
        print(f"{compared} compared, {insertions} insertions, {different} different", flush=True)
    return different


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="model directory or finished workdir")
    parser.add_argument("--data", required=True, type=Path, help="folder that data.build wrote")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--variant", default="tiny", help="of configs/eval.py")
    flags = parser.parse_args()
    found = compare(flags.checkpoint, flags.data, flags.limit, flags.batch_size, flags.variant)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
