"""Sizes of the thinker, read from and written to a Hugging Face `config.json`."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

# Control tokens of the released Qwen2.5-Omni vocabulary. Checkpoints with a renumbered vocabulary name theirs in
# config.json.
QWEN_IM_START_ID = 151644
QWEN_IM_END_ID = 151645
QWEN_AUDIO_ID = 151646
QWEN_AUDIO_BOS_ID = 151647
QWEN_AUDIO_EOS_ID = 151648
QWEN_PAD_ID = 151643


@dataclasses.dataclass(frozen=True)
class AudioConfig:
    """Sizes of the audio tower (a Whisper-style encoder that attends inside short windows)."""

    num_layers: int
    d_model: int
    num_heads: int
    ffn_dim: int
    output_dim: int
    num_mel_bins: int = 128
    half_window: int = 100  # a window holds 2 * half_window mel frames (2 s at 100 frames a second)
    max_source_positions: int = 1500

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads:
            raise ValueError(
                f"audio d_model {self.d_model} is not a multiple of its {self.num_heads} heads"
            )
        if self.d_model % 2:
            raise ValueError(f"audio d_model {self.d_model} must be even (sinusoidal positions)")
        if self.half_window % 2:
            raise ValueError(
                f"audio n_window {self.half_window} must be even: tokens pool pairs inside a window"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.num_heads

    @property
    def window_frames(self) -> int:
        """Mel frames a window."""
        return 2 * self.half_window

    @property
    def window_tokens(self) -> int:
        """Audio tokens a full window yields (two stride-2 reductions)."""
        return self.half_window // 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the language model (Qwen2.5: RMSNorm, RoPE, grouped-query attention with q/k/v biases, SwiGLU)."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even (rotary positions)")


# Enough for transformers to build the unused image tower of an exported thinker.
_MINIMAL_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 1,
    "fullatt_block_indexes": [0],
}


@dataclasses.dataclass(frozen=True)
class ThinkerConfig:
    """Everything the pure functions need to know; hashable, so it can be a static argument of `jax.jit`."""

    audio: AudioConfig
    text: TextConfig
    im_start_id: int = QWEN_IM_START_ID
    im_end_id: int = QWEN_IM_END_ID
    audio_token_id: int = QWEN_AUDIO_ID
    audio_bos_id: int = QWEN_AUDIO_BOS_ID
    audio_eos_id: int = QWEN_AUDIO_EOS_ID
    pad_id: int = QWEN_PAD_ID
    vision_json: str = json.dumps(_MINIMAL_VISION, sort_keys=True)

    def __post_init__(self) -> None:
        if self.audio.output_dim != self.text.hidden_size:
            raise ValueError(
                f"audio_config.output_dim {self.audio.output_dim} differs from text_config.hidden_size "
                f"{self.text.hidden_size}: audio embeddings would not fit among token embeddings"
            )
        for name in (
            "im_start_id",
            "im_end_id",
            "audio_token_id",
            "audio_bos_id",
            "audio_eos_id",
            "pad_id",
        ):
            if not 0 <= getattr(self, name) < self.text.vocab_size:
                raise ValueError(
                    f"{name} {getattr(self, name)} lies outside the vocabulary of {self.text.vocab_size}"
                )

    @staticmethod
    def from_hf(source: Mapping[str, Any] | str | os.PathLike[str]) -> "ThinkerConfig":
        """Reads a config.json (or its parsed content), of a whole Omni checkpoint or of a thinker alone.

        Raises:
          ValueError: the file is not JSON, or a field is missing or impossible; the message names file and field.
        """
        name = "config"
        if not isinstance(source, Mapping):
            name = os.fspath(source)
            try:
                with open(source, encoding="utf-8") as file:
                    source = json.load(file)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{name} is not valid JSON: {error}") from error
        root: Any = source.get("thinker_config", source) if isinstance(source, Mapping) else None
        if not isinstance(root, Mapping):
            root = {}
        sections = [root.get(section) for section in ("audio_config", "text_config")]
        if not all(isinstance(section, Mapping) for section in sections):
            raise ValueError(
                f"{name} has no audio_config and text_config: it is not the config of a Qwen2.5-Omni thinker; copy "
                "the checkpoint's file again"
            )
        audio, text = root["audio_config"], root["text_config"]
        try:
            _check_supported(audio, text)
            rope = text.get("rope_parameters") or {}
            audio_config = AudioConfig(
                num_layers=audio["encoder_layers"],
                d_model=audio["d_model"],
                num_heads=audio["encoder_attention_heads"],
                ffn_dim=audio["encoder_ffn_dim"],
                output_dim=audio["output_dim"],
                num_mel_bins=audio.get("num_mel_bins", 128),
                half_window=audio.get("n_window", 100),
                max_source_positions=audio.get("max_source_positions", 1500),
            )
            num_heads = text["num_attention_heads"]
            text_config = TextConfig(
                vocab_size=text["vocab_size"],
                hidden_size=text["hidden_size"],
                num_layers=text["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=text.get("num_key_value_heads") or num_heads,
                head_dim=text.get("head_dim") or text["hidden_size"] // num_heads,
                ffn_dim=text["intermediate_size"],
                rope_theta=float(text.get("rope_theta") or rope.get("rope_theta") or 1_000_000.0),
                rms_norm_eps=text.get("rms_norm_eps", 1e-6),
                # The thinker's own field governs in transformers; text_config repeats it, and may contradict it.
                tie_embeddings=bool(
                    root.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
                ),
            )
            return ThinkerConfig(
                audio=audio_config,
                text=text_config,
                im_start_id=root.get("im_start_token_id", QWEN_IM_START_ID),
                im_end_id=root.get("im_end_token_id", QWEN_IM_END_ID),
                audio_token_id=root.get(
                    "audio_token_id", root.get("audio_token_index", QWEN_AUDIO_ID)
                ),
                audio_bos_id=root.get("audio_start_token_id", QWEN_AUDIO_BOS_ID),
                audio_eos_id=root.get("audio_end_token_id", QWEN_AUDIO_EOS_ID),
                pad_id=QWEN_PAD_ID if root.get("pad_token_id") is None else root["pad_token_id"],
                vision_json=json.dumps(
                    root.get("vision_config") or _MINIMAL_VISION, sort_keys=True
                ),
            )
        except KeyError as error:
            raise ValueError(f"{name} lacks the field {error.args[0]!r}") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        except (AttributeError, TypeError) as error:  # a word where a number belongs
            raise ValueError(
                f"{name} is damaged ({error}); copy the checkpoint's file again"
            ) from error

    def to_hf(self) -> dict[str, Any]:
        """Returns the content of a thinker's config.json that transformers loads."""
        half = self.text.head_dim // 2
        # With audio and text only the three M-RoPE axes carry equal positions, so any split that sums to half the
        # head size means ordinary RoPE; the proportions are those of the released checkpoints (16:24:24).
        mrope_section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
        rope = {
            "rope_type": "default",
            "rope_theta": self.text.rope_theta,
            "mrope_section": mrope_section,
        }
        return {
            "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
            "model_type": "qwen2_5_omni_thinker",
            "audio_config": {
                "model_type": "qwen2_5_omni_audio_encoder",
                "encoder_layers": self.audio.num_layers,
                "d_model": self.audio.d_model,
                "encoder_attention_heads": self.audio.num_heads,
                "encoder_ffn_dim": self.audio.ffn_dim,
                "output_dim": self.audio.output_dim,
                "num_mel_bins": self.audio.num_mel_bins,
                "n_window": self.audio.half_window,
                "max_source_positions": self.audio.max_source_positions,
            },
            "text_config": {
                "model_type": "qwen2_5_omni_text",
                "vocab_size": self.text.vocab_size,
                "hidden_size": self.text.hidden_size,
                "num_hidden_layers": self.text.num_layers,
                "num_attention_heads": self.text.num_heads,
                "num_key_value_heads": self.text.num_kv_heads,
                "head_dim": self.text.head_dim,
                "intermediate_size": self.text.ffn_dim,
                "rms_norm_eps": self.text.rms_norm_eps,
                "rope_theta": self.text.rope_theta,
                "rope_parameters": rope,
                "rope_scaling": {"type": "default", **rope},
                "tie_word_embeddings": self.text.tie_embeddings,
            },
            "vision_config": json.loads(self.vision_json),
            "tie_word_embeddings": self.text.tie_embeddings,
            "audio_token_index": self.audio_token_id,
            "audio_token_id": self.audio_token_id,
            "audio_start_token_id": self.audio_bos_id,
            "audio_end_token_id": self.audio_eos_id,
            "pad_token_id": self.pad_id,
            "im_start_token_id": self.im_start_id,
            "im_end_token_id": self.im_end_id,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
        }

    @staticmethod
    def preset(name: str, vocab_size: int | None = None, **special_ids: Any) -> "ThinkerConfig":
        """Returns a named size: "qwen2.5-omni-7b", "qwen2.5-omni-3b" (the released checkpoints) or "tiny".

        Args:
          name: the preset.
          vocab_size: replaces the preset's vocabulary size ("tiny" uses a compact vocabulary).
          **special_ids: control token ids of a renumbered vocabulary (`Tokenizer.config_ids`).

        Raises:
          ValueError: unknown name.
        """
        if name not in _PRESETS:
            raise ValueError(f"unknown model preset {name!r}; known: {', '.join(sorted(_PRESETS))}")
        audio, text = _PRESETS[name]
        if vocab_size is not None:
            text = dataclasses.replace(text, vocab_size=vocab_size)
        return ThinkerConfig(audio=audio, text=text, **special_ids)


