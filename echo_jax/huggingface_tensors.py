"""Which tensor of a Hugging Face checkpoint is which array of the parameter tree, and how the two are laid out.

`_RULES` names for each array of the tree its checkpoint tensor (one a layer for stacked arrays). The expected shapes
and the table of all tensors follow from it and from the declarations in `thinker.param_specs`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, Literal

import jax
import numpy as np

from echo_jax.arrays import ArraySpec, is_spec
from echo_jax.model import thinker
from echo_jax.model.config import ThinkerConfig

Layout = Literal["same", "linear", "conv"]
"""How a checkpoint tensor relates to our array (of one layer).

same: equal up to merging the head dimensions. linear: torch's [out, in]; ours has the contracted dimensions
first. conv: torch's [out, in, time]; ours is [time, in, out].
"""

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
      layout: how the tensor is laid out, see `Layout`.
      shape: shape of the leaf without its layer axis.
      shape_on_disk: shape of the checkpoint tensor.
    """

    key: str
    path: tuple[str, ...]
    layer: int | None
    layout: Layout
    shape: tuple[int, ...]
    shape_on_disk: tuple[int, ...]

    def from_disk(self, tensor: np.ndarray) -> np.ndarray:
        """Checkpoint tensor -> (a view as) one layer of our leaf."""
        if self.layout == "conv":
            return tensor.transpose(2, 1, 0)
        if self.layout == "linear":
            tensor = tensor.T
        return tensor.reshape(self.shape)

    def to_disk(self, array: np.ndarray) -> np.ndarray:
        """One layer of our leaf -> contiguous checkpoint tensor."""
        if self.layout == "conv":
            array = array.transpose(2, 1, 0)
        elif self.layout == "linear":
            array = array.reshape(self.shape_on_disk[::-1]).T
        return np.ascontiguousarray(array).reshape(self.shape_on_disk)


def tensors(config: ThinkerConfig) -> dict[str, Tensor]:
    """Every tensor of a thinker-only checkpoint, by key, in the order of the parameter tree.

    Raises:
      KeyError: an array of the tree has no rule here (a programming error).
    """
    table: dict[str, Tensor] = {}
    for path, spec in leaves(thinker.param_specs(config)):
        template, layout = _RULES["/".join(path)], _layout(path)
        stacked = spec.logical_axes[0] == "layers"
        shape = spec.shape[1:] if stacked else spec.shape
        for layer in range(spec.shape[0]) if stacked else (None,):
            key = template if layer is None else template.format(layer)
            assert key not in table, f"two arrays claim {key}"
            on_disk = _shape_on_disk(spec, shape, layout, stacked)
            table[key] = Tensor(key, path, layer, layout, shape, on_disk)
    return table


def _layout(path: tuple[str, ...]) -> Layout:
    if path[-1] != "kernel":
        return "same"
    return "conv" if path[-2] in ("conv1", "conv2") else "linear"


def leaves(specs: Any) -> Iterator[tuple[tuple[str, ...], ArraySpec]]:
    """The keys that lead to each array of a tree of declarations, and its declaration."""
    for path, spec in jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0]:
        yield tuple(str(entry.key) for entry in path), spec


def _shape_on_disk(
    spec: ArraySpec, shape: tuple[int, ...], layout: Layout, stacked: bool
) -> tuple[int, ...]:
    if layout == "conv":
        return shape[::-1]
    if layout == "linear":
        contracted = [axis - stacked for axis in spec.fan_in_axes]
        inputs = math.prod(shape[axis] for axis in contracted)
        return (math.prod(shape) // inputs, inputs)
    # Heads and their size are one dimension on disk.
    heads = spec.logical_axes[-2:] in (("heads", "head_dim"), ("kv_heads", "head_dim"))
    return (*shape[:-2], shape[-2] * shape[-1]) if heads else shape
