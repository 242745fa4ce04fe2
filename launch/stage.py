"""What the training stages share: the model, what a step leaves, and the jitted update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from echo_jax import arrays
from echo_jax.model.config import ThinkerConfig
from echo_jax.text.tokenizer import Tokenizer
from echo_jax.train import finite, step
from echo_jax.train import optimizer as optimizer_lib
from echo_jax.train.checkpoint import Progress, TrainState

Metrics = dict[str, float]


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; the message names the step, what is not finite, and the records of the batch."""


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


StepFunction = Callable[[TrainState, dict[str, Any]], tuple[TrainState, StepResult]]


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
        self._groups = finite.gradient_groups(self.trainable(params))
        # Consecutive updates that are not finite before the run stops; at 0 it stops at the first.
        self._limit = config.non_finite_limit if config.non_finite == "skip" else 0
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
        self, state: TrainState, micro_batches: Any, update_number: int, ids: Sequence[str]
    ) -> tuple[TrainState, Metrics]:
        """One update; consumes `state`.

        Args:
            state: before the update.
            micro_batches: what the loss is summed over.
            update_number: counts from 0, skipped ones included; for the logged learning rate.
            ids: records of the batch, for the message.

        Raises:
            NonFiniteError: loss or gradient is not finite, and the config does not skip such updates, or too many came
                in a row.
        """
        trainable, frozen = optimizer_lib.split(state.params, self._labels)
        micro_batches = jax.device_put(micro_batches)
        # What is not on the device by now would be moved there anew in every step.
        with jax.transfer_guard("disallow"):
            trainable, opt_state, metrics = self._update(
                trainable, frozen, state.opt_state, micro_batches
            )
        values = jax.device_get(metrics)
        parts = values.pop("finite_parts")
        found = {name: float(value) for name, value in values.items()}
        # The optimizer's schedule counts the updates that had an effect.
        made = update_number - state.progress.skipped_updates
        found["learning_rate"] = float(self._schedule(made))
        reason = finite.offending(parts, self._groups, found["loss"], found["grad_norm"])
        progress = self._counted(state.progress, reason, state.step + 1, ids)
        params = optimizer_lib.merge(trainable, frozen)
        state = dataclasses.replace(state, params=params, opt_state=opt_state, progress=progress)
        return state, found

    def _counted(
        self, progress: Progress, reason: str, step_number: int, ids: Sequence[str]
    ) -> Progress:
        """The progress after an update that had no effect for the reason, or had one if there is none."""
        if not reason:
            return dataclasses.replace(progress, skipped_in_a_row=0)
        in_a_row = progress.skipped_in_a_row + 1
        what = f"step {step_number}: {reason}; records of the batch: {', '.join(ids)}"
        if in_a_row > self._limit:
            skipped = f" (after {self._limit} skipped updates in a row)" if self._limit else ""
            raise NonFiniteError(what + skipped)
        if jax.process_index() == 0:
            print(f"update skipped: {what}", flush=True)
        return dataclasses.replace(
            progress, skipped_updates=progress.skipped_updates + 1, skipped_in_a_row=in_a_row
        )
