"""Base stage: a tiny thinker learns to hear. It stands in for a pretrained Qwen2.5-Omni, which can.

    python -m launch.train --config=configs/base.py:tiny --workdir=DIR --config.data.root=DATA

It names short clips, captions scenes and says what is present; no reasoning, no times. The vocabulary is the part of
Qwen's that the dataset needs, so later stages start from this stage's model.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "tiny") -> ConfigDict:
    """Config of the base stage; `arg` is "tiny", "small" or "test"."""
    config = common.stage("base")
    # Sizes of the new model, a name in ThinkerConfig.preset; not used with init_from.
    config.model_preset = "tiny"
    # "compact": the part of Qwen's vocabulary that the dataset needs; "qwen": all of it; or a directory.
    config.tokenizer = "compact"
    # Every wording that later stages will use, so that the compact vocabulary spells it.
    config.tokenizer_prompts = ("tiny", "tiny_conditioned")
    config.batch_size = 32
    config.micro_batches = 1

    config.listening = common.listening()
    # Token buffers of the two kinds of batches.
    config.naming_tokens = 352
    config.scene_tokens = 352

    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_fraction = 0.05
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    return common.choose(
        "configs/base.py", arg, config, {"tiny": _tiny, "small": _small, "test": _test}
    )


def _tiny(config: ConfigDict) -> None:
    config.data.clip_seconds = 6.0
    config.batch_size = 16
    config.naming_tokens = 288
    config.scene_tokens = 208
    config.total_steps = 400
    config.optimizer.learning_rate = 2e-3


def _small(config: ConfigDict) -> None:
    _tiny(config)
    config.data.clip_seconds = 30.0
    config.naming_tokens = 320
    config.scene_tokens = 816
    # Whole recordings are five times as long as the clips, and few of them do.
    config.listening.weights = {"naming": 4.0, "choice": 4.0, "caption": 0.4, "presence": 0.4}
    config.total_steps = 600


def _test(config: ConfigDict) -> None:
    config.model_preset = "tiny"
    config.data.clip_seconds = 8.0
    config.batch_size = 2
    config.scene_tokens = 288
    config.total_steps = 4
    config.checkpoint.every_steps = 2
