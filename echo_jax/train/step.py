"""One optimizer update, with gradient accumulation that is exact: micro-batches add sums and denominators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from echo_jax.train import finite
from echo_jax.train import optimizer as optimizer_lib
from echo_jax.train.sft import SumAndDenominator

PyTree = Any
LossFunction = Callable[[PyTree, PyTree], dict[str, SumAndDenominator]]
Update = Callable[
    [PyTree, PyTree, optax.OptState, PyTree], tuple[PyTree, optax.OptState, dict[str, jax.Array]]
]


@dataclasses.dataclass(frozen=True)
class Precision:
    """Number formats of a run.

    Attributes:
        master: of the trained parameters and the optimizer's state.
        compute: of the forward and backward pass, of what the devices exchange, and of the frozen parameters.
    """

    master: Any
    compute: Any


PRECISIONS = {
    "float32": Precision(jnp.float32, jnp.float32),
    "mixed": Precision(jnp.float32, jnp.bfloat16),
    "bfloat16": Precision(jnp.bfloat16, jnp.bfloat16),
}


def accumulate(
    loss_fn: LossFunction,
    trainable: PyTree,
    frozen: PyTree,
    micro_batches: PyTree,
    constrain: Callable[[PyTree], PyTree] = lambda gradients: gradients,
) -> tuple[PyTree, dict[str, SumAndDenominator]]:
    """Gradients of the summed loss, and the sums and denominators, added up over the first axis of `micro_batches`.

    Args:
        loss_fn: see `make_update`.
        trainable, frozen: parameters in the number format to compute with.
        micro_batches: see above.
        constrain: fixes the sharding of gradients, so that each device keeps its part of a sum and no more.

    Returns:
        Gradients in the parameters' format, in float32 where there are several micro-batches; and the sums.
    """

    def loss_sum(part: PyTree, batch: PyTree) -> tuple[jax.Array, dict[str, SumAndDenominator]]:
        sums = loss_fn(optimizer_lib.merge(part, frozen), batch)
        return sums["loss"][0], sums

    def one(batch: PyTree) -> tuple[PyTree, dict[str, SumAndDenominator]]:
        gradients, sums = jax.grad(loss_sum, has_aux=True)(trainable, batch)
        return constrain(gradients), sums

    count = jax.tree.leaves(micro_batches)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], micro_batches)
    if count == 1:
        return one(first)

    def add(total: PyTree, batch: PyTree) -> tuple[PyTree, None]:
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, one(batch)), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(one, first))
    total, _ = jax.lax.scan(add, (constrain(zero[0]), zero[1]), micro_batches)
    return total


def make_update(
    loss_fn: LossFunction,
    optimizer: optax.GradientTransformation,
    compute_dtype: Any = jnp.float32,
    constrain: Callable[[PyTree], PyTree] = lambda gradients: gradients,
) -> Update:
    """The function (trainable, frozen, opt_state, micro_batches) -> (trainable, opt_state, metrics).

    Pure; the trainer jits it with the trainable parameters and the optimizer state donated.

    Args:
        loss_fn: (all parameters, one micro-batch) -> name -> (sum, denominator), with a ``loss``.
        optimizer: over the trainable part.
        compute_dtype: of the trainable parameters in the forward and backward pass; the frozen ones come in it.
        constrain: see `accumulate`.

    Returns:
        The function; its metrics are the means of what `loss_fn` returns, ``grad_norm`` before clipping, and
        ``finite_parts`` (see `finite.finite_parts`). Unless all parts are finite, the trainable parameters and the
        optimizer state are returned as they came.
    """

    def update(
        trainable: PyTree, frozen: PyTree, opt_state: optax.OptState, micro_batches: PyTree
    ) -> tuple[PyTree, optax.OptState, dict[str, jax.Array]]:
        # Once, before anything is gathered: devices exchange the narrower numbers.
        computing = jax.tree.map(lambda x: x.astype(compute_dtype), trainable)
        gradients, sums = accumulate(loss_fn, computing, frozen, micro_batches, constrain)
        denominator = jnp.maximum(sums["loss"][1], 1.0)
        gradients = jax.tree.map(
            lambda g, master: (g.astype(jnp.float32) / denominator).astype(master.dtype),
            gradients,
            trainable,
        )
        updates, new_opt_state = optimizer.update(gradients, opt_state, trainable)
        metrics = {name: total / jnp.maximum(count, 1.0) for name, (total, count) in sums.items()}
        metrics["grad_norm"] = optax.tree.norm(gradients)
        parts = finite.finite_parts(sums["loss"][0], metrics["grad_norm"], gradients)
        metrics["finite_parts"] = parts
        new = (optax.apply_updates(trainable, updates), new_opt_state)
        return (*finite.keep_unless(parts.all(), new, (trainable, opt_state)), metrics)

    return update
