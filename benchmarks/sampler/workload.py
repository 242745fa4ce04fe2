"""A model of Qwen's shapes that gives realistic answers, and the questions it gives them to.

The layers are random, so that the hidden state after every prefix is different; the last feed-forward layer is solved
for, so that each question gets the answer that was written for it, token for token. All the arithmetic is that of any
other model of these sizes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax import arrays
from echo_jax.arrays import Params
from echo_jax.model import frontend, thinker
from echo_jax.model.config import AudioConfig, TextConfig, ThinkerConfig
from echo_jax.sampler import Prompts, Rollout
from echo_jax.text import prompts as prompts_lib
from echo_jax.text.tokenizer import Tokenizer
from tests.echo_jax.sampler import scripts

# Qwen2.5's proportions (FFN 5.5 times the width, heads of 64, two of them with keys, tied embeddings, the real
# vocabulary) and Whisper's (FFN 4 times the width): 59 million parameters, 39 of them the embeddings.
AUDIO = AudioConfig(num_layers=6, d_model=256, num_heads=4, ffn_dim=1024, output_dim=256)
TEXT = TextConfig(
    vocab_size=151_936,
    hidden_size=256,
    num_layers=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    ffn_dim=1408,
    tie_embeddings=True,
)
NUM_QUESTIONS = 8  # what the last layer can learn: fewer sampled tokens than it is wide
_SOUNDS = ("bell", "dog", "engine", "siren", "piano", "door", "whistle", "drum", "crowd", "rain")
_OPENINGS = (
    "The question asks which sound comes first, so I go back to the recording.",
    "To tell the two apart I need to hear both of them again, one after the other.",
    "I remember both sounds, but not their order, so let me listen once more.",
)
_FINDINGS = (
    " there is a {0} that fades slowly, while the {1} has not begun yet",
    " I hear the {1} twice, and the {0} stays in the background",
    " a short {0} is followed by silence and then by the {1}",
    " nothing but the {0} can be heard, and it is quite loud",
)
_CLOSINGS = (
    " Taken together, the {0} is what comes before the {1}.",
    " So the order is clear: {0}, then {1}.",
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, questions and the answers it gives.

    Attributes:
      prompts: NUM_QUESTIONS questions, each about a recording of its own, in numpy.
      answers: what it says to each.
    """

    tokenizer: Tokenizer
    config: ThinkerConfig
    params: Params
    prompts: Prompts
    answers: list[scripts.Expected]

    def batch(self, rows: int, questions: int = NUM_QUESTIONS) -> Prompts:
        """So many rows, which ask the first questions in turn."""
        index = np.arange(rows) % questions
        return jax.tree.map(lambda x: x[index], self.prompts)

    def check(self, rollout: Rollout, asked: np.ndarray | None = None) -> None:
        """Stops the benchmark if the answers are not those that were written.

        Args:
          rollout: of `batch`, or of
          asked: the question of each row.
        """
        rows = np.arange(len(rollout.length)) if asked is None else asked
        for row, number in enumerate(rows % NUM_QUESTIONS):
            first, last = rollout.prompt_length[row], rollout.length[row]
            if np.asarray(rollout.tokens[row, first:last]).tolist() != self.answers[number].tokens:
                raise SystemExit(
                    f"row {row}: the sampler does not answer what the model was taught"
                )

    def describe(self) -> str:
        """Sizes of the model, the prompts and the answers."""
        specs = thinker.param_specs(self.config)
        count = arrays.count_parameters(specs) / 1e6
        embeddings = arrays.count_parameters(specs["language_model"]["embed"]) / 1e6
        inserted = [answer.drawn.count(-1) for answer in self.answers]
        sampled = [len(answer.tokens) - n for answer, n in zip(self.answers, inserted, strict=True)]
        clips = [
            (end - begin) / frontend.SAMPLE_RATE
            for answer in self.answers
            for begin, end in answer.segments
        ]
        return (
            f"{count:.1f} million parameters, {embeddings:.1f} of them embeddings; "
            f"prompts of {self.prompts.length.mean():.0f} tokens; an answer has {np.mean(sampled):.0f} sampled tokens "
            f"({min(sampled)} to {max(sampled)}), {len(clips) / len(self.answers):.1f} clips of {min(clips):.1f} to "
            f"{max(clips):.1f} s and {np.mean(inserted):.0f} inserted tokens"
        )


@functools.cache
def build(seconds: int = 10) -> Workload:
    """The model with its questions about recordings of `seconds`."""
    tokenizer = Tokenizer.from_qwen_wheel()
    config = ThinkerConfig(AUDIO, TEXT)  # the ids of the real vocabulary
    rng = np.random.default_rng(0)
    prompts = _prompts(tokenizer, seconds * frontend.SAMPLE_RATE, rng)
    answers = [_answer(tokenizer, seconds, rng) for _ in range(NUM_QUESTIONS)]
    params = _teach(config, random_params(config), prompts, answers)
    return Workload(tokenizer, config, params, prompts, answers)


