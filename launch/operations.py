"""Floating-point operations of a traced function, from its jaxpr: what is asked of all devices together."""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def count(closed: core.ClosedJaxpr) -> int:
    """Operations of all matrix products and convolutions, a multiplication and an addition being two.

    A loop counts as often as it runs, a conditional as its most expensive branch, a `while_loop` (whose length is not
    known) once, and a kernel as its grid with every block computed. What is recomputed in a backward pass stands in the
    jaxpr once more, and counts once more.
    """
    return _count(closed.jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(equation.invars[0])
        depth = math.prod(left[axis] for axis in contracted)
        return 2 * depth * math.prod(_shape(equation.outvars[0]))
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) // out_features
    inner = [_count(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "cond":
        return max(inner)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        # The name that jax gives them has changed before.
        axes = next(params[key] for key in ("newly_manual_axes", "manual_axes") if key in params)
        times = math.prod(params["mesh"].shape[axis] for axis in axes)
    elif name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    return times * sum(inner)


def _jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                found.append(part.jaxpr)
            elif isinstance(part, core.Jaxpr):
                found.append(part)
    return found


def _shape(variable: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = variable.aval.shape
    return shape
