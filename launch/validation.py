"""Validation while GRPO trains: greedy answers to questions that are not trained on, by the sampler of the rollouts.

Its figures depend on the parameters and the config alone. It reads through files of its own and draws with a key of its
own, so a run with validation trains as one without.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from data import pipeline
from data.records import EaqaRecord
from echo_jax.arrays import Params, Placement
from echo_jax.sampler import Sampler
from echo_jax.train import rewards
from launch import devices, inputs, rollouts
from launch.checks import sampling_options
from launch.stage import Metrics, Model

# What of `rollouts.answer_metrics` is logged, beside accuracy and format.
FIGURES = (
    "segments",
    "mean_s",
    "overlap",
    "insertions",
    "response_tokens",
    "response_length",
)


class Validator:
    """Answers the same questions whenever it is called.

    Attributes:
        records: the questions.
    """

    def __init__(self, config: ConfigDict, model: Model, decode: Placement) -> None:
        """Reads the questions; nothing is compiled before the first call. `decode` is where answers are sampled.

        Raises:
            ValueError: there are none; the message names config.validation.
        """
        options = config.validation
        self.records = held_out(config)
        self._every_steps = options.every_steps
        sampling = dataclasses.replace(sampling_options(config), temperature=options.temperature)
        self._decode = decode
        rules = decode.rules if decode.mesh else None
        self._sampler = Sampler(model.config, model.tokenizer, sampling, decode.mesh, rules)
        # A batch is divided over the devices of the rollouts.
        shards = decode.num_shards("batch")
        batch_size = -(-min(options.batch_size, len(self.records)) // shards) * shards
        # The paper's reward and its strict rules, whatever is trained with: runs stay comparable.
        self._scorer = rollouts.Scorer(
            model.tokenizer, "paper", rewards.RewardOptions(), config.format == "interleaved"
        )
        self._key = jax.random.key(config.seed)
        store = inputs.audio_store(config, {record.audio_path for record in self.records})
        self._dataset = pipeline.prompt_dataset(
            self.records,
            store,
            model.tokenizer,
            prompt=inputs.prompt_name(config),
            batch_size=batch_size,
            clip_seconds=config.data.clip_seconds,
            max_prompt_tokens=config.data.max_tokens,
            epochs=1,
            shuffle=False,
        )

    def is_due(self, step: int) -> bool:
        """Whether figures are wanted after `step` steps."""
        return step % self._every_steps == 0

    def __call__(self, params: Params) -> Metrics:
        """The figures of these parameters. A question whose recording cannot be used counts as wrong, and in
        ``validation/skipped``."""
        parts, scores = [], []
        for number, batch in enumerate(self._dataset):
            records = batch["records"]
            prompts = rollouts.prompts_of(batch)
            key = jax.random.fold_in(self._key, number)
            placed = devices.put(prompts, self._decode)
            rollout = devices.to_host(self._sampler(params, placed, key))
            # The last batch is filled up.
            rollout = rollouts.rows_of(rollout, slice(len(records)))
            scores += self._scorer(rollout, records, batch["num_samples"])
            parts.append(rollout)
        found = rollouts.answer_metrics(scores, rollouts.joined(parts))
        total = len(self.records)
        metrics = {
            "accuracy": sum(score["correct"] for score in scores) / total,
            "format": sum(score["format"] > 0 for score in scores) / total,
            **{name: found[name] for name in FIGURES},
            "skipped": float(total - len(scores)),
        }
        return {f"validation/{name}": value for name, value in metrics.items()}


def held_out(config: ConfigDict) -> Sequence[EaqaRecord]:
    """The questions of config.validation: at most `limit`, spread evenly over their file.

    Raises:
        ValueError: there are none.
    """
    options = config.validation
    place = copy.deepcopy(config)
    place.data.split = options.split
    place.data.records = options.records or config.data.records
    try:
        records = inputs.load_records(place)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"config.validation: {error}") from error
    count = min(options.limit or len(records), len(records))
    chosen = np.arange(count) * len(records) // count
    return [records[index] for index in chosen.tolist()]
