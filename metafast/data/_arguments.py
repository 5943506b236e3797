"""The checks that the arguments of this package share."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence


def integer(name: str, value: object, minimum: int, maximum: int | None = None) -> int:
    """Return `value` as a Python int, or raise naming the argument, the value and the range."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None
    if number < minimum or (maximum is not None and number > maximum):
        wanted = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
        raise ValueError(f"{name} must be {wanted}, got {number}")
    return number


def integer_range(name: str, value: object, minimum: int) -> tuple[int, int]:
    """Smallest and largest of an integer or a pair (smallest, largest)."""
    if not isinstance(value, (tuple, list)):
        number = integer(name, value, minimum)
        return number, number
    if len(value) != 2:
        raise ValueError(f"{name} must be an integer or a pair (smallest, largest), got {value!r}")
    low, high = (integer(name, end, minimum) for end in value)
    if low > high:
        raise ValueError(f"{name} must be a pair (smallest, largest), got {(low, high)}")
    return low, high


def interval(name: str, value: object) -> tuple[float, float]:
    """Ends of an interval given as a finite number or a pair (smallest, largest)."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    try:
        low, high = (float(end) for end in pair)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or a pair (smallest, largest), got {value!r}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{name} must be a finite number or a pair (smallest, largest), got {value!r}")
    return low, high


def one_of(name: str, value: object, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        wanted = ", ".join(map(repr, choices[:-1])) + f" or {choices[-1]!r}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return value
