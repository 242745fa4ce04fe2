"""Which tensor of a Hugging Face checkpoint is which array of the parameter tree, and how the two are laid out.

`_RULES` names for each array of the tree its checkpoint tensor (one a layer for stacked arrays). The expected shapes,
the table of all tensors, and which slice of a tensor holds which slice of an array follow from it and from the
declarations in `thinker.param_specs`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from echo_jax.arrays import ArraySpec, is_spec
from echo_jax.model import thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.transfer import Index

# Path in the parameter tree -> tensor name, with {} for the layer of a stacked array.
_RULES: dict[str, str] = {
    "audio_tower/conv1/kernel": "audio_tower.conv1.weight",
    "audio_tower/conv1/bias": "audio_tower.conv1.bias",
    "audio_tower/conv2/kernel": "audio_tower.conv2.weight",
    "audio_tower/conv2/bias": "audio_tower.conv2.bias",
    "audio_tower/layers/attn_norm/scale": "audio_tower.layers.{}.self_attn_layer_norm.weight",
    "audio_tower/layers/attn_norm/bias": "audio_tower.layers.{}.self_attn_layer_norm.bias",
    "audio_tower/layers/q/kernel": "audio_tower.layers.{}.self_attn.q_proj.weight",
    "audio_tower/layers/q/bias": "audio_tower.layers.{}.self_attn.q_proj.bias",
    "audio_tower/layers/k/kernel": "audio_tower.layers.{}.self_attn.k_proj.weight",
    "audio_tower/layers/v/kernel": "audio_tower.layers.{}.self_attn.v_proj.weight",
    "audio_tower/layers/v/bias": "audio_tower.layers.{}.self_attn.v_proj.bias",
    "audio_tower/layers/o/kernel": "audio_tower.layers.{}.self_attn.out_proj.weight",
    "audio_tower/layers/o/bias": "audio_tower.layers.{}.self_attn.out_proj.bias",
    "audio_tower/layers/mlp_norm/scale": "audio_tower.layers.{}.final_layer_norm.weight",
    "audio_tower/layers/mlp_norm/bias": "audio_tower.layers.{}.final_layer_norm.bias",
    "audio_tower/layers/fc1/kernel": "audio_tower.layers.{}.fc1.weight",
    "audio_tower/layers/fc1/bias": "audio_tower.layers.{}.fc1.bias",
    "audio_tower/layers/fc2/kernel": "audio_tower.layers.{}.fc2.weight",
    "audio_tower/layers/fc2/bias": "audio_tower.layers.{}.fc2.bias",
    "audio_tower/ln_post/scale": "audio_tower.ln_post.weight",
    "audio_tower/ln_post/bias": "audio_tower.ln_post.bias",
    "audio_tower/proj/kernel": "audio_tower.proj.weight",
    "audio_tower/proj/bias": "audio_tower.proj.bias",
    "audio_tower/audio_bos_eos/embedding": "audio_tower.audio_bos_eos_token.weight",
    "language_model/embed/embedding": "model.embed_tokens.weight",
    "language_model/layers/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "language_model/layers/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "language_model/layers/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "language_model/layers/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "language_model/layers/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "language_model/layers/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "language_model/layers/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "language_model/layers/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "language_model/layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "language_model/layers/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "language_model/layers/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "language_model/layers/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "language_model/final_norm/scale": "model.norm.weight",
    "language_model/lm_head/kernel": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and its place in the parameter tree.

    Attributes:
      key: name in a thinker-only checkpoint.
      path: keys of the leaf in the tree.
      layer: index along the leaf's first axis, or None when the leaf is not stacked.
      shape: shape of the leaf without its layer axis.
      axes: for each dimension on disk, the axes of `shape` that are merged in it. torch has the outputs of a linear
        layer first, ours has the contracted axes first; torch's convolutions are [out, in, time], ours [time, in, out];
        heads and their size are one dimension on disk.
    """

    key: str
    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def shape_on_disk(self) -> tuple[int, ...]:
        """Shape of the checkpoint tensor."""
        return self._merged(self.shape)

    @property
    def _order(self) -> tuple[int, ...]:
        """Our axes in the order of the disk."""
        return tuple(axis for merged in self.axes for axis in merged)

    def _merged(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(math.prod(shape[axis] for axis in merged) for merged in self.axes)

    def on_disk(self, index: Index) -> tuple[Index, Index]:
        """Where a part of our array lies in the checkpoint tensor.

        Args:
          index: part of an array of `shape`.

        Returns:
          The smallest slices of the tensor that hold it, and what to take of these once `from_disk` has given them our
          axes. That is all of them, except where an axis is cut that is merged behind another one (head_dim).
        """
        slices, within = [], list(whole(self.shape))
        for first, *behind in self.axes:
            size = math.prod(self.shape[axis] for axis in behind)
            slices.append(slice(index[first].start * size, index[first].stop * size))
            within[first] = slice(0, index[first].stop - index[first].start)
            for axis in behind:
                within[axis] = index[axis]
        return tuple(slices), tuple(within)

    def blocks(self, index: Index, most_scalars: int) -> Iterator[Index]:
        """Cuts a part of our array along the axis that is outermost on disk, into at most so many scalars if it can."""
        axis = self.axes[0][0]
        span = index[axis]
        row = math.prod(cut.stop - cut.start for i, cut in enumerate(index) if i != axis)
        step = max(1, most_scalars // max(1, row))
        for start in range(span.start, span.stop, step):
            cut = slice(start, min(start + step, span.stop))
            yield (*index[:axis], cut, *index[axis + 1 :])

    def from_disk(self, part: np.ndarray) -> np.ndarray:
        """Checkpoint tensor, or slices of it that cut no merged axis but the first -> (a view with) our axes."""
        unmerged: list[int] = []
        for size, (_, *behind) in zip(part.shape, self.axes, strict=True):
            sizes = [self.shape[axis] for axis in behind]
            unmerged += [size // math.prod(sizes), *sizes]
        return part.reshape(unmerged).transpose(np.argsort(self._order))

    def to_disk(self, part: np.ndarray) -> np.ndarray:
        """One layer of our leaf, or a part of it -> (a view with) the axes of the checkpoint tensor."""
        return part.transpose(self._order).reshape(self._merged(part.shape))


def whole(shape: Sequence[int]) -> Index:
    """All of an array."""
    return tuple(slice(0, size) for size in shape)


def tensors(config: ThinkerConfig) -> dict[str, Tensor]:
    """Every tensor of a thinker-only checkpoint, by key, in the order of the parameter tree.

    Raises:
      KeyError: an array of the tree has no rule here (a programming error).
    """
    table: dict[str, Tensor] = {}
    for path, spec in leaves(thinker.param_specs(config)):
        template = _RULES["/".join(path)]
        stacked = spec.logical_axes[0] == "layers"
        shape = spec.shape[1:] if stacked else spec.shape
        axes = _axes_on_disk(path, spec, stacked)
        for layer in range(spec.shape[0]) if stacked else (None,):
            key = template if layer is None else template.format(layer)
            assert key not in table, f"two arrays claim {key}"
            table[key] = Tensor(key, path, layer, shape, axes)
    return table


def leaves(specs: Any) -> Iterator[tuple[tuple[str, ...], ArraySpec]]:
    """The keys that lead to each array of a tree of declarations, and its declaration."""
    for path, spec in jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0]:
        yield tuple(str(entry.key) for entry in path), spec


def _axes_on_disk(
    path: tuple[str, ...], spec: ArraySpec, stacked: bool
) -> tuple[tuple[int, ...], ...]:
    axes = range(len(spec.shape) - stacked)
    if path[-1] != "kernel":
        if spec.logical_axes[-2:] in (("heads", "head_dim"), ("kv_heads", "head_dim")):
            return (*((axis,) for axis in axes[:-2]), tuple(axes[-2:]))
        return tuple((axis,) for axis in axes)
    if path[-2] in ("conv1", "conv2"):
        return tuple((axis,) for axis in reversed(axes))
    contracted = tuple(axis - stacked for axis in spec.fan_in_axes)
    return tuple(axis for axis in axes if axis not in contracted), contracted
