"""What holds of the loop whatever it is asked: independent rows, replay, chunks, groups, controls, compilations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from echo_jax.sampler import FinishReason, Prompts, Rollout
from tests import compilations
from tests.echo_jax.sampler import scripts
from tests.echo_jax.sampler.conftest import OPTIONS, make_prompts

SAMPLED = dataclasses.replace(OPTIONS, temperature=1.0)
FEWER_BRANCHES = dataclasses.replace(
    OPTIONS, segment_seconds=(), insertion_slots=3, insertion_patience=2
)
KEYS = jax.random.split(jax.random.key(7), 6)


def take(prompts: Prompts, rows) -> Prompts:
    return jax.tree.map(lambda x: x[np.asarray(rows)], prompts)


def rows_of(rollout: Rollout, rows) -> Rollout:
    per_row = {
        field.name: getattr(rollout, field.name)[np.asarray(rows)]
        for field in dataclasses.fields(rollout)
        if not field.name.endswith("_steps")
    }
    return rollout.replace(**per_row)


def assert_same_answers(got: Rollout, want: Rollout) -> None:
    """The same tokens and bookkeeping, and log-probabilities but for float noise; rows may be padded differently."""
    for row in range(len(want.length)):
        first, end = want.prompt_length[row], want.length[row]
        assert got.length[row] == end, row
        np.testing.assert_array_equal(got.tokens[row, first:end], want.tokens[row, first:end])
        np.testing.assert_array_equal(got.sampled[row, :end], want.sampled[row, :end])
        np.testing.assert_array_equal(got.stop_rest[row, :end], want.stop_rest[row, :end])
        for name in ("logprob", "model_logprob"):
            np.testing.assert_allclose(
                getattr(got, name)[row, :end], getattr(want, name)[row, :end], atol=1e-4
            )
        np.testing.assert_array_equal(got.stop_reason[row, :end], want.stop_reason[row, :end])
        # Nothing is left of what the row held before.
        assert len(set(got.tokens[row, end:].tolist())) <= 1
        for name, empty in (
            ("logprob", 0),
            ("model_logprob", 0),
            ("sampled", False),
            ("stop_rest", -1),
            ("stop_reason", -1),
        ):
            assert (getattr(got, name)[row, end:] == empty).all(), name
    for name in (
        "prompt_length",
        "segment_samples",
        "segment_token_start",
        "num_segments",
        "finish_reason",
        "num_turns",
    ):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


@pytest.fixture(scope="module")
def sampled(world, talkative) -> Rollout:
    rollout = world.run(SAMPLED, talkative, key=KEYS[:3])
    assert rollout.num_segments.sum() >= 2
    return rollout


def test_replay_gives_the_samplers_log_probabilities(world, talkative, sampled):
    """Whole-row passes without a cache, over rows of all kinds, with stop events and clips of several lengths."""
    world.check(SAMPLED, talkative, sampled)
    reasons, stops, inserted, widths = set(), 0, 0, set()
    for chosen in scripts.SCRIPTS.values():
        params = world.teach(*(world.expand(*script.parts) for script in chosen), logit=11.0)
        for seed in range(3):
            rollout = world.run(SAMPLED, params, key=jax.random.key(seed))
            world.check(SAMPLED, params, rollout)
            reasons |= set(rollout.finish_reason.tolist())
            stops += int((rollout.stop_rest >= 0).sum())
            inserted += int(rollout.num_segments.sum())
            lengths = np.diff(rollout.segment_samples, axis=-1)[..., 0]
            widths |= set(np.searchsorted([0, 8_000, 16_000], lengths[lengths > 0]).tolist())
    assert reasons == {FinishReason.END, FinishReason.TOKEN_BUDGET, FinishReason.TURN_LIMIT}
    assert widths == {1, 2, 3}, "every segment buffer should have been used"
    assert stops >= 40
    assert inserted >= 20


def test_confused_models_still_follow_algorithm_1(world):
    """Other recordings than the model was taught lead it astray among its own tags."""
    inserted = stops = 0
    for seed, chosen in enumerate(scripts.SCRIPTS.values()):
        params = world.teach(*(world.expand(*script.parts) for script in chosen))
        for turn in range(3):
            prompts = make_prompts(world.tokenizer, seed=1 + seed)
            prompts = prompts.replace(
                tokens=prompts.tokens, waveforms=prompts.waveforms * 0.5**turn
            )
            rollout = world.run(OPTIONS, params, prompts)
            world.check(OPTIONS, params, rollout, prompts)
            inserted += int(rollout.num_segments.sum())
            stops += int((rollout.stop_rest >= 0).sum())
    assert stops >= 20
    assert inserted >= 10


def test_permuted_rows_give_the_same_answers(world, talkative, sampled):
    for order in ([2, 0, 1], [1, 2, 0]):
        got = world.run(SAMPLED, talkative, take(world.prompts, order), KEYS[:3][np.array(order)])
        assert_same_answers(got, rows_of(sampled, order))


def test_split_batches_give_the_same_answers(world, talkative, sampled):
    for row in range(3):
        got = world.run(SAMPLED, talkative, take(world.prompts, [row]), KEYS[row : row + 1])
        assert_same_answers(got, rows_of(sampled, [row]))


def test_padding_gives_the_same_answers(world):
    """Longer rows of prompts, longer buffers with noise behind the recordings, and other insertions at a time."""
    prompts = world.prompts
    noise = np.random.default_rng(3).normal(size=(3, 32_000)).astype(np.float32)
    inside = np.arange(32_000) < prompts.num_samples[:, None]
    waveforms = np.pad(prompts.waveforms, ((0, 0), (0, 32_000 - prompts.waveforms.shape[1])))
    padded = prompts.replace(
        tokens=np.pad(prompts.tokens, ((0, 0), (0, 13)), constant_values=world.config.pad_id),
        waveforms=np.where(inside, waveforms, noise),
    )
    for name in ("lengths", "edges"):
        chosen = scripts.SCRIPTS[name]
        params = world.teach(*(world.expand(*script.parts) for script in chosen))
        got = world.run(FEWER_BRANCHES, params, padded)
        assert_same_answers(got, world.run(OPTIONS, params))


def test_a_group_shares_its_prefill_and_nothing_else(world, talkative, sampled):
    """Row q * G + g is what a batch of its own gives with its key; one key gives each row its own."""
    order = np.array([0, 3, 1, 4, 2, 5])
    group = world.run(SAMPLED, talkative, key=KEYS[order], num_samples=2)
    world.check(SAMPLED, talkative, group)
    assert_same_answers(rows_of(group, [0, 2, 4]), sampled)
    other = world.run(SAMPLED, talkative, key=KEYS[3:])
    assert_same_answers(rows_of(group, [1, 3, 5]), other)


def test_one_key_gives_each_row_its_own(world):
    """Row r draws with `fold_in(key, r)`; an untaught model, which is surprised by nothing."""
    key = jax.random.key(5)
    one_key = world.run(SAMPLED, world.params, key=key, num_samples=2)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(6))
    same = world.run(SAMPLED, world.params, key=keys, num_samples=2)
    jax.tree.map(np.testing.assert_array_equal, one_key, same)
    assert len({row.tobytes() for row in one_key.logprob}) == 6


def test_chunks_of_steps_equal_one_run(world, talkative, sampled):
    sampler = world.sampler(SAMPLED)
    state = sampler.start(talkative, world.prompts, KEYS[:3])
    chunks, before = 0, jax.device_get((state.tokens, state.length))
    while np.asarray(state.active).any():
        state = sampler.run(talkative, state, max_steps=9)
        chunks += 1
        tokens, length, cached = jax.device_get((state.tokens, state.length, state.cache.length))
        for row, end in enumerate(before[1]):  # what has been streamed stays
            np.testing.assert_array_equal(tokens[row, :end], before[0][row, :end])
        np.testing.assert_array_equal(cached, length - 1)
        assert not (np.asarray(state.waiting) & ~np.asarray(state.active)).any()
        before = tokens, length
    got = jax.device_get(sampler.finish(state))
    assert chunks == -(-int(got.num_decode_steps + got.num_insert_steps) // 9) > 3
    jax.tree.map(np.testing.assert_array_equal, got, sampled)


def test_controls_change_only_what_is_inserted(world, talkative):
    """Segments from another recording, and from another place; the prompt's audio stays."""
    options, prompts = FEWER_BRANCHES, world.prompts
    plain = world.run(options, talkative)
    zeros = np.zeros(3, np.int32)

    def run(insert_waveforms: np.ndarray, shift: np.ndarray, cut) -> Rollout:
        changed = prompts.replace(insert_waveforms=insert_waveforms, insert_shift_samples=shift)
        rollout = world.run(options, talkative, changed)
        world.check(options, talkative, rollout, prompts, cut)
        return rollout

    assert_same_answers(run(prompts.waveforms, zeros, None), plain)

    def cut_silence(question: int, begin: int, end: int) -> np.ndarray:
        return np.zeros(end - begin, np.float32)

    silent = run(np.zeros_like(prompts.waveforms), zeros, cut_silence)

    def cut_shifted(question: int, begin: int, end: int) -> np.ndarray:
        places = prompts.num_samples[question] - (end - begin) + 1
        begin_there = (begin + 20_000) % places
        return prompts.waveforms[question, begin_there : begin_there + end - begin]

    shifted = run(prompts.waveforms, zeros + 20_000, cut_shifted)
    # Up to the first clip nothing differs, after it the model has heard something else.
    start = int(plain.segment_token_start[0, 0])
    for control in (silent, shifted):
        np.testing.assert_array_equal(control.tokens[0, :start], plain.tokens[0, :start])
        np.testing.assert_array_equal(control.segment_samples[0, 0], plain.segment_samples[0, 0])
        np.testing.assert_allclose(control.logprob[0, :start], plain.logprob[0, :start], atol=1e-5)
        after = slice(int(plain.segment_token_start[0, 0]) + 12, None)
        assert not np.allclose(control.logprob[0, after], plain.logprob[0, after], atol=1e-3)


