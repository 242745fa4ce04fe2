"""Options, and the distribution that tokens are drawn from."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import scipy.stats

from echo_jax.sampler import Sampler, SamplingOptions, sampling
from tests.echo_jax.sampler import oracle, scripts
from tests.echo_jax.sampler.conftest import OPTIONS

VOCABULARY = 50


def options_of(**changes) -> SamplingOptions:
    return SamplingOptions(insert_audio=False, **changes)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.35, 1e-6])
@pytest.mark.parametrize("min_p", [0.0, 0.15, 1.0])
def test_distribution_equals_numpys(temperature, top_k, top_p, min_p):
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 2, (6, VOCABULARY)).astype(np.float32)
    allowed = rng.random(VOCABULARY) < 0.8
    options = options_of(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    masked = np.where(allowed, scores, np.float32(-1e30))
    logits = jax.jit(sampling.sampling_logits, static_argnums=1)(masked, options)
    got = np.asarray(jax.nn.log_softmax(logits))
    want = np.stack([oracle.log_probs(row, allowed, options) for row in scores])
    np.testing.assert_array_equal(got > -1e20, want > -np.inf)
    np.testing.assert_allclose(got[want > -np.inf], want[want > -np.inf], atol=2e-5)
    np.testing.assert_allclose(np.exp(got.astype(np.float64)).sum(1), 1, atol=1e-5)


def test_numpys_distribution_by_hand():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    allowed = np.ones(4, bool)

    def probs(**changes) -> list[float]:
        return np.exp(oracle.log_probs(logits, allowed, options_of(**changes))).round(4).tolist()

    assert probs() == [0.4, 0.3, 0.2, 0.1]
    assert probs(top_k=2) == [0.5714, 0.4286, 0, 0]
    assert probs(top_p=0.65) == [0.5714, 0.4286, 0, 0]
    assert probs(top_p=0.75) == [0.4444, 0.3333, 0.2222, 0]
    assert probs(top_k=3, top_p=0.4) == [1, 0, 0, 0]
    assert probs(min_p=0.45) == [0.4444, 0.3333, 0.2222, 0]
    assert probs(top_k=2, min_p=0.8) == [1, 0, 0, 0]
    assert probs(temperature=0.5) == [0.5333, 0.3, 0.1333, 0.0333]


def test_draws_follow_the_distribution():
    logits = np.random.default_rng(1).normal(0, 1.5, VOCABULARY).astype(np.float32)
    options = options_of(temperature=0.8, top_k=12, top_p=0.95)
    draws = 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    wanted = sampling.sampling_logits(logits[None], options)
    tokens = sampling.draw(np.tile(wanted, (draws, 1)), keys, options)
    probs = np.exp(np.asarray(jax.nn.log_softmax(wanted)[0], np.float64))
    counts = np.bincount(np.asarray(tokens), minlength=VOCABULARY)
    assert (counts[probs == 0] == 0).all()
    kept = probs > 0
    assert scipy.stats.chisquare(counts[kept], draws * probs[kept] / probs.sum()).pvalue > 1e-3


def test_greedy_takes_the_most_probable_and_needs_no_luck():
    logits = np.random.default_rng(2).normal(size=(4, VOCABULARY)).astype(np.float32)
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), 4)
        tokens = sampling.draw(logits, keys, options_of(temperature=0.0))
        np.testing.assert_array_equal(tokens, logits.argmax(1))


@pytest.mark.parametrize("size", [1, 50, 128, 129, 1000])
def test_argmax_is_the_first_largest(size):
    values = np.random.default_rng(size).integers(0, 5, (20, size)).astype(np.float32)
    values[0] = -1e30
    np.testing.assert_array_equal(sampling.argmax(values), values.argmax(1))


def test_draws_are_those_of_jax():
    logits = np.random.default_rng(4).normal(size=(30, 200)).astype(np.float32)
    keys = jax.random.split(jax.random.key(9), 30)
    want = jax.vmap(jax.random.categorical)(keys, logits)
    np.testing.assert_array_equal(sampling.draw(logits, keys, options_of()), want)


def test_filters_hold_in_whole_rollouts(world):
    """The record's log-probabilities are those of the filtered distribution, stop events included."""
    options = dataclasses.replace(
        OPTIONS, temperature=0.9, top_k=4, top_p=0.97, segment_seconds=(), insertion_slots=3
    )
    chosen = scripts.SCRIPTS["lengths"]
    params = world.teach(*(world.expand(*script.parts) for script in chosen), logit=9.0)
    rollout = world.run(options, params, key=jax.random.key(3))
    world.check(options, params, rollout)
    assert (rollout.stop_rest >= 0).any()
    assert (rollout.logprob[rollout.sampled] > np.log(0.97 / 341)).all()


