"""Waveform -> log-mel spectrogram on the device, equal to the Whisper feature extractor.

The numbers are those of `transformers.WhisperFeatureExtractor` as Qwen2.5-Omni uses it (16 kHz mono, 400-point
periodic Hann STFT with hop 160, 128 Slaney mel bins, every clip padded with zeros to 300 s before the STFT),
for the frames that carry the clip. Padding to 300 s is never materialised: only the frames just beyond the end
still see samples, and they matter for the clip's maximum alone.
"""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

SAMPLE_RATE = 16_000
HOP_SAMPLES = 160
FFT_SAMPLES = 400
NUM_MEL_BINS = 128
MAX_CLIP_SAMPLES = 300 * SAMPLE_RATE  # the extractor's chunk_length: longer clips would be cut

_BLOCK = 80  # gcd(HOP_SAMPLES, FFT_SAMPLES): a frame is 5 whole blocks, a hop 2
_HALF = FFT_SAMPLES // 2
_POWER_FLOOR = 1e-10
_RANGE_LOG10 = 8.0
# A TPU multiplies in bfloat16 by default, which is 100 times too coarse for 1e-4 on a log scale.
_PRECISION = jax.lax.Precision.HIGHEST

Count = TypeVar("Count", int, np.ndarray, jax.Array)


