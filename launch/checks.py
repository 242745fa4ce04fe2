"""What a config means for a stage, and whether it means anything: found out before anything is loaded or compiled.

Every refusal is a ValueError of one line that names the field. What only the model or the records can show, such as a
freezing rule that matches no parameter or a batch larger than the data, is found where they are read.
"""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from data.listening import ListeningConfig
from echo_jax import ranges
from echo_jax.model import frontend
from echo_jax.ranges import Range
from echo_jax.sampler import SamplingOptions
from echo_jax.train import grpo, optimizer, replay, rewards
from echo_jax.train.retention import Retention
from launch import inputs

FORMATS = ("conditioned", "grounded", "interleaved")
NON_FINITE = ("stop", "skip")
# The stages, each with a field that only its config files have.
_OWN_FIELD = {"base": "model_preset", "sft": "questions_per_chat", "grpo": "rollouts_per_query"}

_MOST_SECONDS = frontend.MAX_CLIP_SAMPLES / frontend.SAMPLE_RATE
# Fields that are no part of another room's options; a stage has some of them.
_RANGES = {
    "seed": ranges.SEED,
    "total_steps": ranges.COUNT,
    "batch_size": ranges.COUNT,
    "micro_batches": ranges.COUNT,
    "log_every_steps": ranges.COUNT,
    "checkpoint.every_steps": ranges.COUNT,
    "non_finite_limit": ranges.COUNT,
    "data.clip_seconds": Range(above=0, most=_MOST_SECONDS),
    "data.max_tokens": ranges.NOT_NEGATIVE,
    "data.max_bad_fraction": ranges.SHARE_BELOW_ONE,
    "data.cache_bytes": ranges.NOT_NEGATIVE,
    "naming_tokens": ranges.COUNT,
    "scene_tokens": ranges.COUNT,
    "questions_per_chat": ranges.COUNT,
    # SFT batches of nothing but base chats would be no SFT.
    "listening_fraction": ranges.SHARE_BELOW_ONE,
    "listening.naming_turns": ranges.COUNT,
    "listening.inline_fraction": ranges.SHARE,
    "listening.jitter_s": ranges.NOT_NEGATIVE,
    # Clips are cut in steps of 0.1 s.
    "listening.max_clip_s": Range(least=0.1, most=_MOST_SECONDS),
    # The advantage of an answer is what it has over the others of its group.
    "rollouts_per_query": Range(least=2, whole=True),
    "queries_per_step": ranges.COUNT,
    "queries_per_minibatch": ranges.COUNT,
    "queries_per_microbatch": ranges.COUNT,
    # The greedy 0 has no log-probabilities to learn from.
    "sampling.temperature": ranges.POSITIVE,
    "sampling.max_response_tokens": ranges.COUNT,
    "sampling.max_turns": ranges.COUNT,
    "sampling.insertion_slots": ranges.COUNT,
    "sampling.insertion_patience": ranges.COUNT,
}


def check_config(config: ConfigDict) -> None:
    """Checks all that a config says by itself.

    Raises:
        ValueError: a field has a value that means nothing, alone or beside another.
    """
    _check_stage(config)
    for name, allowed in _RANGES.items():
        section, _, field = name.rpartition(".")
        values = config.get(section, {}) if section else config
        if field in values:
            ranges.check(f"config.{name}", values[field], allowed)
    if config.non_finite not in NON_FINITE:
        raise ValueError(
            f"config.non_finite={config.non_finite!r} must be one of {', '.join(NON_FINITE)}"
        )
    retention(config)
    optimizer.OptimizerOptions(**config.optimizer.to_dict())
    optimizer.check_rules(config.parameter_rules)
    if config.stage == "grpo":
        _check_grpo(config)
    else:
        _check_chats(config)


def retention(config: ConfigDict) -> Retention:
    """Which checkpoints stay.

    Raises:
        ValueError: a value that means nothing.
    """
    names = [field.name for field in dataclasses.fields(Retention)]
    return Retention(**{name: config.checkpoint[name] for name in names})


def sampling_options(config: ConfigDict) -> SamplingOptions:
    """How rollouts are sampled in the config's format.

    Raises:
        ValueError: an unknown format, or a value that the sampler cannot use.
    """
    if config.format not in FORMATS:
        raise ValueError(f"config.format={config.format!r} must be one of {', '.join(FORMATS)}")
    fields = config.sampling.to_dict()
    seconds = fields["segment_seconds"] = tuple(fields["segment_seconds"])
    if (
        not seconds
        or not all(value in ranges.POSITIVE for value in seconds)
        or list(seconds) != sorted(set(seconds))
    ):
        raise ValueError(
            f"config.sampling.segment_seconds={seconds} must hold one or more lengths in seconds, ascending and more "
            "than 0"
        )
    return SamplingOptions(insert_audio=config.format == "interleaved", **fields)


def replay_options(config: ConfigDict) -> replay.ReplayOptions:
    """How the trainer runs the rollouts of `sampling_options` again.

    Raises:
        ValueError: a value that it cannot use.
    """
    options = sampling_options(config)
    buffers = options.segment_buffers(inputs.clip_samples(config)) if options.insert_audio else ()
    return replay.ReplayOptions(
        group=config.rollouts_per_query,
        buffers=buffers,
        least_slots=tuple(config.replay.least_slots) if options.insert_audio else (),
        token_multiple=config.replay.token_multiple,
        target_multiple=config.replay.target_multiple,
        temperature=options.temperature,
        remat=config.remat,
    )


def _check_stage(config: ConfigDict) -> None:
    if config.stage not in _OWN_FIELD:
        raise ValueError(f"config.stage={config.stage!r} must be one of {', '.join(_OWN_FIELD)}")
    own = _OWN_FIELD[config.stage]
    if own not in config:
        raise ValueError(
            f"config.stage={config.stage!r} is not the stage of this config, which has no {own}: leave it as the "
            f"config file sets it, or give --config=configs/{config.stage}.py"
        )


def _check_chats(config: ConfigDict) -> None:
    if config.batch_size % config.micro_batches:
        raise ValueError(
            f"config.micro_batches={config.micro_batches} must divide config.batch_size={config.batch_size}"
        )
    weights = config.listening.weights.to_dict()
    for task, weight in weights.items():
        ranges.check(f"config.listening.weights.{task}", weight, ranges.NOT_NEGATIVE)
    if not any(weights.values()):
        raise ValueError("config.listening.weights are all 0; give at least one task more")
    ListeningConfig(**config.listening.to_dict())


def _check_grpo(config: ConfigDict) -> None:
    for name, whole in (
        ("queries_per_minibatch", "queries_per_step"),
        ("queries_per_microbatch", "queries_per_minibatch"),
    ):
        if config[whole] % config[name]:
            raise ValueError(
                f"config.{name}={config[name]} must divide config.{whole}={config[whole]}"
            )
    replay_options(config)
    grpo.GrpoOptions(**config.loss.to_dict())
    grpo.get_advantage(config.advantage)
    rewards.get_reward(config.reward.name)
