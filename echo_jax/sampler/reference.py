"""Algorithm 1 of the Echo paper written plainly on the host: the sampler's oracle.

One request at a time, no cache, the whole sequence recomputed for every token, tags found by a regular expression in
decoded text, clips cut with NumPy. It shares nothing with the jitted loop but the model's forward pass.
"""

import dataclasses
import decimal
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.arrays import Params
from echo_jax.model import frontend, language_model, thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler.state import FinishReason, SamplingOptions
from echo_jax.text.tokenizer import Tokenizer

_CLOSED_TAG = re.compile(r"<seg>([\d\.]+),\s*([\d\.]+)</seg>$", re.ASCII)
_NUMBER = re.compile(r"\d+(\.\d+)?|\.\d+|\d+\.", re.ASCII)
_STOP = "</seg>"


@dataclasses.dataclass
class HostAnswer:
    """One finished answer.

    Attributes:
      tokens: the response, inserted audio included.
      segments: (begin, end) in samples of each inserted clip.
      finish_reason: why it stopped.
    """

    tokens: list[int]
    segments: list[tuple[int, int]]
    finish_reason: FinishReason


@functools.partial(jax.jit, static_argnames="config")
def _next_logits(
    config: ThinkerConfig,
    params: Params,
    tokens: jax.Array,
    length: jax.Array,
    clips: tuple[thinker.AudioClips, ...],
) -> jax.Array:
    hidden = thinker.forward_hidden(config, params, tokens, clips)[0, length - 1]
    return language_model.unembed(params["language_model"], hidden)


def answer(
    config: ThinkerConfig,
    params: Params,
    tokenizer: Tokenizer,
    options: SamplingOptions,
    prompt: list[int],
    waveform: np.ndarray,
    audio_start: int,
) -> HostAnswer:
    """Answers one question greedily.

    Args:
      config: sizes.
      params: all arrays of the model.
      tokenizer: spells the tokens.
      options: budgets and format; the temperature must be 0.
      prompt: token ids.
      waveform: f32[n], the whole recording at 16 kHz.
      audio_start: index of the prompt's first <|AUDIO|>.

    Raises:
      ValueError: the temperature is not 0.
    """
    if options.temperature != 0:
        raise ValueError("the host reference is greedy: set temperature=0")
    spelled = tokenizer.token_bytes
    allowed = np.array(
        [bool(spelled[i]) if i < len(spelled) else False for i in range(config.text.vocab_size)]
    )
    allowed[config.im_end_id] = True
    response: list[int] = []
    inserted: list[tuple[int, int]] = []
    starts = [audio_start]
    clips = [waveform]
    turn, text = 1, b""
    while True:
        logits = _run(config, params, prompt + response, clips, starts, options, len(prompt))
        token = int(np.argmax(np.where(allowed, logits, -np.inf)))
        before, text = text, text + spelled[token]
        stops = (
            options.insert_audio and _STOP.encode() in text[max(len(before) - len(_STOP) + 1, 0) :]
        )
        if stops:
            # Generation stops at the string: the token's tail is lost, and what stays is tokenized as its own piece.
            end = text.index(_STOP.encode(), max(len(before) - len(_STOP) + 1, 0)) + len(_STOP)
            text = text[:end]
            response.extend(
                [token]
                if text == before + spelled[token]
                else tokenizer.encode(text[len(before) :].decode())
            )
        else:
            response.append(token)
        if token == config.im_end_id:
            return HostAnswer(response, inserted, FinishReason.END)
        if stops:
            if turn == options.max_turns:
                return HostAnswer(response, inserted, FinishReason.TURN_LIMIT)
            turn += 1
            span = _insertable_span(text.decode(errors="replace"), len(waveform))
            if span is not None:
                num_tokens = int(frontend.num_audio_tokens(span[1] - span[0]))
                if len(response) + num_tokens + 2 >= options.max_response_tokens:
                    return HostAnswer(response, inserted, FinishReason.TOKEN_BUDGET)
                starts.append(len(prompt) + len(response) + 1)
                clips.append(waveform[span[0] : span[1]])
                inserted.append(span)
                response.extend(
                    [
                        config.audio_bos_id,
                        *[config.audio_token_id] * num_tokens,
                        config.audio_eos_id,
                    ]
                )
        if len(response) >= options.max_response_tokens:
            return HostAnswer(response, inserted, FinishReason.TOKEN_BUDGET)


def _insertable_span(text: str, num_samples: int) -> tuple[int, int] | None:
    """The sample range of the tag that `text` ends with, or None if Algorithm 1 inserts nothing for it."""
    match = _CLOSED_TAG.search(text)
    if not match or not all(_NUMBER.fullmatch(number) for number in match.groups()):
        return None
    begin, end = (
        int(decimal.Decimal(number) * frontend.SAMPLE_RATE + decimal.Decimal("0.5"))
        for number in match.groups()
    )
    end = min(end, num_samples)
    return (begin, end) if end - begin >= 3_200 else None


def _run(
    config: ThinkerConfig,
    params: Params,
    tokens: list[int],
    clips: list[np.ndarray],
    starts: list[int],
    options: SamplingOptions,
    prompt_length: int,
) -> np.ndarray:
    """f32[V] logits after the last token, from a full forward pass padded to one compiled shape."""
    capacity = prompt_length + options.max_response_tokens
    padded = np.full((1, -(-capacity // 64) * 64), config.pad_id, np.int32)
    padded[0, : len(tokens)] = tokens
    slots = 1 + options.max_insertions
    waveforms = np.zeros((slots, -(-len(clips[0]) // 32_000) * 32_000), np.float32)
    for slot, clip in enumerate(clips):
        waveforms[slot, : len(clip)] = clip
    num_samples = np.zeros(slots, np.int32)
    num_samples[: len(clips)] = [len(clip) for clip in clips]
    start = np.zeros(slots, np.int32)
    start[: len(starts)] = starts
    arrays = (waveforms, num_samples, np.zeros(slots, np.int32), start)
    group = thinker.AudioClips(*map(jnp.asarray, arrays))
    return np.asarray(_next_logits(config, params, jnp.asarray(padded), len(tokens), (group,)))
