"""How far the JAX model is from transformers, on random small models that differ in every size.

    python -m tests.parity             # the cases of the test suite
    python -m tests.parity --random 8  # and eight more, with every size drawn at random

For each case: transformers' thinker with random weights is saved, loaded here from that directory, and both hear the
same ragged batch. Printed are the largest errors of the log-mel (absolute, limit 1e-4), of the audio tower's
embeddings (relative to the largest one) and of the logits (relative to the largest one, limit 1e-4), all in float32;
and of a batch against its rows one by one.
"""

import argparse
import dataclasses
import functools
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import torch
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)

from echo_jax import huggingface
from echo_jax.arrays import Params
from echo_jax.model import frontend, thinker
from echo_jax.model.config import ThinkerConfig

RATE = frontend.SAMPLE_RATE


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one model and the clips each row of the batch hears, in seconds."""

    name: str
    rows: tuple[tuple[float, ...], ...]
    audio_layers: int
    audio_heads: int
    audio_head_dim: int
    audio_ffn: int
    half_window: int
    mels: int
    text_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocabulary: int
    mrope_section: tuple[int, int, int]
    rope_theta: float
    rms_norm_eps: float
    tied: bool
    seed: int = 0


CASES = (
    Case(
        name="grouped",
        rows=((0.1, 3.0), (12.34,)),
        audio_layers=2,
        audio_heads=2,
        audio_head_dim=16,
        audio_ffn=48,
        half_window=100,
        mels=128,
        text_layers=3,
        heads=6,
        kv_heads=2,
        head_dim=16,
        hidden=80,
        ffn=96,
        vocabulary=300,
        mrope_section=(2, 3, 3),
        rope_theta=1000000.0,
        rms_norm_eps=1e-06,
        tied=False,
    ),
    Case(
        name="tied",
        rows=((40.0,), (0.15, 0.5, 2.0)),
        audio_layers=3,
        audio_heads=3,
        audio_head_dim=8,
        audio_ffn=40,
        half_window=50,
        mels=128,
        text_layers=2,
        heads=4,
        kv_heads=4,
        head_dim=8,
        hidden=32,
        ffn=72,
        vocabulary=211,
        mrope_section=(2, 1, 1),
        rope_theta=10000.0,
        rms_norm_eps=1e-05,
        tied=True,
    ),
    Case(
        name="one-kv-head",
        rows=((2.01, 1.99, 0.2), (), (4.0,)),
        audio_layers=1,
        audio_heads=4,
        audio_head_dim=12,
        audio_ffn=64,
        half_window=26,
        mels=80,
        text_layers=4,
        heads=5,
        kv_heads=1,
        head_dim=12,
        hidden=60,
        ffn=56,
        vocabulary=401,
        mrope_section=(1, 2, 3),
        rope_theta=500000.0,
        rms_norm_eps=1e-06,
        tied=False,
    ),
    Case(
        name="wide-heads",
        rows=((7.7,), (0.3,), (19.99, 0.11)),
        audio_layers=2,
        audio_heads=1,
        audio_head_dim=20,
        audio_ffn=32,
        half_window=150,
        mels=64,
        text_layers=1,
        heads=2,
        kv_heads=2,
        head_dim=32,
        hidden=44,
        ffn=120,
        vocabulary=173,
        mrope_section=(4, 6, 6),
        rope_theta=100000.0,
        rms_norm_eps=1e-06,
        tied=True,
    ),
)


def random_case(seed: int) -> Case:
    """Draws every size."""
    rng = np.random.default_rng(1000 + seed)

    def pick(*options: int) -> int:
        return int(rng.choice(options))

    kv_heads, half = pick(1, 2, 3), 2 * pick(2, 3, 4, 8)
    first = int(rng.integers(1, half - 1))
    second = int(rng.integers(1, half - first))
    lengths = np.round(np.exp(rng.uniform(np.log(0.1), np.log(40.0), size=6)), 3).tolist()
    cuts = sorted(rng.integers(0, 7, size=2).tolist())
    rows = tuple(
        tuple(part) for part in (lengths[: cuts[0]], lengths[cuts[0] : cuts[1]], lengths[cuts[1] :])
    )
    return Case(
        name=f"random-{seed}",
        rows=rows,
        audio_layers=pick(1, 2, 4),
        audio_heads=pick(1, 2, 3, 5),
        audio_head_dim=2 * pick(3, 4, 7, 10),
        audio_ffn=pick(24, 40, 72),
        half_window=2 * pick(5, 20, 33, 50, 90),
        mels=pick(40, 64, 80, 128),
        text_layers=pick(1, 2, 3, 5),
        heads=kv_heads * pick(1, 2, 4),
        kv_heads=kv_heads,
        head_dim=2 * half,
        hidden=pick(28, 48, 72, 100),
        ffn=pick(36, 64, 90),
        vocabulary=pick(97, 256, 777),
        mrope_section=(first, second, half - first - second),
        rope_theta=float(pick(10_000, 500_000, 1_000_000)),
        rms_norm_eps=float(rng.choice([1e-5, 1e-6])),
        tied=bool(rng.integers(2)),
        seed=seed,
    )


@dataclasses.dataclass(frozen=True)
class Errors:
    """Largest errors of one case; all but mel relative to the largest value."""

    mel: float
    tower: float
    logits: float
    batch: float


@dataclasses.dataclass(frozen=True)
class Batch:
    """A ragged batch: right-padded rows and, in the order of their rows, the clips."""

    tokens: np.ndarray  # i32[B, L]
    lengths: np.ndarray  # i32[B]
    clips: tuple[np.ndarray, ...]  # f32[samples] each
    clip_row: tuple[int, ...]
    clip_start: tuple[int, ...]


# Control tokens of the small vocabularies; ordinary tokens follow.
_SPECIAL = {
    "im_start_token_id": 0,
    "im_end_token_id": 1,
    "audio_token_index": 2,
    "audio_start_token_id": 3,
    "audio_end_token_id": 4,
    "pad_token_id": 5,
}


def reference_config(case: Case) -> Qwen2_5OmniThinkerConfig:
    """The case in transformers' terms, written without our exporter."""
    return Qwen2_5OmniThinkerConfig(
        audio_config={
            "encoder_layers": case.audio_layers,
            "d_model": case.audio_heads * case.audio_head_dim,
            "encoder_attention_heads": case.audio_heads,
            "encoder_ffn_dim": case.audio_ffn,
            "output_dim": case.hidden,
            "n_window": case.half_window,
            "num_mel_bins": case.mels,
        },
        text_config={
            "vocab_size": case.vocabulary,
            "hidden_size": case.hidden,
            "num_hidden_layers": case.text_layers,
            "num_attention_heads": case.heads,
            "num_key_value_heads": case.kv_heads,
            "head_dim": case.head_dim,
            "intermediate_size": case.ffn,
            "rms_norm_eps": case.rms_norm_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": case.rope_theta,
                "mrope_section": list(case.mrope_section),
            },
        },
        # The image tower is never used; this one takes no time to build.
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "fullatt_block_indexes": [0],
            "out_hidden_size": case.hidden,
        },
        tie_word_embeddings=case.tied,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        **_SPECIAL,
    )


