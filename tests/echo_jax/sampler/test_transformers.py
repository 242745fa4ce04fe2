"""The jitted loop beside transformers running Algorithm 1 in torch on the exported model, token for token."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from echo_jax import huggingface
from echo_jax.arrays import Params
from echo_jax.sampler import FinishReason, Prompts, Rollout, SamplingOptions
from tests.echo_jax.sampler import scripts
from tests.echo_jax.sampler.conftest import OPTIONS, World, make_prompts
from tests.transformers_algorithm1 import TransformersAlgorithm1, cited_span

# One row at a time gets its clip, in a buffer as long as the recording.
SEVEN = dataclasses.replace(
    OPTIONS, max_turns=8, max_response_tokens=176, insertion_slots=1, segment_seconds=()
)
PAD_SECONDS = 3  # the recordings have 1.6


def exported(
    world: World, params: Params, options: SamplingOptions, directory: Path
) -> TransformersAlgorithm1:
    huggingface.save_pretrained(directory, world.config, params, world.tokenizer)
    return TransformersAlgorithm1(directory, options, PAD_SECONDS)


def assert_same(theirs: TransformersAlgorithm1, prompts: Prompts, rollout: Rollout) -> None:
    for row in range(len(rollout.length)):
        prompt = prompts.tokens[row, : prompts.length[row]].tolist()
        waveform = prompts.waveforms[row, : prompts.num_samples[row]]
        expected = theirs.answer(prompt, waveform)
        answer = rollout.tokens[row, rollout.prompt_length[row] : rollout.length[row]]
        spans = rollout.segment_samples[row, : rollout.num_segments[row]]
        assert answer.tolist() == expected.tokens, row
        assert [tuple(span) for span in spans.tolist()] == expected.segments, row
        assert FinishReason(rollout.finish_reason[row]) == expected.finish_reason, row


@pytest.mark.parametrize("name", sorted(scripts.SCRIPTS))
def test_scripts_are_answered_as_transformers_does(world, name, tmp_path):
    """Invalid times, edges of the recording, tags in unusual tokens, used-up budgets and turns."""
    expected = [world.expand(*script.parts) for script in scripts.SCRIPTS[name]]
    params = world.teach(*expected)
    rollout = world.run(OPTIONS, params)
    reasons = [script.reason for script in scripts.SCRIPTS[name]]
    assert rollout.finish_reason.tolist() == reasons, "the model should have kept to its script"
    assert_same(exported(world, params, OPTIONS, tmp_path), world.prompts, rollout)


@pytest.mark.parametrize("counts", [(7, 6, 0), (5, 4, 1), (3, 2, 7)], ids=str)
def test_none_to_seven_insertions_as_transformers_does(world, counts, tmp_path):
    expected = []
    for row, count in enumerate(counts):
        parts: list[scripts.Part] = []
        for i in range(count):  # 0.0 to 0.2 s, 0.1 to 0.3 s, …
            clip = scripts.Clip(i / 10, (i + 2) / 10)
            # Some close with a token of their own, some with one that goes on.
            tail = [f"<seg>{clip.start}, {clip.end}</seg", scripts.Drawn(">.")]
            parts += [*(tail if (i + row) % 2 else [f"<seg>{clip.start}, {clip.end}</seg>"]), clip]
        last = "<seg>0.1, 0.9</seg>" if count == 7 else scripts.END
        expected.append(world.expand(*parts, last))
    params = world.teach(*expected)
    rollout = world.run(SEVEN, params)
    assert rollout.num_segments.tolist() == list(counts)
    assert_same(exported(world, params, SEVEN, tmp_path), world.prompts, rollout)


def test_grounded_answers_as_transformers_gives_them(world, tmp_path):
    options = dataclasses.replace(OPTIONS, insert_audio=False)
    expected = []
    for script in scripts.SCRIPTS["lengths"]:
        drawn = world.expand(*(part for part in script.parts if not isinstance(part, scripts.Clip)))
        expected.append(dataclasses.replace(drawn, tokens=drawn.drawn))
    params = world.teach(*expected)
    rollout = world.run(options, params)
    assert_same(exported(world, params, options, tmp_path), world.prompts, rollout)


def test_no_control_token_is_ever_sampled_by_either(world, tmp_path):
    """A model that wants nothing but control tokens and rows beyond the vocabulary."""
    controls = sorted(world.tokenizer.control_ids - {world.config.im_end_id})
    wanted = np.array([*controls, *range(world.tokenizer.vocab_size, world.config.text.vocab_size)])
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(scripts.WIDTH, world.config.text.vocab_size)) * 0.2
    kernel[:, wanted] += 50 * rng.normal(size=(scripts.WIDTH, len(wanted)))
    params = scripts.with_head(world.params, kernel)
    rollout = world.run(OPTIONS, params)
    assert_same(exported(world, params, OPTIONS, tmp_path), world.prompts, rollout)


@pytest.mark.slow
def test_greedy_answers_to_210_prompts_equal_those_of_transformers(world, tmp_path):
    """Recordings that are not quite those the models were taught: on the way they lose the thread."""
    compared = inserted = 0
    names = sorted(scripts.SCRIPTS)
    for seed in range(70):
        if seed % 14 == 0:
            name = names[seed // 14]
            params = world.teach(*(world.expand(*script.parts) for script in scripts.SCRIPTS[name]))
            theirs = exported(world, params, OPTIONS, tmp_path / name)
        prompts = make_prompts(world.tokenizer, seed)
        mixed = np.sqrt(0.9) * world.prompts.waveforms + np.sqrt(0.1) * prompts.waveforms
        prompts = prompts.replace(waveforms=mixed.astype(np.float32))
        rollout = world.run(OPTIONS, params, prompts)
        assert_same(theirs, prompts, rollout)
        compared, inserted = compared + len(rollout.length), inserted + rollout.num_segments.sum()
    assert compared == 210
    assert inserted > 150


def test_features_do_not_depend_on_the_padding(world, tmp_path):
    """What lets these tests pad to 3 s where the released code pads to 300."""
    theirs = exported(world, world.params, OPTIONS, tmp_path)
    clips = [world.prompts.waveforms[0], world.prompts.waveforms[0, 1_000:4_200]]
    short = theirs.features(clips)
    theirs.pad_seconds = 300
    long = theirs.features(clips)
    assert long["input_features"].shape[-1] == 30_000
    for row, frames in enumerate((160, 20)):
        assert short["attention_mask"][row].sum() == long["attention_mask"][row].sum() == frames
        np.testing.assert_allclose(
            short["input_features"][row, :, :frames],
            long["input_features"][row, :, :frames],
            atol=1e-6,
        )


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("<seg>0.5, 1.5</seg>", (8_000, 24_000)),
        ("<seg>9, 1</seg> <seg>.5,\n1.</seg>", (8_000, 16_000)),
        ("<seg>0.5, 99</seg>", (8_000, 32_000)),
        ("<seg>0, 0.19997</seg>", (0, 3_200)),
        ("<seg>0, 0.19996</seg>", None),
        ("<seg>1.2.3, 4</seg>", None),
        ("<seg>0.5, 1.5</seg> and <seg>1e9, 2</seg>", None),
        ("<seg>0.5, 1.5</seg></seg>", None),
        ("<seg>1.5, 0.5</seg>", None),
        ("", None),
    ],
)
def test_cited_span(text, span):
    assert cited_span(text, 32_000) == span
