import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from echo_jax.train import grpo, replay, step, targets

OPTIONS = replay.ReplayOptions(group=2, buffers=(16_000, 32_000, 64_000), token_multiple=32)
ADVANTAGE = np.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], np.float32)
ALL = np.arange(3)


@pytest.fixture(scope="module")
def vocabulary(sampler):
    return replay.Vocabulary(sampler.sampleable, np.asarray(sampler.automaton.stop_mask))


def stacked(rollout, prompts, micro_batches=1, queries=ALL, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    return replay.stack_micro_batches(rollout, prompts, ADVANTAGE, queries, micro_batches, options)


def logprobs(model, vocabulary, batch):
    config, params = model
    return jax.jit(
        lambda params, batch: jax.lax.map(
            functools.partial(replay.logprobs, config, OPTIONS, vocabulary, params), batch
        )
    )(params, batch)


def test_trainer_logprobs_equal_the_samplers(model, vocabulary, rollout, prompts):
    batch = stacked(rollout, prompts)
    got = np.asarray(logprobs(model, vocabulary, batch))
    mask = batch.positions > 0
    assert mask.sum() == rollout.sampled.sum()
    np.testing.assert_allclose(got[mask], batch.old_logprob[mask], atol=2e-5)


def test_micro_batches_do_not_change_logprobs(model, vocabulary, rollout, prompts):
    whole, cut = stacked(rollout, prompts), stacked(rollout, prompts, 3)
    assert cut.tokens.shape[:2] == (3, 2)
    np.testing.assert_allclose(
        np.asarray(logprobs(model, vocabulary, cut)).reshape(6, -1),
        np.asarray(logprobs(model, vocabulary, whole))[0],
        atol=2e-5,
    )


def test_copies_of_a_prompt_change_nothing(model, vocabulary, rollout, prompts):
    config, params = model
    whole = stacked(rollout, prompts)
    options = dataclasses.replace(OPTIONS, group=1, copies=2)
    for micro_batches in (1, 3):
        cut = replay.stack_micro_batches(rollout, prompts, ADVANTAGE, ALL, micro_batches, options)
        assert cut.prompts.tokens.shape[:2] == (micro_batches, 6 // micro_batches)
        for name in ("tokens", "positions", "advantage"):
            one, other = getattr(cut, name), getattr(whole, name)
            np.testing.assert_array_equal(one.reshape(6, -1), other.reshape(6, -1))
        got = jax.lax.map(
            functools.partial(replay.logprobs, config, options, vocabulary, params), cut
        )
        mask = whole.positions[0] > 0
        expected = np.asarray(whole.old_logprob)[0]
        np.testing.assert_allclose(np.asarray(got).reshape(6, -1)[mask], expected[mask], atol=2e-5)


def test_the_vocabulary_in_chunks_changes_nothing(model, vocabulary, rollout, prompts):
    config, params = model
    batch = jax.tree.map(lambda x: x[0], stacked(rollout, prompts))
    mask = batch.positions > 0
    results = []
    for chunk in (0, 7, 64):
        options = dataclasses.replace(OPTIONS, vocabulary_chunk=chunk)

        def total(params, options=options):
            found = replay.logprobs(config, options, vocabulary, params, batch)
            return jnp.where(mask, found, 0).sum(), found

        results.append(jax.jit(jax.grad(total, has_aux=True))(params))
    for gradients, found in results[1:]:
        np.testing.assert_allclose(found[mask], results[0][1][mask], atol=1e-5)
        close = functools.partial(np.testing.assert_allclose, atol=2e-4, rtol=1e-4)
        jax.tree.map(close, gradients, results[0][0])


def test_without_its_clips_the_replay_is_another(model, vocabulary, rollout, prompts):
    batch = stacked(rollout, prompts)
    silent = jax.tree.map(np.zeros_like, batch.segments)
    got = np.asarray(logprobs(model, vocabulary, batch.replace(segments=silent)))
    mask = batch.positions > 0
    assert np.abs(got[mask] - batch.old_logprob[mask]).max() > 1e-3


def test_inserted_audio_is_outside_and_the_end_inside(rollout, prompts, tokenizer):
    batch = stacked(rollout, prompts)
    kept = targets.at(batch.tokens[0], batch.positions[0])[batch.positions[0] > 0]
    controls = {tokenizer.audio_id, tokenizer.audio_bos_id, tokenizer.audio_eos_id}
    assert not controls & set(kept.tolist())
    assert (batch.tokens == tokenizer.audio_eos_id).sum() > len(prompts.length) * 2
    ended = rollout.finish_reason == 0
    assert (kept == tokenizer.im_end_id).sum() == ended.sum()


LOSSES = {
    "paper": {},
    "token_mean": {"aggregation": "token_mean", "dual_clip": 3.0, "kl_kind": "low_variance"},
    "constant_length": {"aggregation": "constant_length", "importance_cap": 1.02},
}


@pytest.mark.parametrize(
    "name",
    [name if name == "paper" else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES],
)
def test_accumulated_update_equals_the_whole(name, model, vocabulary, rollout, prompts):
    config, params = model
    loss_options = grpo.GrpoOptions(**LOSSES[name], max_response_tokens=144)
    loss_fn = functools.partial(replay.replay_loss, config, OPTIONS, vocabulary, loss_options)
    optimizer = optax.sgd(1.0)
    update = jax.jit(step.make_update(loss_fn, optimizer))
    results = []
    for micro_batches in (1, 3):
        batch = stacked(rollout, prompts, micro_batches)
        if loss_options.importance_cap:
            # As if the trainer had found every other token a little likelier than the sampler.
            shift = 0.05 * (np.arange(batch.old_logprob.shape[-1]) % 2)
            batch = replay.recomputed(batch, batch.old_logprob + shift)
        reference = jnp.asarray(batch.old_logprob) - 0.3
        new, _, metrics = update(
            params, _nothing(params), optimizer.init(params), (batch, reference)
        )
        results.append((new, metrics))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=2e-5), results[0][0], results[1][0]
    )
    np.testing.assert_allclose(results[0][1]["loss"], results[1][1]["loss"], rtol=1e-4)
    assert results[0][1]["logprob_gap"] < 2e-5
    assert (results[0][1]["ratio"] < 0.99) == bool(loss_options.importance_cap)


