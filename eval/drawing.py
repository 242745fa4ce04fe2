"""Pictures and sounds for a page that works offline: spectrogram PNG, curve SVG, WAV, as plain bytes or text."""

import base64
import html
import io
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import soundfile

from echo_jax.model import frontend

MAX_COLUMNS = 1_000
"""Widest spectrogram in pixels; longer recordings are averaged in time."""

# Dark to bright, evenly rising in lightness, so that it also reads in grey.
_RAMP = np.array(
    [
        (3, 3, 12),
        (44, 16, 84),
        (104, 28, 109),
        (163, 48, 96),
        (213, 80, 66),
        (243, 133, 34),
        (249, 196, 52),
        (252, 252, 170),
    ],
    np.float64,
)


def spectrogram_png(log_mel: np.ndarray) -> bytes:
    """Draws a log-mel spectrogram, low bands at the bottom.

    Args:
        log_mel: f32[frames, bands], frames of 10 ms that carry the recording.

    Returns:
        An 8-bit indexed PNG of `bands` rows and at most `MAX_COLUMNS` columns.
    """
    frames = len(log_mel)
    if frames > MAX_COLUMNS:
        edges = np.linspace(0, frames, MAX_COLUMNS + 1).astype(int)
        widths = np.diff(edges)[:, None]
        log_mel = np.add.reduceat(log_mel, edges[:-1], axis=0) / widths
    top = float(log_mel.max())
    # The frontend keeps 80 dB below the maximum, which is 2 in its units.
    level = np.clip((log_mel - (top - 2.0)) / 2.0, 0.0, 1.0)
    pixels = np.ascontiguousarray(np.rint(level * 255).astype(np.uint8).T[::-1])
    height, width = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1)  # filter type 0
    places = np.linspace(0, len(_RAMP) - 1, 256)
    palette = np.stack(
        [np.interp(places, np.arange(len(_RAMP)), _RAMP[:, channel]) for channel in range(3)],
        axis=1,
    )
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            _png_chunk(b"PLTE", np.rint(palette).astype(np.uint8).tobytes()),
            _png_chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            _png_chunk(b"IEND", b""),
        ]
    )


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def wav_bytes(waveform: np.ndarray) -> bytes:
    """Encodes f32[samples] at 16 kHz as a 16-bit WAV file."""
    buffer = io.BytesIO()
    soundfile.write(
        buffer, np.clip(waveform, -1.0, 1.0), frontend.SAMPLE_RATE, format="WAV", subtype="PCM_16"
    )
    return buffer.getvalue()


def data_uri(media_type: str, body: bytes) -> str:
    """Returns the bytes as a `data:` URI, so that no second file is needed."""
    return f"data:{media_type};base64,{base64.b64encode(body).decode('ascii')}"


def curve_svg(name: str, points: Sequence[tuple[float, float]]) -> str:
    """Draws one curve over training steps: the values, and over them their moving average.

    Args:
        name: what is drawn.
        points: (step, value), steps rising, at least one.
    """
    width, height, left, right, top, bottom = 320, 150, 46, 8, 10, 20
    # A step may be drawn a pixel wide at best; every n-th is enough.
    stride = -(-len(points) // 400)
    average, smooth = points[0][1], []
    weight = 1.0 - math.exp(-1.0 / max(1.0, len(points) / 40))
    for step, value in points:
        average += weight * (value - average)
        smooth.append((step, average))
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1.0), high + (abs(high) or 1.0)
    span = max(steps[-1] - steps[0], 1e-9)

    def path(series: Sequence[tuple[float, float]]) -> str:
        kept = [*series[:-1:stride], series[-1]]
        return " ".join(
            f"{left + (step - steps[0]) / span * (width - left - right):.1f},"
            f"{top + (high - value) / (high - low) * (height - top - bottom):.1f}"
            for step, value in kept
        )

    label = html.escape(f"{name}: from {values[0]:.4g} to {values[-1]:.4g}", quote=True)
    base = height - bottom
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f'<path class="axis" d="M{left} {top}V{base}H{width - right}"/>'
        f'<polyline class="raw" points="{path(points)}"/>'
        f'<polyline class="smooth" points="{path(smooth)}"/>'
        f'<text x="{left - 4}" y="{top + 8}" text-anchor="end">{high:.2g}</text>'
        f'<text x="{left - 4}" y="{base}" text-anchor="end">{low:.2g}</text>'
        f'<text x="{left}" y="{height - 5}">{steps[0]:g}</text>'
        f'<text x="{width - right}" y="{height - 5}" text-anchor="end">step {steps[-1]:g}</text>'
        "</svg>"
    )


def interval_svg(value: float, low: float, high: float) -> str:
    """Draws a fraction and its interval on a line from 0 to 1 (decorative: the table says the numbers)."""
    return (
        '<svg class="interval" viewBox="0 0 100 10" aria-hidden="true" preserveAspectRatio="none">'
        '<path class="axis" d="M0 9.5H100"/>'
        f'<rect class="range" x="{100 * low:.2f}" y="3" width="{100 * (high - low):.2f}" height="4"/>'
        f'<rect class="point" x="{max(0.0, 100 * value - 0.6):.2f}" y="1" width="1.2" height="8"/>'
        "</svg>"
    )
