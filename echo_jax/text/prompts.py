"""The Qwen chat template with audio, and the named wordings of the question prompt.

A chat is a list of `Message`; `encode_chat` turns it into token ids, the loss mask and the places of the audio. The
layout is Qwen2.5-Omni's: `<|im_start|>role\\n…<|im_end|>\\n`, a clip being `<|audio_bos|>`, n times `<|AUDIO|>`,
`<|audio_eos|>`, with n from the clip's length.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from echo_jax.model.frontend import num_audio_tokens
from echo_jax.text import tokenizer as tokenizer_lib

CLOSE_TAG = "</seg>"
ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Audio:
    """A clip within a message: its length in samples at 16 kHz."""

    num_samples: int

    @property
    def num_tokens(self) -> int:
        """How many `<|AUDIO|>` stand for the clip."""
        return num_audio_tokens(self.num_samples)


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a chat: a role and its text, or its parts in order."""

    role: Literal["system", "user", "assistant"]
    content: str | Sequence[str | Audio]


@dataclasses.dataclass(frozen=True)
class EncodedChat:
    """A tokenized chat.

    Attributes:
      tokens: i32[L].
      loss_mask: bool[L], True where the token is the assistant's own: its text and its `<|im_end|>`, not the
        header, not audio, not the newline behind.
      audio_starts: index of the first `<|AUDIO|>` of each clip, in order.
      audio_tokens: number of `<|AUDIO|>` of each clip.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    audio_starts: list[int]
    audio_tokens: list[int]


@dataclasses.dataclass(frozen=True)
class PromptPreset:
    """A wording of the question prompt.

    Attributes:
      template: the user's text behind the audio, with `{question}` and `{choices}`.
      system: text of the system turn; "" leaves the turn out.
      choices: "list" prints a Python list of strings, "plain" joins with commas.
      split_tags: whether SFT text is split behind each `</seg>` before BPE, see `encode_chat`.
    """

    template: str
    system: str = "You are a helpful assistant."
    choices: Literal["list", "plain"] = "list"
    split_tags: bool = True

    def __post_init__(self) -> None:
        for field in ("{question}", "{choices}"):
            if self.template.count(field) != 1:
                raise ValueError(f"prompt template must hold {field} once: {self.template!r}")

    def user_text(self, question: str, choices: Sequence[str]) -> str:
        """The text of the user turn."""
        printed = str(list(choices)) if self.choices == "list" else ", ".join(choices)
        # No str.format: questions and choices may hold braces.
        before, _, after = self.template.partition("{question}")
        return before.replace("{choices}", printed) + question + after.replace("{choices}", printed)


_ASK = "{question}\nChoose the answer from the following list of choices: {choices}.\nThink step by step"
_FORM = (
    " Write your reasoning and then the chosen text in the form"
    " <think>your reasoning</think><answer>your choice</answer>."
)
_ECHO = (
    _ASK
    + ", and while reasoning refer to the specific audio segments that matter, with their timestamps."
    + _FORM
)

PRESETS: dict[str, PromptPreset] = {
    # Echo, grounded and interleaved: asks for segments, does not explain their syntax (SFT teaches it).
    "echo": PromptPreset(_ECHO),
    # The same with the text of SFT tokenized in one piece.
    "echo_plain_tokens": PromptPreset(_ECHO, split_tags=False),
    # The text-only baseline: the sentence on segments is left out.
    "conditioned": PromptPreset(_ASK + "." + _FORM),
    # Few tokens around the question, for models whose training time is their sequence length.
    "tiny": PromptPreset("{question} {choices}. Cite.", system="", choices="plain"),
    "tiny_conditioned": PromptPreset("{question} {choices}.", system="", choices="plain"),
}


def preset(name: str) -> PromptPreset:
    """The preset of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown prompt preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def question_messages(
    prompt: str | PromptPreset, question: str, choices: Sequence[str], num_samples: int
) -> list[Message]:
    """The chat that asks a multiple-choice question about one clip of `num_samples` samples (echo.md, section 2)."""
    chosen = preset(prompt) if isinstance(prompt, str) else prompt
    system = [Message("system", chosen.system)] if chosen.system else []
    return [*system, Message("user", [Audio(num_samples), chosen.user_text(question, choices)])]


