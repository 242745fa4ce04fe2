"""Evaluation of a checkpoint on held-out questions.

    python -m eval --config=configs/eval.py:tiny --checkpoint DIR --data DIR --output DIR
    python -m eval --config=configs/eval.py:echo_7b --checkpoint DIR --data FILE.jsonl --output DIR \
        --format grounded

`tiny` and `small` are for the small models of `make demo` and of the evidence run, `echo_7b` has the paper's values.
`--config.temperature=0.7` and the like change single fields.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "tiny") -> ConfigDict:
    """Config of an evaluation; `arg` is "tiny", "small", "test" or "echo_7b"."""
    config = ConfigDict()
    config.split = "test"
    # Questions to ask, chosen by a hash of their ids; 0 asks all.
    config.limit = 0
    # conditioned, grounded or interleaved.
    config.format = "interleaved"
    # What is done to the audio, a name in eval.controls.CONTROLS.
    config.control = "none"
    config.seed = 0
    # Wording for each format, names in echo_jax.text.prompts.PRESETS.
    config.prompts = {"conditioned": "conditioned", "grounded": "echo", "interleaved": "echo"}

    # 0 takes the most probable token.
    config.temperature = 0.7
    config.top_k = 0
    config.top_p = 1.0
    config.min_p = 0.0
    config.max_turns = 8
    config.max_response_tokens = 2048
    # Rows that get audio together, and how many decode steps one waits for the others at most.
    config.insertion_slots = 8
    config.insertion_patience = 64
    config.segment_seconds = (2.0, 5.0, 10.0, 30.0)

    # Answers in the making at a time, and questions that are prefilled together as rows become free; 0 is an eighth.
    config.batch_size = 16
    config.refill = 0
    # A recording goes into the shortest of these that holds it; each is one compiled program.
    config.clip_seconds = (10.0, 30.0, 60.0, 300.0)
    # Share of the questions whose recording may turn out unusable before the run stops.
    config.max_bad_fraction = 0.02
    # Answers to listen to in the report.
    config.num_answers = 16
    variants = {"tiny": _tiny, "small": _small, "test": _test, "echo_7b": lambda config: None}
    return common.choose("configs/eval.py", arg, config, variants)


def _tiny(config: ConfigDict) -> None:
    config.prompts = {
        "conditioned": "tiny_conditioned",
        "grounded": "tiny",
        "interleaved": "tiny",
    }
    config.temperature = 0.0
    config.max_response_tokens = 160
    config.segment_seconds = (2.0,)
    config.batch_size = 64
    config.insertion_slots = 32
    config.clip_seconds = (6.0,)


def _small(config: ConfigDict) -> None:
    _tiny(config)
    config.clip_seconds = (20.0, 30.0)


def _test(config: ConfigDict) -> None:
    _tiny(config)
    config.max_response_tokens = 96
    config.segment_seconds = (1.0,)
    config.batch_size = 4
    config.clip_seconds = (8.0,)
    config.max_bad_fraction = 0.5
