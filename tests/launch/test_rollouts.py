"""Which questions of a GRPO step are learned from, and what is logged of all that were drawn."""

from __future__ import annotations

import numpy as np
import pytest

from echo_jax.sampler import Prompts
from launch import rollouts
from tests.launch.test_train import record, rollout_of
from tests.models import citing_tokenizer

TOKENIZER = citing_tokenizer()


def answered(number: int, *groups: tuple[float, ...]) -> rollouts.Answered:
    """Round `number`: a question for each group of rewards, recognizable by its numbers everywhere."""
    queries = np.arange(len(groups)) + 10 * number
    texts = [f"{query}.{g}" for query in queries for g in range(len(groups[0]))]
    rollout = rollout_of(TOKENIZER, texts, [0] * len(texts))
    # Of one width, as the sampler's are.
    wide = {
        name: np.pad(getattr(rollout, name), ((0, 0), (0, 16 - rollout.tokens.shape[1])))
        for name in ("tokens", "logprob", "model_logprob", "sampled", "stop_rest", "stop_reason")
    }
    return rollouts.Answered(
        records=[record(query) for query in queries],
        prompts=Prompts(
            tokens=np.repeat(queries[:, None], 4, axis=1),
            length=np.full(len(queries), 4),
            waveforms=np.repeat(queries[:, None], 320, axis=1).astype(np.float32),
            num_samples=np.full(len(queries), 320),
            audio_start=np.ones(len(queries)),
        ),
        rollout=rollout.replace(**wide, finish_reason=np.zeros(len(texts), np.int32)),
        scores=[{"total": total} for group in groups for total in group],
    )


def check(kept: rollouts.Answered, queries: list[int]) -> None:
    """Records, prompts, rollouts and scores are those of these questions."""
    assert [row.id for row in kept.records] == [f"r{query}" for query in queries]
    assert kept.prompts.tokens[:, 0].tolist() == queries
    assert kept.prompts.waveforms[:, 7].tolist() == queries
    said = [
        TOKENIZER.decode(tokens[sampled])
        for tokens, sampled in zip(kept.rollout.tokens, kept.rollout.sampled, strict=True)
    ]
    assert said == [f"{query}.{g}" for query in queries for g in range(2)]
    assert kept.totals.shape == (len(queries), 2)


def draw(rounds: list[rollouts.Answered], max_rounds: int) -> rollouts.Drawn:
    asked = []

    def answer(number: int) -> rollouts.Answered:
        asked.append(number)
        return rounds[number]

    drawn = rollouts.collect(answer, max_rounds)
    assert asked == list(range(len(asked)))
    assert len(drawn.scores) == len(drawn.rollout.tokens) == 2 * len(drawn.ids)
    assert int(drawn.rollout.num_decode_steps) == len(asked)
    return drawn


NONE, SOME = (0.5, 0.5), (0.0, 1.0)


def counts(rounds: int, questions: int, dropped: int, surplus: int, filled: int):
    names = ("rounds", "questions", "dropped", "surplus", "filled")
    values = (rounds, questions, dropped, surplus, filled)
    return {f"dynamic_sampling/{n}": float(v) for n, v in zip(names, values, strict=True)}


def test_without_dynamic_sampling_a_step_is_one_round_as_it_is():
    drawn = draw([answered(0, NONE, SOME, NONE)], 0)
    check(drawn.kept, [0, 1, 2])
    assert drawn.ids == ["r0", "r1", "r2"]
    assert drawn.metrics == {}


def test_groups_without_signal_are_replaced():
    rounds = [answered(0, NONE, SOME, NONE), answered(1, SOME, NONE, SOME), answered(2, SOME)]
    drawn = draw(rounds, 5)
    check(drawn.kept, [1, 10, 12])
    assert drawn.kept.has_signal.all()
    assert drawn.ids == ["r0", "r1", "r2", "r10", "r11", "r12"]
    # Three of six had no signal, three were wanted and found.
    assert drawn.metrics == counts(rounds=2, questions=6, dropped=3, surplus=0, filled=0)


def test_nothing_more_is_drawn_where_all_have_a_signal():
    drawn = draw([answered(0, SOME, SOME)], 5)
    check(drawn.kept, [0, 1])
    assert drawn.metrics == counts(rounds=1, questions=2, dropped=0, surplus=0, filled=0)


def test_surplus_is_dropped_and_counted():
    drawn = draw([answered(0, SOME, NONE), answered(1, SOME, SOME)], 5)
    check(drawn.kept, [0, 10])
    assert drawn.metrics == counts(rounds=2, questions=4, dropped=1, surplus=1, filled=0)


@pytest.mark.parametrize("max_rounds", [1, 2, 3])
def test_after_the_last_round_the_first_without_signal_stay(max_rounds):
    rounds = [
        answered(0, NONE, NONE, SOME),
        answered(1, NONE, NONE, NONE),
        answered(2, NONE, SOME, NONE),
    ]
    drawn = draw(rounds, max_rounds)
    if max_rounds == 3:
        check(drawn.kept, [0, 2, 21])
        assert drawn.metrics == counts(rounds=3, questions=9, dropped=6, surplus=0, filled=1)
    else:
        check(drawn.kept, [0, 1, 2])
        questions = 3 * max_rounds
        assert drawn.metrics == counts(max_rounds, questions, questions - 3, 0, filled=2)


def test_curves_are_of_all_answers_that_were_drawn():
    first, second = answered(0, NONE, SOME), answered(1, SOME, SOME)
    names = ("format", "accuracy", "segment", "consistency", "spread", "overlong", "correct")
    rest = dict.fromkeys(names, 0.0)
    for number, score in enumerate([*first.scores, *second.scores]):
        # Every other answer cites two segments of 3 s in all.
        cited = {"segments": 2.0, "total_s": 3.0, "mean_s": 1.5} if number % 2 else {}
        score |= {**rest, **dict.fromkeys(("segments", "total_s", "mean_s"), 0.0), **cited}
    drawn = draw([first, second], 2)
    found = rollouts.step_metrics(drawn, 2)
    assert found["reward/total"] == pytest.approx((0.5 + 0.5 + 0 + 1 + 0 + 1 + 0 + 1) / 8)
    assert found["groups_without_signal"] == 0.25
    assert found["segments"] == 1.0
    # Of a segment: answers without any do not count as segments of 0 s.
    assert found["mean_s"] == 1.5
    assert found["dynamic_sampling/surplus"] == 1.0
