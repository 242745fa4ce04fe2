"""What the configs of all stages share.

A config is a function `get_config(arg)`; `--config=configs/sft.py:tiny` passes "tiny". Every field can be
overridden on the command line (`--config.optimizer.learning_rate=1e-3`); a field that does not exist is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

Variant = Callable[[ConfigDict], None]


def choose(file: str, arg: str, config: ConfigDict, variants: Mapping[str, Variant]) -> ConfigDict:
    """Applies the variant named `arg` to `config`.

    Raises:
        ValueError: there is no such variant; the message names the nearest.
    """
    if arg not in variants:
        near = difflib.get_close_matches(arg, variants, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(variants)}"
        raise ValueError(f"{file} has no variant {arg!r}; {hint}")
    variants[arg](config)
    return config


def stage(name: str) -> ConfigDict:
    """Fields that every stage has, with neutral values."""
    config = ConfigDict()
    config.stage = name
    config.seed = 0
    # A model directory, the workdir of a finished stage, or owner/name or owner/name@revision on the Hugging Face hub.
    config.init_from = ""
    # Wording of the question, a name in echo_jax.text.prompts.PRESETS.
    config.prompt = "echo"

    data = config.data = ConfigDict()
    # Folder that python -m data.build wrote; audio paths are relative to it.
    data.root = ""
    # Records to train on: a JSON-lines file or a built dataset; "" takes the only one under data.root.
    data.records = ""
    data.split = "train"
    # The longest clip; every waveform buffer has this length.
    data.clip_seconds = 30.0
    # Length of the token buffers; 0 measures the records.
    data.max_tokens = 0
    # Share of the files that may turn out unusable before the run stops.
    data.max_bad_fraction = 0.02
    # Memory for decoded waveforms.
    data.cache_bytes = 1 << 30

    config.total_steps = 1

    # Devices of the training steps: batches are divided over data and fsdp, weights over fsdp and tensor. -1: the rest.
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    # "float32"; "mixed" (float32 parameters and optimizer, bfloat16 computation); or "bfloat16".
    config.precision = "float32"
    # "auto" takes the splash kernel on TPU and plain attention elsewhere.
    config.attention = "auto"
    # What the backward pass computes again instead of keeping it: "none", "full" or "dots" (see model/execution.py).
    config.remat = "none"
    # Positions a row whose logits are in memory at once; 0 for all.
    config.vocabulary_chunk = 0

    optimizer = config.optimizer = ConfigDict()
    optimizer.learning_rate = 1e-3
    optimizer.schedule = "constant"
    optimizer.warmup_fraction = 0.0
    optimizer.final_fraction = 0.0
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.0
    optimizer.clip_norm = 1.0
    # (regular expression of whole parameter names, "train" or "freeze"); every parameter matches exactly one.
    config.parameter_rules = ((".*", "train"),)

    checkpoint = config.checkpoint = ConfigDict()
    checkpoint.every_steps = 100
    # What stays: the newest, the best by a metric of their step ("loss", "reward/total"), and those whose step is a
    # multiple of keep_every (0: none).
    checkpoint.keep_last = 2
    checkpoint.keep_best = 0
    checkpoint.best_metric = ""
    checkpoint.best_mode = "max"
    checkpoint.keep_every = 0
    checkpoint.asynchronous = True
    config.log_every_steps = 1
    # An update whose loss or gradient is not finite: "stop" the run, or "skip" the update, at most so many in a row.
    config.non_finite = "stop"
    config.non_finite_limit = 10
    return config


def at_scale(config: ConfigDict) -> None:
    """What a model of billions of parameters needs."""
    config.precision = "mixed"
    config.remat = "full"
    config.vocabulary_chunk = 256


FROZEN_TOWER = (("audio_tower/.*", "freeze"), ("language_model/.*", "train"))


def listening() -> ConfigDict:
    """Chats of the base stage, see `data.listening.ListeningConfig`, and the token buffers of their two shapes."""
    config = ConfigDict()
    config.style = "short"
    config.weights = {"naming": 2.0, "choice": 2.0, "caption": 0.5, "presence": 0.5}
    config.naming_turns = 4
    config.inline_fraction = 0.5
    config.jitter_s = 0.2
    config.max_clip_s = 2.0
    config.caption_order = "alphabetical"
    return config