def num_frames(num_samples: Count) -> Count:
    """Mel frames of a clip: ceil(samples / 160). Works on int, numpy and jax arrays."""
    return -(-num_samples // HOP_SAMPLES)


def num_audio_tokens(num_samples: Count) -> Count:
    """Audio tokens of a clip of `num_samples` samples at 16 kHz, 25 a second.

    `((F-1)//2+1-2)//2+1` with F mel frames (`_get_feat_extract_output_lengths` of Qwen2.5-Omni): conv2 has
    stride 2, then pairs are averaged. A clip of 320 samples or fewer has no token. Works on int, numpy and jax.
    """
    return ((num_frames(num_samples) - 1) // 2 - 1) // 2 + 1


def log_mel(
    waveforms: jax.Array, num_samples: jax.Array, num_mel_bins: int = NUM_MEL_BINS
) -> jax.Array:
    """Log-mel spectrogram of a ragged batch of clips; jittable, also inside `lax.while_loop`.

    Args:
      waveforms: f32[C, S] 16 kHz mono; S is a multiple of 160 and at most 300 s. What lies at or beyond a
        clip's `num_samples` is ignored, so buffers need not be cleared.
      num_samples: i32[C] valid samples of each clip, 0 for an empty slot.
      num_mel_bins: mel bands (128 in every Qwen2.5-Omni checkpoint).

    Returns:
      f32[C, S // 160, num_mel_bins]; frames at or beyond ceil(num_samples / 160) are zero.

    Raises:
      ValueError: for a shape outside the above.
    """
    if waveforms.ndim != 2 or num_samples.shape != waveforms.shape[:1]:
        raise ValueError(
            f"log_mel wants waveforms [C, S] and num_samples [C], got {waveforms.shape} and {num_samples.shape}"
        )
    capacity = waveforms.shape[1]
    if capacity == 0 or capacity % HOP_SAMPLES or capacity > MAX_CLIP_SAMPLES:
        raise ValueError(
            f"log_mel: waveform length {capacity} must be a positive multiple of {HOP_SAMPLES} and at most "
            f"{MAX_CLIP_SAMPLES} samples"
        )
    valid = jnp.arange(capacity) < num_samples[:, None]
    samples = jnp.where(valid, waveforms.astype(jnp.float32), 0.0)

    # Bins 0 and 200 lie on the outer edges of the outermost filters, where every weight is 0.
    power = _power_spectrum(_frames(samples))
    mel = jnp.matmul(power, mel_filter_bank(num_mel_bins)[1:-1], precision=_PRECISION)
    log_spec = jnp.log10(jnp.maximum(mel, _POWER_FLOOR))

    loudest = jnp.max(log_spec, axis=(1, 2), keepdims=True)
    log_spec = (jnp.maximum(log_spec, loudest - _RANGE_LOG10) + 4.0) / 4.0
    log_spec = log_spec[:, : capacity // HOP_SAMPLES]
    inside = jnp.arange(log_spec.shape[1]) < num_frames(num_samples)[:, None]
    return jnp.where(inside[:, :, None], log_spec, 0.0)


def _frames(samples: jax.Array) -> jax.Array:
    """Centred STFT frames f32[C, T, 400] of f32[C, S]: all that can see a sample, T = S // 160 + 2.

    Frame t covers samples 160 t - 200 ... 160 t + 199. The left edge is reflected (torch.stft with center=True),
    the right edge is zeros until 300 s, where the extractor reflects again and keeps 30,000 frames.
    """
    capacity = samples.shape[1]
    count = min(capacity // HOP_SAMPLES + 2, MAX_CLIP_SAMPLES // HOP_SAMPLES)
    end = (count - 1) * HOP_SAMPLES + _HALF
    overhang = max(end - MAX_CLIP_SAMPLES, 0)
    samples = jnp.pad(samples, ((0, 0), (0, end - overhang - capacity)))
    samples = jnp.pad(samples, ((0, 0), (_HALF, overhang)), mode="reflect")
    # Strided slices of whole blocks instead of a gather: frame t is blocks 2 t ... 2 t + 4.
    blocks = samples.reshape(samples.shape[0], -1, _BLOCK)
    stride = HOP_SAMPLES // _BLOCK
    parts = [
        blocks[:, k : k + stride * (count - 1) + 1 : stride] for k in range(FFT_SAMPLES // _BLOCK)
    ]
    return jnp.concatenate(parts, axis=-1)


def _power_spectrum(frames: jax.Array) -> jax.Array:
    """|STFT|^2 of f32[..., 400] frames at bins 1 ... 199, f32[..., 199].

    A DFT by matrix product rather than `jnp.fft`: it shards over clips without a gather, keeps its precision on
    TPU, and costs about the same on a CPU. The frame is first folded about its middle (cosine is even, sine is
    odd), which halves the work and, adding before rounding, keeps the quiet bins beside a loud tone accurate.
    """
    cosine, sine = _windowed_dft()
    left, right = frames[..., 1:_HALF], frames[..., :_HALF:-1]
    even = jnp.concatenate([left + right, frames[..., _HALF : _HALF + 1]], axis=-1)
    real = jnp.matmul(even, cosine, precision=_PRECISION)
    imag = jnp.matmul(left - right, sine, precision=_PRECISION)
    return jnp.square(real) + jnp.square(imag)


@functools.cache
def _windowed_dft() -> tuple[np.ndarray, np.ndarray]:
    """Cosine f32[200, 199] (samples 1 ... 200) and sine f32[199, 199] (samples 1 ... 199) of bins 1 ... 199.

    Both times the periodic Hann window, which is 0 at sample 0.
    """
    sample, frequency_bin = np.arange(1, _HALF + 1)[:, None], np.arange(1, _HALF)
    hann = 0.5 - 0.5 * np.cos(2.0 * np.pi * sample / FFT_SAMPLES)
    phase = 2.0 * np.pi * (sample * frequency_bin % FFT_SAMPLES) / FFT_SAMPLES
    cosine, sine = hann * np.cos(phase), hann[:-1] * np.sin(phase[:-1])
    return cosine.astype(np.float32), sine.astype(np.float32)


@functools.cache
def mel_filter_bank(num_mel_bins: int = NUM_MEL_BINS) -> np.ndarray:
    """Triangular mel filters, f32[201, num_mel_bins], 0 to 8 kHz, on Slaney's scale with Slaney's area norm.

    Slaney's Auditory Toolbox scale (1998): linear, 200/3 Hz a mel, up to 1 kHz; above it logarithmic, 27 mel to
    a factor of 6.4. Each triangle is divided by half its width in Hz.
    """
    nyquist_hz = SAMPLE_RATE / 2.0
    mel_max = _hz_to_mel(nyquist_hz)
    edges_hz = np.array(
        [_mel_to_hz(mel_max * i / (num_mel_bins + 1)) for i in range(num_mel_bins + 2)]
    )
    bins_hz = np.linspace(0.0, nyquist_hz, _HALF + 1)[:, None]
    low, centre, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising = (bins_hz - low) / (centre - low)
    falling = (high - bins_hz) / (high - centre)
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return (triangles * 2.0 / (high - low)).astype(np.float32)


_LINEAR_HZ_PER_MEL = 200.0 / 3.0
_LOG_START_HZ = 1000.0
_LOG_START_MEL = _LOG_START_HZ / _LINEAR_HZ_PER_MEL
_LOG_STEP = np.log(6.4) / 27.0


def _hz_to_mel(frequency_hz: float) -> float:
    if frequency_hz < _LOG_START_HZ:
        return frequency_hz / _LINEAR_HZ_PER_MEL
    return _LOG_START_MEL + float(np.log(frequency_hz / _LOG_START_HZ)) / _LOG_STEP


def _mel_to_hz(mel: float) -> float:
    if mel < _LOG_START_MEL:
        return mel * _LINEAR_HZ_PER_MEL
    return _LOG_START_HZ * float(np.exp(_LOG_STEP * (mel - _LOG_START_MEL)))
