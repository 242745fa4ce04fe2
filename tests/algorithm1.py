"""The jitted sampler against Algorithm 1 on the host, on a trained model and held-out questions, token for token.

    python -m tests.algorithm1 --checkpoint runs/demo/grpo --data runs/demo/data [--limit 200]
        [--against host transformers]

Greedy and interleaved. Both oracles ask one question at a time:

  host          keeps no cache and recomputes the whole sequence for every token (`echo_jax/sampler/reference.py`)
  transformers  is Hugging Face `generate` in torch, on the exported weights (`tests/transformers_algorithm1.py`)

Prints for each how many answers were compared, with how many insertions, and the ones that differ; the exit status is
1 if any does.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import transformers

from configs import eval as eval_config
from data import pipeline
from data.audio_store import AudioStore
from echo_jax import huggingface
from echo_jax.sampler import FinishReason, Prompts, Sampler, reference
from echo_jax.sampler.reference import HostAnswer
from eval import questions
from eval.runner import Model, Settings
from tests.transformers_algorithm1 import TransformersAlgorithm1

# (prompt tokens, recording, index of its first <|AUDIO|>) -> answer
Oracle = Callable[[list[int], np.ndarray, int], HostAnswer]
AGAINST = ("host", "transformers")


@dataclasses.dataclass
class Count:
    """What one comparison has found so far."""

    insertions: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    different: int = 0

    def line(self) -> str:
        histogram = " ".join(f"{n}:{self.insertions[n]}" for n in range(8))
        reasons = ", ".join(f"{count} {name}" for name, count in sorted(self.reasons.items()))
        inserted = sum(n * answers for n, answers in self.insertions.items())
        return (
            f"{self.insertions.total()} compared, {inserted} insertions, {self.different} different; "
            f"answers by insertions {histogram}; finished by {reasons}"
        )


def oracle(name: str, model: Model, settings: Settings, directory: Path) -> Oracle:
    """One of `AGAINST`; `directory` is where it may export the model to."""
    options = settings.sampling
    if name == "host":
        return lambda prompt, waveform, start: reference.answer(
            model.config, model.params, model.tokenizer, options, prompt, waveform, start
        )
    huggingface.save_pretrained(directory, model.config, model.params, model.tokenizer)
    theirs = TransformersAlgorithm1(directory, options)
    return lambda prompt, waveform, start: theirs.answer(prompt, waveform)


def compare(
    checkpoint: str, data: Path, limit: int, batch_size: int, variant: str, against: list[str]
) -> int:
    """Answers the questions by the sampler and by each oracle; returns how many answers differ."""
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
    counts = {name: Count() for name in against}
    with tempfile.TemporaryDirectory() as exported:
        oracles = {name: oracle(name, model, settings, Path(exported)) for name in against}
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
                spans = rollout.segment_samples[row, : rollout.num_segments[row]]
                answer = HostAnswer(
                    rollout.tokens[row, length : int(rollout.length[row])].tolist(),
                    [(int(begin), int(end)) for begin, end in spans],
                    FinishReason(int(rollout.finish_reason[row])),
                )
                for name, ask in oracles.items():
                    expected = ask(
                        batch["prompt_tokens"][row, :length].tolist(),
                        batch["waveforms"][row, : int(batch["num_samples"][row])],
                        int(batch["clip_start"][row]),
                    )
                    count = counts[name]
                    count.insertions[len(expected.segments)] += 1
                    count.reasons[expected.finish_reason.name] += 1
                    if answer != expected:
                        count.different += 1
                        for who, said in (("sampler", answer), (name, expected)):
                            text = model.tokenizer.decode(said.tokens)
                            print(f"{record.id}: {who} {said.finish_reason.name} {text!r}")
            for name, count in counts.items():
                print(f"{name}: {count.line()}", flush=True)
    return sum(count.different for count in counts.values())


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="model directory or finished workdir")
    parser.add_argument("--data", required=True, type=Path, help="folder that data.build wrote")
    parser.add_argument("--limit", type=int, default=200, help="questions")
    parser.add_argument("--batch-size", type=int, default=20, help="of the sampler")
    parser.add_argument("--variant", default="tiny", help="of configs/eval.py")
    parser.add_argument("--against", nargs="+", choices=AGAINST, default=list(AGAINST))
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()  # it misses the weights of the image tower, which nobody uses
    found = compare(
        flags.checkpoint,
        flags.data,
        flags.limit,
        flags.batch_size,
        flags.variant,
        flags.against,
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
