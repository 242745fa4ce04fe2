"""Section `host`: the jitted loop against the algorithm written plainly on the host, one row at a time.

Both answer the same greedy prompts of a scripted model of the tiny size (see `tests/models.py`): four cited segments
an answer, three of them inserted. The host loop keeps no cache and recomputes the whole sequence for each token, as
Algorithm 1 reads when nothing is made fast.
"""

from __future__ import annotations

import argparse
import functools

import jax
import numpy as np

from benchmarks.timing import best_of, finished
from echo_jax.sampler import Prompts, Sampler, SamplingOptions, reference
from echo_jax.text import prompts as prompts_lib
from echo_jax.text.tokenizer import Tokenizer
from tests.models import scripted_model, single_tokens

QUESTION, CHOICES = "Which sound comes first?", ["bell", "buzz"]
TAG = ["\n", "<", "seg", ">", "0", ",", " ", "1", "</", "seg", ">"]
BETWEEN = [" I", " hear", " the", " bell", " first", " and", " then", " a", " short", " buzz", "<"]


def run(args: argparse.Namespace) -> None:
    """Prints one line a batch size: tokens a second, and the ratio to the host loop."""
    corpus = [f"user\n{QUESTION} bell, buzz. Cite. assistant\n", *TAG, *BETWEEN]
    tokenizer = Tokenizer.from_qwen_wheel().compact(corpus)
    chains = [single_tokens(tokenizer, pieces) for pieces in (TAG, BETWEEN)]
    config, params = scripted_model(tokenizer, [chains[0], [tokenizer.audio_eos_id, *chains[1]]])
    options = SamplingOptions(max_response_tokens=192, max_turns=4, temperature=0.0)

    rng = np.random.default_rng(0)
    waveform = rng.normal(size=args.seconds * 16_000).astype(np.float32) / 10
    messages = prompts_lib.question_messages("tiny", QUESTION, CHOICES, len(waveform))
    chat = prompts_lib.encode_chat(tokenizer, messages, add_generation_prompt=True)

    host, host_s = best_of(
        args.repeats,
        lambda: reference.answer(
            config, params, tokenizer, options, chat.tokens.tolist(), waveform, chat.audio_starts[0]
        ),
    )
    inserted = sum(
        token in (config.audio_token_id, config.audio_bos_id, config.audio_eos_id)
        for token in host.tokens
    )
    sampled = len(host.tokens) - inserted
    print(
        f"an answer: {sampled} sampled and {inserted} inserted tokens, {len(host.segments)} segments"
    )
    print(f"host loop, batch 1: {host_s:.2f} s, {sampled / host_s:.0f} sampled tokens/s")

    sampler = Sampler(config, tokenizer, options)
    for batch in sorted({1, 8, args.batch}):
        prompts = Prompts(
            tokens=np.tile(chat.tokens, (batch, 1)),
            length=np.full(batch, len(chat.tokens), np.int32),
            waveforms=np.tile(waveform, (batch, 1)),
            num_samples=np.full(batch, len(waveform), np.int32),
            audio_start=np.full(batch, chat.audio_starts[0], np.int32),
        )
        answer = functools.partial(sampler, params, prompts, jax.random.key(0))
        rollout, seconds = best_of(args.repeats, functools.partial(finished, answer))
        begin, end = len(chat.tokens), int(rollout.length[0])
        if rollout.tokens[0, begin:end].tolist() != host.tokens:
            raise SystemExit(f"batch {batch}: the jitted loop and the host loop answer differently")
        rate = batch * sampled / seconds
        ratio = rate * host_s / sampled
        print(
            f"jitted loop, batch {batch}: {seconds:.2f} s, {rate:.0f} sampled tokens/s, {ratio:.1f} times the host loop"
        )
