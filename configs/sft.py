"""SFT: cross-entropy on grounded reasoning, the audio once, in the prompt.

    python -m launch.train --config=configs/sft.py:tiny --workdir=DIR --config.data.root=DATA \
        --config.init_from=BASE [--config.optimizer.learning_rate=1e-3]

At 7B: `paper` (also called `echo_7b`) holds the paper's values (learning rate, batch, frozen audio tower), `released`
those of the released script (batch of 64, cosine, weight decay).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "tiny") -> ConfigDict:
    """Config of the SFT stage; `arg` is "tiny", "small", "test", "paper", "echo_7b" (its other name) or "released"."""
    config = common.stage("sft")
    config.batch_size = 16
    # Questions about one recording that share its audio in one chat; the paper's chats hold one.
    config.questions_per_chat = 1
    # Share of the batches that repeat chats of the base stage. A tiny model forgets how to name a clip while it learns
    # to cite; the paper's SFT repeats nothing.
    config.listening_fraction = 0.0
    config.listening = common.listening()
    config.naming_tokens = 288
    config.scene_tokens = 208
    config.micro_batches = 1
    config.parameter_rules = common.FROZEN_TOWER
    config.optimizer.b2 = 0.95
    variants = {
        "tiny": _tiny,
        "small": _small,
        "test": _test,
        "paper": _paper,
        "echo_7b": _paper,
        "released": _released,
    }
    return common.choose("configs/sft.py", arg, config, variants)


def _tiny(config: ConfigDict) -> None:
    config.prompt = "tiny"
    config.data.clip_seconds = 6.0
    config.batch_size = 16
    config.listening_fraction = 0.3
    config.listening.weights = {"naming": 1.0, "choice": 1.0}
    config.listening.inline_fraction = 1.0
    config.total_steps = 450
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.weight_decay = 0.1


def _small(config: ConfigDict) -> None:
    _tiny(config)
    config.data.clip_seconds = 30.0
    config.naming_tokens = 320
    config.batch_size = 8
    # Two-digit times are harder to copy than one-digit ones, and the text is cheap beside 30 seconds of sound.
    config.questions_per_chat = 2
    config.listening_fraction = 0.3
    config.total_steps = 800


def _test(config: ConfigDict) -> None:
    _tiny(config)
    config.data.clip_seconds = 8.0
    config.batch_size = 2
    config.total_steps = 4
    config.checkpoint.every_steps = 2


def _paper(config: ConfigDict) -> None:
    config.init_from = "Qwen/Qwen2.5-Omni-7B"
    config.data.clip_seconds = 30.0
    config.data.max_tokens = 2048
    config.batch_size = 16
    config.total_steps = 75_862 // 16  # one pass over EAQA-SFT
    common.at_scale(config)
    config.optimizer.learning_rate = 5e-6
    # "Linear warm-up over 5 %"; what follows is not stated.
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_fraction = 0.05
    config.checkpoint.every_steps = 500


def _released(config: ConfigDict) -> None:
    _paper(config)
    config.batch_size = 64
    config.micro_batches = 4
    config.total_steps = 75_862 // 64
    config.optimizer.schedule = "cosine"
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
