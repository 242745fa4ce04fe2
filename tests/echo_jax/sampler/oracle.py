"""Checks a finished rollout against Algorithm 1, row by row, with NumPy, regular expressions and whole forward passes.

If every token is the most probable one after the tokens before it, and everything that was inserted is what Algorithm 1
inserts there, then by induction the row is what Algorithm 1 writes. The same walk proves the log-probabilities.
"""

from __future__ import annotations

import decimal
import re
from collections.abc import Callable

import numpy as np

from echo_jax.arrays import Params
from echo_jax.model import frontend
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler import FinishReason, Prompts, Rollout, SamplingOptions
from echo_jax.text import segments
from echo_jax.text.tokenizer import Tokenizer
from tests.echo_jax.sampler import scripts

CLOSE = b"</seg>"
_NUMBER = rb"(\d+\.?\d*|\.\d+)"
_TAG = re.compile(rb"<seg>" + _NUMBER + rb",\s*" + _NUMBER + rb"</seg>\Z")
_SHORTEST = 3_200

Cut = Callable[[int, int, int], np.ndarray]


def log_probs(logits: np.ndarray, allowed: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """f64[V] log-probabilities of the sampling distribution, derived again in float64; f32[V] logits."""
    scores = np.where(allowed, logits.astype(np.float64), -np.inf)
    if options.temperature > 0:
        scores = scores / options.temperature
        if options.top_k:
            kth = np.sort(scores)[::-1][: options.top_k][-1]
            scores = np.where(scores >= kth, scores, -np.inf)
        if options.top_p < 1:
            order = np.argsort(-scores, kind="stable")
            cumulative = np.cumsum(np.exp(_normalized(scores)[order]))
            count = int(np.searchsorted(cumulative, options.top_p)) + 1
            scores = np.where(scores >= scores[order[min(count, len(order)) - 1]], scores, -np.inf)
        if options.min_p:
            scores = np.where(scores - scores.max() >= np.log(options.min_p), scores, -np.inf)
    return _normalized(scores)


def _normalized(scores: np.ndarray) -> np.ndarray:
    return scores - logsumexp(scores)


def logsumexp(scores: np.ndarray) -> float:
    """log(sum(exp(scores))) in float64."""
    top = scores.max()
    return float(top + np.log(np.exp(scores - top).sum()))


def cited_span(text: bytes, num_samples: int) -> tuple[int, int] | None:
    """The samples of the tag that `text` ends with, or None if no audio is inserted for it."""
    found = _TAG.search(text)
    if not found:
        return None
    begin, end = (
        int((decimal.Decimal(n.decode()) * frontend.SAMPLE_RATE).to_integral_value("ROUND_HALF_UP"))
        for n in found.groups()
    )
    end = min(end, num_samples)
    return (begin, end) if end - begin >= _SHORTEST else None


def open_rest(text: bytes) -> bytes:
    """What completes `</seg>` behind `text`; empty where none has begun."""
    begun = next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
    return CLOSE[begun:] if begun else b""


def check_rollout(
    config: ThinkerConfig,
    params: Params,
    tokenizer: Tokenizer,
    options: SamplingOptions,
    prompts: Prompts,
    rollout: Rollout,
    cut: Cut | None = None,
) -> None:
    """Asserts that each row is what Algorithm 1 allows.

    Args:
      config, params, tokenizer: the model.
      options: how it was sampled.
      prompts: Q questions, of which the rollout has as many rows each.
      rollout: numpy.
      cut: (question, begin, end) to the samples of an inserted clip; by default those of the recording.
    """
    group = len(rollout.length) // len(prompts.length)
    for row in range(len(rollout.length)):
        _check_row(config, params, tokenizer, options, prompts, rollout, row, row // group, cut)


def _check_row(
    config: ThinkerConfig,
    params: Params,
    tokenizer: Tokenizer,
    options: SamplingOptions,
    prompts: Prompts,
    rollout: Rollout,
    row: int,
    question: int,
    cut: Cut | None,
) -> None:
    length, first = int(rollout.length[row]), int(rollout.prompt_length[row])
    num_samples = int(prompts.num_samples[question])
    waveform = np.asarray(prompts.waveforms[question])[:num_samples]
    assert first == prompts.length[question]
    tokens = rollout.tokens[row, :length].tolist()
    assert tokens[:first] == np.asarray(prompts.tokens[question, :first]).tolist()
    assert (rollout.tokens[row, length:] == config.pad_id).all()

    count = int(rollout.num_segments[row])
    spans = [(int(begin), int(end)) for begin, end in rollout.segment_samples[row, :count]]
    starts = rollout.segment_token_start[row, :count].tolist()
    cut = cut or (lambda question, begin, end: waveform[begin:end])
    states = scripts.hidden_states(
        config,
        params,
        tokens,
        [waveform, *(cut(question, begin, end) for begin, end in spans)],
        [int(prompts.audio_start[question]), *starts],
    )
    logits = states @ np.asarray(params["language_model"]["lm_head"]["kernel"])
    spelled = tokenizer.token_bytes
    allowed = np.zeros(config.text.vocab_size, bool)
    allowed[: len(spelled)] = [len(piece) > 0 for piece in spelled]
    allowed[config.im_end_id] = True

    text, turns, t = b"", 1, first
    sampled_at: list[int] = []
    closed_at: dict[int, segments.Reason] = {}
    found: list[tuple[tuple[int, int], int]] = []
    reason = None
    while reason is None:
        token = tokens[t]
        rest = open_rest(text) if options.insert_audio else b""
        stops = [i for i, piece in enumerate(spelled) if rest and piece.startswith(rest)]
        event = stops if token in stops else [token]
        if token in stops:
            assert spelled[token] == rest, "the tail of a token behind </seg> was kept"
        assert rollout.stop_rest[row, t] == (len(CLOSE) - len(rest) - 1 if token in stops else -1)
        expected = log_probs(logits[t - 1], allowed, options)
        np.testing.assert_allclose(rollout.logprob[row, t], logsumexp(expected[event]), atol=1e-4)
        of_model = logsumexp(_normalized(np.where(allowed, logits[t - 1], -np.inf))[event])
        np.testing.assert_allclose(rollout.model_logprob[row, t], of_model, atol=1e-4)
        if options.temperature == 0:
            best = np.where(allowed, logits[t - 1], -np.inf)
            assert best[event].max() >= best.max() - 1e-3, f"row {row}, token {t} is not the best"
        sampled_at.append(t)
        before, text = text, text + spelled[token]
        t += 1
        used = t - first
        if token == config.im_end_id:
            reason = FinishReason.END
        elif options.insert_audio and CLOSE in text[max(len(before) - len(CLOSE) + 1, 0) :]:
            assert text.endswith(CLOSE)
            closed_at[t - 1] = segments.parse_bytes(text, num_samples)[-1].reason
            if turns == options.max_turns:
                reason = FinishReason.TURN_LIMIT
                if cited_span(text, num_samples) is not None:
                    closed_at[t - 1] = segments.Reason.NO_TURNS_LEFT
                break
            turns += 1
            span = cited_span(text, num_samples)
            if span is not None:
                num_audio = frontend.num_audio_tokens(span[1] - span[0])
                if used + num_audio + 2 >= options.max_response_tokens:
                    closed_at[t - 1] = segments.Reason.NO_ROOM
                    reason = FinishReason.TOKEN_BUDGET
                    break
                inserted = [
                    config.audio_bos_id,
                    *[config.audio_token_id] * num_audio,
                    config.audio_eos_id,
                ]
                assert tokens[t : t + len(inserted)] == inserted
                found.append((span, t + 1))
                t += len(inserted)
        if reason is None and t - first >= options.max_response_tokens:
            reason = FinishReason.TOKEN_BUDGET

    assert t == length
    assert FinishReason(int(rollout.finish_reason[row])) == reason
    assert int(rollout.num_turns[row]) == turns
    assert found == list(zip(spans, starts, strict=True))
    np.testing.assert_array_equal(np.flatnonzero(rollout.sampled[row]), sampled_at)
    elsewhere = ~rollout.sampled[row]
    assert (rollout.logprob[row, elsewhere] == 0).all()
    assert (rollout.model_logprob[row, elsewhere] == 0).all()
    assert (rollout.stop_rest[row, elsewhere] == -1).all()
    want = np.full(len(rollout.tokens[row]), -1)
    want[list(closed_at)] = list(closed_at.values())
    np.testing.assert_array_equal(rollout.stop_reason[row], want)
    valid = sum(reason == segments.Reason.VALID for reason in closed_at.values())
    assert valid == count
