"""Which numbers a config field may hold, and the line about a field that holds another."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Range:
    """A set of numbers.

    Attributes:
        words: the set, as the end of "config.field=value must …".
        holds: whether a number is in it; False for NaN.
    """

    words: str
    holds: Callable[[Any], bool]

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and self.holds(value)


COUNT = Range("be at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Range("be a finite number, 0 or more", lambda value: 0 <= value < math.inf)
POSITIVE = Range("be a finite number, more than 0", lambda value: 0 < value < math.inf)
SHARE = Range("lie in [0, 1]", lambda value: 0 <= value <= 1)
SHARE_BELOW_ONE = Range("lie in [0, 1)", lambda value: 0 <= value < 1)
# What jax and numpy both take as a seed.
SEED = Range("be 0 to 4294967295", lambda value: 0 <= value < 2**32)


def check(name: str, value: Any, allowed: Range) -> None:
    """Raises ValueError, naming the field, where `value` is not in the range.

    Args:
        name: the field in full, e.g. ``config.optimizer.eps``.
        value: what it holds.
        allowed: what it may hold.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must {allowed.words}")
