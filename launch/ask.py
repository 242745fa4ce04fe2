"""Asks a model one question about one sound file, and shows where it listens again.

  python -m launch.ask --checkpoint DIR --audio FILE --question "Which sound comes right after the bell?" \
      --choices bell buzz "dog bark" siren

The reasoning is printed as it is sampled; `[listening again 2.4–5.1 s]` stands where that stretch of the recording was
put into the sequence. The last line is the choice that the answer names.
"""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from data import audio_files
from echo_jax import huggingface, ranges
from echo_jax.arrays import Params
from echo_jax.model.frontend import SAMPLE_RATE
from echo_jax.sampler import FinishReason, Prompts, Sampler, SamplingOptions
from echo_jax.text import prompts as prompts_lib
from echo_jax.text.tokenizer import Tokenizer
from eval import scoring

FORMATS = ("interleaved", "grounded", "conditioned")
# A released Qwen2.5-Omni has 152 thousand ids; a smaller vocabulary is one that a tiny run cut down to its corpus.
_SMALL_VOCABULARY = 50_000


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of the answer's text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Listening:
    """A clip was inserted: the recording from `start_s` to `end_s`, in seconds."""

    start_s: float
    end_s: float


@dataclasses.dataclass(frozen=True)
class Finished:
    """The answer is complete."""

    reason: FinishReason


Event = Text | Listening | Finished


def stream(
    sampler: Sampler,
    tokenizer: Tokenizer,
    params: Params,
    prompts: Prompts,
    key: jax.Array,
    steps: int = 4,
) -> Iterator[Event]:
    """Samples one answer and yields what is new after every `steps` iterations of the sampler's loop.

    Args:
      sampler: compiled for the format and the temperature that are wanted.
      tokenizer: spells the tokens.
      params: the model's arrays.
      prompts: exactly one prompt.
      key: typed random key.
      steps: how often to look; a smaller number streams more smoothly and costs more round trips.
    """
    state = sampler.start(params, prompts, key)
    shown = int(state.prompt_length[0])
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    num_clips = 0
    while True:
        state = sampler.run(params, state, max_steps=steps)
        # Copies: the next call gives the state's buffers away.
        tokens, sampled = np.array(state.tokens[0]), np.array(state.sampled[0])
        spans, length = np.array(state.segment_samples[0]), int(state.length[0])
        reason = FinishReason(int(state.finish_reason[0]))
        text = ""
        for position in range(shown, length):
            if sampled[position]:
                text += utf8.decode(tokenizer.token_bytes[tokens[position]])
            elif tokens[position] == tokenizer.audio_bos_id:
                if text:
                    yield Text(text)
                    text = ""
                begin, end = spans[num_clips] / SAMPLE_RATE
                yield Listening(float(begin), float(end))
                num_clips += 1
        shown = length
        if reason != FinishReason.ACTIVE:
            text += utf8.decode(b"", final=True)
        if text:
            yield Text(text)
        if reason != FinishReason.ACTIVE:
            yield Finished(reason)
            return