def _check_supported(audio: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raises ValueError on settings that change the mathematics and that no Qwen2.5-Omni checkpoint uses."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    found = {
        "audio_config.activation_function": (audio.get("activation_function", "gelu"), ("gelu",)),
        "text_config.hidden_act": (text.get("hidden_act", "silu"), ("silu",)),
        "text_config.use_sliding_window": (bool(text.get("use_sliding_window")), (False,)),
        # "mrope" is the older name of the default with an mrope_section.
        "text_config rope type": (
            rope.get("rope_type") or rope.get("type") or "default",
            ("default", "mrope"),
        ),
    }
    for field, (value, supported) in found.items():
        if value not in supported:
            raise ValueError(
                f"{field} is {value!r}, which is not supported (only {supported[0]!r})"
            )


_PRESETS: dict[str, tuple[AudioConfig, TextConfig]] = {
    "qwen2.5-omni-7b": (
        AudioConfig(num_layers=32, d_model=1280, num_heads=20, ffn_dim=5120, output_dim=3584),
        TextConfig(
            vocab_size=152064,
            hidden_size=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            ffn_dim=18944,
        ),
    ),
    "qwen2.5-omni-3b": (
        AudioConfig(num_layers=32, d_model=1280, num_heads=20, ffn_dim=5120, output_dim=2048),
        TextConfig(
            vocab_size=151936,
            hidden_size=2048,
            num_layers=36,
            num_heads=16,
            num_kv_heads=2,
            head_dim=128,
            ffn_dim=11008,
        ),
    ),
    "tiny": (
        AudioConfig(num_layers=2, d_model=64, num_heads=4, ffn_dim=128, output_dim=128),
        TextConfig(
            vocab_size=152064,
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            ffn_dim=320,
            rope_theta=10_000.0,
        ),
    ),
}
