"""From a config to records, vocabulary and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
from absl import logging
from ml_collections import ConfigDict

from data import eaqa_builder, pipeline, released
from data.audio_store import AudioStore
from data.listening import ListeningConfig
from data.records import EaqaRecord, Scene, read_records
from data.scenes import read_scenes
from echo_jax.text.tokenizer import Tokenizer


def data_root(config: ConfigDict) -> Path:
    """The folder that audio paths are relative to.

    Raises:
        FileNotFoundError: config.data.root is empty or not a folder.
    """
    root = Path(config.data.root)
    if not config.data.root or not root.is_dir():
        raise FileNotFoundError(
            f"config.data.root={config.data.root!r} is not a folder; make one with python -m data.build"
        )
    return root


def load_records(config: ConfigDict) -> Sequence[EaqaRecord]:
    """The records of config.data: a JSON-lines file (ours or in a released format), or a dataset of data.build.

    Raises:
        FileNotFoundError: there are none.
        ValueError: several datasets to choose from, or none of the split.
    """
    # Importing TFDS takes seconds, which a file of JSON lines need not pay.
    import tensorflow_datasets as tfds

    root = data_root(config)
    source = Path(config.data.records) if config.data.records else root
    if not source.exists():
        raise FileNotFoundError(f"config.data.records={config.data.records!r} does not exist")
    if source.is_file():
        if released.is_released(source):
            return _released_records(source, root, config)
        chosen = [
            record for record in read_records(source) if config.data.split in ("all", record.split)
        ]
        if not chosen:
            raise ValueError(f"{source} holds no record of split {config.data.split!r}")
        return chosen
    found = sorted(path.parent for path in source.rglob("dataset_info.json"))
    if not found:
        raise FileNotFoundError(f"{source} holds no records; make them with python -m data.build")
    if len(found) > 1:
        names = ", ".join(str(path) for path in found)
        raise ValueError(
            f"{source} holds {len(found)} datasets; set config.data.records to one of: {names}"
        )
    return eaqa_builder.load_records(tfds.builder_from_directory(str(found[0])), config.data.split)


def _released_records(source: Path, root: Path, config: ConfigDict) -> list[EaqaRecord]:
    if config.data.split not in ("all", "train"):
        raise ValueError(
            f"{source}: rows in a released format have no splits, so config.data.split={config.data.split!r} takes "
            "none of them; leave it at 'train'"
        )
    records, skipped = released.load_released(source, root)
    total = len(records) + len(skipped)
    if len(skipped) > config.data.max_bad_fraction * total:
        raise ValueError(
            f"{len(skipped)} of {total} rows are unusable, more than config.data.max_bad_fraction="
            f"{config.data.max_bad_fraction:g} allows; the first is {skipped[0]}"
        )
    if skipped:
        logging.warning("%s: %d of %d rows left out", source, len(skipped), total)
    return records


def load_scenes(config: ConfigDict) -> list[Scene]:
    """The labelled scenes of the split.

    Raises:
        FileNotFoundError: there are none.
    """
    root = data_root(config)
    split = config.data.split.split("[")[0]
    if not (root / f"recordings_{split}.tsv").is_file():
        raise FileNotFoundError(
            f"{root} holds no scenes of split {split!r}; make them with python -m data.build"
        )
    return read_scenes(root, split)


def vocabulary_of(scenes: Sequence[Scene]) -> list[str]:
    """All labels, sorted."""
    return sorted({event.label for scene in scenes for event in scene.events})


def new_tokenizer(config: ConfigDict, scenes: Sequence[Scene]) -> Tokenizer:
    """The vocabulary of a model that starts from random numbers (the base stage); see `configs/base.py`."""
    if config.tokenizer == "qwen":
        return Tokenizer.from_qwen_wheel()
    if config.tokenizer != "compact":
        return Tokenizer.from_directory(config.tokenizer)
    texts = pipeline.corpus_texts(
        load_records(config),
        list(config.tokenizer_prompts),
        vocabulary_of(scenes),
        ListeningConfig(**config.listening.to_dict()),
    )
    return Tokenizer.from_qwen_wheel().compact(texts)


def clip_samples(config: ConfigDict) -> int:
    """Length of the waveform buffers, in samples at 16 kHz."""
    samples = pipeline.num_samples_of(config.data.clip_seconds)
    return -(-samples // pipeline.FRAME_SAMPLES) * pipeline.FRAME_SAMPLES


def audio_store(config: ConfigDict, paths: set[str]) -> AudioStore:
    """One store for all that a run reads: a file is decoded, counted and kept once."""
    # With no usable file at all the endless batches would wait for ever.
    most = min(int(config.data.max_bad_fraction * len(paths)), len(paths) - 1)
    return AudioStore(data_root(config), max_bytes=config.data.cache_bytes, max_bad=most)


def prompt_name(config: ConfigDict) -> str:
    """Wording of the question: in GRPO, that of the format."""
    return config.prompts[config.format] if config.stage == "grpo" else config.prompt


def _listening(
    config: ConfigDict, scenes: Sequence[Scene], store: AudioStore, tokenizer: Tokenizer
) -> grain.IterDataset:
    """Batches of the base stage."""
    _check_size(len(scenes), config.batch_size, "scenes", config)
    return pipeline.base_dataset(
        scenes,
        store,
        tokenizer,
        config=ListeningConfig(**config.listening.to_dict()),
        vocabulary=vocabulary_of(scenes),
        batch_size=config.batch_size,
        scene_seconds=config.data.clip_seconds,
        naming_tokens=config.naming_tokens,
        scene_tokens=config.scene_tokens,
        seed=config.seed,
    )


def batches(config: ConfigDict, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """The endless batches of the config's stage, as a grain iterator (`get_state`, `set_state`).

    Raises:
        ValueError: fewer examples than a batch holds.
    """
    repeats = config.stage == "sft" and config.listening_fraction > 0
    scenes = load_scenes(config) if config.stage == "base" or repeats else []
    scene_paths = {scene.audio_path for scene in scenes}
    if config.stage == "base":
        return iter(_listening(config, scenes, audio_store(config, scene_paths), tokenizer))
    records = load_records(config)
    size = config.batch_size if config.stage == "sft" else config.queries_per_step
    if config.stage == "sft":
        chats = pipeline.chats_of(records, config.questions_per_chat)
        _check_size(len(chats), size, "chats", config)
    else:
        _check_size(len(records), size, "records", config)
    common = {
        "prompt": prompt_name(config),
        "batch_size": size,
        "clip_seconds": config.data.clip_seconds,
        "seed": config.seed,
    }
    store = audio_store(config, scene_paths | {record.audio_path for record in records})
    if config.stage == "sft":
        dataset = pipeline.sft_dataset(
            records,
            store,
            tokenizer,
            max_tokens=config.data.max_tokens,
            questions_per_chat=config.questions_per_chat,
            **common,
        )
        if repeats:
            shares = [1.0 - config.listening_fraction, config.listening_fraction]
            chats_of_base = _listening(config, scenes, store, tokenizer)
            dataset = grain.IterDataset.mix([dataset, chats_of_base], shares)
    else:
        dataset = pipeline.prompt_dataset(
            records, store, tokenizer, max_prompt_tokens=config.data.max_tokens, **common
        )
    return iter(dataset)


def _check_size(available: int, batch: int, what: str, config: ConfigDict) -> None:
    if available < batch:
        raise ValueError(
            f"{config.data.root}: {available} {what} in split {config.data.split!r}, fewer than a batch of {batch}"
        )
