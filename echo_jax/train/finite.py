"""Updates whose loss or gradient is not finite: found inside the jitted update, named outside, and without effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from echo_jax.train import optimizer as optimizer_lib

PyTree = Any

# Groups of parameters that are named before the rest is counted.
_NAMED = 6


def finite_parts(loss: jax.Array, norm: jax.Array, gradients: PyTree) -> jax.Array:
    """bool[2 + number of gradients]: whether the loss, the gradient's norm and each gradient are finite.

    One more reduction over gradients that the norm reads anyway.
    """
    parts = [loss, norm, *jax.tree.leaves(gradients)]
    return jnp.stack([jnp.isfinite(part).all() for part in parts])


def keep_unless(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the scalar condition is true, else `old`, bit for bit."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def gradient_groups(trainable: PyTree) -> list[str]:
    """The group of each gradient, in the order of `finite_parts`: its name without the last part, which says whether it
    is a kernel or a bias, e.g. ``language_model/layers/q``."""
    names = jax.tree.leaves(optimizer_lib.parameter_names(trainable))
    return [name.rpartition("/")[0] or name for name in names]


def offending(parts: np.ndarray, groups: Sequence[str], loss: float, norm: float) -> str:
    """What is not finite, in words; "" if everything is.

    Args:
        parts: see `finite_parts`.
        groups: see `gradient_groups`.
        loss: its value.
        norm: of the gradient.
    """
    found = [] if parts[0] else [f"loss is {loss}"]
    bad = [group for group, finite in zip(groups, parts[2:], strict=True) if not finite]
    bad, everything = list(dict.fromkeys(bad)), len(set(groups))
    if len(bad) == everything:
        found.append(f"the gradient of all {everything} parameter groups is not finite")
    elif bad:
        rest = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        found.append(f"the gradient of {', '.join(bad[:_NAMED])}{rest} is not finite")
    elif not parts[1]:
        found.append(f"grad_norm is {norm}, of gradients that are finite")
    return ", ".join(found)
