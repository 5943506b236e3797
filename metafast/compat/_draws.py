"""The draws of Python's ``random``, from the same bits of its stream, in less time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any


@cache
def _set_limit(k: int) -> int:
    """Populations up to this size are drawn from a list, larger ones with a set of what is taken."""
    limit, covered = 21, 1
    while k > 5 and covered < 3 * k:
        covered *= 4
    return limit + covered if k > 5 else limit


@cache
def _steps(n: int, k: int) -> tuple[tuple[int, int], ...]:
    """The last place of what is left of a list, and the bits of its length, for each draw."""
    return tuple((left - 1, left.bit_length()) for left in range(n, n - k, -1))


def sample(population: Sequence[Any], k: int) -> list[Any]:
    """``random.sample(population, k)``, of at least k."""
    n = len(population)
    bits = random.getrandbits
    drawn = []
    if n <= _set_limit(k):
        pool = list(population)
        for last, width in _steps(n, k):
            j = bits(width)
            while j > last:
                j = bits(width)
            drawn.append(pool[j])
            pool[j] = pool[last]
        return drawn
    taken = set()
    width = n.bit_length()
    for _ in range(k):
        j = bits(width)
        while j >= n or j in taken:
            j = bits(width)
        taken.add(j)
        drawn.append(population[j])
    return drawn


def shuffle(values: list[Any]) -> None:
    """``random.shuffle(values)``."""
    bits = random.getrandbits
    for last in range(len(values) - 1, 0, -1):
        width = (last + 1).bit_length()
        j = bits(width)
        while j > last:
            j = bits(width)
        values[last], values[j] = values[j], values[last]
