"""Rows of a data set that are taken at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


class Rows(Sequence[Any]):
    """What a list of ``(image, label)`` would be, with all images in one tensor ``[n, ...]``."""

    def __init__(self, images: Tensor, labels: Sequence[Any]) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self.images[index], self.labels[index])
        return self.images[index], self.labels[index]

    def __iter__(self) -> Iterator[Any]:
        return zip(self.images.unbind(), self.labels, strict=True)
