"""The audio tower: log-mel windows of two seconds to audio embeddings at 25 tokens a second.

Architecture: the audio encoder of Qwen2.5-Omni (arXiv 2503.20215, section 2.2, and its published configuration): two
convolutions and sinusoidal positions per window, pre-norm transformer layers whose attention never leaves the window,
pooling of frame pairs, LayerNorm and a projection to the language model's width. Windows are independent, so every
window of every clip of a batch is one row of a dense [windows, frames, mels] array.
"""

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.arrays import ONE_DEVICE, ArraySpec, Params, Placement
from echo_jax.model.config import AudioConfig

_LAYER_NORM_EPS = 1e-5


def param_specs(config: AudioConfig) -> dict:
    """Declares the tower's arrays."""
    n, d, h, k, f = (
        config.num_layers,
        config.d_model,
        config.num_heads,
        config.head_dim,
        config.ffn_dim,
    )

    def norm(*lead: int) -> dict:
        axes = ("layers",) * len(lead) + ("embed",)
        return {
            "scale": ArraySpec((*lead, d), axes, "ones"),
            "bias": ArraySpec((*lead, d), axes, "zeros"),
        }

    qkv_kernel = ArraySpec((n, d, h, k), ("layers", "embed", "heads", "head_dim"), "fan_in", (1,))
    qkv_bias = ArraySpec((n, h, k), ("layers", "heads", "head_dim"), "zeros")
    return {
        "conv1": {
            "kernel": ArraySpec(
                (3, config.num_mel_bins, d), (None, None, "embed"), "fan_in", (0, 1)
            ),
            "bias": ArraySpec((d,), ("embed",), "zeros"),
        },
        "conv2": {
            # With variance 1 / fan-in, what conv2 puts out is of order 0.1 and the positions added to it of order 1:
            # the sound was 2 % of the tower's variance, and learning to tell sounds apart began with finding it.
            "kernel": ArraySpec((3, d, d), (None, None, "embed"), "unit"),
            "bias": ArraySpec((d,), ("embed",), "zeros"),
        },
        "layers": {
            "attn_norm": norm(n),
            "q": {"kernel": qkv_kernel, "bias": qkv_bias},
            "k": {"kernel": qkv_kernel},
            "v": {"kernel": qkv_kernel, "bias": qkv_bias},
            "o": {
                "kernel": ArraySpec(
                    (n, h, k, d), ("layers", "heads", "head_dim", "embed"), "fan_in", (1, 2)
                ),
                "bias": ArraySpec((n, d), ("layers", "embed"), "zeros"),
            },
            "mlp_norm": norm(n),
            "fc1": {
                "kernel": ArraySpec((n, d, f), ("layers", "embed", "mlp"), "fan_in", (1,)),
                "bias": ArraySpec((n, f), ("layers", "mlp"), "zeros"),
            },
            "fc2": {
                "kernel": ArraySpec((n, f, d), ("layers", "mlp", "embed"), "fan_in", (1,)),
                "bias": ArraySpec((n, d), ("layers", "embed"), "zeros"),
            },
        },
        "ln_post": norm(),
        "proj": {
            "kernel": ArraySpec((d, config.output_dim), (None, "embed"), "fan_in", (0,)),
            "bias": ArraySpec((config.output_dim,), ("embed",), "zeros"),
        },
        # Present in released checkpoints and read by no forward pass; kept so that an export is complete.
        "audio_bos_eos": {"embedding": ArraySpec((2, config.output_dim), (None, "embed"), "unit")},
    }


