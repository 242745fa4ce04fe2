"""Checks of config fields: what they refuse they name, in one line that says what would do."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any


def check_number(
    field: str, value: Any, least: float = -math.inf, most: float = math.inf, whole: bool = False
) -> None:
    """Passes a finite number (a whole one) from `least` to `most`, both included.

    Raises:
      ValueError: it is something else; the message begins with `field`.
    """
    kind = numbers.Integral if whole else numbers.Real
    right = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not right or not least <= value <= most:
        bounds = (
            f" from {least:g} to {most:g}" if math.isfinite(most) else f" of at least {least:g}"
        )
        text = ("a whole number" if whole else "a number") + (
            bounds if math.isfinite(least) else ""
        )
        raise ValueError(f"{field} must be {text}, got {value!r}")


def check_span(
    field: str, value: Any, least: float = -math.inf, most: float = math.inf, whole: bool = False
) -> None:
    """Passes a tuple (lowest, highest) of numbers as `check_number` passes them, the lowest first.

    Raises:
      ValueError: it is something else; the message begins with `field`.
    """
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{field} must be two numbers, (lowest, highest), got {value!r}")
    for number in value:
        check_number(f"{field}: each", number, least, most, whole)
    if value[0] > value[1]:
        raise ValueError(f"{field} must begin with the lower of its two numbers, got {value!r}")


def check_choices(field: str, values: Any, allowed: Iterable[Any]) -> None:
    """Passes a tuple of one or more of `allowed`.

    Raises:
      ValueError: it is something else; the message begins with `field`.
    """
    known = list(allowed)
    if not isinstance(values, tuple) or not values:
        raise ValueError(f"{field} must name one or more of {known}, got {values!r}")
    for value in values:
        if value not in known:
            raise ValueError(f"{field}: {value!r} is unknown; use one or more of {known}")


def check_tenths(field: str, *seconds: float) -> None:
    """Passes multiples of 0.1 s.

    Raises:
      ValueError: a time is between them; the message begins with `field`.
    """
    for value in seconds:
        if abs(value * 10 - round(value * 10)) > 1e-6:
            raise ValueError(f"{field}: times are multiples of 0.1 s, got {value!r}")
