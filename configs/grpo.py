"""GRPO: groups of answers sampled with audio insertion, rewarded, and learned from.

    python -m launch.train --config=configs/grpo.py:tiny --workdir=DIR --config.data.root=DATA \
        --config.init_from=SFT [--config.format=grounded]

At 7B: `paper` (also called `echo_7b`) holds the paper's values, `released` those of the released code where they are
choices, `drgrpo` and `dapo` the paper's with the changes of Dr. GRPO (arXiv 2503.20783) and DAPO (arXiv 2503.14476).
docs/grpo.md compares them field by field.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "tiny") -> ConfigDict:
    """Config of the GRPO stage; `arg` is "tiny", "small", "test", "paper", "echo_7b" (its other name), "released",
    "drgrpo" or "dapo"."""
    config = common.stage("grpo")
    # conditioned (no citations), grounded (citations), interleaved (citations, and the audio is inserted).
    config.format = "interleaved"
    # Wording of the question in each format, names in echo_jax.text.prompts.PRESETS.
    del config.prompt
    config.prompts = {"conditioned": "conditioned", "grounded": "echo", "interleaved": "echo"}
    config.rollouts_per_query = 8
    config.queries_per_step = 64
    # An optimizer update each; must divide queries_per_step.
    config.queries_per_minibatch = 32
    # What is in memory at once; must divide queries_per_minibatch.
    config.queries_per_microbatch = 1
    # "group_normalized", or "group_centred" without the division by the standard deviation.
    config.advantage = "group_normalized"
    # Log-probabilities before the updates of a step: the "sampler"'s own, or "recomputed" by the trainer.
    config.old_logprobs = "sampler"
    # With recomputed ones, the policy term is weighed with min(pi_trainer / pi_sampler, cap); 0 leaves it as it is.
    config.importance_cap = 0.0

    # Devices of the rollouts: the same, rows divided over data, weights over tensor.
    config.rollout_mesh = ConfigDict({"data": -1, "tensor": 1})

    sampling = config.sampling = ConfigDict()
    sampling.temperature = 1.0
    sampling.max_response_tokens = 2048
    sampling.max_turns = 8
    sampling.insertion_slots = 8
    sampling.insertion_patience = 64
    sampling.segment_seconds = (2.0, 5.0, 10.0, 30.0)

    # Batches of questions that a step draws at most to replace groups whose rewards are all equal; 0 keeps those.
    config.dynamic_sampling = ConfigDict({"max_rounds": 0})

    reward = config.reward = ConfigDict()
    # A name in echo_jax.train.rewards.REWARDS.
    reward.name = "paper"
    reward.pay_uninsertable = False
    reward.ordered_tags = True
    # Tokens before the end of the budget over which the reward falls by overlong_penalty; 0 takes nothing off.
    reward.overlong_buffer = 0
    reward.overlong_penalty = 1.0

    loss = config.loss = ConfigDict()
    loss.clip_low = 0.2
    loss.clip_high = 0.2
    # 0 is off.
    loss.dual_clip = 0.0
    # 0 keeps no reference model.
    loss.kl_coefficient = 0.04
    # "k1", "k2", "k3", or "low_variance", which is k3 within 10.
    loss.kl_kind = "k3"
    # "sequence_mean", "token_mean" or "constant_length".
    loss.aggregation = "sequence_mean"
    # The cold start in the KL: "float32" or "bfloat16".
    config.reference = ConfigDict({"dtype": "float32"})

    replay = config.replay = ConfigDict()
    # A prompt is run so often for its answers, each time for a share of them; must divide rollouts_per_query. More
    # copies leave fewer rows a device, and make a batch divisible by more devices.
    replay.copies = 1
    # Shapes of the training batches are rounded up, so that few are compiled.
    replay.token_multiple = 128
    replay.target_multiple = 64
    # Clips that every segment buffer of a micro-batch has room for at least; () = one a row for the
    # shortest buffer, one for eight rows for the longer ones.
    replay.least_slots = ()

    validation = config.validation = ConfigDict()
    # Every so many steps, questions that are not trained on are answered; 0 is never.
    validation.every_steps = 0
    # Their split, and their file or dataset; "" takes that of config.data.records.
    validation.split = "validation"
    validation.records = ""
    # How many questions at most, in the order of their file; 0 takes all.
    validation.limit = 64
    # Questions that are answered at a time.
    validation.batch_size = 64
    # 0 takes the most probable token.
    validation.temperature = 0.0

    config.optimizer.learning_rate = 1e-6
    config.parameter_rules = common.FROZEN_TOWER
    variants = {
        "tiny": _tiny,
        "small": _small,
        "test": _test,
        "paper": _paper,
        "echo_7b": _paper,
        "released": _released,
        "drgrpo": _drgrpo,
        "dapo": _dapo,
    }
    return common.choose("configs/grpo.py", arg, config, variants)


def _tiny(config: ConfigDict) -> None:
    config.prompts = {
        "conditioned": "tiny_conditioned",
        "grounded": "tiny",
        "interleaved": "tiny",
    }
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
    config.validation.batch_size = 2
    config.checkpoint.every_steps = 1


def _paper(config: ConfigDict) -> None:
    config.data.clip_seconds = 30.0
    config.data.max_tokens = 2048
    config.total_steps = 342  # one pass over EAQA-RL
    common.at_scale(config)
    # A chip of a v5e 4x4 holds half the answers to a question: logits of 256 positions at a time.
    config.queries_per_microbatch = 8
    config.replay.copies = 2
    config.vocabulary_chunk = 64
    # 7B decodes over 4 chips.
    config.rollout_mesh.tensor = 4
    config.reference.dtype = "bfloat16"
    config.checkpoint.every_steps = 20


def _released(config: ConfigDict) -> None:
    _paper(config)
    config.reward.name = "6"
    config.reward.pay_uninsertable = True
    config.reward.ordered_tags = False
    config.loss.dual_clip = 3.0
    config.loss.kl_kind = "low_variance"
    config.loss.aggregation = "token_mean"
    config.optimizer.weight_decay = 0.01
    # Meant to be frozen, but the released freeze looks for the tower under a name that does not exist.
    config.parameter_rules = ((".*", "train"),)


def _drgrpo(config: ConfigDict) -> None:
    _paper(config)
    config.advantage = "group_centred"
    config.loss.aggregation = "constant_length"
    config.loss.kl_coefficient = 0.0


def _dapo(config: ConfigDict) -> None:
    _paper(config)
    config.loss.clip_high = 0.28
    config.loss.aggregation = "token_mean"
    config.loss.kl_coefficient = 0.0
    config.dynamic_sampling.max_rounds = 10
    # A fifth of the budget, as there.
    config.reward.overlong_buffer = 410
