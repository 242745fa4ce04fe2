"""The log-mel frontend against transformers' extractor and against the definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from echo_jax.model import frontend

RATE = frontend.SAMPLE_RATE
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def extractor() -> WhisperFeatureExtractor:
    """As Qwen2.5-Omni's processor configures it."""
    return WhisperFeatureExtractor(feature_size=128, chunk_length=300)


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def click(num_samples: int, position: int, floor: float = 0.0) -> np.ndarray:
        clip = floor * rng.normal(size=num_samples)
        clip[position] = 1.0
        return clip

    def noisy_tone(seconds: float, hz: float, noise: float) -> np.ndarray:
        time = np.arange(round(seconds * RATE)) / RATE
        return 0.5 * np.sin(2 * np.pi * hz * time) * (time % 1 < 0.6) + noise * rng.normal(
            size=len(time)
        )

    harmonics = sum(np.sin(2 * np.pi * 180 * n * np.arange(40_000) / RATE) / n for n in range(1, 9))
    made = {
        "0.1 s of noise": 0.3 * rng.normal(size=1600),
        "shortest inserted clip": 0.1 * rng.normal(size=3200),
        "one sample more than whole frames": 0.1 * rng.normal(size=3201),
        "whole frames": 0.1 * rng.normal(size=160 * 77),
        "one sample less than whole frames": 0.1 * rng.normal(size=160 * 77 - 1),
        "40 s of noise": 0.2 * rng.normal(size=40 * RATE),
        "tone in noise": noisy_tone(2.0, 880.0, 0.01),
        "high tone in noise": noisy_tone(1.5, 7800.0, 0.02),
        "harmonics": 0.2 * harmonics + 0.003 * rng.normal(size=40_000),
        "very quiet": 1e-5 * rng.normal(size=20_000),
        "silence": np.zeros(8_000),
        "click at the first sample": click(9_000, 0),
        "click at the last sample": click(16_077, -1),
        # The frames beyond the end see this click best: the clip's maximum lies in frames that are cut off.
        "click at the last sample over noise": click(16_000, -1, floor=1e-4),
        "click just before the end": click(16_100, -150, floor=1e-4),
    }
    return {name: clip.astype(np.float32) for name, clip in made.items()}


def padded(
    clips: list[np.ndarray], capacity: int, garbage: float = 5.0
) -> tuple[np.ndarray, np.ndarray]:
    waveforms = np.full((len(clips), capacity), garbage, np.float32)
    for row, clip in zip(waveforms, clips, strict=True):
        row[: len(clip)] = clip
    return waveforms, np.array([len(clip) for clip in clips], np.int32)


def reference(extractor: WhisperFeatureExtractor, clip: np.ndarray) -> np.ndarray:
    features = extractor(clip, sampling_rate=RATE, return_tensors="np").input_features[0]
    return features.T[: frontend.num_frames(len(clip))]


def definition(clip: np.ndarray) -> np.ndarray:
    """The same numbers in float64, frame by frame, from the definition."""
    samples = np.concatenate([clip.astype(np.float64), np.zeros(4 * 160)])
    samples = np.concatenate([samples[200:0:-1], samples])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    starts = range(0, len(samples) - 400 + 1, 160)
    frames = np.stack([samples[start : start + 400] * window for start in starts])
    mel = np.abs(np.fft.rfft(frames)) ** 2 @ frontend.mel_filter_bank().astype(np.float64)
    log_spec = np.log10(np.maximum(mel, 1e-10))
    log_spec = (np.maximum(log_spec, log_spec.max() - 8) + 4) / 4
    return log_spec[: frontend.num_frames(len(clip))]


def test_equals_the_extractor_on_a_ragged_batch(extractor, clips):
    waveforms, num_samples = padded(list(clips.values()), 40 * RATE)
    mel = np.asarray(jax.jit(frontend.log_mel)(waveforms, num_samples))
    assert mel.shape == (len(clips), 4000, 128)
    assert mel.dtype == np.float32
    for row, (name, clip) in zip(mel, clips.items(), strict=True):
        frames = frontend.num_frames(len(clip))
        error = np.abs(row[:frames] - reference(extractor, clip)).max()
        assert error < TOLERANCE, f"{name}: {error}"
        assert not row[frames:].any(), name


def test_a_clip_that_fills_the_extractor(extractor):
    # Here the right edge is reflected, not zeros, and the last frame is dropped.
    clip = (0.1 * np.random.default_rng(1).normal(size=300 * RATE)).astype(np.float32)
    full = np.asarray(frontend.log_mel(clip[None], np.array([len(clip)], np.int32)))[0]
    assert np.abs(full - reference(extractor, clip)).max() < TOLERANCE
    shorter = clip[: -160 - 50]
    mel = np.asarray(frontend.log_mel(*padded([shorter], 300 * RATE - 160)))[0]
    assert np.abs(mel - reference(extractor, shorter)).max() < TOLERANCE


