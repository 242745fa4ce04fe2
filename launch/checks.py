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
from echo_jax.model.execution import ATTENTION, PLAIN, REMAT_POLICIES, Execution
from echo_jax.ranges import Range
from echo_jax.sampler import SamplingOptions
from echo_jax.text import prompts
from echo_jax.train import grpo, optimizer, replay, rewards, step
from echo_jax.train.retention import Retention
from launch import inputs

FORMATS = ("conditioned", "grounded", "interleaved")
OLD_LOGPROBS = ("sampler", "recomputed")
REFERENCE_DTYPES = ("float32", "bfloat16")
# The stages, each with a field that only its config files have.
_OWN_FIELD = {"base": "model_preset", "sft": "questions_per_chat", "grpo": "rollouts_per_query"}

_COUNT_OR_OFF = Range(least=0, whole=True)
_MOST_SECONDS = frontend.MAX_CLIP_SAMPLES / frontend.SAMPLE_RATE
# Fields that are no part of another room's options; a stage has some of them.
_RANGES = {
    "seed": ranges.SEED,
    "total_steps": ranges.COUNT,
    "batch_size": ranges.COUNT,
    "micro_batches": ranges.COUNT,
    "vocabulary_chunk": ranges.NATURAL,
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
    "replay.copies": ranges.COUNT,
    # The greedy 0 has no log-probabilities to learn from.
    "sampling.temperature": ranges.POSITIVE,
    "sampling.max_response_tokens": ranges.COUNT,
    "sampling.max_turns": ranges.COUNT,
    "sampling.insertion_slots": ranges.COUNT,
    "sampling.insertion_patience": ranges.COUNT,
    "dynamic_sampling.max_rounds": _COUNT_OR_OFF,
    "validation.every_steps": _COUNT_OR_OFF,
    "validation.limit": _COUNT_OR_OFF,
    "validation.batch_size": ranges.COUNT,
    "validation.temperature": ranges.NOT_NEGATIVE,
}

_NAMES = {
    "precision": tuple(step.PRECISIONS),
    "attention": ("auto", *ATTENTION),
    "remat": tuple(REMAT_POLICIES),
    "non_finite": ("stop", "skip"),
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
    for name, known in _NAMES.items():
        if config[name] not in known:
            raise ValueError(f"config.{name}={config[name]!r} must be one of {', '.join(known)}")
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


def replay_options(config: ConfigDict, execution: Execution = PLAIN) -> replay.ReplayOptions:
    """How the trainer runs the rollouts of `sampling_options` again.

    Args:
        config: of the GRPO stage.
        execution: of its training passes.

    Raises:
        ValueError: a value that it cannot use.
    """
    options = sampling_options(config)
    buffers = options.segment_buffers(inputs.clip_samples(config)) if options.insert_audio else ()
    return replay.ReplayOptions(
        group=config.rollouts_per_query // config.replay.copies,
        copies=config.replay.copies,
        buffers=buffers,
        least_slots=tuple(config.replay.least_slots) if options.insert_audio else (),
        token_multiple=config.replay.token_multiple,
        target_multiple=config.replay.target_multiple,
        temperature=options.temperature,
        vocabulary_chunk=config.vocabulary_chunk,
        execution=execution,
    )


def loss_options(config: ConfigDict) -> grpo.GrpoOptions:
    """The hyperparameters of the GRPO loss.

    Raises:
        ValueError: a value that it cannot use.
    """
    return grpo.GrpoOptions(
        **config.loss.to_dict(),
        importance_cap=config.importance_cap,
        max_response_tokens=config.sampling.max_response_tokens,
    )


def reward_options(config: ConfigDict) -> rewards.RewardOptions:
    """The choices beyond the reward's name.

    Raises:
        ValueError: a value that it cannot use.
    """
    fields = config.reward.to_dict()
    del fields["name"]
    return rewards.RewardOptions(**fields, max_response_tokens=config.sampling.max_response_tokens)


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
    if config.rollouts_per_query % config.replay.copies:
        raise ValueError(
            f"config.replay.copies={config.replay.copies} must divide config.rollouts_per_query="
            f"{config.rollouts_per_query}"
        )
    replay_options(config)
    for how in FORMATS:
        prompts.preset(config.prompts[how])
    loss_options(config)
    grpo.get_advantage(config.advantage)
    rewards.get_reward(config.reward.name)
    reward_options(config)
    for name, known in (
        ("old_logprobs", OLD_LOGPROBS),
        ("reference.dtype", REFERENCE_DTYPES),
    ):
        section, _, field = name.rpartition(".")
        value = (config[section] if section else config)[field]
        if value not in known:
            raise ValueError(f"config.{name}={value!r} must be one of {', '.join(known)}")
    if config.importance_cap and config.old_logprobs == "sampler":
        raise ValueError(
            f"config.importance_cap={config.importance_cap} weighs the trainer's log-probabilities against the "
            "sampler's; set config.old_logprobs='recomputed', or the cap to 0"
        )
    _check_validation(config)


def _check_validation(config: ConfigDict) -> None:
    validation = config.validation
    if not validation.every_steps:
        return
    if validation.every_steps % config.log_every_steps:
        raise ValueError(
            f"config.validation.every_steps={validation.every_steps} must be a multiple of config.log_every_steps="
            f"{config.log_every_steps}, or its figures are not written"
        )
    trained_on = (config.data.records, config.data.split)
    if (validation.records or config.data.records, validation.split) == trained_on:
        raise ValueError(
            f"config.validation.split={validation.split!r} is what is trained on; give another split, or other "
            "questions with config.validation.records"
        )
