"""A small model that cites, listens again and stops, by chance and not by training: its rollouts hold all that a
trainer must replay."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax import arrays
from echo_jax.arrays import Params
from echo_jax.model import thinker
from echo_jax.model.config import AudioConfig, TextConfig, ThinkerConfig
from echo_jax.text.tokenizer import Tokenizer

TEXTS = ("system user\nassistant\n What?", "<seg>1.0, 2</seg> ok A", "</seg>, ")


def citing_tokenizer() -> Tokenizer:
    """A vocabulary of single bytes and few words."""
    return Tokenizer.from_qwen_wheel().compact(TEXTS)


def citing_model(tokenizer: Tokenizer) -> tuple[ThinkerConfig, Params]:
    """Random layers between an embedding and a head that make citations likely, but nothing certain."""
    config = ThinkerConfig(
        audio=AudioConfig(num_layers=1, d_model=16, num_heads=2, ffn_dim=24, output_dim=32),
        text=TextConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            ffn_dim=40,
        ),
        im_start_id=tokenizer.im_start_id,
        im_end_id=tokenizer.im_end_id,
        audio_token_id=tokenizer.audio_id,
        audio_bos_id=tokenizer.audio_bos_id,
        audio_eos_id=tokenizer.audio_eos_id,
        pad_id=tokenizer.pad_id,
    )
    params = arrays.init_params(thinker.param_specs(config), jax.random.key(1))
    language = params["language_model"]
    directions = np.random.default_rng(0).normal(size=(tokenizer.vocab_size, 32))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    language["embed"]["embedding"] = jnp.asarray(directions * 8, jnp.float32)
    head = np.random.default_rng(1).normal(size=(32, tokenizer.vocab_size)) * 0.1

    def ids(*pieces: str) -> list[int]:
        found = [tokenizer.encode(piece) for piece in pieces]
        assert all(len(index) == 1 for index in found), pieces
        return [index[0] for index in found]

    def follow(chain: list[int], weight: float) -> None:
        for token, following in itertools.pairwise(chain):
            head[:, following] += directions[token] * weight

    follow(ids("\n", "<"), 2.6)
    follow(ids("<", "seg", ">", "1", ".", "0", ",", " ", "2", "</", "seg", ">"), 2.6)
    follow(ids(">", "0"), 1.9)  # another citation, of another length
    follow([tokenizer.audio_eos_id, *ids(" ok", "<")], 2.6)
    follow([tokenizer.audio_eos_id, *ids("A", "<")], 2.3)  # a fresh start, which costs consistency
    follow([tokenizer.audio_eos_id, tokenizer.im_end_id], 2.4)
    language["lm_head"]["kernel"] = jnp.asarray(head, jnp.float32)
    return config, params