@pytest.mark.slow
def test_stops_are_as_frequent_as_their_event_probability(world):
    """Behind `</seg` five tokens are likely; three of them are the stop. Chi-square over many rows of one prompt."""
    spell = world.expand("<seg>0.1, 0.9</seg").tokens
    rows = [world.expand("<seg>0.1, 0.9</seg", scripts.Drawn(tail)) for tail in (">", ">,", ">.")]
    rows += [world.expand(scripts.Pieces((*_pieces(world, spell), text))) for text in ("x", ".")]
    prompts = jax.tree.map(lambda x: x[:1], world.prompts)
    repeated = jax.tree.map(lambda x: np.repeat(x, len(rows), 0), prompts)
    # Rows with one prefix and several targets: least squares gives each of them a fifth of the logit.
    taught = scripts.teach(world.config, world.params, repeated, rows, logit=30.0)
    options = dataclasses.replace(
        OPTIONS, temperature=1.0, max_response_tokens=len(spell) + 1, segment_seconds=()
    )
    count = 1024
    rollout = world.run(options, taught, prompts, jax.random.key(0), num_samples=count)
    world.check(options, taught, jax.tree.map(lambda x: x[:8] if x.ndim else x, rollout), prompts)

    first = int(prompts.length[0])
    reached = (rollout.tokens[:, first : first + len(spell)] == spell).all(1)
    assert reached.sum() > count / 2
    states = scripts.hidden_states(
        world.config,
        taught,
        [*prompts.tokens[0, :first], *spell],
        [prompts.waveforms[0, : prompts.num_samples[0]]],
        [int(prompts.audio_start[0])],
    )
    logits = states[-1] @ np.asarray(taught["language_model"]["lm_head"]["kernel"])
    allowed = world.tokenizer.sampleable(world.config.text.vocab_size)
    probs = np.exp(oracle.log_probs(logits, allowed, options))
    stop = np.array([piece.startswith(b">") for piece in world.tokenizer.token_bytes])
    stop_prob = probs[: len(stop)][stop].sum()
    others = [scripts.single(world.tokenizer, text) for text in ("x", ".")]
    exact = np.array([stop_prob, *probs[others]])
    assert 0.2 < stop_prob < 0.95

    last = rollout.tokens[reached, first + len(spell)]
    events = [scripts.single(world.tokenizer, ">"), *others]
    counts = np.array([(last == event).sum() for event in events])
    counts, exact = np.append(counts, len(last) - counts.sum()), np.append(exact, 1 - exact.sum())
    assert scipy.stats.chisquare(counts, len(last) * exact).pvalue > 1e-3
    merged = [scripts.single(world.tokenizer, text) for text in (">,", ">.")]
    assert not np.isin(last, merged).any()


def _pieces(world, tokens) -> list[str]:
    return [world.tokenizer.token_bytes[token].decode() for token in tokens]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be a finite number, at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"temperature": float("inf")}, "temperature=inf must be a finite number"),
        ({"top_p": 0.0}, "top_p=0.0 must be a finite number in (0, 1]"),
        ({"top_p": 1.5}, "top_p=1.5 must be a finite number in (0, 1]"),
        ({"top_k": -1}, "top_k=-1 must be a whole number, at least 0"),
        ({"min_p": 1.1}, "min_p=1.1 must be a finite number in [0, 1]"),
        ({"max_response_tokens": 0}, "max_response_tokens=0 must be a whole number, at least 1"),
        ({"max_turns": 0}, "max_turns=0 must be a whole number, at least 1"),
        ({"insertion_slots": 0}, "insertion_slots=0 must be a whole number, at least 1"),
        ({"insertion_patience": 0}, "insertion_patience=0 must be a whole number, at least 1"),
        ({"segment_seconds": (2.0, 1.0)}, "ascending and more than 0"),
        ({"segment_seconds": (1.0, 1.0)}, "ascending and more than 0"),
        ({"segment_seconds": (0.0, 1.0)}, "ascending and more than 0"),
    ],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingOptions(**changes)


def test_segment_buffers_are_whole_frames_and_end_with_the_recording():
    options = SamplingOptions(segment_seconds=(0.0001, 0.333, 0.335, 1.0, 5.0))
    assert options.segment_buffers(32_000) == (160, 5_440, 16_000, 32_000)
    assert options.segment_buffers(16_000) == (160, 5_440, 16_000)
    assert SamplingOptions(segment_seconds=()).segment_buffers(800) == (800,)
    assert SamplingOptions(max_turns=8).max_insertions == 7
    assert SamplingOptions(max_turns=8, insert_audio=False).max_insertions == 0


def test_calls_that_do_not_fit_are_named(world):
    sampler, prompts, key = world.sampler(OPTIONS), world.prompts, jax.random.key(0)
    for changed, message in (
        (
            prompts.replace(length=prompts.length[:2]),
            r"prompts.length has shape \(2,\), but \(3,\)",
        ),
        (prompts.replace(waveforms=prompts.waveforms[:, :-1]), "25599 samples; pad them to a mult"),
        (prompts.replace(tokens=prompts.tokens[0]), r"prompts need tokens \[Q, P\]"),
        (
            prompts.replace(insert_waveforms=prompts.waveforms[:, :160]),
            r"prompts.insert_waveforms has shape \(3, 160\), but \(3, 25600\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            sampler(world.params, changed, key)
    with pytest.raises(ValueError, match=r"key has shape \(2,\).* 3 rows"):
        sampler(world.params, prompts, jax.random.split(key, 2))
    with pytest.raises(ValueError, match=r"make a typed key with jax.random.key\(seed\)"):
        sampler(world.params, prompts, jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="num_samples 0 must be at least 1"):
        sampler(world.params, prompts, key, num_samples=0)


def test_a_model_and_a_tokenizer_of_different_vocabularies_are_refused(world):
    swapped = dataclasses.replace(
        world.config,
        audio_bos_id=world.config.audio_eos_id,
        audio_eos_id=world.config.audio_bos_id,
    )
    with pytest.raises(ValueError, match=r"audio_bos_id is \d+ but the tokenizer's is \d+"):
        Sampler(swapped, world.tokenizer, OPTIONS)
