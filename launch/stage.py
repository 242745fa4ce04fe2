"""What the training stages share: the model, what a step leaves, and the jitted update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from echo_jax import arrays
from echo_jax.arrays import ONE_DEVICE, Placement
from echo_jax.model import thinker
from echo_jax.model.config import ThinkerConfig
from echo_jax.model.execution import Execution
from echo_jax.text.tokenizer import Tokenizer
from echo_jax.train import finite, step
from echo_jax.train import optimizer as optimizer_lib
from echo_jax.train.checkpoint import Progress, TrainState
from launch import devices

Metrics = dict[str, float]


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; the message names the step, what is not finite, and the records of the batch."""


@dataclasses.dataclass
class Model:
    """What a stage starts from: sizes, arrays and vocabulary."""

    config: ThinkerConfig
    params: arrays.Params
    tokenizer: Tokenizer
    placement: Placement = ONE_DEVICE

    def execution(self, config: ConfigDict) -> Execution:
        """How its training passes are run.

        Raises:
            ValueError: config.remat or config.attention is unknown.
        """
        attention = config.attention
        if attention == "auto":
            attention = "splash" if jax.default_backend() == "tpu" else "plain"
        return Execution(config.remat, attention, self.placement)


def place(
    config: ConfigDict, thinker_config: ThinkerConfig, params: arrays.Params, placement: Placement
) -> arrays.Params:
    """Parameters to their devices, in the number formats of config.precision."""
    specs = stored_specs(config, thinker_config)

    def put(spec: arrays.ArraySpec, array: Any) -> jax.Array:
        array = array.astype(spec.dtype)
        if placement.mesh is None:
            return jax.device_put(array)
        sharding = placement.sharding(*spec.logical_axes)
        if isinstance(array, jax.Array):
            return jax.device_put(array, sharding)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, specs, params, is_leaf=arrays.is_spec)


def stored_specs(config: ConfigDict, thinker_config: ThinkerConfig) -> Any:
    """Declarations of the parameters as a run holds them: the trained ones in the master format, the frozen ones in
    that of the computation.

    Raises:
        ValueError: config.precision is unknown, or config.parameter_rules do not fit the model.
    """
    if config.precision not in step.PRECISIONS:
        raise ValueError(
            f"config.precision={config.precision!r} must be one of {', '.join(step.PRECISIONS)}"
        )
    precision = step.PRECISIONS[config.precision]
    specs = thinker.param_specs(thinker_config)
    labels = optimizer_lib.label_parameters(specs, config.parameter_rules)
    return jax.tree.map(
        lambda spec, label: dataclasses.replace(
            spec, dtype=precision.master if label == "train" else precision.compute
        ),
        specs,
        labels,
        is_leaf=arrays.is_spec,
    )


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
    """Schedule, frozen parts and the jitted update of a stage.

    Attributes:
        update: (trainable, frozen, opt_state, micro_batches) -> (trainable, opt_state, metrics), jitted; what goes in
            first and third is donated.
    """

    def __init__(
        self, config: ConfigDict, model: Model, loss_fn: step.LossFunction, updates_per_step: int
    ):
        """Args: the run's config; the model, whose arrays may be abstract; the loss; optimizer updates a step."""
        options = optimizer_lib.OptimizerOptions(**config.optimizer.to_dict())
        total = config.total_steps * updates_per_step
        self._schedule = optimizer_lib.make_schedule(options, total)
        self._optimizer = optimizer_lib.make_optimizer(options, total)
        self._labels = optimizer_lib.label_parameters(model.params, config.parameter_rules)
        self._groups = finite.gradient_groups(self.trainable(model.params))
        # Consecutive updates that are not finite before the run stops; at 0 it stops at the first.
        self._limit = config.non_finite_limit if config.non_finite == "skip" else 0
        self._placement = model.placement
        constrain, out_shardings = self._shardings(model)
        update = step.make_update(
            loss_fn, self._optimizer, step.PRECISIONS[config.precision].compute, constrain
        )
        # Donated: the new trainable parameters and optimizer state take the place of the old ones.
        self.update = jax.jit(
            update, donate_argnames=("trainable", "opt_state"), out_shardings=out_shardings
        )

    def _shardings(self, model: Model) -> tuple[Callable[[Any], Any], Any]:
        """How gradients are constrained, and where the results of an update lie."""
        if self._placement.mesh is None:
            self._state_shardings: Any = None
            return (lambda gradients: gradients), None
        trainable = self.trainable(model.params)
        shardings = self.trainable(
            jax.tree.map(
                lambda spec: self._placement.sharding(*spec.logical_axes),
                thinker.param_specs(model.config),
                is_leaf=arrays.is_spec,
            )
        )
        everywhere = self._placement.sharding()
        self._state_shardings = optimizer_lib.state_shardings(
            self._optimizer, trainable, shardings, everywhere
        )

        def constrain(gradients: Any) -> Any:
            divided = jax.lax.with_sharding_constraint(gradients, shardings)
            # The TPU compiler would exchange them once, after all micro-batches, and hold them whole until then.
            return jax.lax.optimization_barrier(divided)

        return constrain, (shardings, self._state_shardings, everywhere)

    def init(self, params: arrays.Params) -> optax.OptState:
        """The optimizer state before the first update, where its parameters are."""
        init = jax.jit(self._optimizer.init, out_shardings=self._state_shardings)
        return init(self.trainable(params))

    def abstract_state(self, params: arrays.Params) -> optax.OptState:
        """Shapes, formats and shardings of `init`'s result."""
        shapes = jax.eval_shape(self._optimizer.init, self.trainable(params))
        if self._state_shardings is None:
            return shapes
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            self._state_shardings,
        )

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
        # Micro-batches are stacked: the batch is the second axis.
        micro_batches = devices.put(micro_batches, self._placement, None)
        # What is not on the device by now would be moved there anew in every step.
        with jax.transfer_guard("disallow"):
            trainable, opt_state, metrics = self.update(
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
