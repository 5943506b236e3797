"""The order of tasks."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from torch.utils.data import RandomSampler, SequentialSampler

from metafast.compat import absent
from metafast.compat.torchmeta.utils.data.dataset import CombinationMetaDataset

__getattr__ = absent(__name__)

__all__ = ["CombinationRandomSampler", "CombinationSequentialSampler"]


def _checked(data_source: Any) -> CombinationMetaDataset:
    if not isinstance(data_source, CombinationMetaDataset):
        raise TypeError(f"data_source: expected a CombinationMetaDataset, got {type(data_source).__name__}")
    return data_source


class CombinationSequentialSampler(SequentialSampler):
    """All combinations of classes, in lexicographic order.

    Raises:
        TypeError: ``data_source`` is no ``CombinationMetaDataset``.
    """

    def __init__(self, data_source: CombinationMetaDataset) -> None:
        super().__init__(_checked(data_source))
        self._classes = data_source

    def __iter__(self) -> Iterator[Any]:
        return combinations(range(len(self._classes.dataset)), self._classes.num_classes_per_task)


class CombinationRandomSampler(RandomSampler):
    """As many combinations of classes as there are, each drawn by Python's ``random`` on its own.

    Raises:
        TypeError: ``data_source`` is no ``CombinationMetaDataset``.
    """

    def __init__(self, data_source: CombinationMetaDataset) -> None:
        self._classes = _checked(data_source)
        with warnings.catch_warnings():
            # The number of combinations may be larger than len can say; the order does not depend on it.
            warnings.simplefilter("ignore")
            super().__init__(data_source, replacement=True)

    def __iter__(self) -> Iterator[Any]:
        count, ways = len(self._classes.dataset), self._classes.num_classes_per_task
        for _ in combinations(range(count), ways):
            yield tuple(random.sample(range(count), ways))
