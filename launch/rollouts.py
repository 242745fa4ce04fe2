"""The first half of a GRPO step: questions drawn, answered and scored, and the groups that are learned from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from data.records import EaqaRecord
from echo_jax.sampler import FinishReason, Prompts, Rollout
from echo_jax.text.tokenizer import Tokenizer
from echo_jax.train import rewards
from launch.checks import reward_options
from launch.stage import Metrics

Scores = list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The reward of every row with its parts and statistics, from the text of its sampled tokens.

    Attributes:
        tokenizer: spells the tokens.
        reward: a name in `rewards.REWARDS`.
        options: choices beyond it.
        inserts: whether the format inserts audio, so that only inserted clips are paid for.
    """

    tokenizer: Tokenizer
    reward: str
    options: rewards.RewardOptions
    inserts: bool

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer) -> Scorer:
        """The scorer of config.reward and config.format."""
        inserts = config.format == "interleaved"
        return cls(tokenizer, config.reward.name, reward_options(config), inserts)

    def __call__(
        self, rollout: Rollout, records: Sequence[EaqaRecord], num_samples: np.ndarray
    ) -> Scores:
        """Scores each row.

        Args:
            rollout: in numpy; as many rows for each record, those of a record together.
            records: the questions.
            num_samples: i32[Q], lengths of their recordings.
        """
        function = rewards.get_reward(self.reward)
        group = len(rollout.tokens) // len(records)
        scores = []
        for row in range(len(rollout.tokens)):
            truth = records[row // group].answer
            sampled = rollout.sampled[row]
            tokens = rollout.tokens[row][sampled].tolist()
            probability = None
            if rewards.needs_probability(self.reward):
                logprobs = rollout.logprob[row][sampled].tolist()
                probability = rewards.answer_probability(
                    tokens, logprobs, self.tokenizer.token_bytes, truth
                )
            response = rewards.Response(
                text=self.tokenizer.decode(tokens),
                truth=truth,
                num_samples=int(num_samples[row // group]),
                probability=probability,
                num_inserted=int(rollout.num_segments[row]) if self.inserts else None,
                num_tokens=int(rollout.length[row] - rollout.prompt_length[row]),
            )
            scores.append(function(response, self.options))
        return scores


@dataclasses.dataclass(frozen=True)
class Answered:
    """Questions with their groups of answers, in numpy.

    Attributes:
        records: Q questions.
        prompts: theirs.
        rollout: Q x group rows, those of a question together.
        scores: of each row.
    """

    records: list[EaqaRecord]
    prompts: Prompts
    rollout: Rollout
    scores: Scores

    @property
    def totals(self) -> np.ndarray:
        """Rewards, f64[Q, group]."""
        totals = np.array([score["total"] for score in self.scores])
        return totals.reshape(len(self.records), -1)

    @property
    def has_signal(self) -> np.ndarray:
        """bool[Q], whether the rewards of a group differ; where they do not, all advantages are 0."""
        return np.ptp(self.totals, axis=-1) > 0

    def take(self, queries: np.ndarray) -> Answered:
        """Some of the questions, with their answers."""
        group = len(self.scores) // len(self.records)
        rows = (queries[:, None] * group + np.arange(group)).reshape(-1)
        return Answered(
            records=[self.records[query] for query in queries],
            prompts=jax.tree.map(lambda x: x[queries], self.prompts),
            rollout=rows_of(self.rollout, rows),
            scores=[self.scores[row] for row in rows],
        )

    def followed_by(self, other: Answered) -> Answered:
        """These questions, then those."""
        return Answered(
            records=[*self.records, *other.records],
            prompts=jax.tree.map(lambda *x: np.concatenate(x), self.prompts, other.prompts),
            rollout=joined([self.rollout, other.rollout]),
            scores=[*self.scores, *other.scores],
        )


def rows_of(rollout: Rollout, rows: np.ndarray | slice) -> Rollout:
    """Some rows; the counters of steps stay those of the whole rollout."""
    return jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, rollout)


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    """The rows of all of them; the counters of steps are added."""
    return jax.tree.map(lambda *x: np.concatenate(x) if np.ndim(x[0]) else sum(x), *rollouts)


def prompts_of(batch: dict[str, Any]) -> Prompts:
    """The sampler's view of a prompt batch of `data.pipeline`."""
    return Prompts(
        tokens=batch["prompt_tokens"],
        length=batch["prompt_length"],
        waveforms=batch["waveforms"],
        num_samples=batch["num_samples"],
        audio_start=batch["clip_start"],
    )


# -------------------- dynamic sampling --------------------


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a step has sampled.

    Attributes:
        kept: the questions that are learned from.
        ids: of all questions that were drawn, in order.
        rollout: all answers to them.
        scores: theirs.
        metrics: how many rounds and questions it took, and what became of them; {} without dynamic sampling.
    """

    kept: Answered
    ids: list[str]
    rollout: Rollout
    scores: Scores
    metrics: Metrics


def collect(answer: Callable[[int], Answered], max_rounds: int) -> Drawn:
    """Draws questions until as many as a round has give a signal (DAPO, arXiv 2503.14476, section 3.2).

    Groups whose rewards are all equal are dropped as soon as there are others in their place. If there still are too
    few when the rounds are used up, the first of them stay: the shape of a step does not depend on luck, and what they
    add to its loss is the KL alone. Groups with a signal beyond the number of a step are dropped too, never kept for
    the next one: they would be off-policy there, and a checkpoint would have to hold them.

    Args:
        answer: draws and answers the questions of a round, numbered from 0.
        max_rounds: how many rounds at most; with 0 there is one, and it is taken as it is.
    """
    kept = answer(0)
    wanted = len(kept.records)
    with_signal = int(kept.has_signal.sum())
    # Without the prompts: recordings are large, and only the questions that are learned from keep theirs.
    ids, parts, scores = [record.id for record in kept.records], [kept.rollout], list(kept.scores)
    while len(parts) < max_rounds and with_signal < wanted:
        new = answer(len(parts))
        with_signal += int(new.has_signal.sum())
        kept = _best(kept.followed_by(new), wanted)
        ids += [record.id for record in new.records]
        parts.append(new.rollout)
        scores += new.scores
    metrics = {
        "rounds": len(parts),
        "questions": len(ids),
        "dropped": len(ids) - max(with_signal, wanted),
        "surplus": max(with_signal - wanted, 0),
        "filled": max(wanted - with_signal, 0),
    }
    named = {f"dynamic_sampling/{name}": float(value) for name, value in metrics.items()}
    return Drawn(kept, ids, joined(parts), scores, named if max_rounds else {})


def _best(answered: Answered, wanted: int) -> Answered:
    """The first questions with a signal, or, where these are too few, the first of the others too; in order."""
    has_signal = answered.has_signal
    chosen = np.concatenate([np.flatnonzero(has_signal), np.flatnonzero(~has_signal)])[:wanted]
    return answered.take(np.sort(chosen))


# -------------------- metrics --------------------


def answer_metrics(scores: Scores, rollout: Rollout) -> Metrics:
    """Means over answers: reward parts, cited segments, lengths, insertions, how answers end."""
    means = rewards.summarize(scores)
    of_reward = ("total", "correct", *rewards.PARTS)
    metrics = {f"reward/{name}": means[name] for name in of_reward}
    metrics |= {name: value for name, value in means.items() if name not in of_reward}
    # The length of a segment, not of an answer's mean segment: answers without any would count as 0 s.
    metrics["mean_s"] = means["total_s"] / means["segments"] if means["segments"] else 0.0
    metrics["response_tokens"] = float(rollout.sampled.sum(-1).mean())
    metrics["response_length"] = float((rollout.length - rollout.prompt_length).mean())
    metrics["insertions"] = float(rollout.num_segments.mean())
    for reason in (FinishReason.END, FinishReason.TOKEN_BUDGET, FinishReason.TURN_LIMIT):
        metrics[f"finish/{reason.name.lower()}"] = float((rollout.finish_reason == reason).mean())
    return metrics


def step_metrics(drawn: Drawn, group: int) -> Metrics:
    """The curves of a step, over all answers that it has sampled."""
    totals = np.array([score["total"] for score in drawn.scores]).reshape(-1, group)
    without = float((np.ptp(totals, axis=-1) == 0).mean())
    return {
        **answer_metrics(drawn.scores, drawn.rollout),
        "groups_without_signal": without,
        **drawn.metrics,
    }
