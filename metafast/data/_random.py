"""Random numbers that are the same on every machine and under every version of numpy and torch."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

#: Random bits of a sorting key; the column it belongs to takes the others, or more where it needs more.
_KEY_BITS = 53


class RandomStream:
    """Random numbers of one pair (seed, number), which shares no stream with another pair.

    The bits are those of the counter-based generator Philox 4x64-10 with the pair as its key (Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", SC 2011). What is made of them uses integers and single
    IEEE operations only: numpy and torch promise the bits, but neither their permutations nor logarithms.
    """

    def __init__(self, seed: int, number: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, number], dtype=np.uint64))
        self._half: NDArray[np.uint64] = np.empty(0, dtype=np.uint64)

    def words(self, *shape: int) -> NDArray[np.uint64]:
        """Random 64-bit words."""
        return self._bits.random_raw(math.prod(shape)).reshape(shape)

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """Floats from 0 to 1, both excluded: the middles of 2**52 equal intervals."""
        return ((self.words(*shape) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def below(self, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """A number from 0 to `bound - 1` for each of `bounds`, all below 2**31: `floor(word * bound / 2**64)`."""
        words, factor = self.words(*bounds.shape), bounds.astype(np.uint64)
        low = ((words & np.uint64(0xFFFFFFFF)) * factor) >> np.uint64(32)
        return (((words >> np.uint64(32)) * factor + low) >> np.uint64(32)).astype(np.int64)

    def between(self, low: int, high: int, count: int) -> NDArray[np.int64]:
        """`count` numbers from `low` to `high`, both included."""
        return low + self.below(np.full(count, high - low + 1, dtype=np.int64))

    def one_between(self, low: int, high: int) -> int:
        """A number from `low` to `high`, both included; takes no random bits where they are equal."""
        return low if low == high else int(self.between(low, high, 1)[0])

    def order(
        self, rows: int, columns: int, sizes: NDArray[np.int64] | None = None, count: int | None = None
    ) -> NDArray[np.int64]:
        """The first `count` entries of a random permutation of `0..columns-1` for each row.

        With `sizes [rows]` it is a permutation of `0..size-1`, and `count` is at most the smallest size.
        """
        # The order of independent random keys is a uniform permutation. The last bits say where a key came from.
        shift = np.uint64(max(64 - _KEY_BITS, (columns - 1).bit_length()))
        keys = (self.words(rows, columns) >> shift << shift) | np.arange(columns, dtype=np.uint64)
        if sizes is not None:
            keys[np.arange(columns) >= sizes[:, None]] = np.uint64(2**64 - 1)
        keys.sort(axis=1)
        return (keys[:, :count] & ((np.uint64(1) << shift) - np.uint64(1))).astype(np.int64)

    def distinct(self, rows: int, count: int, population: int) -> NDArray[np.int64]:
        """`[rows, count]` numbers below `population`, distinct in a row, each ordered choice equally likely."""
        if count * count > population:
            return self.order(rows, population, count=count)
        # More than half of the rows have no repetition: drawing the others again costs less than keys.
        drawn = self._bounded(population, rows * count).reshape(rows, count)
        while True:
            again = _repeats(drawn)
            if not again.any():
                return drawn
            drawn[again] = self._bounded(population, int(again.sum()) * count).reshape(-1, count)

    def distinct_below(self, sizes: NDArray[np.int64], count: int, largest: int) -> NDArray[np.int64]:
        """`[len(sizes), count]` numbers, in each row distinct and below its size, each choice equally likely.

        No size is above `largest`, which decides how many random bits are taken.
        """
        limit = max(count * count, 64)
        if largest <= limit:
            return self.order(len(sizes), largest, sizes, count)
        drawn = np.empty((len(sizes), count), dtype=np.int64)
        again = sizes > limit
        drawn[~again] = self.order(int((~again).sum()), limit, sizes[~again], count)
        while again.any():
            drawn[again] = self.below(np.repeat(sizes[again][:, None], count, axis=1))
            again[again] = _repeats(drawn[again])
        return drawn

    def weighted(self, rows: int, count: int, weights: NDArray[np.float64]) -> NDArray[np.int64]:
        """`[rows, count]` numbers, distinct in a row: one after the other with chances in proportion to `weights`.

        The `count` smallest of `-log(u) / weight` (Efraimidis and Spirakis, "Weighted random sampling with a
        reservoir", 2006); at least `count` of the weights are positive.
        """
        positive = np.flatnonzero(weights > 0)
        keys = _minus_log(self.uniform(rows, len(positive))) / weights[positive]
        return positive[keys.argsort(axis=1, kind="stable")[:, :count]]

    def choices(self, count: int, weights: NDArray[np.float64]) -> NDArray[np.int64]:
        """`count` independent numbers with chances in proportion to the positive `weights`."""
        ends = weights.cumsum()
        return np.minimum(
            np.searchsorted(ends, self.uniform(count) * ends[-1], side="right"), len(weights) - 1
        )

    def _bounded(self, bound: int, count: int) -> NDArray[np.int64]:
        """Exactly uniform numbers below `bound` from halves of words (Lemire, ACM TOMACS 29(1), 2019)."""
        if bound == 1:
            return np.zeros(count, dtype=np.int64)
        threshold = (2**32 - bound) % bound
        parts: list[NDArray[np.uint64]] = []
        missing = count
        while missing:
            product = self._halves(missing) * np.uint64(bound)
            parts.append(product[(product & np.uint64(0xFFFFFFFF)) >= threshold] >> np.uint64(32))
            missing -= len(parts[-1])
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def _halves(self, count: int) -> NDArray[np.uint64]:
        """32-bit words, the lower half of a 64-bit word first; an unused half is the first of the next call."""
        words = self.words((count - len(self._half) + 1) // 2)
        halves = words.astype("<u8", copy=False).view("<u4").astype(np.uint64)
        if len(self._half):
            halves = np.concatenate([self._half, halves])
        self._half = halves[count:]
        return halves[:count]


def _repeats(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which rows hold a number twice."""
    ordered = np.sort(rows, axis=1)
    found: NDArray[np.bool_] = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    return found


def _minus_log(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """`-log(u)` to about 1e-13, by the same IEEE operations everywhere, which the libraries' logarithms are not."""
    mantissa, exponent = np.frexp(u)
    s = (mantissa - 1) / (mantissa + 1)
    square = s * s
    series = np.zeros_like(u)
    for k in range(25, 0, -2):
        series = series * square + 1 / k
    return -(2 * s * series + exponent * 0.6931471805599453)
