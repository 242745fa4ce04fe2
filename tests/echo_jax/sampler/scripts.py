"""Random models that answer as they are told, and answers to tell them.

The layers are random, so the hidden state after every prefix is different. Of one script, which has fewer tokens than
the model is wide, the head can be solved for exactly: the drawn token gets its logit at each step, whatever the text.
Off its script, for another recording say, such a model writes its tags in confusion, which is a test too.
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
from echo_jax.model.config import ThinkerConfig
from echo_jax.sampler import FinishReason, Prompts
from echo_jax.text.tokenizer import Tokenizer
from tests.models import small_config

CORPUS = (
    "system user\nassistant\n What? Which sound? 0123456789",
    "<think>I hear a <seg>0.2, 0.7</seg> and then bell, buzz.</think><answer>x</answer>",
    *(f"</seg>{tail}" for tail in (",", ".", "\n", "</", ")", ">", "><", "...")),
    *(" <seg>", "(<seg>", "..", "-", "  ", ".</", ",\t"),
)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A token that completes `</seg>` with bytes behind it: drawn, and replaced by `>`."""

    text: str


@dataclasses.dataclass(frozen=True)
class Clip:
    """An inserted clip, in seconds."""

    start: float
    end: float

    @property
    def samples(self) -> tuple[int, int]:
        return round(self.start * frontend.SAMPLE_RATE), round(self.end * frontend.SAMPLE_RATE)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Tokens one by one where BPE would join them."""

    texts: tuple[str, ...]


END = "<|im_end|>"
WIDTH = 256  # of the model, so the most tokens that the scripts of one model may draw
_SLOTS, _LENGTH, _SAMPLES = 8, 256, 32_000  # one shape for all rows, so that they are compiled once
Part = str | Drawn | Clip | Pieces


@dataclasses.dataclass(frozen=True)
class Script:
    """What a model writes and what Algorithm 1 makes of it.

    Attributes:
      parts: in order; a `Clip` stands where audio must be inserted.
      reason: why the answer ends.
    """

    parts: tuple[Part, ...]
    reason: FinishReason = FinishReason.END


@dataclasses.dataclass(frozen=True)
class Expected:
    """A script as token ids.

    Attributes:
      tokens: the response.
      drawn: the token drawn at each place, -1 for inserted ones.
      segments: (begin, end) in samples of each inserted clip.
      starts: index in the response of the first <|AUDIO|> of each.
    """

    tokens: list[int]
    drawn: list[int]
    segments: list[tuple[int, int]]
    starts: list[int]


def expand(tokenizer: Tokenizer, parts: Sequence[Part]) -> Expected:
    """Spells a script."""
    found = Expected([], [], [], [])
    for part in parts:
        if isinstance(part, Clip):
            begin, end = part.samples
            found.segments.append((begin, end))
            found.starts.append(len(found.tokens) + 1)
            num_audio = frontend.num_audio_tokens(end - begin)
            inserted = [
                tokenizer.audio_bos_id,
                *[tokenizer.audio_id] * num_audio,
                tokenizer.audio_eos_id,
            ]
            found.tokens.extend(inserted)
            found.drawn.extend([-1] * len(inserted))
        elif isinstance(part, Drawn):
            found.tokens.append(single(tokenizer, ">"))
            found.drawn.append(single(tokenizer, part.text))
        else:
            if isinstance(part, Pieces):
                ids = [single(tokenizer, text) for text in part.texts]
            elif part == END:
                ids = [tokenizer.im_end_id]
            else:
                ids = [index for run in _split(part) for index in tokenizer.encode(run)]
            found.tokens.extend(ids)
            found.drawn.extend(ids)
    return found


def _split(text: str) -> list[str]:
    *closed, rest = text.split("</seg>")
    return [*(piece + "</seg>" for piece in closed), rest]


def single(tokenizer: Tokenizer, text: str) -> int:
    """The token that is exactly this text."""
    return tokenizer.token_bytes.index(text.encode())


def micro_model(tokenizer: Tokenizer, seed: int = 0) -> tuple[ThinkerConfig, Params]:
    """A thinker of two layers whose hidden states tell prefixes apart."""
    config = small_config(
        tokenizer,
        WIDTH,
        # A checkpoint's head has more rows than its tokenizer has tokens.
        vocab_size=tokenizer.vocab_size + 11,
        num_heads=4,
        num_kv_heads=2,
        ffn_dim=64,
        rope_theta=1_000.0,
    )
    params = arrays.init_params(thinker.param_specs(config), jax.random.key(seed))
    language = params["language_model"]
    rng = np.random.default_rng(seed)
    shape = language["embed"]["embedding"].shape
    language["embed"]["embedding"] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    for name in ("q", "k"):
        shape = language["layers"][name]["bias"].shape
        language["layers"][name]["bias"] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return config, params


@functools.partial(jax.jit, static_argnames="config")
def _hidden(
    config: ThinkerConfig, params: Params, tokens: jax.Array, clips: thinker.AudioClips
) -> jax.Array:
    return thinker.forward_hidden(config, params, tokens, (clips,))[0]


def hidden_states(
    config: ThinkerConfig,
    params: Params,
    tokens: Sequence[int],
    clips: Sequence[np.ndarray],
    starts: Sequence[int],
) -> np.ndarray:
    """f32[L, hidden_size] of one whole row, without any cache; `starts` is where each clip's first <|AUDIO|> stands."""
    padded = np.full((1, _LENGTH), config.pad_id, np.int32)
    padded[0, : len(tokens)] = tokens
    waveforms = np.zeros((_SLOTS, _SAMPLES), np.float32)
    num_samples, start = np.zeros((2, _SLOTS), np.int32)
    for slot, clip in enumerate(clips):
        waveforms[slot, : len(clip)] = clip
        num_samples[slot], start[slot] = len(clip), starts[slot]
    row = np.zeros(_SLOTS, np.int32)
    group = thinker.AudioClips(*map(jnp.asarray, (waveforms, num_samples, row, start)))
    return np.asarray(_hidden(config, params, jnp.asarray(padded), group))[: len(tokens)]


