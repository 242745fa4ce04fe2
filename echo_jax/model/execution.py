"""How a forward pass for training is run: what is recomputed, which attention kernel, and on which devices."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from echo_jax.arrays import ONE_DEVICE, Placement

# What the backward pass finds kept of a decoder layer, beside its input; the rest is computed again.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    # The products with weights: all but attention's own.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ATTENTION = ("plain", "splash", "splash_interpreted")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How to run a forward pass; what it computes does not depend on it.

    Attributes:
      remat: a name in REMAT_POLICIES.
      attention: "plain" (any device), "splash" (TPU), or "splash_interpreted" (the same kernel, slowly, anywhere).
      placement: mesh and rules; batches are divided over the rules' `batch`.

    Raises:
      ValueError: an unknown name.
    """

    remat: str = "none"
    attention: str = "plain"
    placement: Placement = ONE_DEVICE

    def __post_init__(self) -> None:
        for field, known in (("remat", tuple(REMAT_POLICIES)), ("attention", ATTENTION)):
            if getattr(self, field) not in known:
                raise ValueError(
                    f"config.{field}={getattr(self, field)!r} must be one of {', '.join(known)}"
                )

    def rematerialized(self, layer: Callable[..., Any]) -> Callable[..., Any]:
        """The layer with `remat` applied."""
        if self.remat == "none":
            return layer
        return jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat])


PLAIN = Execution()
