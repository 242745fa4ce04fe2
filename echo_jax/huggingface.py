"""Hugging Face checkpoints <-> the parameter pytree, tensor by tensor, both ways.

`huggingface_tensors.py` says which tensor is which array, `huggingface_files.py` reads and writes the files, and
`huggingface_find.py` finds them. Arrays are numpy arrays, or jax arrays that lie on a mesh, of several processes too:
then each process reads the slices that its own devices hold, and all hand theirs to the first one to be written.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from echo_jax import transfer
from echo_jax.arrays import ArraySpec, Params
from echo_jax.huggingface_files import CheckpointFiles, write_file
from echo_jax.huggingface_find import (
    INDEX_FILE,
    SINGLE_FILE,
    Found,
    find,
    is_pinned,
    resolve,
)
from echo_jax.huggingface_tensors import Tensor, leaves, tensors, whole
from echo_jax.model import frontend, thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.transfer import Index

__all__ = [
    "Found",
    "SavableTokenizer",
    "find",
    "is_pinned",
    "load_pretrained",
    "resolve",
    "save_pretrained",
]

# What a save takes from the devices at once. Under several processes each device gets all of it.
_GATHERED_BYTES = 64 * 1024**2


class SavableTokenizer(Protocol):
    """What `save_pretrained` needs of a tokenizer."""

    def save(self, directory: Path) -> object:
        """Writes the tokenizer's files into a directory."""


# ---------------------------------------------------------------------------------------------- load


def load_pretrained(
    path_or_repo_id: str | os.PathLike[str],
    dtype: Any = np.float32,
    shardings: Any | Callable[[ThinkerConfig], Any] = None,
    on_read: Callable[[int], None] | None = None,
) -> tuple[ThinkerConfig, Params]:
    """Reads a checkpoint: a whole Omni model or a thinker alone, one safetensors file or shards with an index.

    With shardings, each process reads the slices that its devices hold and no others, and once where several devices
    hold the same; beyond the arrays the host needs about 1 GB at most. Without, it needs some blocks of a tensor.

    Args:
      path_or_repo_id: see `find`.
      dtype: dtype of the returned arrays.
      shardings: for each array of `thinker.param_specs` how it lies on the devices, or a function that says so once the
        configuration is known: `lambda config: arrays.shardings(thinker.param_specs(config), mesh, rules)`. None for
        numpy arrays.
      on_read: called with the bytes of each slice that has been read from the files.

    Returns:
      The configuration and the parameter tree, numpy arrays, or jax arrays under `shardings`.

    Raises:
      FileNotFoundError: no model, or a shard is missing.
      ValueError: a file is damaged; a tensor is missing, unknown, present twice, of the wrong shape or not of
        floating-point numbers; an array cannot be divided as the shardings say. The message names it, and comes before
        the first tensor is read.
    """
    directory = resolve(path_or_repo_id)
    config = ThinkerConfig.from_hf(directory / "config.json")
    specs = dict(leaves(thinker.param_specs(config)))
    placed: Mapping[tuple[str, ...], Sharding] = {}
    if shardings is not None:
        placed = _by_path(shardings(config) if callable(shardings) else shardings)
        _check_shardings(specs, placed)
    table = tensors(config)
    files = CheckpointFiles(directory, table, on_read)
    tensors_of: dict[tuple[str, ...], list[Tensor]] = collections.defaultdict(list)
    for tensor in table.values():
        tensors_of[tensor.path].append(tensor)
    params: Params = {}
    for path, spec in specs.items():
        read = functools.partial(_read, files, tensors_of[path], np.dtype(dtype))
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        if shardings is None:
            (node[path[-1]],) = read([whole(spec.shape)])
        else:
            first = tensors_of[path][0]
            axis = first.axes[0][0] if first.layer is None else 0
            node[path[-1]] = transfer.to_devices(spec.shape, dtype, placed[path], read, axis)
    return config, params


def _read(
    files: CheckpointFiles, stored: Sequence[Tensor], dtype: np.dtype, indices: Sequence[Index]
) -> list[np.ndarray]:
    """Parts of an array from the tensors that hold it; each tensor is gone through once."""
    parts = [np.empty([cut.stop - cut.start for cut in index], dtype) for index in indices]
    for tensor in stored:
        for index, part in zip(indices, parts, strict=True):
            if tensor.layer is None:
                files.read(tensor, index, part)
            elif index[0].start <= tensor.layer < index[0].stop:
                files.read(tensor, index[1:], part[tensor.layer - index[0].start])
    return parts


