"""Hugging Face checkpoints <-> the parameter pytree, tensor by tensor, both ways.

`huggingface_tensors.py` says which tensor is which array. Reading, writing and the check that nothing is missing,
unknown or matched twice all follow from it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from echo_jax.arrays import Params, is_spec
from echo_jax.huggingface_tensors import Tensor, leaves, tensors
from echo_jax.model import frontend, thinker
from echo_jax.model.config import ThinkerConfig

# A whole Omni checkpoint prefixes the thinker's tensors; a thinker alone does not.
_THINKER_PREFIX = "thinker."
_IGNORED_PREFIXES = ("thinker.visual.", "visual.", "talker.", "token2wav.")

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_SMALL_FILES = ("*.json", "merges.txt", "*.jinja")


class SavableTokenizer(Protocol):
    """What `save_pretrained` needs of a tokenizer."""

    def save(self, directory: Path) -> object:
        """Writes the tokenizer's files into a directory."""


# ---------------------------------------------------------------------------------------------- find


def resolve(path_or_repo_id: str | os.PathLike[str]) -> Path:
    """Finds the model directory behind a path or a repository id.

    Args:
      path_or_repo_id: a model directory; the workdir of a finished training stage (its `export` is meant); or
        `owner/name` on the Hugging Face hub, of which the thinker's shards and the small files are downloaded.

    Returns:
      A directory that holds config.json.

    Raises:
      FileNotFoundError: nothing there, or no model in it; one line that names the path.
    """
    path = Path(path_or_repo_id).expanduser()
    if path.is_dir():
        for candidate in (path, path / "export"):
            if (candidate / "config.json").is_file():
                return candidate
        raise FileNotFoundError(
            f"{path} holds no model: neither config.json nor export/config.json "
            "(a training workdir has export/ once its stage has finished)"
        )
    if path.exists():
        raise FileNotFoundError(
            f"{path} is a file; give the model directory that holds config.json"
        )
    name = str(path_or_repo_id)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/")):
        return _download(name)
    raise FileNotFoundError(
        f"{name}: no such directory, and not a repository id of the form owner/name"
    )


