"""A model whose answers are known: its next token is a function of the last one.

Every layer adds zero, so the final hidden state is the last token's embedding, and the head is a table from token to
next token. All the arithmetic of the sizes is done all the same, so the model also serves to measure speed.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from echo_jax import arrays
from echo_jax.arrays import Params
from echo_jax.model import thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.text.tokenizer import Tokenizer


def scripted_model(
    tokenizer: Tokenizer, chains: Iterable[Sequence[int]], preset: str = "tiny"
) -> tuple[ThinkerConfig, Params]:
    """Builds the model.

    Args:
      tokenizer: its vocabulary and control tokens are the model's.
      chains: token ids that follow each other.
      preset: sizes, see `ThinkerConfig.preset`.

    Raises:
      ValueError: a token has two different successors.
    """
    config = ThinkerConfig.preset(
        preset,
        vocab_size=tokenizer.vocab_size,
        im_start_id=tokenizer.im_start_id,
        im_end_id=tokenizer.im_end_id,
        audio_token_id=tokenizer.audio_id,
        audio_bos_id=tokenizer.audio_bos_id,
        audio_eos_id=tokenizer.audio_eos_id,
        pad_id=tokenizer.pad_id,
    )
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, tie_embeddings=False)
    )
    specs = thinker.param_specs(config)
    params = arrays.map_with_path(lambda path, spec: np.zeros(spec.shape, np.float32), specs)
    language = params["language_model"]
    # Random directions are nearly orthogonal: a token's own product is 1, another's about 0.1.
    size = (config.text.vocab_size, config.text.hidden_size)
    directions = np.random.default_rng(0).normal(size=size).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    language["embed"]["embedding"] = directions
    language["final_norm"]["scale"] = np.ones_like(language["final_norm"]["scale"])
    successors: dict[int, int] = {}
    for token, following in itertools.chain.from_iterable(map(itertools.pairwise, chains)):
        if successors.setdefault(token, following) != following:
            raise ValueError(f"token {token} is followed by {successors[token]} and by {following}")
    for token, following in successors.items():
        language["lm_head"]["kernel"][:, following] += directions[token]
    return config, params


def single_tokens(tokenizer: Tokenizer, pieces: Iterable[str]) -> list[int]:
    """The id of each piece.

    Raises:
      ValueError: a piece is not a token of the vocabulary.
    """
    ids = []
    for piece in pieces:
        index = tokenizer.encode(piece)
        if len(index) != 1:
            raise ValueError(f"{piece!r} is {len(index)} tokens, not one")
        ids += index
    return ids