def encode_chat(
    tokenizer: tokenizer_lib.Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    split_tags: bool = True,
) -> EncodedChat:
    """Tokenizes a chat.

    Args:
      tokenizer: the vocabulary.
      messages: the turns; audio may stand in any of them.
      add_generation_prompt: whether to end with the header of an assistant turn, for the model to go on.
      split_tags: whether assistant text is cut behind each `</seg>` before BPE. Generation stops there, so no
        token that the model is conditioned on reaches over the end of the tag (`>` and `,`, never `>,`).

    Raises:
      ValueError: an unknown role, or a clip too short for one token.
    """
    control = {
        tokenizer_lib.IM_START: tokenizer.im_start_id,
        tokenizer_lib.IM_END: tokenizer.im_end_id,
    }
    tokens: list[int] = []
    loss: list[bool] = []
    audio_starts: list[int] = []
    audio_tokens: list[int] = []
    for run, own in _runs(messages, add_generation_prompt, split_tags):
        if isinstance(run, Audio):
            if run.num_tokens < 1:
                raise ValueError(
                    f"a clip of {run.num_samples} samples has no audio token; use at least 321 samples"
                )
            audio_starts.append(len(tokens) + 1)
            audio_tokens.append(run.num_tokens)
            ids = [
                tokenizer.audio_bos_id,
                *[tokenizer.audio_id] * run.num_tokens,
                tokenizer.audio_eos_id,
            ]
        elif isinstance(run, _Control):
            ids = [control[run.name]]
        else:
            ids = tokenizer.encode(run)
        tokens += ids
        loss += [own] * len(ids)
    return EncodedChat(np.array(tokens, np.int32), np.array(loss, bool), audio_starts, audio_tokens)


def text_runs(
    messages: Sequence[Message], add_generation_prompt: bool = False, split_tags: bool = True
) -> list[str]:
    """The strings that `encode_chat` hands to the BPE, for `Tokenizer.compact`."""
    return [
        run for run, _ in _runs(messages, add_generation_prompt, split_tags) if isinstance(run, str)
    ]


@dataclasses.dataclass(frozen=True)
class _Control:
    name: str


def _runs(
    messages: Sequence[Message], add_generation_prompt: bool, split_tags: bool
) -> Iterator[tuple[str | Audio | _Control, bool]]:
    """The chat as (run, whether it is the assistant's own): text that BPE sees in one piece, clips, control tokens."""
    for message in messages:
        if message.role not in ROLES:
            raise ValueError(
                f"unknown role {message.role!r} in a chat; use one of {', '.join(ROLES)}"
            )
        own = message.role == "assistant"
        parts = [message.content] if isinstance(message.content, str) else list(message.content)
        header = f"{message.role}\n"
        yield _Control(tokenizer_lib.IM_START), False
        if own:  # the prompt of a generation ends with the header, so what is generated never merges with it
            yield header, False
        else:
            parts = [header, *parts]
        for is_text, group in itertools.groupby(parts, lambda part: isinstance(part, str)):
            if is_text:
                text = "".join(part for part in group if isinstance(part, str))
                for piece in _split_behind_tags(text) if own and split_tags else [text]:
                    if piece:
                        yield piece, own
            else:
                for clip in group:
                    yield clip, False
        yield _Control(tokenizer_lib.IM_END), own
        yield "\n", False
    if add_generation_prompt:
        yield _Control(tokenizer_lib.IM_START), False
        yield "assistant\n", False


def _split_behind_tags(text: str) -> list[str]:
    *closed, rest = text.split(CLOSE_TAG)
    return [*(piece + CLOSE_TAG for piece in closed), rest]
