"""One optimizer update of SFT and of GRPO on meshes of eight CPU devices, against one device; run by `test_devices.py`.

python -m tests.launch.on_mesh [data,fsdp,tensor ...]

Plain gradient descent with a rate of 1, so that the new parameters show the gradients.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    os.environ["JAX_PLATFORMS"] = "cpu"

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from configs import grpo as grpo_config
from configs import sft as sft_config
from echo_jax import arrays
from echo_jax.arrays import ONE_DEVICE, Placement
from echo_jax.model import language_model, thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler import Prompts, Rollout, Sampler, SamplingOptions
from echo_jax.train import grpo, optimizer, replay, sft, targets
from echo_jax.train.checkpoint import TrainState
from launch import devices
from launch.stage import Model, Updater, place
from tests.models import citing_model, citing_tokenizer, noise_prompts

MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4), (4, 1, 2))
ROWS = 8


class Sampled(NamedTuple):
    """Answers to learn from."""

    prompts: Prompts
    rollout: Rollout
    vocabulary: replay.Vocabulary


def world() -> tuple[ThinkerConfig, arrays.Params, Any]:
    """A small model whose sizes all meshes divide."""
    tokenizer = citing_tokenizer()
    config, params = citing_model(tokenizer)
    text = dataclasses.replace(config.text, num_heads=4, num_kv_heads=2, head_dim=8)
    audio = dataclasses.replace(config.audio, num_heads=4)
    config = dataclasses.replace(config, text=text, audio=audio)
    drawn = arrays.init_params(thinker.param_specs(config), jax.random.key(1))
    for name in ("embed", "lm_head", "final_norm"):
        if name in params["language_model"]:
            drawn["language_model"][name] = params["language_model"][name]
    return config, jax.device_get(drawn), tokenizer


def chats(tokenizer: Any, packed: bool) -> sft.ChatBatch:
    """Rows of a recording and an answer; packed, each row holds two of them and padding."""
    rng = np.random.default_rng(0)
    each = 2 if packed else 1
    count = ROWS * each
    samples = [int(rng.integers(8_000, 16_000)) for _ in range(count)]
    prompts = noise_prompts(tokenizer, [(n, " What?") for n in samples], capacity=16_000)
    longest = int(prompts.length.max()) + 12
    width = longest * each + 5
    tokens = np.full((ROWS, width), tokenizer.pad_id, np.int32)
    mask = np.zeros((ROWS, width), bool)
    positions, segments = np.zeros((2, ROWS, width), np.int32)
    start = np.zeros(count, np.int32)
    for number in range(count):
        row, first = number // each, number % each * longest
        length, answer = int(prompts.length[number]), int(rng.integers(4, 12))
        tokens[row, first : first + length] = prompts.tokens[number, :length]
        drawn = rng.integers(0, 40, answer)
        tokens[row, first + length : first + length + answer] = drawn
        mask[row, first + length : first + length + answer] = True
        positions[row, first : first + longest] = np.arange(longest)
        segments[row, first : first + longest] = 1 + number % each
        start[number] = first + prompts.audio_start[number]
    packing = language_model.Packing(positions, segments) if packed else None
    return sft.ChatBatch(
        tokens=tokens,
        positions=targets.positions_of(mask, 8),
        clips=thinker.AudioClips(
            waveforms=np.asarray(prompts.waveforms),
            num_samples=np.asarray(prompts.num_samples),
            row=np.arange(count, dtype=np.int32) // each,
            start=start,
        ),
        packing=packing,
    )


def stacked(batch: Any, micro_batches: int) -> Any:
    """Cuts the rows of a batch into micro-batches."""

    def cut(x: np.ndarray) -> np.ndarray:
        return x.reshape(micro_batches, len(x) // micro_batches, *x.shape[1:])

    cut_batch = jax.tree.map(cut, batch)
    rows = cut_batch.tokens.shape[1]
    return cut_batch.replace(clips=cut_batch.clips.replace(row=cut_batch.clips.row % rows))


def update(
    config: ThinkerConfig,
    params: arrays.Params,
    tokenizer: Any,
    placement: Placement,
    fields: Any,
    loss_fn: Any,
    batch: Any,
) -> tuple[arrays.Params, dict[str, float]]:
    """One step of plain gradient descent by the trainer's own update."""
    placed = place(fields, config, params, placement)
    model = Model(config, placed, tokenizer, placement)
    original = optimizer.make_optimizer
    optimizer.make_optimizer = lambda options, total: optax.sgd(1.0)  # type: ignore[assignment]
    try:
        updater = Updater(fields, model, loss_fn, 1)
    finally:
        optimizer.make_optimizer = original
    state = TrainState(0, placed, updater.init(placed), jax.random.key(0))
    state, metrics = updater(state, batch, 0, [])
    return devices.to_host(state.params), metrics


