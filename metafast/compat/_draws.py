"""The draws of Python's ``random``, from the same bits of its stream, in less time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from metafast import _C

T = TypeVar("T")
U = TypeVar("U")


def sample(population: Sequence[T], k: int) -> list[T]:
    """``random.sample(population, k)``."""
    return _C.sample(random.getrandbits, population, k)


def sample_task(labels: Sequence[T], rows_of: Mapping[T, Sequence[U]], ways: int, rows: int) -> list[U]:
    """``ways`` of the labels, and of each of them ``rows`` of ``rows_of[label]``, by ``random.sample``."""
    return _C.sample_task(random.getrandbits, labels, rows_of, ways, rows)


def shuffle(values: list[T]) -> None:
    """``random.shuffle(values)``."""
    _C.shuffle(random.getrandbits, values)
