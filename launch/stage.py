"""What the training stages share: the model, what a step leaves, and the jitted update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from echo_jax import arrays
from echo_jax.model.config import ThinkerConfig
from echo_jax.text.tokenizer import Tokenizer
from echo_jax.train import optimizer as optimizer_lib
from echo_jax.train import step
from echo_jax.train.checkpoint import TrainState

Metrics = dict[str, float]


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; the message names the step and the records of its batch."""


@dataclasses.dataclass
class Model:
    """What a stage starts from: sizes, arrays and vocabulary."""

    config: ThinkerConfig
    params: arrays.Params
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step leaves beside the new state.

    Attributes:
        metrics: determined by seed, data and config.
        timings: seconds of the parts of the step, by name.
        tokens: tokens that were processed, for tokens/s.
        ids: records of the batch.
    """

    metrics: Metrics
    timings: dict[str, float]
    tokens: int
    ids: list[str]


# The next batch of the data iterator, for a stage that needs more than one in a step.
Draw = Callable[[], dict[str, Any]]
StepFunction = Callable[[TrainState, dict[str, Any], Draw], tuple[TrainState, StepResult]]


class Updater:
    """Schedule, frozen parts and the jitted update of a stage."""

    def __init__(
        self,
        config: ConfigDict,
        params: arrays.Params,
        loss_fn: step.LossFunction,
        updates_per_step: int,
    ):
        options = optimizer_lib.OptimizerOptions(**config.optimizer.to_dict())
        total = config.total_steps * updates_per_step
        self._schedule = optimizer_lib.make_schedule(options, total)
        self._optimizer = optimizer_lib.make_optimizer(options, total)
        self._labels = optimizer_lib.label_parameters(params, config.parameter_rules)
        # Donated: the new trainable parameters and optimizer state take the place of the old ones.
        self._update = jax.jit(
            step.make_update(loss_fn, self._optimizer), donate_argnames=("trainable", "opt_state")
        )

    def init(self, params: arrays.Params) -> optax.OptState:
        """The optimizer state before the first update."""
        return self._optimizer.init(self.trainable(params))

    def trainable(self, params: arrays.Params) -> arrays.Params:
        """The part that is trained, None elsewhere."""
        return optimizer_lib.split(params, self._labels)[0]

    def __call__(
        self, state: TrainState, micro_batches: Any, update_number: int
    ) -> tuple[TrainState, Metrics]:
        """One update; consumes `state`. `update_number` counts from 0, for the logged learning rate."""
        trainable, frozen = optimizer_lib.split(state.params, self._labels)
        micro_batches = jax.device_put(micro_batches)
        # What is not on the device by now would be moved there anew in every step.
        with jax.transfer_guard("disallow"):
            trainable, opt_state, metrics = self._update(
                trainable, frozen, state.opt_state, micro_batches
            )
        found = {name: float(value) for name, value in jax.device_get(metrics).items()}
        found["learning_rate"] = float(self._schedule(update_number))
        params = optimizer_lib.merge(trainable, frozen)
        return dataclasses.replace(state, params=params, opt_state=opt_state), found


def check_finite(metrics: Mapping[str, float], step_number: int, ids: Sequence[str]) -> None:
    """Raises NonFiniteError when loss or gradient norm is not finite."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            raise NonFiniteError(
                f"step {step_number}: {name} is {metrics[name]}; records of the batch: {', '.join(ids)}"
            )