def with_head(params: Params, kernel: np.ndarray) -> Params:
    """The same model with another head f32[hidden_size, V]."""
    language = {**params["language_model"], "lm_head": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    return {**params, "language_model": language}


def teach(
    config: ThinkerConfig,
    params: Params,
    prompts: Prompts,
    expected: Sequence[Expected],
    logit: float = 8.0,
) -> Params:
    """Gives the model the head with which row r draws the tokens of `expected[r]`: each gets `logit`, others 0."""
    states, drawn = [], []
    for row, script in enumerate(expected):
        length = int(prompts.length[row])
        waveform = np.asarray(prompts.waveforms[row])[: int(prompts.num_samples[row])]
        others = prompts.other_clips
        heard = others is not None and int(others.num_samples[row]) > 0
        example = [others.waveforms[row, : int(others.num_samples[row])]] if heard else []
        states.append(
            hidden_states(
                config,
                params,
                [*prompts.tokens[row, :length], *script.tokens],
                [waveform, *(waveform[begin:end] for begin, end in script.segments), *example],
                [
                    int(prompts.audio_start[row]),
                    *(length + start for start in script.starts),
                    *([int(others.start[row])] if heard else []),
                ],
            )[length - 1 : -1]
        )
        drawn.append(np.array(script.drawn, np.int32))
    taught = np.concatenate(drawn)
    inputs = np.concatenate(states).astype(np.float64)[taught >= 0]
    targets = logit * np.eye(config.text.vocab_size)[taught[taught >= 0]]
    # The solution of least norm, a little shrunk, so that float noise stays noise.
    gram = inputs @ inputs.T + 1e-2 * np.eye(len(inputs))
    return with_head(params, inputs.T @ np.linalg.solve(gram, targets))


def _cite(times: str, *clip: float, tail: str = ",") -> tuple[Part, ...]:
    """A cited span whose last token is merged with what follows, and the clip that must be inserted."""
    return (f"<seg>{times}</seg", Drawn(f">{tail}"), *([Clip(*clip)] if clip else []))


_DIGITS = "31415926535897932384626433832795028841971693993751058209749445923078164062862089986280"
_LIMIT, _FULL = FinishReason.TURN_LIMIT, FinishReason.TOKEN_BUDGET

# Three scripts each, one for each recording of 1.6, 1.28 and 1.04 s; four turns and 128 tokens an answer.
SCRIPTS: dict[str, tuple[Script, Script, Script]] = {
    "lengths": (
        Script(
            (
                "<think>I hear ",
                *_cite("0.1, 0.5", 0.1, 0.5),
                " and ",
                *_cite("0, 0.9", 0, 0.9, tail="."),
                *_cite("0.2, 1.5", 0.2, 1.5, tail="</"),
                " bell",
                END,
            )
        ),
        Script(("a <seg>0.2, 0.7</seg>", Clip(0.2, 0.7), ", then buzz.", END)),
        Script(("<think>I hear a bell and then buzz.</think><answer>x</answer>", END)),
    ),
    "invalid": (
        Script(
            (
                *_cite("1.2.3, 1.5"),
                *_cite("0.9, 0.3", tail="."),
                "<seg>0.3, 0.4</seg>",
                " x",
                END,
            )
        ),
        Script(("<seg>1.28, 2</seg>", *_cite("1.1, 9"), *_cite("0.5, 0.6999"), " a", END)),
        Script(
            (
                "<seg>-0.1, 0.5</seg>",
                *_cite("1e9, 2"),
                "<seg></seg>",
                *_cite("0.1, 0.9"),
            ),
            _LIMIT,
        ),
    ),
    "edges": (
        Script((*_cite("0.5, 0.7", 0.5, 0.7), *_cite("1.25, 99", 1.25, 1.6), "x", END)),
        Script(
            (
                "<seg>0.2,\t \n0.8</seg",
                Drawn(">\n"),
                Clip(0.2, 0.8),
                *_cite(".3, 1.", 0.3, 1.0),
                END,
            )
        ),
        Script(
            (
                f"<seg>0.25{'0' * 57}1, 0.5</seg>",
                Clip(0.25, 0.5),
                " x",
                END,
            )
        ),
    ),
    "spellings": (
        Script(
            (
                Pieces(("<", "s", "e", "g", ">", "0", ".", "1", ",", "0", ".", "4", "<", "/")),
                Pieces(("s", "e", "g")),
                Drawn(">."),
                Clip(0.1, 0.4),
                Pieces(("(<", "se", "g", ">", "0", ",", " ", "1", "</", "se", "g", ">")),
                Clip(0, 1),
                END,
            )
        ),
        Script(
            (
                "<seg>0.1, 0.3 <seg>0.2<seg<seg>0.4, 0.9</seg",
                Drawn("></"),
                Clip(0.4, 0.9),
                "</seg",
                Drawn(">,"),
                " a </segx</se <seg>0.5, 0.8",
                END,
            )
        ),
        Script(
            (
                "<seg>0.1, 0.9</segx</seg>",
                "0.2, 0.9</seg",
                Drawn("><"),
                "seg>0.3, 1</seg>",
                "</seg>",
            ),
            _LIMIT,
        ),
    ),
    "limits": (
        Script(
            (
                *_cite("0, 1.2", 0, 1.2),
                *_cite("0.1, 1.3", 0.1, 1.3),
                " no <seg>0.4, 1.5</seg>",
            ),
            _FULL,
        ),
        Script(
            (
                *_cite("0, 0.2", 0, 0.2),
                *_cite("0.2, 0.4", 0.2, 0.4),
                *_cite("0.4, 0.6", 0.4, 0.6),
                *_cite("0.6, 0.8"),
            ),
            _LIMIT,
        ),
        Script((*_cite("0, 1.04", 0, 1.04), *_cite("0, 1", 0, 1), _DIGITS[:60]), _FULL),
    ),
}
