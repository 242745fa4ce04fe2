"""GRPO: groups of answers sampled with audio insertion, rewarded, and learned from.

    python -m launch.train --config=configs/grpo.py:tiny --workdir=DIR --config.data.root=DATA \
        --config.init_from=SFT [--config.format=grounded]

`echo_7b` holds the paper's values; `echo_7b_released` those of the released code where they are choices (reward 6,
dual clip, mean over all tokens, trained audio tower, no check that a cited segment can be inserted).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "tiny") -> ConfigDict:
    """Config of the GRPO stage; `arg` is "tiny", "small", "test", "echo_7b" or "echo_7b_released"."""
    config = common.stage("grpo")
    # conditioned (no citations), grounded (citations), interleaved (citations, and the audio is inserted).
    config.format = "interleaved"
    config.rollouts_per_query = 8
    config.queries_per_step = 64
    # An optimizer update each; must divide queries_per_step.
    config.queries_per_minibatch = 32
    # What is in memory at once; must divide queries_per_minibatch.
    config.queries_per_microbatch = 1
    config.advantage = "group_normalized"

    # Devices of the rollouts: the same, rows divided over data, weights over tensor.
    config.rollout_mesh = ConfigDict({"data": -1, "tensor": 1})

    sampling = config.sampling = ConfigDict()
    sampling.temperature = 1.0
    sampling.max_response_tokens = 2048
    sampling.max_turns = 8
    sampling.insertion_slots = 8
    sampling.insertion_patience = 64
    sampling.segment_seconds = (2.0, 5.0, 10.0, 30.0)

    reward = config.reward = ConfigDict()
    # A name in echo_jax.train.rewards.REWARDS.
    reward.name = "paper"
    reward.pay_uninsertable = False
    reward.ordered_tags = True

    loss = config.loss = ConfigDict()
    loss.clip_low = 0.2
    loss.clip_high = 0.2
    loss.dual_clip = 0.0
    loss.kl_coefficient = 0.04
    loss.kl_kind = "k3"
    loss.aggregation = "sequence_mean"

    replay = config.replay = ConfigDict()
    # Shapes of the training batches are rounded up, so that few are compiled.
    replay.token_multiple = 128
    replay.target_multiple = 64
    # Clips that every segment buffer of a micro-batch has room for at least; () = one a row for the
    # shortest buffer, one for eight rows for the longer ones.
    replay.least_slots = ()

    config.optimizer.learning_rate = 1e-6
    config.parameter_rules = common.FROZEN_TOWER
    variants = {
        "tiny": _tiny,
        "small": _small,
        "test": _test,
        "echo_7b": _echo_7b,
        "echo_7b_released": _echo_7b_released,
    }
    return common.choose("configs/grpo.py", arg, config, variants)


def _tiny(config: ConfigDict) -> None:
    config.prompt = "tiny"
    config.data.clip_seconds = 6.0
    config.total_steps = 30
    config.queries_per_step = 8
    config.queries_per_minibatch = 8
    config.queries_per_microbatch = 8
    config.sampling.max_response_tokens = 128
    # One compiled shape for nearly every step: compiling another takes as long as several steps.
    config.replay.token_multiple = 96
    config.sampling.insertion_slots = 32
    config.sampling.segment_seconds = (2.0,)
    config.optimizer.learning_rate = 3e-4
    config.checkpoint.every_steps = 10


def _small(config: ConfigDict) -> None:
    _tiny(config)
    config.data.clip_seconds = 30.0
    config.total_steps = 60
    # At tiny's constant rate the copying of times drifted: fewer segments were cited exactly after GRPO than before.
    config.optimizer.learning_rate = 2e-4
    config.optimizer.schedule = "cosine"


def _test(config: ConfigDict) -> None:
    _tiny(config)
    config.data.clip_seconds = 8.0
    config.total_steps = 3
    config.rollouts_per_query = 3
    config.queries_per_step = 2
    config.queries_per_minibatch = 1
    config.queries_per_microbatch = 1
    config.sampling.max_response_tokens = 48
    config.sampling.insertion_slots = 4
    config.checkpoint.every_steps = 1


def _echo_7b(config: ConfigDict) -> None:
    config.data.clip_seconds = 30.0
    config.data.max_tokens = 2048
    config.total_steps = 342  # one pass over EAQA-RL
    common.at_scale(config)
    config.checkpoint.every_steps = 20


def _echo_7b_released(config: ConfigDict) -> None:
    _echo_7b(config)
    config.reward.name = "6"
    config.reward.pay_uninsertable = True
    config.reward.ordered_tags = False
    config.loss.dual_clip = 3.0
    config.loss.aggregation = "token_mean"
    config.optimizer.weight_decay = 0.01
    # Meant to be frozen, but the released freeze looks for the tower under a name that does not exist.
    config.parameter_rules = ((".*", "train"),)