def reference_model(case: Case) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """transformers' thinker in float32; every array is random, biases and norms too."""
    model = Qwen2_5OmniThinkerForConditionalGeneration(reference_config(case)).eval()
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                embedding = "embed" in name or "bos_eos" in name
                parameter.copy_(noise * (0.5 if embedding else fan_in**-0.5))
            else:
                parameter.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))
    return model


def make_batch(case: Case) -> Batch:
    """Rows of random text with the case's clips at random places."""
    rng = np.random.default_rng(case.seed)
    rows: list[list[int]] = []
    clips, clip_row, clip_start = [], [], []

    def text() -> list[int]:
        return rng.integers(len(_SPECIAL), case.vocabulary, size=int(rng.integers(2, 9))).tolist()

    for index, seconds in enumerate(case.rows):
        row = text()
        for duration in seconds:
            clip = sound(round(duration * RATE), rng)
            row.append(_SPECIAL["audio_start_token_id"])
            clips.append(clip)
            clip_row.append(index)
            clip_start.append(len(row))
            row += [_SPECIAL["audio_token_index"]] * frontend.num_audio_tokens(len(clip))
            row += [_SPECIAL["audio_end_token_id"], *text()]
        rows.append(row)
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), lengths.max()), _SPECIAL["pad_token_id"], np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return Batch(tokens, lengths, tuple(clips), tuple(clip_row), tuple(clip_start))


