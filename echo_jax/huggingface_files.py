"""The safetensors files of a checkpoint: read by slices of tensors, written as their bytes arrive.

Neither way holds more than a block of a tensor besides what the caller asked for.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from echo_jax.huggingface_find import INDEX_FILE, SINGLE_FILE, is_ignored, needed_shards, weight_map
from echo_jax.huggingface_tensors import Tensor
from echo_jax.transfer import Index

# A whole Omni checkpoint prefixes the thinker's tensors; a thinker alone does not.
_THINKER_PREFIX = "thinker."

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

# Converted and transposed at once: two copies of it fit into the cache of a core.
_BLOCK_SCALARS = 1 << 19
# Files are mapped into memory. What has been read of them stays in the memory of the process, although the system could
# take it back, until they are closed: so they are opened anew after this much. Counted are whole rows: parts of one lie
# on the same pages, or close to each other.
_MAPPED_BYTES = 256 * 1024**2


class CheckpointFiles:
    """The tensors of a checkpoint directory, one safetensors file or shards with an index.

    Everything that can be known from the headers is checked at once, before any tensor is read.

    Args:
      directory: holds the files.
      table: every tensor that the checkpoint must hold, by its bare name.
      on_read: called with the bytes of each slice that has been read.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or a tensor is missing, unknown, present twice, of the wrong shape or not of
        floating-point numbers; the message names it.
    """

    def __init__(
        self,
        directory: Path,
        table: Mapping[str, Tensor],
        on_read: Callable[[int], None] | None = None,
    ) -> None:
        self._places = _places(directory, table)
        self._on_read = on_read
        self._opened: dict[Path, Any] = {}
        self._mapped_bytes = 0
        for key, tensor in table.items():
            self._check(key, tensor)

    def read(self, tensor: Tensor, index: Index, out: np.ndarray) -> None:
        """Reads a part of a tensor.

        Args:
          tensor: one of the table.
          index: which part of our array, one layer of it where it is stacked.
          out: takes it; of the shape of `index`, of any floating-point dtype, maybe strided.
        """
        for block in tensor.blocks(index, _BLOCK_SCALARS):
            slices, within = tensor.on_disk(block)
            stored = self._slice(tensor, slices)
            if stored.dtype != out.dtype:
                stored = stored.astype(out.dtype)
            place = tuple(
                slice(cut.start - full.start, cut.stop - full.start)
                for cut, full in zip(block, index, strict=True)
            )
            _bits(out[place])[...] = tensor.from_disk(_bits(stored))[within]

    def _slice(self, tensor: Tensor, slices: Index) -> np.ndarray:
        file, key = self._places[tensor.key]
        stored = self._open(file).get_slice(key)
        try:
            part = np.asarray(stored[slices])
        except SafetensorError as error:
            raise ValueError(f"{file}: {key} cannot be read: {error}") from error
        row = math.prod(tensor.shape_on_disk[1:]) * part.itemsize
        self._mapped_bytes += len(part) * row
        if self._on_read is not None:
            self._on_read(part.nbytes)
        return part

    def _open(self, file: Path) -> Any:
        if self._mapped_bytes > _MAPPED_BYTES:
            self._opened.clear()
            self._mapped_bytes = 0
        if file not in self._opened:
            self._opened[file] = open_file(file)
        return self._opened[file]

    def _check(self, key: str, tensor: Tensor) -> None:
        file, stored_key = self._places[key]
        stored = self._open(file).get_slice(stored_key)
        shape, code = tuple(stored.get_shape()), stored.get_dtype()
        if shape != tensor.shape_on_disk:
            raise ValueError(
                f"{file}: {stored_key} has shape {shape}, config.json asks for {tensor.shape_on_disk}"
            )
        if code not in _DTYPES:
            raise ValueError(
                f"{file}: {stored_key} holds {code} numbers; give a checkpoint of {', '.join(_DTYPES)}"
            )


def open_file(file: Path) -> Any:
    """Opens a safetensors file, which checks that its header fits its size.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error


def write_file(
    file: Path,
    contents: Iterable[tuple[str, Any, tuple[int, ...]]],
    parts: Iterable[np.ndarray],
) -> None:
    """Writes a safetensors file of which the content need not be in memory, down to the disk itself.

    Args:
      file: replaced if it is there.
      contents: name, dtype and shape of each tensor, in the order in which they come.
      parts: their numbers: each tensor in one or more parts along its first dimension.

    Raises:
      ValueError: a dtype that is none of floating-point numbers; the message names the tensor.
      OSError: the disk does not take it; the message names the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, given, shape in contents:
        dtype = np.dtype(given)
        if dtype not in _CODES:
            raise ValueError(f"{key} holds {dtype} numbers, which a checkpoint does not")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    written = 0
    try:
        with file.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for part in parts:
                rows = max(1, _BLOCK_SCALARS * len(part) // part.size)
                for start in range(0, len(part), rows):
                    block = np.ascontiguousarray(_bits(part[start : start + rows]))
                    written += out.write(block.reshape(-1).view(np.uint8).data)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error.strerror or error}") from error
    assert written == end, f"{file}: {written} bytes came, {end} were announced"


def _bits(array: np.ndarray) -> np.ndarray:
    """The same numbers as unsigned integers: numpy copies bfloat16 across strides one by one, and integers fast."""
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


# ---------------------------------------------------------------------------------------------- checks


def _places(directory: Path, table: Mapping[str, Tensor]) -> dict[str, tuple[Path, str]]:
    """Where each tensor is, by its bare name: its file, and its name there."""
    seen: dict[str, tuple[Path, str]] = {}
    for file, key in _stored_keys(directory):
        if is_ignored(key):
            continue
        bare = key.removeprefix(_THINKER_PREFIX)
        if bare not in table:
            raise ValueError(_unknown_key(file, key, bare, table))
        if bare in seen:
            first, second = (f"{f.name}:{k}" for f, k in (seen[bare], (file, key)))
            raise ValueError(f"{directory}: {bare} is present twice, as {first} and as {second}")
        seen[bare] = (file, key)
    missing = [key for key in table if key not in seen]
    if missing:
        raise ValueError(
            f"{directory}: {len(missing)} of {len(table)} tensors are missing, the first is {missing[0]}"
        )
    return seen


def _stored_keys(directory: Path) -> Iterator[tuple[Path, str]]:
    """All (file, key) of a checkpoint; with an index, only files that hold tensors of the thinker are opened."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise ValueError(
            f"{directory} holds both {SINGLE_FILE} and {INDEX_FILE}: remove the stale one"
        )
    if single.is_file():
        yield from ((single, key) for key in _keys(single))
        return
    if not index.is_file():
        raise FileNotFoundError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    listed = weight_map(index)
    for name in needed_shards(index):
        stored = _keys(directory / name)
        expected = {key for key, file_name in listed.items() if file_name == name}
        for key in sorted(expected - set(stored)):
            raise ValueError(f"{directory / name} lacks {key}, which {INDEX_FILE} places there")
        yield from ((directory / name, key) for key in stored)


def _keys(file: Path) -> Sequence[str]:
    with open_file(file) as opened:
        return list(opened.keys())


def _unknown_key(file: Path, key: str, bare: str, table: Mapping[str, Tensor]) -> str:
    why = "the thinker has no such tensor"
    if bare == "lm_head.weight":
        why = "config.json ties the head to the embeddings (tie_word_embeddings), so it must not be there"
    return f"{file}: unknown tensor {key}: {why}"
