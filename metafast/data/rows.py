"""Batches of labelled rows of all classes: what an encoder is trained on to classify them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from metafast.data._arguments import integer
from metafast.data._random import RandomStream
from metafast.data.classes import Classes
from metafast.data.episodes import Episodes
from metafast.data.sampler import as_datasets, gathered

#: Rows of a batch of a pass in the data sets' order, which no optimiser step is made of.
ROWS_AT_ONCE = 256


class RowSampler:
    """`batch` labelled rows at each step, in passes that take every row of every class once, in random order.

    `sampler(step)` is a pure function of `(seed, step)` and gives :class:`Episodes`: one task for each row, with one
    query row, no support row and all classes as its ways. Rotated classes are classes of their own, and those of
    several data sets follow one another. A batch that ends a pass begins the next.

    The order of a pass is that of a Philox generator with key `(seed, pass)`, as of :class:`EpisodeSampler`.

    Args:
        dataset: the classes, or several such data sets with rows of one shape, dtype and device.
        batch: rows at each step.
        seed: integer from 0 to 2**64 - 1.

    Attributes:
        ways: number of classes.
        rows: number of rows, each counted once for each of its rotations.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range, data sets that do not fit together.
    """

    def __init__(self, dataset: Classes | Sequence[Classes], batch: int, seed: int = 0) -> None:
        self.datasets = as_datasets(dataset)
        self.batch = integer("batch", batch, minimum=1)
        self.seed = integer("seed", seed, minimum=0, maximum=2**64 - 1)
        # Of each row: its data set, number and label there, and the label of all.
        columns: list[NDArray[np.int64]] = []
        self.ways = 0
        for number, data in enumerate(self.datasets):
            sizes = data.class_sizes.numpy()
            rows = np.concatenate(
                [np.arange(a, a + n) for a, n in zip(data.class_starts.tolist(), sizes.tolist(), strict=True)]
            )
            turns = 4 if data.rotations else 1
            labels = np.arange(data.num_classes).repeat(np.tile(sizes, turns))
            columns.append(
                np.stack([np.full(len(labels), number), np.tile(rows, turns), labels, labels + self.ways])
            )
            self.ways += data.num_classes
        self._rows = np.concatenate(columns, axis=1)
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def rows(self) -> int:
        return self._rows.shape[1]

    def __call__(self, step: int) -> Episodes:
        """The rows of `step`, an integer from 0."""
        first = integer("step", step, minimum=0) * self.batch
        numbers = np.arange(first, first + self.batch)
        chosen = np.empty_like(numbers)
        for turn in range(first // self.rows, (first + self.batch - 1) // self.rows + 1):
            own = numbers // self.rows == turn
            chosen[own] = self._pass(turn)[numbers[own] % self.rows]
        return self._episodes(chosen)

    def __iter__(self) -> Iterator[Episodes]:
        """Steps 0, 1, 2 ... without end."""
        step = 0
        while True:
            yield self(step)
            step += 1

    def once(self) -> Iterator[Episodes]:
        """Every row once, in the data sets' order."""
        for numbers in np.array_split(np.arange(self.rows), range(ROWS_AT_ONCE, self.rows, ROWS_AT_ONCE)):
            yield self._episodes(numbers)

    def _pass(self, number: int) -> NDArray[np.int64]:
        """The order of a pass; that of the last one is kept."""
        if self._order is None or self._order[0] != number:
            self._order = number, RandomStream(self.seed, number).order(1, self.rows)[0]
        return self._order[1]

    def _episodes(self, chosen: NDArray[np.int64]) -> Episodes:
        owners, rows, own_labels, labels = self._rows[:, chosen]
        x = gathered(
            self.datasets, owners, rows, lambda data: torch.from_numpy(own_labels // len(data.names))
        ).unsqueeze(1)
        y = torch.from_numpy(labels).to(x.device).unsqueeze(1)
        return Episodes(x[:, :0], y[:, :0], x, y, self.ways)

    def __repr__(self) -> str:
        data = repr(self.datasets[0]) if len(self.datasets) == 1 else repr(list(self.datasets))
        return f"RowSampler({data}, batch={self.batch}, seed={self.seed})"