def test_no_control_token_is_ever_sampled(world):
    """Even where the model wants nothing else; `<|im_end|>` alone may come."""
    controls = sorted(world.tokenizer.control_ids - {world.config.im_end_id})
    beyond = range(world.tokenizer.vocab_size, world.config.text.vocab_size)
    wanted = np.array([*controls, *beyond])
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(scripts.WIDTH, world.config.text.vocab_size)) * 0.2
    kernel[:, wanted] += 50 * rng.normal(size=(scripts.WIDTH, len(wanted)))
    params = scripts.with_head(world.params, kernel)
    for options in (OPTIONS, SAMPLED):
        rollout = world.run(options, params)
        world.check(options, params, rollout)
        assert not np.isin(rollout.tokens[rollout.sampled], wanted).any()
        assert rollout.sampled.sum() > 3
        assert (rollout.logprob[rollout.sampled] > -30).all()


def test_a_second_call_compiles_nothing(world, talkative, sampled):
    sampler = world.sampler(SAMPLED)
    jax.block_until_ready(sampler(talkative, world.prompts, jax.random.key(3)))
    with compilations.heard() as compiled:
        jax.jit(lambda x: x * 3 - 7)(np.ones(11))
        assert len(compiled) == 1, "a compilation must be heard"
        prompts = make_prompts(world.tokenizer, seed=9)
        jax.block_until_ready(sampler(talkative, prompts, jax.random.key(1)))
        state = sampler.start(talkative, prompts, jax.random.key(2))
        for steps in (1, 4, None):
            state = sampler.run(talkative, state, max_steps=steps)
        assert len(compiled) == 1