def sinusoids(length: int, channels: int) -> np.ndarray:
    """Whisper's positions: sines then cosines of geometric timescales from 1 to 10,000; f32[length, channels]."""
    increment = np.log(10_000) / (channels // 2 - 1)
    timescales = np.exp(-increment * np.arange(channels // 2))
    angles = np.arange(length)[:, None] * timescales[None]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def _layer_norm(params: Params, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
    normed = (x32 - mean) * jax.lax.rsqrt(variance + _LAYER_NORM_EPS)
    return (normed * params["scale"] + params["bias"]).astype(x.dtype)


def _conv3(params: Params, x_wtc: jax.Array, stride: int) -> jax.Array:
    """Convolution over time, kernel 3, padding 1, as three matrix products; [W, T, C] -> [W, T // stride, D]."""
    frames = x_wtc.shape[1]
    padded = jnp.pad(x_wtc, ((0, 0), (1, 1), (0, 0)))
    taps = (padded[:, tap : tap + frames : stride] @ params["kernel"][tap] for tap in range(3))
    return sum(taps, start=params["bias"])


def encode_windows(
    config: AudioConfig,
    params: Params,
    mel_wfm: jax.Array,
    num_frames_w: jax.Array,
    placement: Placement = ONE_DEVICE,
) -> jax.Array:
    """Encodes independent windows.

    Args:
      config: sizes.
      params: the tower's arrays.
      mel_wfm: f32[W, 2 * half_window, mels], zero beyond each window's frames.
      num_frames_w: i32[W], valid mel frames of each window, 0 for padding windows.
      placement: over its `batch` the windows are divided.

    Returns:
      [W, half_window // 2, output_dim]; entries that pool a frame beyond a window's end are meaningless.
    """
    dtype = params["conv1"]["kernel"].dtype
    frame_valid = jnp.arange(config.window_frames) < num_frames_w[:, None]
    x = jax.nn.gelu(_conv3(params["conv1"], mel_wfm.astype(dtype), stride=1), approximate=False)
    x = jnp.where(frame_valid[..., None], x, 0)
    x = jax.nn.gelu(_conv3(params["conv2"], x, stride=2), approximate=False)
    x = x + sinusoids(config.half_window, config.d_model).astype(dtype)
    key_valid = jnp.arange(config.half_window) < (num_frames_w[:, None] + 1) // 2
    # Finite, so that a window without any valid frame gives numbers (never read) and not NaN gradients.
    key_bias = jnp.where(key_valid, 0.0, -1e30)[:, None, None, :]

    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        y = _layer_norm(p["attn_norm"], x)
        q = jnp.einsum("wtd,dhk->wthk", y, p["q"]["kernel"]) + p["q"]["bias"]
        k = jnp.einsum("wtd,dhk->wthk", y, p["k"]["kernel"])
        v = jnp.einsum("wtd,dhk->wthk", y, p["v"]["kernel"]) + p["v"]["bias"]
        scores = jnp.einsum(
            "wqhk,wshk->whqs", q * config.head_dim**-0.5, k, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(scores + key_bias, axis=-1).astype(dtype)
        attended = jnp.einsum("whqs,wshk->wqhk", weights, v)
        x = x + jnp.einsum("wqhk,hkd->wqd", attended, p["o"]["kernel"]) + p["o"]["bias"]
        y = _layer_norm(p["mlp_norm"], x)
        y = jax.nn.gelu(y @ p["fc1"]["kernel"] + p["fc1"]["bias"], approximate=False)
        x = x + y @ p["fc2"]["kernel"] + p["fc2"]["bias"]
        return placement.constrain(x, "batch", None, None), None

    x = placement.constrain(x, "batch", None, None)
    x, _ = jax.lax.scan(layer, x, params["layers"])
    windows = x.shape[0]
    pooled = x.reshape(windows, config.window_tokens, 2, config.d_model).mean(axis=2)
    return (
        _layer_norm(params["ln_post"], pooled) @ params["proj"]["kernel"] + params["proj"]["bias"]
    )


def encode_clips(
    config: AudioConfig,
    params: Params,
    mel_cfm: jax.Array,
    num_frames_c: jax.Array,
    placement: Placement = ONE_DEVICE,
) -> jax.Array:
    """Encodes clips of equal buffer length.

    Args:
      config: sizes.
      params: the tower's arrays.
      mel_cfm: f32[C, F, mels]; F is padded up to whole windows here.
      num_frames_c: i32[C], valid mel frames of each clip.
      placement: over its `batch` the clips are divided.

    Returns:
      [C, windows * half_window // 2, output_dim]: the tokens of a clip are contiguous from index 0.
    """
    clips, frames, mels = mel_cfm.shape
    windows = -(-frames // config.window_frames)
    mel_cfm = jnp.pad(mel_cfm, ((0, 0), (0, windows * config.window_frames - frames), (0, 0)))
    starts = jnp.arange(windows) * config.window_frames
    num_frames = jnp.clip(num_frames_c[:, None] - starts, 0, config.window_frames)
    embeddings = encode_windows(
        config,
        params,
        mel_cfm.reshape(clips * windows, config.window_frames, mels),
        num_frames.reshape(clips * windows),
        placement,
    )
    return embeddings.reshape(clips, windows * config.window_tokens, config.output_dim)
