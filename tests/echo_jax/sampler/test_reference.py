"""The plain host loop, and the jitted loop beside it, on answers that are known beforehand."""

import dataclasses

import jax
import numpy as np
import pytest

from echo_jax.sampler import FinishReason, Rollout, SamplingOptions, reference
from tests.echo_jax.sampler import scripts
from tests.echo_jax.sampler.conftest import OPTIONS, World, make_prompts

GROUNDED = dataclasses.replace(OPTIONS, insert_audio=False)
# One row at a time gets its clip, in a buffer as long as the recording.
SEVEN = dataclasses.replace(
    OPTIONS, max_turns=8, max_response_tokens=176, insertion_slots=1, segment_seconds=()
)


def host_answer(world: World, options: SamplingOptions, params, row: int, prompts=None):
    prompts = prompts or world.prompts
    return reference.answer(
        world.config,
        params,
        world.tokenizer,
        options,
        prompts.tokens[row, : prompts.length[row]].tolist(),
        prompts.waveforms[row, : prompts.num_samples[row]],
        int(prompts.audio_start[row]),
    )


def response(rollout: Rollout, row: int) -> list[int]:
    return rollout.tokens[row, rollout.prompt_length[row] : rollout.length[row]].tolist()


def segments(rollout: Rollout, row: int) -> list[tuple[int, int]]:
    return [tuple(x) for x in rollout.segment_samples[row, : rollout.num_segments[row]].tolist()]


def assert_answers(world, options, params, rollout, expected, reasons, host_rows) -> None:
    world.check(options, params, rollout)
    budget = options.max_response_tokens
    for row, (script, reason) in enumerate(zip(expected, reasons, strict=True)):
        assert response(rollout, row) == script.tokens[:budget], row
        assert segments(rollout, row) == script.segments, row
        assert rollout.finish_reason[row] == reason, row
        if row in host_rows:
            host = host_answer(world, options, params, row)
            assert host.tokens == script.tokens[:budget], row
            assert host.segments == script.segments, row
            assert host.finish_reason == reason, row


@pytest.mark.parametrize("name", sorted(scripts.SCRIPTS))
def test_scripts_are_answered_as_algorithm_1_says(world, name):
    expected = [world.expand(*script.parts) for script in scripts.SCRIPTS[name]]
    params = world.teach(*expected)
    rollout = world.run(OPTIONS, params)
    reasons = [script.reason for script in scripts.SCRIPTS[name]]
    assert_answers(world, OPTIONS, params, rollout, expected, reasons, host_rows=(0, 1, 2))


def test_grounded_answers_keep_merged_tokens_and_insert_nothing(world):
    expected = []
    for script in scripts.SCRIPTS["lengths"]:
        drawn = world.expand(*(part for part in script.parts if not isinstance(part, scripts.Clip)))
        expected.append(dataclasses.replace(drawn, tokens=drawn.drawn))
    params = world.teach(*expected)
    rollout = world.run(GROUNDED, params)
    assert "</seg>, and" in world.tokenizer.decode(response(rollout, 0))
    assert_answers(
        world, GROUNDED, params, rollout, expected, [FinishReason.END] * 3, host_rows=(0,)
    )


def test_up_to_seven_insertions(world):
    def cited(count: int) -> list[scripts.Part]:
        parts: list[scripts.Part] = []
        for i in range(count):  # 0.0 to 0.2 s, 0.1 to 0.3 s, …
            clip = scripts.Clip(i / 10, (i + 2) / 10)
            parts += [f"<seg>{clip.start}, {clip.end}</seg", scripts.Drawn(">."), clip]
        return parts

    expected = [
        world.expand(*cited(7), "<seg>0.1, 0.9</seg>"),
        world.expand(*cited(6), scripts.END),
        world.expand(scripts.END),
    ]
    params = world.teach(*expected)
    rollout = world.run(SEVEN, params)
    assert rollout.num_segments.tolist() == [7, 6, 0]
    assert rollout.num_turns.tolist() == [8, 7, 1]
    reasons = [FinishReason.TURN_LIMIT, FinishReason.END, FinishReason.END]
    assert_answers(world, SEVEN, params, rollout, expected, reasons, host_rows=(0,))