def _prompts(tokenizer: Tokenizer, samples: int, rng: np.random.Generator) -> Prompts:
    chats = []
    for number in range(NUM_QUESTIONS):
        first, second = _pair(number)
        text = (
            f"Which of the two sounds comes first in this recording, the {first} or the {second}?"
        )
        messages = prompts_lib.question_messages("echo", text, [first, second], samples)
        chats.append(prompts_lib.encode_chat(tokenizer, messages, add_generation_prompt=True))
    length = np.array([len(chat.tokens) for chat in chats], np.int32)
    tokens = np.full((NUM_QUESTIONS, length.max()), tokenizer.pad_id, np.int32)
    for row, chat in enumerate(chats):
        tokens[row, : length[row]] = chat.tokens
    waveforms = rng.normal(0, 0.1, (NUM_QUESTIONS, samples)).astype(np.float32)
    starts = np.array([chat.audio_starts[0] for chat in chats], np.int32)
    return Prompts(tokens, length, waveforms, np.full(NUM_QUESTIONS, samples, np.int32), starts)


def _pair(number: int) -> tuple[str, str]:
    return _SOUNDS[number], _SOUNDS[(number + 3) % len(_SOUNDS)]


def _answer(tokenizer: Tokenizer, seconds: int, rng: np.random.Generator) -> scripts.Expected:
    """Two or three citations of 1 to 3 s among sentences; some `</seg>` are drawn as a token that goes on."""
    first, second = rng.choice(_SOUNDS, 2, replace=False)
    parts: list[scripts.Part] = ["<think>" + str(rng.choice(_OPENINGS))]
    for _ in range(rng.integers(2, 4)):
        start = rng.integers(0, (seconds - 3) * 10) / 10
        end = start + rng.integers(10, 31) / 10
        parts.append(f" In <seg>{start:.1f}, {end:.1f}</seg")
        parts.append(scripts.Drawn(">,") if rng.integers(2) else ">")
        parts.append(scripts.Clip(start, end))
        parts.append(str(rng.choice(_FINDINGS)).format(first, second) + ".")
    parts.append(str(rng.choice(_CLOSINGS)).format(first, second))
    return scripts.expand(tokenizer, [*parts, f"</think><answer>{first}</answer>", scripts.END])


def random_params(config: ThinkerConfig) -> Params:
    """The model before it is taught."""
    params = arrays.init_params(thinker.param_specs(config), jax.random.key(0))
    # With these biases a head looks at a few distances, so that what it sees changes from token to token.
    layers = params["language_model"]["layers"]
    for number, name in enumerate(("q", "k")):
        shape = layers[name]["bias"].shape
        layers[name]["bias"] = 2 * jax.random.normal(jax.random.key(1 + number), shape)
    return params


def _teach(
    config: ThinkerConfig, params: Params, prompts: Prompts, answers: Sequence[scripts.Expected]
) -> Params:
    """Solves for the last layer's `down` so that the final hidden state is mostly the next token's embedding."""
    language = params["language_model"]
    layers = language["layers"]
    down = np.array(layers["down"]["kernel"])
    down[-1] = 0
    # With nothing behind it, what the last feed-forward layer reads is what the model returns.
    before = _with_down(params, down)
    rows = [
        [*prompts.tokens[row, : prompts.length[row]].tolist(), *answer.tokens]
        for row, answer in enumerate(answers)
    ]
    tokens = np.full((len(rows), max(map(len, rows))), config.pad_id, np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    heard = (prompts.waveforms, prompts.num_samples, np.arange(len(rows)), prompts.audio_start)
    clips = (thinker.AudioClips(*map(jnp.asarray, heard)), _cited_clips(prompts, answers))
    hidden = np.asarray(_hidden(config, before, tokens, clips), np.float64)
    inputs, targets = [], []
    for row, answer in enumerate(answers):
        first = int(prompts.length[row])
        for offset, token in enumerate(answer.drawn):
            if token >= 0:
                inputs.append(hidden[row, first + offset - 1])
                targets.append(token)
    read = np.stack(inputs)
    gate, up = (np.asarray(layers[name]["kernel"][-1], np.float64) for name in ("gate", "up"))
    gated = read @ gate
    features = gated / (1 + np.exp(-gated)) * (read @ up)
    # Far longer than what the other layers add, so that it decides; a little shrunk, so that float noise stays noise.
    wanted = 300 * np.asarray(language["embed"]["embedding"], np.float64)[targets]
    gram = features @ features.T
    gram += 1e-3 * np.mean(np.diag(gram)) * np.eye(len(gram))
    down[-1] = features.T @ np.linalg.solve(gram, wanted)
    return _with_down(params, down)


def _with_down(params: Params, down: np.ndarray) -> Params:
    language = params["language_model"]
    layers = {**language["layers"], "down": {"kernel": jnp.asarray(down)}}
    return {**params, "language_model": {**language, "layers": layers}}


def _cited_clips(prompts: Prompts, answers: Sequence[scripts.Expected]) -> thinker.AudioClips:
    """The clips that the answers hold, as one group."""
    cited = [
        (row, begin, end, int(prompts.length[row]) + start)
        for row, answer in enumerate(answers)
        for (begin, end), start in zip(answer.segments, answer.starts, strict=True)
    ]
    row, begin, end, start = np.array(cited, np.int32).T
    longest = -(-(end - begin).max() // frontend.HOP_SAMPLES) * frontend.HOP_SAMPLES
    waveforms = np.zeros((len(cited), longest), np.float32)
    for slot, (r, b, e, _) in enumerate(cited):
        waveforms[slot, : e - b] = prompts.waveforms[r, b:e]
    return thinker.AudioClips(*map(jnp.asarray, (waveforms, end - begin, row, start)))


@functools.partial(jax.jit, static_argnames="config")
def _hidden(
    config: ThinkerConfig,
    params: Params,
    tokens: jax.Array,
    clips: tuple[thinker.AudioClips, ...],
) -> jax.Array:
    return thinker.forward_hidden(config, params, tokens, clips)