def test_denominators_count_what_was_sampled(rollout, prompts, tokenizer):
    """Inserted audio is in none of them, a sampled end is in all."""
    ends = ((rollout.tokens == tokenizer.im_end_id) & rollout.sampled).sum()
    assert 0 < ends < len(rollout.tokens)
    inserted = (rollout.length - rollout.prompt_length - rollout.sampled.sum(-1)).sum()
    assert inserted > 4 * 5
    batch = jax.tree.map(lambda x: x[0], stacked(rollout, prompts))
    for aggregation, denominator in (
        ("sequence_mean", 6),
        ("token_mean", rollout.sampled.sum()),
        ("constant_length", 6 * 144),
    ):
        options = grpo.GrpoOptions(aggregation=aggregation, max_response_tokens=144)
        logprob = jnp.asarray(batch.old_logprob)
        found = grpo.policy_loss(
            logprob, logprob, logprob, batch.advantage, batch.positions > 0, options
        )
        for term in ("loss", "policy", "kl"):
            assert found[term][1] == denominator
        assert found["ratio"][1] == rollout.sampled.sum()


def _nothing(params):
    return jax.tree.map(lambda _: None, params)


def test_slots_grow_in_large_steps(rollout, prompts):
    used = int(rollout.num_segments.sum())
    widths = [s.row.shape[1] for s in stacked(rollout, prompts, least_slots=(1, 1, 1)).segments]
    assert all(w in (1, 4, 16, 64) for w in widths)
    counts = [int((s.num_samples > 0).sum()) for s in stacked(rollout, prompts).segments]
    assert sum(counts) == used


def test_lengths_are_rounded_up(rollout, prompts):
    batch = stacked(rollout, prompts)
    longest = int((rollout.length - np.repeat(prompts.length, 2) + 1).max())
    assert longest <= batch.tokens.shape[-1] < longest + 32
    last_b = np.repeat(prompts.length, 2) - 1
    np.testing.assert_array_equal(batch.tokens[0, :, 0], rollout.tokens[np.arange(6), last_b])
    one = stacked(rollout, prompts, queries=np.array([1]))
    assert one.tokens.shape[1] == 2
    np.testing.assert_array_equal(one.advantage, [[0.5, -0.5]])


def test_prompts_that_a_replay_does_not_know_are_refused(rollout, prompts):
    """Their rollouts heard something else than the recording's own clips."""
    for name in ("insert_waveforms", "insert_shift_samples", "other_clips"):
        with pytest.raises(ValueError, match=f"prompts.{name} is given"):
            stacked(rollout, prompts.replace(**{name: np.zeros(3)}))


def test_what_does_not_divide_is_named(rollout, prompts):
    with pytest.raises(ValueError, match="2 micro-batches do not divide 3 queries"):
        stacked(rollout, prompts, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"least_slots": (4,)}, "config.replay.least_slots has 1 entries for 3"),
        ({"least_slots": (4, 0, 4)}, "config.replay.least_slots=(4, 0, 4) must hold whole numbers"),
        ({"least_slots": (4, 1.5, 4)}, "must hold whole numbers, each at least 1"),
        ({"least_slots": ("a",)}, "must hold whole numbers, each at least 1"),
        (
            {"token_multiple": 0},
            "config.replay.token_multiple=0 must be a whole number, at least 1",
        ),
        (
            {"target_multiple": -8},
            "config.replay.target_multiple=-8 must be a whole number, at least 1",
        ),
        (
            {"temperature": 0.0},
            "config.sampling.temperature=0.0 must be a finite number, more than",
        ),
        ({"temperature": float("nan")}, "config.sampling.temperature=nan must be"),
    ],
)
def test_options_that_mean_nothing_are_named(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(OPTIONS, **change)


def test_target_positions():
    mask = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(targets.positions_of(mask, 4), [[2, 3, 0, 0], [0, 0, 0, 0]])
    assert targets.positions_of(np.zeros((2, 3), bool), 8).shape == (2, 8)
    hidden = jnp.arange(10.0).reshape(1, 5, 2)
    np.testing.assert_array_equal(
        targets.predicting(hidden, jnp.array([[3, 1, 0]]))[0, :, 0], [4, 0, 0]
    )
