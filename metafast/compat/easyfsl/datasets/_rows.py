"""Rows of a data set that are taken at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Rows(Sequence[Any]):
    """What a list of ``(image, label)`` would be, of the rows ``items`` of a tensor.

    Args:
        source: all images, ``[N, ...]``.
        items: numbers of rows.
        labels: one of each.
    """

    def __init__(
        self, source: Tensor, items: Sequence[int] | NDArray[np.int64], labels: Sequence[Any]
    ) -> None:
        self.source = source
        # NumPy makes arrays of long lists in a quarter of the time that torch takes.
        self.items = np.asarray(items, dtype=np.int64)
        self.labels = labels

    def images(self, places: Any = ...) -> Tensor:
        """Those at some places of this list, or all, in one tensor."""
        rows = torch.from_numpy(np.ascontiguousarray(self.items[places])).to(self.source.device)
        return self.source.index_select(0, rows)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self.source, self.items[index], self.labels[index])
        return self.source[self.items[index]], self.labels[index]

    def __iter__(self) -> Iterator[Any]:
        return zip(self.images().unbind(), self.labels, strict=True)
