import pytest

from configs import base, grpo, sft
from echo_jax.model.config import ThinkerConfig
from echo_jax.text import prompts
from echo_jax.train import grpo as grpo_lib
from echo_jax.train import optimizer, rewards
from launch import checks, inputs

VARIANTS = [
    *((base, arg) for arg in ("tiny", "small", "test")),
    *((sft, arg) for arg in ("tiny", "small", "test", "paper", "released")),
    *((grpo, arg) for arg in ("tiny", "small", "test", "paper", "released", "drgrpo", "dapo")),
]


@pytest.mark.parametrize(
    ("module", "arg"), VARIANTS, ids=[f"{m.__name__}:{a}" for m, a in VARIANTS]
)
def test_every_value_is_accepted_where_it_is_used(module, arg):
    config = module.get_config(arg)
    config.lock()
    options = optimizer.OptimizerOptions(**config.optimizer.to_dict())
    optimizer.make_schedule(options, config.total_steps)
    names = config.prompts.values() if config.stage == "grpo" else [config.prompt]
    assert set(names) <= set(prompts.PRESETS)
    assert {label for _, label in config.parameter_rules} <= set(optimizer.LABELS)
    if config.stage == "base":
        ThinkerConfig.preset(config.model_preset)
    elif config.stage == "sft":
        assert config.batch_size % config.micro_batches == 0
    else:
        checks.check_config(config)
        checks.loss_options(config)
        grpo_lib.get_advantage(config.advantage)
        assert config.reward.name in rewards.REWARDS
        assert config.queries_per_step % config.queries_per_minibatch == 0
        assert config.queries_per_minibatch % config.queries_per_microbatch == 0


def test_papers_values():
    config = sft.get_config("paper")
    assert (config.optimizer.learning_rate, config.batch_size) == (5e-6, 16)
    assert config.optimizer.warmup_fraction == 0.05
    assert config.parameter_rules[0] == ("audio_tower/.*", "freeze")
    config = grpo.get_config("paper")
    assert config.optimizer.learning_rate == 1e-6
    assert (config.queries_per_step, config.queries_per_minibatch) == (64, 32)
    assert (config.rollouts_per_query, config.sampling.temperature) == (8, 1.0)
    assert (config.loss.kl_coefficient, config.loss.aggregation) == (0.04, "sequence_mean")
    assert (config.data.max_tokens, config.sampling.max_response_tokens) == (2048, 2048)
    assert config.sampling.max_turns == 8
    assert config.total_steps == 342
    assert config.reward.name == "paper"


def test_released_values():
    config = sft.get_config("released")
    assert (config.batch_size, config.optimizer.schedule) == (64, "cosine")
    assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.95)
    assert config.optimizer.weight_decay == 0.1
    config = grpo.get_config("released")
    assert (config.reward.name, config.loss.dual_clip) == ("6", 3.0)
    assert (config.loss.clip_low, config.loss.clip_high) == (0.2, 0.2)
    assert (config.loss.aggregation, config.loss.kl_kind) == ("token_mean", "low_variance")
    assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.999)
    assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.01, 1.0)
    assert config.reward.pay_uninsertable


def test_echo_7b_is_another_name_of_paper():
    for module in (sft, grpo):
        assert module.get_config("echo_7b") == module.get_config("paper")


def test_dr_grpo_and_dapo_values():
    paper, drgrpo, dapo = (grpo.get_config(name) for name in ("paper", "drgrpo", "dapo"))
    assert (drgrpo.advantage, drgrpo.loss.aggregation) == ("group_centred", "constant_length")
    assert (dapo.advantage, dapo.loss.aggregation) == ("group_normalized", "token_mean")
    assert drgrpo.loss.kl_coefficient == dapo.loss.kl_coefficient == 0
    assert (dapo.loss.clip_low, dapo.loss.clip_high) == (0.2, 0.28)
    assert (dapo.dynamic_sampling.max_rounds, dapo.reward.overlong_buffer) == (10, 410)
    for config in (drgrpo, dapo):
        assert config.queries_per_step == paper.queries_per_step
        assert config.optimizer == paper.optimizer


def test_formats_have_their_prompts():
    for arg in ("tiny", "paper"):
        config = grpo.get_config(arg)
        asked = {}
        for config.format in ("conditioned", "grounded", "interleaved"):
            template = prompts.preset(inputs.prompt_name(config)).template
            asked[config.format] = "segments" in template or "Cite" in template
        assert asked == {"conditioned": False, "grounded": True, "interleaved": True}


def test_unknown_variants_are_named():
    with pytest.raises(ValueError, match=r"configs/grpo.py has no variant 'echo_7B'; did you mean"):
        grpo.get_config("echo_7B")
    with pytest.raises(ValueError, match="choose one of tiny, small, test"):
        base.get_config("xyz")
