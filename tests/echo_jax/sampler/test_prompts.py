"""Prompts of all kinds: several clips, and recordings of minutes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.model import thinker
from echo_jax.sampler import Prompts, SamplingOptions
from echo_jax.sampler.stream import stack
from echo_jax.text import prompts as prompts_lib
from tests.echo_jax.sampler import scripts
from tests.echo_jax.sampler.conftest import OPTIONS

GREEDY = SamplingOptions(
    max_response_tokens=6, insert_audio=False, temperature=0.0, segment_seconds=()
)


def greedy(world, tokens: list[int], clips: tuple[thinker.AudioClips, ...], count: int):
    """The `count` most probable tokens, by whole forward passes; at most `<|im_end|>`."""
    allowed = world.tokenizer.sampleable(world.config.text.vocab_size)
    begin = len(tokens)
    row = np.full((1, begin + count), world.config.pad_id, np.int32)
    row[0, :begin] = tokens
    for end in range(begin, begin + count):
        logits = _logits(world.config, world.params, row, clips)[0, end - 1]
        row[0, end] = np.argmax(np.where(allowed, logits, -np.inf))
        if row[0, end] == world.config.im_end_id:
            break
    return row[0, : end + 1].tolist()


_logits = jax.jit(thinker.forward, static_argnums=0)


def two_clip_prompts(world) -> tuple[Prompts, list[thinker.AudioClips]]:
    """Two questions: one about a recording with an example before it, one without an example."""
    rng = np.random.default_rng(0)
    first = prompts_lib.Message(
        "user",
        [prompts_lib.Audio(8_000), "This is a bell. ", prompts_lib.Audio(22_400), " What?"],
    )
    second = prompts_lib.Message("user", [prompts_lib.Audio(16_000), "?"])
    chats = [
        prompts_lib.encode_chat(world.tokenizer, [message], add_generation_prompt=True)
        for message in (first, second)
    ]
    lengths = [len(chat.tokens) for chat in chats]
    tokens = np.full((2, max(lengths)), world.tokenizer.pad_id, np.int32)
    for row, chat in enumerate(chats):
        tokens[row, : lengths[row]] = chat.tokens
    waves = rng.normal(0, 0.1, (3, 22_400)).astype(np.float32)
    samples = np.array([22_400, 16_000, 8_000], np.int32)
    waves *= np.arange(22_400) < samples[:, None]
    example = thinker.AudioClips(
        waveforms=np.stack([waves[2, :8_000], np.zeros(8_000, np.float32)]),
        num_samples=np.array([8_000, 0], np.int32),
        row=np.arange(2, dtype=np.int32),
        start=np.array([chats[0].audio_starts[0], 0], np.int32),
    )
    prompts = Prompts(
        tokens=tokens,
        length=np.array(lengths, np.int32),
        waveforms=waves[:2],
        num_samples=samples[:2],
        audio_start=np.array([chats[0].audio_starts[1], chats[1].audio_starts[0]], np.int32),
        other_clips=example,
    )
    alone = [
        thinker.AudioClips(
            waveforms=jnp.asarray(waves[row : row + 1]),
            num_samples=jnp.asarray(samples[row : row + 1]),
            row=jnp.zeros(1, jnp.int32),
            start=jnp.asarray([prompts.audio_start[min(row, 1)]]),
        )
        for row in range(2)
    ]
    return prompts, [*alone, jax.tree.map(lambda x: jnp.asarray(x[:1]), example)]


def test_all_clips_of_a_prompt_are_heard(world):
    prompts, (recording, other, example) = two_clip_prompts(world)
    rollout = world.run(GREEDY, world.params, prompts)
    heard = greedy(world, prompts.tokens[0].tolist(), (recording, example), 6)
    assert rollout.tokens[0, : rollout.length[0]].tolist() == heard
    deaf = greedy(world, prompts.tokens[0].tolist(), (recording,), 6)
    assert heard != deaf, "the example should matter"
    plain = prompts.tokens[1, : prompts.length[1]].tolist()
    assert rollout.tokens[1, : rollout.length[1]].tolist() == greedy(world, plain, (other,), 6)


def test_segments_are_cut_from_the_recording_and_not_from_the_example(world):
    """The second clip of the prompt is the recording; a citation means it."""
    prompts, _ = two_clip_prompts(world)
    options = dataclasses.replace(OPTIONS, segment_seconds=())
    script = ("I hear <seg>0.2, 0.7</seg>", scripts.Clip(0.2, 0.7), " a bell", scripts.END)
    expected = [world.expand(*script)] * 2
    params = scripts.teach(world.config, world.params, prompts, expected, logit=12.0)
    rollout = world.run(options, params, prompts)
    assert rollout.num_segments.tolist() == [1, 1]
    for row, length in enumerate(prompts.length):
        # What follows the clip was taught with the recording's clip in the ear.
        assert rollout.tokens[row, length : rollout.length[row]].tolist() == expected[row].tokens


def test_other_clips_in_another_order_are_refused(world):
    prompts, _ = two_clip_prompts(world)
    clips = prompts.other_clips
    swapped = prompts.replace(other_clips=clips.replace(row=clips.row[::-1]))
    with pytest.raises(ValueError, match=r"other_clips.row is \[1, 0\], but \[0, 1\] is needed"):
        world.run(GREEDY, world.params, swapped)
    fewer = prompts.replace(other_clips=jax.tree.map(lambda x: x[:1], clips))
    with pytest.raises(ValueError, match="1 slots for 2 prompts; give as many for each"):
        world.run(GREEDY, world.params, fewer)


def test_stacked_clips_stay_with_their_prompts(world):
    prompts, _ = two_clip_prompts(world)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 1], prompts) for i in (1, 0)]
    together = stack(parts, prompts.tokens.shape[1], prompts.waveforms.shape[1])
    assert together.other_clips.row.tolist() == [0, 1]
    want = world.run(GREEDY, world.params, prompts)
    got = world.run(GREEDY, world.params, together)
    np.testing.assert_array_equal(got.tokens, want.tokens[::-1])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("length", [0, 20], r"prompts.length is \[0, 20\]; all must lie in \[1, "),
        ("num_samples", [22_401, 16_000], r"prompts.num_samples is .* lie in \[1, 22400\]"),
        ("audio_start", [5, 500], r"prompts.audio_start is \[5, 500\], but the audio then ends"),
    ],
)
def test_numbers_that_do_not_fit_are_named(world, field, value, message):
    prompts, _ = two_clip_prompts(world)
    with pytest.raises(ValueError, match=message):
        world.run(GREEDY, world.params, prompts.replace(**{field: np.array(value, np.int32)}))


@pytest.mark.slow
def test_a_recording_of_five_minutes(world):
    """7,500 audio tokens, prefilled in blocks of queries."""
    samples = 300 * 16_000
    message = prompts_lib.Message("user", [prompts_lib.Audio(samples), " What?"])
    chat = prompts_lib.encode_chat(world.tokenizer, [message], add_generation_prompt=True)
    waveform = np.random.default_rng(0).normal(0, 0.1, (1, samples)).astype(np.float32)
    prompts = Prompts(
        tokens=chat.tokens[None],
        length=np.array([len(chat.tokens)], np.int32),
        waveforms=waveform,
        num_samples=np.array([samples], np.int32),
        audio_start=np.array([chat.audio_starts[0]], np.int32),
    )
    rollout = world.run(GREEDY, world.params, prompts)
    clip = thinker.AudioClips(
        jnp.asarray(waveform),
        jnp.asarray(prompts.num_samples),
        jnp.zeros(1, jnp.int32),
        jnp.asarray(prompts.audio_start),
    )
    want = greedy(world, chat.tokens.tolist(), (clip,), 2)
    assert rollout.tokens[0, : len(want)].tolist() == want
