"""Rows of a data set that are taken at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metafast import _C


class Rows(Sequence[Any]):
    """What a list of ``(image, label)`` would be, of the rows ``items`` of a tensor.

    Args:
        source: all images, ``[N, ...]``.
        labels: of all images.
        items: numbers of rows.
    """

    def __init__(self, source: Tensor, labels: Sequence[Any], items: list[int]) -> None:
        self.source = source
        self.labels = labels
        self.items = items

    def split(
        self, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]] | None:
        """Support images and their labels, query images and their labels, classes; see ``episodic_collate_fn``.

        Returns:
            None where a label is no int, or the rows are no list.
        """
        if type(self.labels) is not list or type(self.items) is not list:
            return None
        found = _C.split_rows(self.items, self.labels, ways, shots, queries)
        if found is None:
            return None
        numbers, rows, supports = np.frombuffer(found[0], np.int64), len(self.items), ways * shots
        return (
            self._images(torch.from_numpy(numbers[:supports])),
            torch.from_numpy(numbers[rows : rows + supports]),
            self._images(torch.from_numpy(numbers[supports:rows])),
            torch.from_numpy(numbers[rows + supports :]),
            found[1],
        )

    def _images(self, rows: Tensor) -> Tensor:
        return self.source.index_select(0, rows if self.source.is_cpu else rows.to(self.source.device))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        items = self.items[index]
        if isinstance(index, slice):
            return Rows(self.source, self.labels, items)
        return self.source[items], self.labels[items]

    def __iter__(self) -> Iterator[Any]:
        images = self._images(torch.tensor(self.items, dtype=torch.int64)).unbind()
        return zip(images, (self.labels[item] for item in self.items), strict=True)
