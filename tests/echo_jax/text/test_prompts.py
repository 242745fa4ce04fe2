"""The chat layout: goldens, equality with transformers' one-piece tokenization, loss masks, split tags."""

import numpy as np
import pytest
import transformers

from echo_jax.text import prompts
from echo_jax.text.prompts import Audio, Message
from echo_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return Tokenizer.from_qwen_wheel()


@pytest.fixture(scope="module")
def transformers_tokenizer(qwen: Tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    qwen.save(directory)
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_golden_ids(qwen: Tokenizer) -> None:
    messages = [
        Message("system", "You are a helpful assistant."),
        Message("user", [Audio(3_200), "Hi"]),
        Message("assistant", "<answer>"),
    ]
    chat = prompts.encode_chat(qwen, messages)
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    user = [151644, 872, 198, 151647, *[151646] * 5, 151648, 13048, 151645, 198]
    assistant = [151644, 77091, 198, 27, 9217, 29, 151645, 198]
    assert chat.tokens.tolist() == system + user + assistant
    assert chat.tokens.dtype == np.int32
    assert np.flatnonzero(chat.loss_mask).tolist() == [len(system + user) + i for i in (3, 4, 5, 6)]
    assert (chat.audio_starts, chat.audio_tokens) == ([len(system) + 4], [5])


@pytest.mark.parametrize("name", list(prompts.PRESETS))
def test_prompt_equals_one_piece_tokenization(
    qwen: Tokenizer, transformers_tokenizer, name: str
) -> None:
    messages = prompts.question_messages(
        name, "What {follows}?\nListen.", ["it's a bell", "{x}"], 32_000
    )
    chat = prompts.encode_chat(qwen, messages, add_generation_prompt=True)
    text = qwen.decode(chat.tokens, keep_special=True)
    assert transformers_tokenizer(text)["input_ids"] == chat.tokens.tolist()
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert "What {follows}?\nListen." in text
    assert not chat.loss_mask.any()
    assert chat.audio_tokens == [50]
    assert (chat.tokens[chat.audio_starts[0] :][:50] == qwen.audio_id).all()


def test_presets_say_what_they_should() -> None:
    text = {name: preset.user_text("Q?", ["a b", "c"]) for name, preset in prompts.PRESETS.items()}
    assert "['a b', 'c']" in text["echo"]
    assert "['a b', 'c']" in text["conditioned"]
    assert "segment" in text["echo"]
    assert not any(word in text["conditioned"] for word in ("segment", "timestamp"))
    assert "<seg>" not in "".join(text.values())
    assert all(
        "<think>" in text[name] and "<answer>" in text[name] for name in ("echo", "conditioned")
    )


@pytest.mark.parametrize("name", ["tiny", "tiny_conditioned"])
def test_tiny_presets_are_short(qwen: Tokenizer, name: str) -> None:
    messages = prompts.question_messages(name, "", [], 32_000)
    assert len(prompts.encode_chat(qwen, messages, add_generation_prompt=True).tokens) - 50 <= 16


def test_assistant_text_is_split_behind_tags(qwen: Tokenizer) -> None:
    text = "a <seg>0.4, 2.5</seg>, b <seg>1, 2</seg>.\n</seg>"
    messages = [Message("assistant", text)]
    split = prompts.encode_chat(qwen, messages)
    plain = prompts.encode_chat(qwen, messages, split_tags=False)
    assert qwen.decode(split.tokens) == qwen.decode(plain.tokens) == f"assistant\n{text}\n"
    pieces = [qwen.token_bytes[token] for token in split.tokens]
    assert pieces.count(b"</") == 3
    for i, piece in enumerate(pieces):
        if piece == b"</":
            assert pieces[i : i + 3] == [b"</", b"seg", b">"]
    assert b">," in [qwen.token_bytes[token] for token in plain.tokens]
    own = prompts.text_runs(messages)[1:-1]
    assert own == ["a <seg>0.4, 2.5</seg>", ", b <seg>1, 2</seg>", ".\n</seg>"]


def test_audio_within_an_answer_carries_no_loss(qwen: Tokenizer) -> None:
    parts: list[str | Audio] = ["At <seg>0.4, ", "0.6</seg>", Audio(3_200), ", a bell."]
    chat = prompts.encode_chat(
        qwen, [Message("user", [Audio(32_000), "Q"]), Message("assistant", parts)]
    )
    inserted = np.isin(chat.tokens, [qwen.audio_id, qwen.audio_bos_id, qwen.audio_eos_id])
    assert not chat.loss_mask[inserted].any()
    assert chat.audio_tokens == [50, 5]
    assert (
        qwen.decode(chat.tokens[chat.loss_mask], keep_special=True)
        == "At <seg>0.4, 0.6</seg>, a bell.<|im_end|>"
    )
    assert chat.tokens[chat.audio_starts[1] - 1] == qwen.audio_bos_id


def test_compact_vocabulary_of_text_runs(qwen: Tokenizer) -> None:
    messages = [
        *prompts.question_messages("echo", "What is it?", ["a bell", "a horn"], 32_000),
        Message(
            "assistant", "<think>At <seg>0.4, 2.5</seg>, a bell.</think><answer>a bell</answer>"
        ),
    ]
    small = qwen.compact(prompts.text_runs(messages))
    ours, theirs = (prompts.encode_chat(tokenizer, messages) for tokenizer in (small, qwen))
    assert [small.token_bytes[i] for i in ours.tokens] == [
        qwen.token_bytes[i] for i in theirs.tokens
    ]
    assert (ours.loss_mask == theirs.loss_mask).all()


def test_errors(qwen: Tokenizer) -> None:
    with pytest.raises(ValueError, match="unknown prompt preset 'eko'; choose one of echo"):
        prompts.question_messages("eko", "Q", ["a"], 32_000)
    with pytest.raises(ValueError, match="unknown role 'tool'"):
        prompts.encode_chat(qwen, [Message("tool", "x")])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a clip of 320 samples has no audio token"):
        prompts.encode_chat(qwen, [Message("user", [Audio(320)])])
    with pytest.raises(ValueError, match=r"must hold {choices} once"):
        prompts.PromptPreset("{question}")