def test_a_clip_goes_in_when_one_token_is_left_after_it(world):
    """Budgets to the token: what comes after the last clip has room for one token, or for none."""
    budget = OPTIONS.max_response_tokens
    expected = []
    for left in (1, 0):
        head = (
            "<seg>0, 1.2</seg>",
            scripts.Clip(0, 1.2),
            "<seg>0, 1.1</seg>",
            scripts.Clip(0, 1.1),
        )
        tail = ("<seg>0.1, 0.9</seg>", scripts.Clip(0.1, 0.9))
        filler = budget - left - len(world.expand(*head, *tail).tokens)
        digits = "".join(str(i * i % 7) for i in range(filler))
        # Only the last token of the budget follows the clip; where none would, the clip stays out.
        expected.append(world.expand(*head, digits, *(tail if left else tail[:1]), *"x" * left))
    expected.append(world.expand(scripts.END))
    params = world.teach(*expected)
    rollout = world.run(OPTIONS, params)
    assert [len(response(rollout, row)) for row in (0, 1)] == [budget, budget - 22]
    assert rollout.num_segments.tolist() == [3, 2, 0]
    reasons = [FinishReason.TOKEN_BUDGET, FinishReason.TOKEN_BUDGET, FinishReason.END]
    assert_answers(world, OPTIONS, params, rollout, expected, reasons, host_rows=(0, 1))


@pytest.mark.slow
def test_greedy_answers_to_200_prompts_equal_the_host_loop(world):
    compared = inserted = 0
    for seed in range(200):
        prompts = make_prompts(world.tokenizer, seed)
        names = sorted(scripts.SCRIPTS)
        if seed % 40 == 0:
            chosen = scripts.SCRIPTS[names[seed // 40]]
            params = world.teach(*(world.expand(*script.parts) for script in chosen))
        # A tenth of the old noise under the new: on the way the models lose the thread.
        mixed = np.sqrt(0.9) * world.prompts.waveforms + np.sqrt(0.1) * prompts.waveforms
        prompts = prompts.replace(waveforms=mixed.astype(np.float32))
        rollout = world.run(OPTIONS, params, prompts)
        world.check(OPTIONS, params, rollout, prompts)
        row = seed % 3
        host = host_answer(world, OPTIONS, params, row, prompts)
        assert host.tokens == response(rollout, row), seed
        assert host.segments == segments(rollout, row), seed
        assert host.finish_reason == rollout.finish_reason[row], seed
        compared, inserted = compared + 1, inserted + len(host.segments)
    assert compared == 200
    assert inserted > 50


def test_the_host_loop_is_greedy_only(world):
    sampled = dataclasses.replace(OPTIONS, temperature=0.5)
    with pytest.raises(ValueError, match="set temperature=0"):
        host_answer(world, sampled, world.params, 0)


def test_the_oracle_sees_what_is_wrong(world):
    """The check that the other tests rely on fails where it should."""
    chosen = scripts.SCRIPTS["lengths"]
    params = world.teach(*(world.expand(*script.parts) for script in chosen))
    rollout = world.run(OPTIONS, params)
    first, start = int(rollout.prompt_length[0]), int(rollout.segment_token_start[0, 0])

    def changed(name, index, value) -> Rollout:
        array = np.array(getattr(rollout, name))
        array[index] = value
        return rollout.replace(**{name: array})

    merged = scripts.single(world.tokenizer, ">,")
    for wrong in (
        changed("tokens", (0, first), merged),
        changed("tokens", (0, start - 2), merged),
        changed("logprob", (0, first + 2), rollout.logprob[0, first + 2] + 1e-3),
        changed("sampled", (0, start), True),
        changed("segment_samples", (0, 0, 1), 8_160),
        changed("segment_token_start", (0, 0), start + 1),
        changed("finish_reason", 0, FinishReason.TOKEN_BUDGET),
        changed("num_turns", 0, 3),
        changed("stop_rest", (0, start - 2), -1),
    ):
        with pytest.raises(AssertionError):
            world.check(OPTIONS, params, wrong)
    jax.tree.map(np.testing.assert_array_equal, rollout, world.run(OPTIONS, params))