def _by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """The leaves of a tree of dictionaries by the keys that lead to them."""
    return {
        tuple(str(entry.key) for entry in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def _check_paths(
    what: str, specs: Mapping[tuple[str, ...], ArraySpec], found: Mapping[tuple[str, ...], Any]
) -> None:
    for path in specs.keys() ^ found.keys():
        state = "lacks" if path in specs else "has the unknown"
        raise ValueError(f"{what} {state} array {'/'.join(path)}")


def _check_shardings(
    specs: Mapping[tuple[str, ...], ArraySpec], placed: Mapping[tuple[str, ...], Sharding]
) -> None:
    _check_paths("the tree of shardings", specs, placed)
    for path, spec in specs.items():
        try:
            placed[path].shard_shape(spec.shape)
        except ValueError as error:
            raise ValueError(
                f"array {'/'.join(path)} of shape {spec.shape} cannot be divided as {placed[path]} says; choose mesh "
                "axes whose sizes divide it"
            ) from error


# ---------------------------------------------------------------------------------------------- save


def save_pretrained(
    directory: str | os.PathLike[str],
    config: ThinkerConfig,
    params: Params,
    tokenizer: SavableTokenizer | None = None,
    max_shard_bytes: int = 4 * 1024**3,
) -> Path:
    """Writes a directory that `Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained` loads.

    Keys are those of a thinker alone (no prefix); arrays keep their dtype. Arrays come from their devices in pieces of
    at most 64 MB, and go to the disk as they come. config.json comes last: a directory that was being written when the
    process died is not taken for a model.

    Under several processes all must call this, each with its part of the arrays; the first one writes, and when this
    returns the directory is there.

    Args:
      directory: made if needed; a model that is already there is replaced.
      config: sizes, ids.
      params: the parameter tree, numpy or jax arrays, on one device or on many.
      tokenizer: its files are written too when given.
      max_shard_bytes: tensors beyond this go to further files, with an index.

    Returns:
      The directory.

    Raises:
      ValueError: params does not have the tree or the shapes that config declares; the message names the array.
      OSError: the disk does not take it; the message names the file.
    """
    directory = Path(directory)
    _check_tree(config, params)
    shards = _plan_shards(tensors(config), params, max_shard_bytes)
    if jax.process_index():
        for shard in shards:
            collections.deque(_on_host(shard, params), maxlen=0)  # has no other use for them
    else:
        _write(directory, config, params, shards, tokenizer)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {directory}")
    return directory


def _write(
    directory: Path,
    config: ThinkerConfig,
    params: Params,
    shards: Sequence[Sequence[Tensor]],
    tokenizer: SavableTokenizer | None,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for stale in (
        directory / "config.json",
        directory / INDEX_FILE,
        *directory.glob("model*.safetensors"),
    ):
        stale.unlink(missing_ok=True)

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = (
            SINGLE_FILE
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        contents = [
            (tensor.key, _leaf(params, tensor.path).dtype, tensor.shape_on_disk) for tensor in shard
        ]
        parts = (tensor.to_disk(part) for tensor, part in _on_host(shard, params))
        write_file(directory / name, contents, parts)
        weight_map |= {tensor.key: name for tensor in shard}
    if len(shards) > 1:
        total_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        _write_json(
            directory / INDEX_FILE,
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


def _leaf(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _check_tree(config: ThinkerConfig, params: Params) -> None:
    specs, found = dict(leaves(thinker.param_specs(config))), _by_path(params)
    _check_paths("the parameter tree", specs, found)
    for path, spec in specs.items():
        if tuple(found[path].shape) != spec.shape:
            raise ValueError(
                f"array {'/'.join(path)} has shape {tuple(found[path].shape)}, the config declares {spec.shape}"
            )


def _plan_shards(
    table: Mapping[str, Tensor], params: Params, max_shard_bytes: int
) -> list[list[Tensor]]:
    """Groups tensors, in order, into shards of at most max_shard_bytes (a larger tensor has its own).

    In a shard the wider dtypes come first, so that all numbers are aligned.
    """

    def width(tensor: Tensor) -> int:
        return _leaf(params, tensor.path).dtype.itemsize

    shards: list[list[Tensor]] = []
    room = 0
    for tensor in table.values():
        size = math.prod(tensor.shape) * width(tensor)
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    return [sorted(shard, key=width, reverse=True) for shard in shards]


def _on_host(shard: Sequence[Tensor], params: Params) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Tensors of a shard, each in parts along the axis that is outermost on disk; all processes take part."""
    for tensor in shard:
        array = _leaf(params, tensor.path)
        if tensor.layer is not None:
            array = transfer.layer_of(array, tensor.layer)
        for index in tensor.blocks(whole(tensor.shape), _GATHERED_BYTES // array.dtype.itemsize):
            yield tensor, transfer.to_host(array, index)


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
