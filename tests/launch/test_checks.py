"""Every config of ours is accepted; values that mean nothing are refused in one line that names the field."""

import copy
import math
import re

import pytest

from configs import base, grpo, sft
from launch import checks

VARIANTS = [
    *((base, arg) for arg in ("tiny", "small", "test")),
    *((sft, arg) for arg in ("tiny", "small", "test", "paper", "released")),
    *((grpo, arg) for arg in ("tiny", "small", "test", "paper", "released", "drgrpo", "dapo")),
]


@pytest.mark.parametrize(
    ("module", "arg"), VARIANTS, ids=[f"{m.__name__}:{a}" for m, a in VARIANTS]
)
def test_our_configs_are_accepted(module, arg):
    checks.check_config(module.get_config(arg))


def refused(module, change, message):
    config = copy.deepcopy(module.get_config("test"))
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        checks.check_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "rl"}, "config.stage='rl' must be one of base, sft, grpo"),
        (
            {"stage": "grpo"},
            "config.stage='grpo' is not the stage of this config, which has no rollouts_per_query: leave it as the "
            "config file sets it, or give --config=configs/grpo.py",
        ),
        ({"stage": "base"}, "config.stage='base' is not the stage of this config"),
        ({"seed": -1}, "config.seed=-1 must be a whole number in [0, 4294967295]"),
        ({"seed": 2**32}, "config.seed=4294967296 must be"),
        ({"seed": 10**400}, "must be a whole number in [0, 4294967295]"),
        ({"total_steps": 0}, "config.total_steps=0 must be a whole number, at least 1"),
        ({"batch_size": -2}, "config.batch_size=-2 must be a whole number, at least 1"),
        ({"micro_batches": 0}, "config.micro_batches=0 must be a whole number, at least 1"),
        ({"micro_batches": 3}, "config.micro_batches=3 must divide config.batch_size=2"),
        (
            {"questions_per_chat": 0},
            "config.questions_per_chat=0 must be a whole number, at least 1",
        ),
        ({"naming_tokens": 0}, "config.naming_tokens=0 must be a whole number, at least 1"),
        ({"scene_tokens": -1}, "config.scene_tokens=-1 must be a whole number, at least 1"),
        ({"log_every_steps": 0}, "config.log_every_steps=0 must be a whole number, at least 1"),
        (
            {"checkpoint.every_steps": 0},
            "config.checkpoint.every_steps=0 must be a whole number, at least 1",
        ),
        (
            {"checkpoint.keep_last": 0},
            "config.checkpoint.keep_last=0 must be a whole number, at least 1",
        ),
        (
            {"data.clip_seconds": 0.0},
            "config.data.clip_seconds=0.0 must be a finite number in (0, ",
        ),
        ({"data.clip_seconds": 301.0}, "config.data.clip_seconds=301.0 must be"),
        ({"data.clip_seconds": math.nan}, "config.data.clip_seconds=nan must be"),
        ({"data.max_tokens": -1}, "config.data.max_tokens=-1 must be a finite number, at least 0"),
        (
            {"data.max_bad_fraction": 1.0},
            "config.data.max_bad_fraction=1.0 must be a finite number in [0, 1)",
        ),
        (
            {"data.max_bad_fraction": -0.1},
            "config.data.max_bad_fraction=-0.1 must be a finite number in [0, 1)",
        ),
        (
            {"data.cache_bytes": -1},
            "config.data.cache_bytes=-1 must be a finite number, at least 0",
        ),
        (
            {"listening_fraction": 1.0},
            "config.listening_fraction=1.0 must be a finite number in [0, 1)",
        ),
        (
            {"listening_fraction": -0.1},
            "config.listening_fraction=-0.1 must be a finite number in [0, 1)",
        ),
        (
            {"listening.naming_turns": 0},
            "config.listening.naming_turns=0 must be a whole number, at least 1",
        ),
        (
            {"listening.inline_fraction": 2.0},
            "config.listening.inline_fraction=2.0 must be a finite number in [0, 1]",
        ),
        ({"listening.jitter_s": -0.1}, "config.listening.jitter_s=-0.1 must be"),
        (
            {"listening.max_clip_s": 0.0},
            "config.listening.max_clip_s=0.0 must be a finite number in [0.1, 300]",
        ),
        ({"listening.style": "long"}, "listening.style 'long': use 'full' or 'short'"),
        ({"listening.weights.naming": -1.0}, "config.listening.weights.naming=-1.0 must be"),
        ({"listening.weights.choice": math.nan}, "config.listening.weights.choice=nan must be"),
        (
            {"listening.weights.naming": 0.0, "listening.weights.choice": 0.0},
            "config.listening.weights are all 0; give at least one task more",
        ),
        (
            {"optimizer.schedule": "step"},
            "config.optimizer.schedule='step' must be one of constant",
        ),
        ({"optimizer.learning_rate": -1.0}, "config.optimizer.learning_rate=-1.0 must be"),
        (
            {"optimizer.warmup_fraction": 1.5},
            "config.optimizer.warmup_fraction=1.5 must be a finite number in [0, 1]",
        ),
        ({"parameter_rules": ("foo",)}, "config.parameter_rules holds 'foo'; give pairs such as"),
        ({"parameter_rules": (("(", "train"),)}, "'(' is not a regular expression: missing )"),
    ],
)
def test_chat_fields_that_mean_nothing_are_named(change, message):
    refused(sft, change, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "sft"}, "config.stage='sft' is not the stage of this config"),
        ({"format": "spoken"}, "config.format='spoken' must be one of conditioned, grounded"),
        ({"queries_per_step": 0}, "config.queries_per_step=0 must be a whole number, at least 1"),
        (
            {"queries_per_minibatch": 0},
            "config.queries_per_minibatch=0 must be a whole number, at least 1",
        ),
        (
            {"queries_per_minibatch": 2, "queries_per_step": 3},
            "config.queries_per_minibatch=2 must divide config.queries_per_step=3",
        ),
        (
            {"queries_per_microbatch": 3},
            "config.queries_per_microbatch=3 must divide config.queries_per_minibatch=1",
        ),
        (
            {"rollouts_per_query": 1},
            "config.rollouts_per_query=1 must be a whole number, at least 2",
        ),
        ({"sampling.temperature": 0.0}, "config.sampling.temperature=0.0 must be a finite number"),
        ({"sampling.temperature": -1.0}, "config.sampling.temperature=-1.0 must be"),
        (
            {"sampling.max_turns": 0},
            "config.sampling.max_turns=0 must be a whole number, at least 1",
        ),
        (
            {"sampling.insertion_slots": 0},
            "config.sampling.insertion_slots=0 must be a whole number, at least 1",
        ),
        ({"sampling.max_response_tokens": 0}, "config.sampling.max_response_tokens=0 must be"),
        *(
            ({"sampling.segment_seconds": seconds}, f"segment_seconds={seconds} must hold one or")
            for seconds in [(), ("a",), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (math.inf,)]
        ),
        (
            {"replay.least_slots": (0, 0)},
            "config.replay.least_slots=(0, 0) must hold whole numbers",
        ),
        ({"replay.least_slots": (1,)}, "config.replay.least_slots has 1 entries for 2 segment"),
        (
            {"replay.token_multiple": 0},
            "config.replay.token_multiple=0 must be a whole number, at least 1",
        ),
        (
            {"replay.target_multiple": 0},
            "config.replay.target_multiple=0 must be a whole number, at least 1",
        ),
        ({"loss.clip_low": -0.2}, "config.loss.clip_low=-0.2 must be a finite number, at least 0"),
        ({"loss.kl_coefficient": math.nan}, "config.loss.kl_coefficient=nan must be"),
        ({"loss.kl_kind": "k9"}, "unknown kl_kind 'k9'"),
        ({"reward.name": "7"}, "unknown reward '7'"),
        ({"advantage": "gae"}, "unknown advantage 'gae'"),
        ({"prompts.conditioned": "x"}, "unknown prompt preset 'x'"),
        (
            {"old_logprobs": "trainer"},
            "config.old_logprobs='trainer' must be one of sampler, recomputed",
        ),
        ({"importance_cap": 2.0}, "set config.old_logprobs='recomputed', or the cap to 0"),
        (
            {"importance_cap": -1.0, "old_logprobs": "recomputed"},
            "config.importance_cap=-1.0 must be a finite number, at least 0",
        ),
        (
            {"reference.dtype": "float16"},
            "config.reference.dtype='float16' must be one of float32, bfloat16",
        ),
        ({"loss.aggregation": "sum"}, "unknown aggregation 'sum'; known: constant_length"),
        (
            {"reward.overlong_buffer": 49},
            "config.reward.overlong_buffer=49 must be a whole number in [0, 48]",
        ),
        (
            {"dynamic_sampling.max_rounds": -1},
            "config.dynamic_sampling.max_rounds=-1 must be a whole number, at least 0",
        ),
        (
            {"validation.every_steps": -1},
            "config.validation.every_steps=-1 must be a whole number, at least 0",
        ),
        ({"validation.batch_size": 0}, "config.validation.batch_size=0 must be a whole number"),
        ({"validation.temperature": -1.0}, "config.validation.temperature=-1.0 must be a finite"),
        (
            {"validation.every_steps": 3, "log_every_steps": 2},
            "config.validation.every_steps=3 must be a multiple of config.log_every_steps=2",
        ),
        (
            {"validation.every_steps": 1, "validation.split": "train"},
            "config.validation.split='train' is what is trained on",
        ),
    ],
)
def test_grpo_fields_that_mean_nothing_are_named(change, message):
    refused(grpo, change, message)
