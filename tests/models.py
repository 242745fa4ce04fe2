"""Small models whose answers are known, or likely, and questions for them.

`scripted_model` is certain of its next token, a function of the last one. `citing_model` draws, and cites, listens
again and stops by chance and not by training: its rollouts hold all that a trainer must replay.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax import arrays
from echo_jax.arrays import Params
from echo_jax.model import thinker
from echo_jax.model.config import AudioConfig, TextConfig, ThinkerConfig
from echo_jax.sampler import Prompts
from echo_jax.text import prompts as prompts_lib
from echo_jax.text.tokenizer import Tokenizer

CITING_TEXTS = ("system user\nassistant\n What?", "<seg>1.0, 2</seg> ok A", "</seg>, ")


def small_config(tokenizer: Tokenizer, hidden_size: int, **text: float) -> ThinkerConfig:
    """One audio layer and two text layers; `text` replaces sizes of the language model."""
    sizes = {
        "vocab_size": tokenizer.vocab_size,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "ffn_dim": 40,
    }
    return ThinkerConfig(
        audio=AudioConfig(
            num_layers=1, d_model=16, num_heads=2, ffn_dim=24, output_dim=hidden_size
        ),
        text=TextConfig(hidden_size=hidden_size, **{**sizes, **text}),
        **tokenizer.config_ids,
    )


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


def noise_prompts(
    tokenizer: Tokenizer,
    questions: Sequence[tuple[int, str]],
    seed: int = 0,
    capacity: int | None = None,
) -> Prompts:
    """A recording of noise and a text for each pair of samples and text; `capacity` is the length of the buffers."""
    rng = np.random.default_rng(seed)
    chats = []
    for samples, text in questions:
        user = prompts_lib.Message("user", [prompts_lib.Audio(samples), text])
        chats.append(prompts_lib.encode_chat(tokenizer, [user], add_generation_prompt=True))
    num_samples = np.array([samples for samples, _ in questions], np.int32)
    length = np.array([len(chat.tokens) for chat in chats], np.int32)
    tokens = np.full((len(chats), length.max()), tokenizer.pad_id, np.int32)
    waveforms = np.zeros((len(chats), capacity or num_samples.max()), np.float32)
    for row, chat in enumerate(chats):
        tokens[row, : length[row]] = chat.tokens
        waveforms[row, : num_samples[row]] = rng.normal(0, 0.1, num_samples[row])
    starts = np.array([chat.audio_starts[0] for chat in chats], np.int32)
    return Prompts(tokens, length, waveforms, num_samples, starts)


def directions(config: ThinkerConfig) -> np.ndarray:
    """f32[V, hidden_size] of length 1, nearly orthogonal: a token's own product is 1, another's much less."""
    size = (config.text.vocab_size, config.text.hidden_size)
    drawn = np.random.default_rng(0).normal(size=size)
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def scripted_model(
    tokenizer: Tokenizer, chains: Iterable[Sequence[int]], preset: str = "tiny"
) -> tuple[ThinkerConfig, Params]:
    """A model whose next token is a function of the last one.

    Every layer adds zero, so the final hidden state is the last token's embedding, and the head is a table from token
    to next token. All the arithmetic of the sizes is done all the same, so the model also serves to measure speed.

    Args:
      tokenizer: its vocabulary and control tokens are the model's.
      chains: token ids that follow each other.
      preset: sizes, see `ThinkerConfig.preset`.

    Raises:
      ValueError: a token has two different successors.
    """
    config = ThinkerConfig.preset(preset, vocab_size=tokenizer.vocab_size, **tokenizer.config_ids)
    config = dataclasses.replace(
        config, text=dataclasses.replace(config.text, tie_embeddings=False)
    )
    specs = thinker.param_specs(config)
    params = arrays.map_with_path(lambda path, spec: np.zeros(spec.shape, np.float32), specs)
    language = params["language_model"]
    own = language["embed"]["embedding"] = directions(config)
    language["final_norm"]["scale"] = np.ones_like(language["final_norm"]["scale"])
    successors: dict[int, int] = {}
    for token, following in itertools.chain.from_iterable(map(itertools.pairwise, chains)):
        if successors.setdefault(token, following) != following:
            raise ValueError(f"token {token} is followed by {successors[token]} and by {following}")
    for token, following in successors.items():
        language["lm_head"]["kernel"][:, following] += own[token]
    return config, params


def citing_tokenizer() -> Tokenizer:
    """A vocabulary of single bytes and few words."""
    return Tokenizer.from_qwen_wheel().compact(CITING_TEXTS)


def citing_model(
    tokenizer: Tokenizer, config: ThinkerConfig | None = None
) -> tuple[ThinkerConfig, Params]:
    """Random layers between an embedding and a head that make citations likely, but nothing certain.

    `config` gives other sizes than those of `small_config`, with a head of its own.
    """
    config = config or small_config(tokenizer, 32)
    # The last norm makes hidden states as long as they are wide.
    sharpness = math.sqrt(32 / config.text.hidden_size)
    params = arrays.init_params(thinker.param_specs(config), jax.random.key(1))
    language = params["language_model"]
    own = directions(config)
    language["embed"]["embedding"] = jnp.asarray(own * 8)
    head = np.random.default_rng(1).normal(size=own.T.shape) * 0.1

    def follow(chain: list[int], weight: float) -> None:
        for token, following in itertools.pairwise(chain):
            head[:, following] += own[token] * weight * sharpness

    def ids(*pieces: str) -> list[int]:
        return single_tokens(tokenizer, pieces)

    follow(ids("\n", "<"), 2.6)
    follow(ids("<", "seg", ">", "1", ".", "0", ",", " ", "2", "</", "seg", ">"), 2.6)
    follow(ids(">", "0"), 1.9)  # another citation, of another length
    follow([tokenizer.audio_eos_id, *ids(" ok", "<")], 2.6)
    follow([tokenizer.audio_eos_id, *ids("A", "<")], 2.3)  # a fresh start, which costs consistency
    follow([tokenizer.audio_eos_id, tokenizer.im_end_id], 2.4)
    language["lm_head"]["kernel"] = jnp.asarray(head, jnp.float32)
    return config, params
