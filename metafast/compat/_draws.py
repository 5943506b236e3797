"""The draws of Python's ``random`` and of NumPy's ``RandomState``, from the same bits of their streams, but faster."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

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


def split_orders(
    generator: Any,
    seeds: list[int],
    rows: list[int],
    first: list[int],
    counts: list[list[int]],
) -> list[list[int]]:
    """The rows of each class in the order of ``RandomState(seed).permutation(rows)``, parted.

    Args:
        generator: brings the rows of each part into another order by its ``shuffle``, that of ``RandomState`` or not.
        seeds, rows, first: of each class; ``first`` is added to its rows.
        counts: of each split, how many rows of each class it takes.

    Returns:
        The rows of each split, those of one class after the other.
    """
    if type(generator) is np.random.RandomState:
        bits = generator._bit_generator
        with bits.lock:
            return _C.split_orders(bits.capsule, seeds, rows, first, counts)
    found: list[list[int]] = [[] for _ in counts]
    for k, seed in enumerate(seeds):
        order, begin = np.random.RandomState(seed).permutation(rows[k]), 0
        for split, count in zip(found, counts, strict=True):
            part = order[begin : begin + count[k]]
            begin += len(part)
            generator.shuffle(part)
            split += (part + first[k]).tolist()
    return found
