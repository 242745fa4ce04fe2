"""Checks of config fields: what they refuse they name, in one line that says what the field may hold."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable
from typing import Any, cast


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval of finite numbers, whole ones if so said.

    Attributes:
        least: the lowest of them.
        most: the highest of them.
        above: a bound that every number exceeds.
        below: a bound that no number reaches.
        whole: only integers (of an integer type: 2.0 is none).
    """

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        kind = numbers.Integral if self.whole else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        value = cast("float", value)
        return (
            -math.inf < value < math.inf
            and self.least <= value <= self.most
            and self.above < value < self.below
        )

    def __str__(self) -> str:
        number = "a whole number" if self.whole else "a finite number"
        low, high = max(self.least, self.above), min(self.most, self.below)
        if math.isfinite(low) and math.isfinite(high):
            left, right = "[" if low > self.above else "(", "]" if high < self.below else ")"
            return f"{number} in {left}{low:.10g}, {high:.10g}{right}"
        for words, bound in (
            ("at least", self.least),
            ("more than", self.above),
            ("at most", self.most),
        ):
            if math.isfinite(bound):
                return f"{number}, {words} {bound:.10g}"
        return number


COUNT = Range(least=1, whole=True)
NATURAL = Range(least=0, whole=True)
NOT_NEGATIVE = Range(least=0)
POSITIVE = Range(above=0)
SHARE = Range(least=0, most=1)
SHARE_BELOW_ONE = Range(least=0, below=1)
# What jax and numpy both take as a seed.
SEED = Range(least=0, most=2**32 - 1, whole=True)


def check(field: str, value: Any, allowed: Range) -> None:
    """Raises ValueError, naming the field, where `value` is not in the range.

    Args:
        field: its full name, e.g. ``config.optimizer.eps``.
        value: what it holds.
        allowed: what it may hold.
    """
    if value not in allowed:
        raise ValueError(f"{field}={value!r} must be {allowed}")


def check_span(field: str, value: Any, allowed: Range = Range()) -> None:
    """Raises ValueError, naming the field, unless `value` is a tuple (lowest, highest) from the range."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{field}={value!r} must be two numbers, (lowest, highest)")
    if any(number not in allowed for number in value):
        raise ValueError(f"{field}={value!r}: each number must be {allowed}")
    if value[0] > value[1]:
        raise ValueError(f"{field}={value!r} must begin with the lower of its two numbers")


def check_choices(field: str, values: Any, allowed: Iterable[Any]) -> None:
    """Raises ValueError, naming the field, unless `values` is a tuple of one or more of `allowed`."""
    known = list(allowed)
    if not isinstance(values, tuple) or not values:
        raise ValueError(f"{field}={values!r} must name one or more of {known}")
    for value in values:
        if value not in known:
            raise ValueError(f"{field}: {value!r} is unknown; use one or more of {known}")