def _download(repo_id: str) -> Path:
    """Downloads (or finds in the cache) the parts of a hub repository that a thinker needs."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=list(patterns)))

    try:
        directory = fetch(*_SMALL_FILES)
        index = directory / _INDEX_FILE
        directory = (
            fetch(*_needed_shards(index), *_SMALL_FILES)
            if index.is_file()
            else fetch(_SINGLE_FILE, *_SMALL_FILES)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{repo_id}: no such directory, and the Hugging Face hub did not give it "
            f"(offline, gated or misspelt?): {reason}"
        ) from error
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{repo_id}: the repository has no config.json")
    return directory


def _needed_shards(index: Path) -> list[str]:
    """Shard files of an index that hold at least one tensor of the thinker."""
    return sorted({file for key, file in _weight_map(index).items() if not _is_ignored(key)})


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        return dict(content["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{index} is not a safetensors index (no weight_map): {error!r}"
        ) from error


# ---------------------------------------------------------------------------------------------- load


def load_pretrained(
    path_or_repo_id: str | os.PathLike[str], dtype: Any = np.float32
) -> tuple[ThinkerConfig, Params]:
    """Reads a checkpoint: a whole Omni model or a thinker alone, one safetensors file or shards with an index.

    Tensors are read one at a time into the stacked arrays, so the peak is the parameters plus one tensor.

    Args:
      path_or_repo_id: see `resolve`.
      dtype: dtype of the returned arrays.

    Returns:
      The configuration and the parameter tree, numpy arrays.

    Raises:
      FileNotFoundError: no model, or a shard is missing.
      ValueError: a file is damaged, or a tensor is missing, unknown, present twice or of the wrong shape; the message
        names it.
    """
    directory = resolve(path_or_repo_id)
    config = ThinkerConfig.from_hf(directory / "config.json")
    table = tensors(config)
    params = _empty_like(thinker.param_specs(config), dtype)
    seen: dict[str, tuple[Path, str]] = {}
    for file, key in _stored_keys(directory):
        if _is_ignored(key):
            continue
        bare = key.removeprefix(_THINKER_PREFIX)
        if bare not in table:
            raise ValueError(_unknown_key(file, key, bare, config))
        if bare in seen:
            first, second = (f"{f.name}:{k}" for f, k in (seen[bare], (file, key)))
            raise ValueError(f"{directory}: {bare} is present twice, as {first} and as {second}")
        seen[bare] = (file, key)
    missing = [key for key in table if key not in seen]
    if missing:
        raise ValueError(
            f"{directory}: {len(missing)} of {len(table)} tensors are missing, the first is {missing[0]}"
        )
    _fill(params, table, seen)
    return config, params


def _fill(
    params: Params, table: Mapping[str, Tensor], places: Mapping[str, tuple[Path, str]]
) -> None:
    by_file: dict[Path, list[tuple[str, Tensor]]] = {}
    for bare, (path, key) in places.items():
        by_file.setdefault(path, []).append((key, table[bare]))
    for path, wanted in by_file.items():
        with _open(path) as file:
            for key, tensor in wanted:
                shape = tuple(file.get_slice(key).get_shape())
                if shape != tensor.shape_on_disk:
                    raise ValueError(
                        f"{path}: {key} has shape {shape}, config.json asks for {tensor.shape_on_disk}"
                    )
                leaf = _leaf(params, tensor.path)
                target = leaf if tensor.layer is None else leaf[tensor.layer]
                target[...] = tensor.from_disk(file.get_tensor(key))


def _stored_keys(directory: Path) -> Iterator[tuple[Path, str]]:
    """All (file, key) of a checkpoint; with an index, only files that hold tensors of the thinker are opened."""
    single, index = directory / _SINGLE_FILE, directory / _INDEX_FILE
    if single.is_file() and index.is_file():
        raise ValueError(
            f"{directory} holds both {_SINGLE_FILE} and {_INDEX_FILE}: remove the stale one"
        )
    if single.is_file():
        with _open(single) as file:
            stored = list(file.keys())
        yield from ((single, key) for key in stored)
        return
    if not index.is_file():
        raise FileNotFoundError(f"{directory} holds neither {_SINGLE_FILE} nor {_INDEX_FILE}")
    weight_map = _weight_map(index)
    for name in _needed_shards(index):
        listed = {key for key, file_name in weight_map.items() if file_name == name}
        with _open(directory / name) as file:
            stored = list(file.keys())
        for key in sorted(listed - set(stored)):
            raise ValueError(f"{directory / name} lacks {key}, which {_INDEX_FILE} places there")
        yield from ((directory / name, key) for key in stored)


def _open(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def _is_ignored(key: str) -> bool:
    return key.startswith(_IGNORED_PREFIXES)


def _unknown_key(file: Path, key: str, bare: str, config: ThinkerConfig) -> str:
    why = "the thinker has no such tensor"
    if bare == "lm_head.weight" and config.text.tie_embeddings:
        why = "config.json ties the head to the embeddings (tie_word_embeddings), so it must not be there"
    return f"{file}: unknown tensor {key}: {why}"


def _empty_like(specs: Any, dtype: Any) -> Params:
    return jax.tree.map(lambda spec: np.empty(spec.shape, dtype), specs, is_leaf=is_spec)


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


# ---------------------------------------------------------------------------------------------- save


def save_pretrained(
    directory: str | os.PathLike[str],
    config: ThinkerConfig,
    params: Params,
    tokenizer: SavableTokenizer | None = None,
    max_shard_bytes: int = 4 * 1024**3,
) -> Path:
    """Writes a directory that `Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained` loads.

    Keys are those of a thinker alone (no prefix); arrays keep their dtype. One shard is in memory at a time.
    config.json comes last: a directory that was being written when the process died is not taken for a model.

    Args:
      directory: made if needed; a model that is already there is replaced.
      config: sizes, ids.
      params: the parameter tree, numpy or jax arrays.
      tokenizer: its files are written too when given.
      max_shard_bytes: tensors beyond this go to further files, with an index.

    Returns:
      The directory.

    Raises:
      ValueError: params does not have the tree or the shapes that config declares; the message names the array.
    """
    directory = Path(directory)
    table = tensors(config)
    _check_tree(config, params)
    shards = _plan_shards(table, params, max_shard_bytes)
    directory.mkdir(parents=True, exist_ok=True)
    for stale in (
        directory / "config.json",
        directory / _INDEX_FILE,
        *directory.glob("model*.safetensors"),
    ):
        stale.unlink(missing_ok=True)

    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        name = (
            _SINGLE_FILE
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        content: dict[str, np.ndarray] = {}
        for key, array in _on_host(shard, params):
            content[key] = array
            total_bytes += array.nbytes
            weight_map[key] = name
        save_file(content, directory / name, metadata={"format": "pt"})
    if len(shards) > 1:
        _write_json(
            directory / _INDEX_FILE,
            {
                "metadata": {"total_size": total_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            },
        )
    _write_json(directory / "generation_config.json", _generation_config(config))
    _write_json(directory / "preprocessor_config.json", _feature_extractor_config(config))
    if tokenizer is not None:
        tokenizer.save(directory)
    dtype = str(jax.tree.leaves(params)[0].dtype)
    _write_json(directory / "config.json", {**config.to_hf(), "dtype": dtype})
    return directory


def _check_tree(config: ThinkerConfig, params: Params) -> None:
    wanted = dict(leaves(thinker.param_specs(config)))
    found = {
        tuple(str(entry.key) for entry in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    for path in wanted.keys() ^ found.keys():
        state = "lacks" if path in wanted else "has the unknown"
        raise ValueError(f"the parameter tree {state} array {'/'.join(path)}")
    for path, spec in wanted.items():
        if tuple(found[path].shape) != spec.shape:
            raise ValueError(
                f"array {'/'.join(path)} has shape {tuple(found[path].shape)}, the config declares {spec.shape}"
            )


def _plan_shards(
    table: Mapping[str, Tensor], params: Params, max_shard_bytes: int
) -> list[list[Tensor]]:
    """Groups tensors, in order, into shards of at most max_shard_bytes (a larger tensor has its own)."""
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in table.values():
        size = math.prod(tensor.shape) * _leaf(params, tensor.path).dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _on_host(shard: list[Tensor], params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a shard; each leaf is fetched from the device once, not once a layer."""
    fetched: tuple[str, ...] = ()
    leaf = np.empty(0)
    for tensor in shard:
        if tensor.path != fetched:
            leaf, fetched = np.asarray(jax.device_get(_leaf(params, tensor.path))), tensor.path
        yield tensor.key, tensor.to_disk(leaf if tensor.layer is None else leaf[tensor.layer])


def _generation_config(config: ThinkerConfig) -> dict[str, Any]:
    return {"eos_token_id": config.im_end_id, "pad_token_id": config.pad_id}


def _feature_extractor_config(config: ThinkerConfig) -> dict[str, Any]:
    """Settings of transformers' WhisperFeatureExtractor under which it gives our log-mel."""
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "sampling_rate": frontend.SAMPLE_RATE,
        "feature_size": config.audio.num_mel_bins,
        "n_fft": frontend.FFT_SAMPLES,
        "hop_length": frontend.HOP_SAMPLES,
        "chunk_length": frontend.MAX_CLIP_SAMPLES // frontend.SAMPLE_RATE,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, file)