@pytest.mark.parametrize("hz", [440.0, 700.0, 1000.0, 3210.0, 7900.0])
def test_clean_tones_are_as_exact_as_the_extractor(extractor, hz):
    """Bins 80 dB below a clean tone: float32 noise of the extractor itself reaches 1e-4 there."""
    clip = (0.9 * np.sin(2 * np.pi * hz * np.arange(5 * RATE + 1) / RATE)).astype(np.float32)
    ours = np.asarray(frontend.log_mel(*padded([clip], 5 * RATE + 160)))[0][: 5 * 100 + 1]
    exact, theirs = definition(clip), reference(extractor, clip)
    assert np.abs(ours - exact).max() < TOLERANCE
    assert np.abs(ours - theirs).max() < TOLERANCE + np.abs(theirs - exact).max()


def test_bins_far_below_a_loud_sound_are_as_exact_as_the_extractor(extractor):
    """A clean glide: among 128,000 numbers some bins fade to 80 dB below, where float32 ends."""
    pytest.importorskip("torch", reason="without torch the extractor computes in float64")
    time = np.arange(10 * RATE) / RATE
    glide = np.sin(2 * np.pi * (300 + 110 * time) * time)
    noise = np.random.default_rng(3).normal(size=len(time))
    clip = (0.7 * (glide + 0.003 * noise)).astype(np.float32)
    ours = np.asarray(frontend.log_mel(*padded([clip], len(clip))))[0]
    exact, theirs = definition(clip), reference(extractor, clip)
    assert np.abs(ours - exact).mean() <= np.abs(theirs - exact).mean()
    assert np.abs(ours - exact).max() < 3 * TOLERANCE
    assert (np.abs(ours - theirs) > TOLERANCE).mean() < 1e-5


def test_a_clip_does_not_depend_on_batch_buffer_or_garbage(clips):
    chosen = [clips[name] for name in ("0.1 s of noise", "tone in noise", "very quiet", "silence")]
    batch = np.asarray(frontend.log_mel(*padded(chosen, 160 * 300)))
    for row, clip in zip(batch, chosen, strict=True):
        frames = frontend.num_frames(len(clip))
        alone = np.asarray(frontend.log_mel(*padded([clip], 160 * frames, garbage=np.nan)))[0]
        np.testing.assert_allclose(row[:frames], alone, atol=2e-5)


def test_an_empty_slot_is_zero():
    mel = frontend.log_mel(np.full((2, 1600), 3.0, np.float32), np.zeros(2, np.int32))
    assert not np.asarray(mel).any()


def test_runs_inside_a_while_loop(clips):
    """The sampler crops segments and takes their mel in its loop."""
    clip = clips["tone in noise"]
    starts, length = jnp.array([0, 4321, 12_345]), 3_217
    capacity = 21 * 160

    def body(carry):
        step, out = carry
        crop = jax.lax.dynamic_slice(jnp.asarray(clip), (starts[step],), (capacity,))
        mel = frontend.log_mel(crop[None], jnp.array([length]))
        return step + 1, out.at[step].set(mel[0])

    empty = jnp.zeros((3, 21, 128))
    _, out = jax.jit(lambda: jax.lax.while_loop(lambda c: c[0] < 3, body, (0, empty)))()
    for mel, start in zip(np.asarray(out), np.asarray(starts), strict=True):
        np.testing.assert_allclose(mel, definition(clip[start : start + length]), atol=TOLERANCE)


def test_mel_filters_equal_the_extractors(extractor):
    expected = extractor.mel_filters.astype(np.float32)
    np.testing.assert_allclose(frontend.mel_filter_bank(), expected, atol=1e-9)
    # The spectrum leaves these two bins out.
    assert not frontend.mel_filter_bank()[[0, -1]].any()


def test_token_counts():
    seconds = {0.0: 0, 0.02: 0, 0.1: 2, 0.2: 5, 1.0: 25, 2.0: 50, 40.0: 1000}
    for duration, expected in seconds.items():
        assert frontend.num_audio_tokens(round(duration * RATE)) == expected
    counts = np.arange(0, 20_000)
    from_numpy = frontend.num_audio_tokens(counts)
    frames = -(-counts // 160)
    np.testing.assert_array_equal(from_numpy, ((frames - 1) // 2 + 1 - 2) // 2 + 1)
    np.testing.assert_array_equal(frontend.num_audio_tokens(jnp.asarray(counts)), from_numpy)
    assert frontend.num_audio_tokens(320) == 0
    assert frontend.num_audio_tokens(321) == 1


@pytest.mark.parametrize(
    ("shape", "counts"), [((2, 1601), 2), ((2, 0), 2), ((1, 300 * RATE + 160), 1), ((2, 1600), 3)]
)
def test_bad_shapes_are_refused(shape, counts):
    with pytest.raises(ValueError, match="log_mel"):
        frontend.log_mel(jnp.zeros(shape), jnp.zeros(counts, jnp.int32))
