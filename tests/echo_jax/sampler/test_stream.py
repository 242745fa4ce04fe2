"""Questions that stream through few rows get the answers that they get alone."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from echo_jax.sampler import FinishReason, Prompts, Request, Sampler, stream
from echo_jax.sampler.stream import stack
from tests import compilations
from tests.echo_jax.sampler.conftest import OPTIONS
from tests.echo_jax.sampler.test_loop import assert_same_answers
from tests.models import noise_prompts

# One segment buffer: the others would only cost compilations.
SAMPLED = dataclasses.replace(OPTIONS, temperature=1.0, max_response_tokens=64, segment_seconds=())
SAMPLES, LENGTHS = 25_600, (64, 96)


def alone(prompts: Prompts, row: int) -> Prompts:
    """One prompt, no longer than it needs to be."""
    one = jax.tree.map(lambda x: np.asarray(x)[row : row + 1], prompts)
    samples = -(-int(one.num_samples[0]) // 160) * 160
    return one.replace(
        tokens=one.tokens[:, : int(one.length[0])], waveforms=one.waveforms[:, :samples]
    )


def make_requests(world, count: int) -> list[Request]:
    """Recordings of 0.3 to 1.6 s and questions of several lengths, a key each."""
    rng = np.random.default_rng(0)
    texts = [" What?", " Which sound?", " Which <seg>0.1, 0.9 sound?", "?" * 40]
    questions = [
        (int(rng.integers(4_800, SAMPLES)), text)
        for text in itertools.islice(itertools.cycle(texts), count)
    ]
    prompts = noise_prompts(world.tokenizer, questions, capacity=SAMPLES)
    keys = jax.random.split(jax.random.key(3), count)
    return [Request(alone(prompts, row), keys[row]) for row in range(count)]


@pytest.fixture(scope="module")
def asked(world, talkative):
    """Requests, and what the sampler says to each of them in a call of its own."""
    requests = make_requests(world, 11)
    sampler = world.sampler(SAMPLED)
    answers = []
    for request in requests:
        keys = jax.vmap(lambda g, key=request.key: jax.random.fold_in(key, g))(np.arange(2))
        padded = stack([request.prompts], LENGTHS[-1], SAMPLES)
        answers.append(jax.device_get(sampler(talkative, padded, keys, num_samples=2)))
    assert sum(int(rollout.num_segments.sum()) for rollout in answers) >= 5
    assert len({int(n) for rollout in answers for n in rollout.length}) > 5
    return requests, answers


def one_by_one(world, params, requests):
    """Answers through four rows, each refilled as soon as it is free."""
    return stream(
        world.sampler(SAMPLED),
        params,
        requests,
        rows=4,
        prompt_tokens=LENGTHS,
        samples=SAMPLES,
        refill=1,
    )


def one_of(rollout, row: int):
    return jax.tree.map(lambda x: x[row : row + 1] if np.ndim(x) else x, rollout)


@pytest.mark.parametrize(
    ("rows", "refill", "num_samples"), [(4, 2, 1), (3, 1, 1), (5, 2, 2), (16, None, 1)]
)
def test_answers_are_those_of_questions_asked_alone(
    world, talkative, asked, rows, refill, num_samples
):
    requests, answers = asked
    # A sampler of its own, so that its programs can be counted.
    sampler = Sampler(world.config, world.tokenizer, SAMPLED)
    got = {}
    with compilations.heard() as compiled:
        for answer in stream(
            sampler,
            talkative,
            iter(requests),
            rows=rows,
            prompt_tokens=LENGTHS,
            samples=SAMPLES,
            num_samples=num_samples,
            refill=refill,
        ):
            assert (answer.index, answer.sample) not in got
            got[answer.index, answer.sample] = answer.rollout
    assert set(got) == set(itertools.product(range(len(requests)), range(num_samples)))
    for (index, sample), rollout in got.items():
        assert_same_answers(rollout, one_of(answers[index], sample))
    # A prefill for each length that was needed, and one loop.
    assert len(sampler.programs) == 3, sampler.programs
    assert sum("loop over" in program for program in sampler.programs) == 1
    counts = [compiled.count(f"jit(_{name}_impl)") for name in ("empty", "admit", "run", "take")]
    assert counts == [1, 2, 1, 1], compiled


def test_answers_come_as_they_finish_and_questions_are_read_as_needed(world, talkative, asked):
    requests, _ = asked
    read = []

    def reading():
        for number, request in enumerate(requests):
            read.append(number)
            yield request

    order, ahead = [], []
    for answer in one_by_one(world, talkative, reading()):
        ahead.append(len(read) - len(order))
        order.append(answer.index)
    assert sorted(order) == list(range(len(requests)))
    assert order != sorted(order), "some question should have been slower than a later one"
    # Four rows, one that is read ahead, and the answers of one round that are still on their way.
    assert max(ahead) <= 4 + 1 + 4


def test_no_questions_give_no_answers(world, talkative):
    sampler = Sampler(world.config, world.tokenizer, SAMPLED)
    found = stream(sampler, talkative, [], rows=4, prompt_tokens=LENGTHS, samples=SAMPLES)
    assert list(found) == []
    assert sampler.programs == []


def test_budgets_of_single_prompts(world, talkative, asked):
    """A lower budget cuts the same answer short; fewer turns end it at its first `</seg>`."""
    requests, answers = asked
    row = max(range(len(answers)), key=lambda i: int(answers[i].num_segments[0]))
    request, whole = requests[row], answers[row]
    assert whole.num_segments[0] >= 1
    first = int(whole.prompt_length[0])
    for limits, length in (
        ({"max_response_tokens": 9, "max_turns": 4}, first + 9),
        (
            {"max_response_tokens": 64, "max_turns": 1},
            int(np.flatnonzero(whole.stop_reason[0] >= 0)[0]) + 1,
        ),
    ):
        fields = {name: np.array([value], np.int32) for name, value in limits.items()}
        (answer,) = stream(
            world.sampler(SAMPLED),
            talkative,
            [Request(request.prompts.replace(**fields), request.key)],
            rows=2,
            prompt_tokens=LENGTHS,
            samples=SAMPLES,
        )
        got = answer.rollout
        assert got.length[0] == length
        np.testing.assert_array_equal(
            got.tokens[0, first : got.length[0]], whole.tokens[0, first : got.length[0]]
        )
        assert got.num_turns[0] <= limits["max_turns"]


def test_what_does_not_fit_is_named(world, talkative, asked):
    requests, _ = asked
    sampler = world.sampler(SAMPLED)

    def ask(given, **changes):
        fields = {"rows": 4, "prompt_tokens": LENGTHS, "samples": SAMPLES} | changes
        return list(stream(sampler, talkative, given, **fields))

    with pytest.raises(ValueError, match=r"rows=4 must be .* num_samples=5 answers"):
        ask(requests, num_samples=5)
    with pytest.raises(ValueError, match=r"request 0 has 1 prompts of \d+ tokens and \d+ samples"):
        ask(requests, samples=1_600)
    with pytest.raises(ValueError, match=r"request 3 has 1 prompts of \d+ tokens"):
        ask(requests, prompt_tokens=(64,))
    with pytest.raises(ValueError, match=r"prompts.max_turns is \[9\]; all must lie in \[1, 4\]"):
        ask([Request(requests[0].prompts.replace(max_turns=np.array([9])), requests[0].key)])
    mixed = [
        requests[0],
        Request(requests[1].prompts.replace(max_turns=np.ones(1)), requests[1].key),
    ]
    with pytest.raises(ValueError, match=r"request 1: .* need the same optional fields"):
        ask(mixed, refill=2)


def test_what_was_read_before_an_error_is_answered(world, talkative, asked):
    requests, answers = asked

    def breaking():
        yield from requests[:5]
        raise OSError("the disk is gone")

    got = {}
    given = one_by_one(world, talkative, breaking())
    with pytest.raises(OSError, match="the disk is gone"):
        got.update((answer.index, answer.rollout) for answer in given)
    assert sorted(got) == [0, 1, 2, 3, 4]
    for index, rollout in got.items():
        assert_same_answers(rollout, one_of(answers[index], 0))


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_the_smallest_budgets(world, talkative, asked, budget):
    """More rows than questions, a refill larger than the rows, one turn."""
    requests, _ = asked
    limits = {"max_response_tokens": np.array([budget]), "max_turns": np.array([1])}
    found = list(
        stream(
            world.sampler(SAMPLED),
            talkative,
            [Request(request.prompts.replace(**limits), request.key) for request in requests[:3]],
            rows=4,
            prompt_tokens=LENGTHS,
            samples=SAMPLES,
            refill=99,
        )
    )
    assert sorted(answer.index for answer in found) == [0, 1, 2]
    for answer in found:
        rollout = answer.rollout
        assert 1 <= rollout.length[0] - rollout.prompt_length[0] <= budget
        assert rollout.finish_reason[0] in (FinishReason.END, FinishReason.TOKEN_BUDGET)