def results(
    config: ThinkerConfig,
    params: arrays.Params,
    tokenizer: Any,
    placement: Placement,
    sampled: Sampled,
) -> dict[str, tuple[arrays.Params, dict[str, float]]]:
    """Name -> new parameters and metrics."""
    fields = sft_config.get_config("test")
    fields.parameter_rules = ((".*", "train"),)
    run = functools.partial(update, config, params, tokenizer, placement, fields)
    model = Model(config, params, tokenizer, placement)
    found = {}
    for packed in (False, True):
        batch = chats(tokenizer, packed)
        for micro_batches, chunk in ((1, 0), (2, 5)):
            if ROWS // micro_batches % placement.num_shards("batch"):
                continue
            loss_fn = functools.partial(sft.chat_loss, config, model.execution(fields), chunk)
            name = f"sft{' packed' if packed else ''}, {micro_batches} micro-batches"
            found[name] = run(loss_fn, stacked(batch, micro_batches))
    options = replay.ReplayOptions(
        group=2,
        buffers=(16_000, 32_000),
        token_multiple=32,
        vocabulary_chunk=24,
        execution=model.execution(grpo_config.get_config("test")),
    )
    advantage = np.random.default_rng(1).normal(size=2 * ROWS).astype(np.float32)
    for micro_batches in (1, 2):
        if ROWS // micro_batches % placement.num_shards("batch"):
            continue
        replayed = replay.stack_micro_batches(
            sampled.rollout, sampled.prompts, advantage, np.arange(ROWS), micro_batches, options
        )
        loss_fn = functools.partial(
            replay.replay_loss, config, options, sampled.vocabulary, grpo.GrpoOptions()
        )
        reference = np.asarray(replayed.old_logprob) - 0.3
        found[f"grpo, {micro_batches} micro-batches"] = run(loss_fn, (replayed, reference))
    return found


def main(argv: Sequence[str]) -> None:
    """Prints one line a mesh.

    Raises:
      AssertionError: loss or gradients differ.
    """
    meshes = [tuple(map(int, arg.split(","))) for arg in argv] or MESHES
    config, params, tokenizer = world()
    questions = [(16_000 + 1_600 * i, " What?") for i in range(ROWS)]
    prompts = noise_prompts(tokenizer, questions, capacity=32_000)
    sampling = SamplingOptions(max_response_tokens=96, insertion_slots=2, segment_seconds=(1.0,))
    sampler = Sampler(config, tokenizer, sampling)
    vocabulary = replay.Vocabulary(sampler.sampleable, np.asarray(sampler.automaton.stop_mask))
    rollout = jax.device_get(sampler(params, prompts, jax.random.key(3), 2))
    sampled = Sampled(prompts, rollout, vocabulary)
    assert rollout.num_segments.sum() >= 8, rollout.num_segments
    want = results(config, params, tokenizer, ONE_DEVICE, sampled)
    for name in ("sft", "sft packed", "grpo"):
        _assert_same(want[f"{name}, 2 micro-batches"], want[f"{name}, 1 micro-batches"])
    loss = {name: round(metrics["loss"], 4) for name, (_, metrics) in want.items()}
    print(f"one device: {int(rollout.num_segments.sum())} insertions, losses {loss}", flush=True)
    for shape in meshes:
        mesh = Mesh(np.array(jax.devices()).reshape(shape), devices.AXES)
        placement = devices.placed_on(mesh, config)
        got = results(config, params, tokenizer, placement, sampled)
        for name, found in got.items():
            _assert_same(found, want[name])
        print(
            f"data {shape[0]} x fsdp {shape[1]} x tensor {shape[2]}: {len(got)} equal", flush=True
        )


def _assert_same(
    got: tuple[arrays.Params, dict[str, float]], want: tuple[arrays.Params, dict[str, float]]
) -> None:
    for name, value in want[1].items():
        np.testing.assert_allclose(got[1][name], value, atol=1e-5, rtol=2e-5, err_msg=name)

    def close(path: Any, one: jax.Array, other: jax.Array) -> None:
        scale = float(jnp.abs(other).max()) + 1
        np.testing.assert_allclose(
            one, other, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(close, got[0], want[0])


if __name__ == "__main__":
    main(sys.argv[1:])
