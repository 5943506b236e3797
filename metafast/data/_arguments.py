"""The checks that the arguments of this package share."""

from __future__ import annotations

import operator


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