def sound(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """A gliding tone that comes and goes over noise 20 to 6 dB below it, f32[num_samples].

    Cleaner tones leave bins so far below the loudest that the extractor itself, in float32, is off by the
    limit; `test_frontend.py` looks at those with a float64 reference.
    """
    time = np.arange(num_samples) / RATE
    loudness = 10.0 ** rng.uniform(-3, 0)
    glide = np.sin(2 * np.pi * (rng.uniform(80, 3000) + rng.uniform(-20, 20) * time) * time)
    noise = rng.normal(size=num_samples) * 10.0 ** rng.uniform(-1, -0.3)
    gate = np.sin(2 * np.pi * rng.uniform(0.2, 3.0) * time) > -0.7
    return (loudness * (glide * gate + noise)).astype(np.float32)


@functools.cache
def feature_extractor(mels: int) -> WhisperFeatureExtractor:
    """As Qwen2.5-Omni configures it, but for the number of mel bins."""
    return WhisperFeatureExtractor(feature_size=mels, chunk_length=300, return_attention_mask=True)


def reference_mel(clip: np.ndarray, mels: int) -> np.ndarray:
    """transformers' log-mel of the clip's own frames, f32[ceil(samples / 160), mels]."""
    features = feature_extractor(mels)(clip, sampling_rate=RATE, return_tensors="np")
    return features.input_features[0].T[: frontend.num_frames(len(clip))]


def reference_forward(
    model: Qwen2_5OmniThinkerForConditionalGeneration, batch: Batch, mel: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """transformers' audio embeddings f32[all tokens, hidden] and logits f32[B, L, V]."""
    frames = max(len(m) for m in mel)
    features = torch.zeros(len(mel), mel[0].shape[1], frames)
    feature_mask = torch.zeros(len(mel), frames, dtype=torch.long)
    for index, m in enumerate(mel):
        features[index, :, : len(m)] = torch.from_numpy(m.T.copy())
        feature_mask[index, : len(m)] = 1
    attention_mask = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    with torch.no_grad():
        audio = model.get_audio_features(features, feature_attention_mask=feature_mask)
        output = model(
            input_ids=torch.from_numpy(batch.tokens).long(),
            attention_mask=torch.from_numpy(attention_mask).long(),
            input_features=features,
            feature_attention_mask=feature_mask,
        )
    embeddings = getattr(audio, "pooler_output", audio)
    return embeddings.numpy(), output.logits.numpy()


def clip_groups(batch: Batch, short_seconds: float = 3.0) -> tuple[thinker.AudioClips, ...]:
    """The batch's clips in two groups of different buffer lengths, with an unused slot and dirty buffers."""
    is_short = [len(clip) <= short_seconds * RATE for clip in batch.clips]
    groups = []
    for wanted in (True, False):
        members = [i for i, short in enumerate(is_short) if short == wanted]
        if not members:
            continue
        samples = max(len(batch.clips[i]) for i in members)
        capacity = frontend.num_frames(samples) * frontend.HOP_SAMPLES + 480
        waveforms = np.full((len(members) + 1, capacity), 9.0, np.float32)
        num_samples, row, start = np.zeros((3, len(members) + 1), np.int32)
        for slot, i in enumerate(members):
            waveforms[slot, : len(batch.clips[i])] = batch.clips[i]
            num_samples[slot] = len(batch.clips[i])
            row[slot], start[slot] = batch.clip_row[i], batch.clip_start[i]
        groups.append(thinker.AudioClips(waveforms, num_samples, row, start))
    return tuple(groups)


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    config: ThinkerConfig, params: Params, tokens: jax.Array, clips: tuple[thinker.AudioClips, ...]
) -> jax.Array:
    return thinker.forward(config, params, tokens, clips)


@functools.partial(jax.jit, static_argnums=0)
def _encode(
    config: ThinkerConfig, params: Params, waveforms: jax.Array, num_samples: jax.Array
) -> tuple[jax.Array, jax.Array]:
    mel = frontend.log_mel(waveforms, num_samples, config.audio.num_mel_bins)
    return mel, thinker.encode_audio(config, params, waveforms, num_samples)


def our_logits(config: ThinkerConfig, params: Params, batch: Batch) -> list[np.ndarray]:
    """Logits of each row's own positions, f32[length, V] each."""
    logits = np.asarray(_forward(config, params, batch.tokens, clip_groups(batch)))
    return [row[:length] for row, length in zip(logits, batch.lengths, strict=True)]


def our_logits_one_by_one(config: ThinkerConfig, params: Params, batch: Batch) -> list[np.ndarray]:
    """The same, each row as a batch of one with other padding; other rows' clips are unused slots."""
    outputs = []
    for row, length in enumerate(batch.lengths):
        tokens = np.full((1, batch.tokens.shape[1] + 7), _SPECIAL["im_end_token_id"], np.int32)
        tokens[0, :length] = batch.tokens[row, :length]
        clips = tuple(
            group.replace(
                num_samples=np.where(group.row == row, group.num_samples, 0),
                row=np.zeros_like(group.row),
            )
            for group in clip_groups(batch)
        )
        outputs.append(np.asarray(_forward(config, params, tokens, clips))[0, :length])
    return outputs


def our_audio(
    config: ThinkerConfig, params: Params, batch: Batch
) -> tuple[list[np.ndarray], np.ndarray]:
    """Log-mel of each clip's frames, and all audio embeddings in the order of the clips."""
    longest = max(len(clip) for clip in batch.clips)
    waveforms = np.zeros(
        (len(batch.clips), frontend.num_frames(longest) * frontend.HOP_SAMPLES), np.float32
    )
    num_samples = np.array([len(clip) for clip in batch.clips], np.int32)
    for slot, clip in enumerate(batch.clips):
        waveforms[slot, : len(clip)] = clip
    mel, embeddings = map(np.asarray, _encode(config, params, waveforms, num_samples))
    tokens = frontend.num_audio_tokens(num_samples)
    frames = frontend.num_frames(num_samples)
    return (
        [m[:count] for m, count in zip(mel, frames, strict=True)],
        np.concatenate([e[:count] for e, count in zip(embeddings, tokens, strict=True)]),
    )


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over the largest reference value."""
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def measure(case: Case, directory: Path) -> Errors:
    """Builds the case's reference in `directory`, loads it here and compares."""
    model = reference_model(case)
    model.save_pretrained(directory)
    config, params = huggingface.load_pretrained(directory)
    batch = make_batch(case)
    reference_mels = [reference_mel(clip, case.mels) for clip in batch.clips]
    tower, logits = reference_forward(model, batch, reference_mels)

    mels, embeddings = our_audio(config, params, batch)
    rows = our_logits(config, params, batch)
    alone = our_logits_one_by_one(config, params, batch)
    valid = [row[:length] for row, length in zip(logits, batch.lengths, strict=True)]
    return Errors(
        mel=max(float(np.abs(a - b).max()) for a, b in zip(mels, reference_mels, strict=True)),
        tower=relative_error(embeddings, tower),
        logits=relative_error(np.concatenate(rows), np.concatenate(valid)),
        batch=relative_error(np.concatenate(rows), np.concatenate(alone)),
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--random", type=int, default=0, help="further cases drawn at random")
    count = parser.parse_args().random
    torch.set_num_threads(1)
    print(f"{'case':<14}{'mel':>10}{'tower':>10}{'logits':>10}{'batch':>10}")
    for case in (*CASES, *map(random_case, range(count))):
        with tempfile.TemporaryDirectory() as directory:
            errors = measure(case, Path(directory))
        cells = "".join(f"{value:>10.1e}" for value in dataclasses.astuple(errors))
        print(f"{case.name:<14}{cells}", flush=True)


if __name__ == "__main__":
    main()
