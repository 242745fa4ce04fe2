"""Algorithm 1 of the Echo paper in Hugging Face transformers and torch, as the released code runs it: an oracle.

One request at a time. `generate` runs until the decoded text holds `</seg>`; the text is cut there, a regular
expression reads the tag, the clip is cut from the original waveform and appended to the same assistant turn. Then the
features of all clips are extracted anew, each padded to 300 s, and the whole prefix is prefilled anew.

Of this project it uses nothing but three data classes: the tokenizer, the feature extractor, the model and the weights
are transformers' own, read from an exported model directory.
"""

from __future__ import annotations

import fractions
import os
import re
from collections.abc import Sequence

import numpy as np
import torch
import transformers
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from echo_jax.sampler import FinishReason, SamplingOptions
from echo_jax.sampler.reference import HostAnswer

RATE = 16_000
STOP = "</seg>"
_TAG = re.compile(r"<seg>([\d\.]+),\s*([\d\.]+)</seg>", re.ASCII)
_SHORTEST = 3_200


class StopAtTag(StoppingCriteria):
    """Stops as soon as the text behind the first `start` tokens holds `</seg>`."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, start: int):
        self._tokenizer, self._start = tokenizer, start

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object
    ) -> torch.BoolTensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :])
        return torch.tensor([STOP in text for text in texts])


class Suppress(LogitsProcessor):
    """Never these tokens. The library's own takes a search over the whole vocabulary for each token."""

    def __init__(self, ids: Sequence[int]):
        self._ids = torch.tensor(ids, dtype=torch.long)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.index_fill(1, self._ids, -torch.inf)


class TransformersAlgorithm1:
    """Answers questions greedily.

    Attributes:
      model, tokenizer, extractor: what transformers loads from the model directory; the model in float32.
      options: budgets and format; the temperature must be 0.
      pad_seconds: each clip is padded with zeros to so much before its features are extracted, 300 as released. Any
        length that is at least 400 samples more than the longest clip gives the same features, sooner.
    """

    def __init__(
        self, directory: str | os.PathLike[str], options: SamplingOptions, pad_seconds: int = 300
    ):
        if options.temperature != 0:
            raise ValueError("this reference is greedy: set temperature=0")
        self.model = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.extractor = transformers.WhisperFeatureExtractor.from_pretrained(directory)
        self.options = options
        self.pad_seconds = pad_seconds
        self._im_end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        controls = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        beyond = range(len(self.tokenizer), self.model.config.text_config.vocab_size)
        self._suppress = Suppress(sorted({*controls, *beyond} - {self._im_end}))

    def answer(self, prompt: Sequence[int], waveform: np.ndarray) -> HostAnswer:
        """Answers one question.

        Args:
          prompt: token ids, with one recording among them.
          waveform: f32[n], the recording at 16 kHz.
        """
        options, budget = self.options, self.options.max_response_tokens
        response: list[int] = []
        inserted: list[tuple[int, int]] = []
        clips = [waveform]
        written = ""
        for turn in range(1, options.max_turns + 1):
            new = self.generate([*prompt, *response], clips, budget - len(response))
            text = self.tokenizer.decode(new, skip_special_tokens=True)
            stops = options.insert_audio and STOP in text
            if stops:
                kept = text[: text.index(STOP) + len(STOP)]
                new = self._without_tail(new, len(text) - len(kept))
                written += kept
            response += new
            if response[-1] == self._im_end:
                return HostAnswer(response, inserted, FinishReason.END)
            if stops and turn == options.max_turns:
                return HostAnswer(response, inserted, FinishReason.TURN_LIMIT)
            span = cited_span(written, len(waveform)) if stops else None
            if span is not None:
                audio = self._audio_tokens(span[1] - span[0])
                if len(response) + len(audio) >= budget:
                    break
                response += audio
                clips.append(waveform[span[0] : span[1]])
                inserted.append(span)
            if len(response) >= budget:
                break
        return HostAnswer(response, inserted, FinishReason.TOKEN_BUDGET)

    def generate(
        self, tokens: Sequence[int], clips: Sequence[np.ndarray], max_new_tokens: int
    ) -> list[int]:
        """What one call of `generate` adds to `tokens`, up to `</seg>`, the end or the budget."""
        features = self.features(clips)
        input_ids = torch.tensor([tokens])
        stop = [StopAtTag(self.tokenizer, len(tokens))] if self.options.insert_audio else []
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                input_features=features["input_features"],
                feature_attention_mask=features["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self._im_end,
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([self._suppress]),
                stopping_criteria=StoppingCriteriaList(stop),
            )
        return output[0, len(tokens) :].tolist()

    def features(self, clips: Sequence[np.ndarray]) -> transformers.BatchFeature:
        """Log-mel of each clip, padded, and the mask of its own frames (transformers' Qwen2_5OmniProcessor)."""
        return self.extractor(
            list(clips),
            sampling_rate=RATE,
            padding="max_length",
            max_length=self.pad_seconds * RATE,
            return_attention_mask=True,
            return_tensors="pt",
        )

    def _without_tail(self, tokens: list[int], num_chars: int) -> list[int]:
        """Cuts so many characters off; what is left of the last token is tokenized as its own piece."""
        if not num_chars:
            return tokens
        kept = self.tokenizer.decode(tokens[-1:])[:-num_chars]
        return [*tokens[:-1], *self.tokenizer.encode(kept, add_special_tokens=False)]

    def _audio_tokens(self, num_samples: int) -> list[int]:
        """What an inserted clip is in the row: begin, one `<|AUDIO|>` for each of its embeddings, end."""
        frames = -(-num_samples // self.extractor.hop_length)
        count = ((frames - 1) // 2 + 1 - 2) // 2 + 1
        names = ["<|audio_bos|>", *["<|AUDIO|>"] * count, "<|audio_eos|>"]
        return self.tokenizer.convert_tokens_to_ids(names)


def cited_span(text: str, num_samples: int) -> tuple[int, int] | None:
    """The samples of the tag that `text` ends with; None if it ends with none, or Algorithm 1 inserts nothing."""
    tags = list(_TAG.finditer(text))
    if not tags or tags[-1].end() != len(text):
        return None
    try:
        begin, end = (
            int(fractions.Fraction(number) * RATE + fractions.Fraction(1, 2))
            for number in tags[-1].groups()
        )
    except ValueError:  # "1.2.3"
        return None
    end = min(end, num_samples)
    return (begin, end) if end - begin >= _SHORTEST else None