def encode_prompt(
    tokenizer: Tokenizer,
    preset: str,
    question: str,
    choices: Sequence[str],
    waveform: np.ndarray,
) -> Prompts:
    """One question about one recording, f32[n] at 16 kHz, as the sampler takes it.

    Raises:
      ValueError: an unknown preset, or a recording too short for one audio token.
    """
    messages = prompts_lib.question_messages(preset, question, choices, len(waveform))
    chat = prompts_lib.encode_chat(tokenizer, messages, add_generation_prompt=True)
    # Whole seconds, so that recordings of about the same length share a compiled program.
    padded = np.zeros((1, -(-len(waveform) // SAMPLE_RATE) * SAMPLE_RATE), np.float32)
    padded[0, : len(waveform)] = waveform
    return Prompts(
        tokens=chat.tokens[None],
        length=np.array([len(chat.tokens)], np.int32),
        waveforms=padded,
        num_samples=np.array([len(waveform)], np.int32),
        audio_start=np.array([chat.audio_starts[0]], np.int32),
    )


def default_preset(vocab_size: int, answer_format: str) -> str:
    """The prompt wording that a model was most likely trained with."""
    tiny = vocab_size < _SMALL_VOCABULARY
    if answer_format == "conditioned":
        return "tiny_conditioned" if tiny else "conditioned"
    return "tiny" if tiny else "echo"


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like every other error of this program."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"launch.ask: {message} (--help shows all flags)\n")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads and checks the command line; exits with one line on a mistake."""
    parser = _Parser(prog="launch.ask", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="model directory or workdir of a run"
    )
    parser.add_argument(
        "--audio", required=True, metavar="FILE", help="wav, flac, ogg or mp3, up to 300 s"
    )
    parser.add_argument("--question", required=True)
    parser.add_argument("--choices", required=True, nargs="+", metavar="CHOICE", help="two or more")
    parser.add_argument(
        "--format", choices=FORMATS, default="interleaved", help="default: %(default)s"
    )
    parser.add_argument(
        "--prompt",
        choices=sorted(prompts_lib.PRESETS),
        help="wording; default: by checkpoint and format",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: the most probable token (default)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; default: %(default)s")
    parser.add_argument(
        "--max_tokens", type=int, default=2048, help="answer budget; default: %(default)s"
    )
    args = parser.parse_args(argv)
    if not args.question.strip():
        parser.error("--question is empty: write the question")
    for flag, texts in (("--question", [args.question]), ("--choices", args.choices)):
        if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
            parser.error(f"{flag} holds bytes that are not UTF-8: write it in UTF-8")
    if any(not choice.strip() for choice in args.choices):
        parser.error("--choices holds an empty choice: leave it out or write its text")
    if len(args.choices) < 2:
        parser.error(
            f"--choices has {len(args.choices)} choice: give at least two, quoted where they hold blanks"
        )
    first_of: dict[str, str] = {}
    for choice in args.choices:
        # What an answer is compared by; marks alone are nothing but themselves.
        compared = scoring.normalize(choice) or choice.strip()
        if compared in first_of:
            parser.error(
                f"--choices holds the same choice twice, as {first_of[compared]!r} and {choice!r}: give different ones"
            )
        first_of[compared] = choice
    for flag, value, allowed in (
        ("--seed", args.seed, ranges.SEED),
        ("--max_tokens", args.max_tokens, ranges.COUNT),
    ):
        if value not in allowed:
            parser.error(f"{flag} {value} must be {allowed}")
    return args


def answer(args: argparse.Namespace) -> None:
    """Loads, asks and prints.

    Raises:
      OSError, ValueError: with one line that says which file or flag is wrong.
    """
    options = SamplingOptions(
        max_response_tokens=args.max_tokens,
        insert_audio=args.format == "interleaved",
        temperature=args.temperature,
        insertion_slots=1,
    )
    # What is quick to refuse comes before what is slow to load.
    waveform = audio_files.read_audio(args.audio)
    directory = huggingface.resolve(args.checkpoint)
    tokenizer = Tokenizer.from_directory(directory)
    config, params = huggingface.load_pretrained(directory)
    preset = args.prompt or default_preset(tokenizer.vocab_size, args.format)
    try:
        prompts = encode_prompt(tokenizer, preset, args.question, args.choices, waveform)
    except ValueError as error:
        raise ValueError(f"{args.audio}: {error}") from None

    sampler = Sampler(config, tokenizer, options)
    params = jax.tree.map(jnp.asarray, params)
    response = ""
    for event in stream(sampler, tokenizer, params, prompts, jax.random.key(args.seed)):
        match event:
            case Text(text):
                response += text
                print(text, end="", flush=True)
            case Listening(start_s, end_s):
                print(f" [listening again {start_s:.1f}–{end_s:.1f} s]", end="", flush=True)
            case Finished(FinishReason.TOKEN_BUDGET):
                print(f" [stopped: the budget of {args.max_tokens} tokens is used up]", end="")
            case Finished(FinishReason.TURN_LIMIT):
                print(f" [stopped: {options.max_turns} turns are used up]", end="")
    said = scoring.extract_answer(response)
    chosen = scoring.map_to_choice(said, args.choices).choice if said else None
    print(f"\nAnswer: {chosen if chosen is not None else 'none of the choices'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, or 2 after one line about what is wrong."""
    args = parse_args(argv)
    try:
        answer(args)
    except (OSError, ValueError, KeyError) as error:
        print(f"launch.ask: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
