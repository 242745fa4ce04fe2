"""Training curves, read from the metrics that each stage leaves in its workdir."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from echo_jax.train.metrics import METRICS_FILE

# What a reader looks for first, the paper's figure of RL dynamics among it; other metrics follow in the order of the
# file.
_FIRST = (
    "loss",
    "accuracy",
    *("reward/total", "reward/correct", "reward/format", "reward/accuracy", "reward/segment"),
    *("reward/consistency", "reward/spread", "reward/overlong"),
    *("segments", "mean_s", "overlap", "kl", "response_length"),
    *("validation/accuracy", "validation/format", "validation/segments", "validation/mean_s"),
    *("validation/overlap", "validation/response_length"),
)


@dataclass(frozen=True)
class Curve:
    """One metric of one stage: `points` are (step, value) with rising steps."""

    stage: str
    name: str
    points: list[tuple[float, float]]


def read(workdirs: Mapping[str, Path]) -> list[Curve]:
    """Reads every metric of every stage; a stage without a metrics file has no curve, a torn last
    line is passed over.

    Args:
        workdirs: name of the stage, as it is to be shown, to the workdir of its training.
    """
    curves = []
    for stage, workdir in workdirs.items():
        path = workdir / METRICS_FILE
        series: dict[str, list[tuple[float, float]]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                    series.setdefault(name, []).append((float(record["step"]), float(value)))
        curves += [Curve(stage, name, series[name]) for name in sorted(series, key=_rank)]
    return curves


def _rank(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)
