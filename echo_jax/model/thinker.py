"""The thinker: clips and tokens in, logits out; whole rows for training, prefill, extend and decode for sampling."""

import jax
import jax.numpy as jnp
from flax import struct

from echo_jax.arrays import Params
from echo_jax.model import audio_tower, frontend, language_model
from echo_jax.model.config import ThinkerConfig
from echo_jax.model.language_model import KVCache


class AudioClips(struct.PyTreeNode):
    """Clips of one buffer length and where their embeddings go.

    A slot with num_samples 0 is unused. A forward pass takes several groups, so that ten-second prompts and two-second
    segments do not share one padded length.
    """

    waveforms: jax.Array  # f32[C, S], 16 kHz mono, zero beyond num_samples; S a multiple of 160
    num_samples: jax.Array  # i32[C]
    row: jax.Array  # i32[C], the batch row that hears the clip
    start: jax.Array  # i32[C], index in that row of the clip's first <|AUDIO|> token


def param_specs(config: ThinkerConfig) -> dict:
    """Declares every array of the model."""
    return {
        "audio_tower": audio_tower.param_specs(config.audio),
        "language_model": language_model.param_specs(config.text),
    }


def encode_audio(
    config: ThinkerConfig, params: Params, waveforms: jax.Array, num_samples: jax.Array
) -> jax.Array:
    """Waveforms to audio embeddings.

    Args:
      config: sizes.
      params: all arrays of the model.
      waveforms: f32[C, S], 16 kHz mono, S a multiple of 160, zero beyond num_samples.
      num_samples: i32[C].

    Returns:
      [C, T, hidden_size], T the tokens of a clip of S samples; the first `frontend.num_audio_tokens(num_samples)` of a
      clip are its tokens.
    """
    mel = frontend.log_mel(waveforms, num_samples, config.audio.num_mel_bins)
    audio = audio_tower.encode_clips(
        config.audio, params["audio_tower"], mel, frontend.num_frames(num_samples)
    )
    # The tower's windows may reach beyond the buffer; what follows need not carry their padding.
    return audio[:, : frontend.num_audio_tokens(waveforms.shape[1])]


def merge_audio(
    x_ble: jax.Array, audio_cte: jax.Array, num_tokens: jax.Array, row: jax.Array, start: jax.Array
) -> jax.Array:
    """Writes clips' embeddings over the embeddings of their <|AUDIO|> tokens."""
    length = x_ble.shape[1]
    offsets = jnp.arange(audio_cte.shape[1])
    columns = jnp.where(offsets < num_tokens[:, None], start[:, None] + offsets, length)
    return x_ble.at[row[:, None], columns].set(audio_cte.astype(x_ble.dtype), mode="drop")


def embed_tokens(
    config: ThinkerConfig, params: Params, tokens: jax.Array, clips: tuple[AudioClips, ...]
) -> jax.Array:
    """Embeds rows of tokens and puts the sound in; i32[B, L] -> [B, L, hidden_size]."""
    x = language_model.embed(params["language_model"], tokens)
    for group in clips:
        audio = encode_audio(config, params, group.waveforms, group.num_samples)
        x = merge_audio(
            x, audio, frontend.num_audio_tokens(group.num_samples), group.row, group.start
        )
    return x


def forward_hidden(
    config: ThinkerConfig,
    params: Params,
    tokens: jax.Array,
    clips: tuple[AudioClips, ...] = (),
    remat: bool = False,
) -> jax.Array:
    """Final hidden states of whole right-padded rows; i32[B, L] -> [B, L, hidden_size]."""
    x = embed_tokens(config, params, tokens, clips)
    return language_model.forward(config.text, params["language_model"], x, remat)


def forward(
    config: ThinkerConfig, params: Params, tokens: jax.Array, clips: tuple[AudioClips, ...] = ()
) -> jax.Array:
    """Logits of whole right-padded rows; i32[B, L] -> f32[B, L, vocab_size]."""
    return language_model.unembed(
        params["language_model"], forward_hidden(config, params, tokens, clips)
    )


def prefill(
    config: ThinkerConfig,
    params: Params,
    tokens: jax.Array,
    num_tokens: jax.Array,
    clips: tuple[AudioClips, ...],
    slots: int,
) -> tuple[jax.Array, KVCache]:
    """Runs prompts into a fresh cache.

    Args:
      config: sizes.
      params: all arrays of the model.
      tokens: i32[B, P], right padded.
      num_tokens: i32[B].
      clips: the prompts' audio.
      slots: length of the cache, at least P.

    Returns:
      f32[B, vocab_size] logits after each row's last token, and the cache.
    """
    batch = len(tokens)
    x = embed_tokens(config, params, tokens, clips)
    cache = KVCache.empty(config.text, batch, slots, x.dtype)
    hidden, cache = language_model.prefill(
        config.text, params["language_model"], cache, x, num_tokens, jnp.arange(batch)[:, None]
    )
    return _last_logits(params, hidden, num_tokens), cache


def extend(
    config: ThinkerConfig,
    params: Params,
    cache: KVCache,
    x_bte: jax.Array,
    num_new: jax.Array,
    visible_slots: int | None = None,
) -> tuple[jax.Array, KVCache]:
    """Appends a chunk of embeddings; returns f32[B, vocab_size] logits after each row's last new entry."""
    hidden, cache = language_model.extend(
        config.text, params["language_model"], cache, x_bte, num_new, visible_slots
    )
    return _last_logits(params, hidden, num_new), cache


def _last_logits(params: Params, hidden_bte: jax.Array, num_tokens: jax.Array) -> jax.Array:
    last = jnp.maximum(num_tokens - 1, 0)
    last_hidden = jnp.take_along_axis(hidden_bte, last[:, None, None], axis=1)[:, 0]
    return language_model.unembed(params["language_model"], last_hidden)


def decode_step(
    config: ThinkerConfig,
    params: Params,
    cache: KVCache,
    tokens: jax.Array,
    active: jax.Array,
    visible_slots: int | None = None,
) -> tuple[jax.Array, KVCache]:
    """Feeds one token to each active row; i32[B], bool[B] -> f32[B, vocab_size] and the grown cache.

    `visible_slots` is that of `language_model.extend`.
    """
    x = language_model.embed(params["language_model"], tokens)[:, None]
    return extend(config, params, cache, x, active.astype(jnp.int32), visible_slots)
