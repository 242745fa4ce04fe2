"""Which checkpoints stay: the newest, the best by a metric, and every so many steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers

from echo_jax import ranges
from echo_jax.ranges import Range

MODES = ("max", "min")


@dataclasses.dataclass(frozen=True)
class Retention:
    """Config values; a checkpoint stays as long as one of the three rules wants it.

    Attributes:
        keep_last: so many of the newest.
        keep_best: so many of the best by `best_metric`; of equal ones the newer.
        best_metric: a name among the metrics of a step, e.g. ``reward/total``; "" if none is kept for being the best.
        best_mode: one of MODES.
        keep_every: all whose step is a multiple, for ever; 0 = none.

    Raises:
        ValueError: a number out of its range, an unknown mode, or best ones without a metric; the message names the
            field.
    """

    keep_last: int = 2
    keep_best: int = 0
    best_metric: str = ""
    best_mode: str = "max"
    keep_every: int = 0

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            ranges.check(f"config.checkpoint.{name}", getattr(self, name), allowed)
        if self.best_mode not in MODES:
            raise ValueError(
                f"config.checkpoint.best_mode={self.best_mode!r} must be one of {', '.join(MODES)}"
            )
        if self.keep_best and not self.best_metric:
            raise ValueError(
                f"config.checkpoint.keep_best={self.keep_best} needs config.checkpoint.best_metric, a metric's name"
            )

    def check_metrics(self, metrics: Mapping[str, float]) -> None:
        """Raises ValueError where the metrics of a step lack the one that decides which is the best."""
        if self.keep_best and self.best_metric not in metrics:
            raise ValueError(
                f"config.checkpoint.best_metric={self.best_metric!r} is no metric of this run; "
                f"use one of {', '.join(sorted(metrics))}"
            )

    def best(self, metrics: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps that stay for being the best, worst first.

        Args:
            metrics: step -> its metrics; a step without the metric, or where it is not finite, is never among the best.
        """
        sign = 1.0 if self.best_mode == "max" else -1.0
        rated = {
            step: sign * values[self.best_metric]
            for step, values in metrics.items()
            if math.isfinite(values.get(self.best_metric, math.nan))
        }
        ranked = sorted(rated, key=lambda step: (rated[step], step))
        return ranked[-self.keep_best :] if self.keep_best else []


_RANGES = {
    "keep_last": ranges.COUNT,
    "keep_best": Range(least=0, whole=True),
    "keep_every": Range(least=0, whole=True),
}


class _Best(checkpoint_managers.PreservationPolicy):
    """Orbax's own BestN reads a file of metrics in every checkpoint when it starts, and a damaged one ends the run."""

    def __init__(self, retention: Retention, metrics: Mapping[int, Mapping[str, float]]) -> None:
        self._retention = retention
        self._metrics = metrics

    def should_preserve(
        self, checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo], *, context: Any
    ) -> Sequence[bool]:
        del context
        there = [info.step for info in checkpoints]
        best = self._retention.best(
            {step: self._metrics[step] for step in there if step in self._metrics}
        )
        return [step in best for step in there]


def policy(
    retention: Retention, metrics: Mapping[int, Mapping[str, float]]
) -> checkpoint_managers.PreservationPolicy:
    """The orbax policy.

    Args:
        retention: the rules.
        metrics: step -> its metrics; looked into whenever a checkpoint is written, so it may grow.
    """
    rules = [checkpoint_managers.LatestN(retention.keep_last), _Best(retention, metrics)]
    if retention.keep_every:
        rules.append(checkpoint_managers.EveryNSteps(retention.keep_every))
    return checkpoint_managers.AnyPreservationPolicy(rules)
