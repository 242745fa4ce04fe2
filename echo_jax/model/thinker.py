"""The thinker: clips and tokens in, logits out; whole rows for training, prefill, extend and decode for sampling."""

import jax
import jax.numpy as jnp
from flax import struct

from echo_jax.arrays import ONE_DEVICE, Params, Placement
from echo_jax.model import audio_tower, frontend, language_model
from echo_jax.model.config import ThinkerConfig
from echo_jax.model.execution import PLAIN, Execution
from echo_jax.model.language_model import KVCache, Packing


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
    config: ThinkerConfig,
    params: Params,
    waveforms: jax.Array,
    num_samples: jax.Array,
    placement: Placement = ONE_DEVICE,
) -> jax.Array:
    """Waveforms to audio embeddings.

    Args:
      config: sizes.
      params: all arrays of the model.
      waveforms: f32[C, S], 16 kHz mono, S a multiple of 160, zero beyond num_samples.
      num_samples: i32[C].
      placement: over its `batch` the clips are divided.

    Returns:
      [C, T, hidden_size], T the tokens of a clip of S samples; the first `frontend.num_audio_tokens(num_samples)` of a
      clip are its tokens.
    """
    waveforms = placement.constrain(waveforms, "batch", None)
    mel = frontend.log_mel(waveforms, num_samples, config.audio.num_mel_bins)
    audio = audio_tower.encode_clips(
        config.audio, params["audio_tower"], mel, frontend.num_frames(num_samples), placement
    )
    # The tower's windows may reach beyond the buffer; what follows need not carry their padding.
    return audio[:, : frontend.num_audio_tokens(waveforms.shape[1])]


def merge_audio(
    x_ble: jax.Array,
    audio_cte: jax.Array,
    num_tokens: jax.Array,
    row: jax.Array,
    start: jax.Array,
    parts: int = 1,
) -> jax.Array:
    """Puts clips' embeddings in the place of those of their <|AUDIO|> tokens.

    Args:
      x_ble: [B, L, hidden_size].
      audio_cte: [C, T, hidden_size].
      num_tokens, row, start: i32[C], how many of T are real, and where they begin.
      parts: rows and clips are so many equal parts, and no clip belongs to a row of another part: then nothing moves
        between the devices that hold them.
    """
    (batch, length, width), (clips, tokens) = x_ble.shape, audio_cte.shape[:2]
    rows = batch // parts
    offsets = jnp.arange(tokens)

    def place_of(num_tokens: jax.Array, row: jax.Array, start: jax.Array) -> jax.Array:
        """i32[rows, L]: which of a part's embeddings belongs there, -1 for none."""
        columns = jnp.where(offsets < num_tokens[:, None], start[:, None] + offsets, length)
        which = jnp.arange(clips // parts)[:, None] * tokens + offsets
        empty = jnp.full((rows, length), -1)
        return empty.at[row[:, None] % rows, columns].set(which, mode="drop")

    split = (x.reshape(parts, clips // parts) for x in (num_tokens, row, start))
    place = jax.vmap(place_of)(*split)
    audio = audio_cte.astype(x_ble.dtype).reshape(parts, -1, width)
    heard = jax.vmap(lambda part, index: part[jnp.maximum(index, 0)])(audio, place)
    is_audio = (place >= 0).reshape(batch, length, 1)
    return jnp.where(is_audio, heard.reshape(x_ble.shape), x_ble)


def embed_tokens(
    config: ThinkerConfig,
    params: Params,
    tokens: jax.Array,
    clips: tuple[AudioClips, ...],
    placement: Placement = ONE_DEVICE,
) -> jax.Array:
    """Embeds rows of tokens and puts the sound in; i32[B, L] -> [B, L, hidden_size].

    Under a placement, clips and rows are divided alike: the clips of a group belong to rows of the same shard.
    """
    x = language_model.embed(params["language_model"], tokens, placement)
    x = placement.constrain(x, "batch", None, None)
    for group in clips:
        audio = encode_audio(config, params, group.waveforms, group.num_samples, placement)
        num_tokens = frontend.num_audio_tokens(group.num_samples)
        parts = placement.num_shards("batch")
        x = merge_audio(x, audio, num_tokens, group.row, group.start, parts)
        x = placement.constrain(x, "batch", None, None)
    return x


def forward_hidden(
    config: ThinkerConfig,
    params: Params,
    tokens: jax.Array,
    clips: tuple[AudioClips, ...] = (),
    packing: Packing | None = None,
    execution: Execution = PLAIN,
) -> jax.Array:
    """Final hidden states of whole rows; i32[B, L] -> [B, L, hidden_size]. See `language_model.forward`."""
    x = embed_tokens(config, params, tokens, clips, execution.placement)
    return language_model.forward(config.text, params["language_model"], x, packing, execution)


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
