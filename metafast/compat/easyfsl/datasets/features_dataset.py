"""Features that are computed already."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metafast import _check
from metafast.compat import absent
from metafast.compat.easyfsl.datasets._rows import Rows
from metafast.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset

__getattr__ = absent(__name__)


class FeaturesDataset(FewShotDataset):
    """Features with labels. A DataLoader takes the rows of a task at once.

    Args:
        labels: one of each row.
        embeddings: ``[n, ...]``.
        class_names: ``class_names[label]`` is the name of a label.

    Raises:
        TypeError: embeddings that are no tensor.
        ValueError: another number of labels than of embeddings.
    """

    def __init__(self, labels: list[int], embeddings: Tensor, class_names: list[str]) -> None:
        _check.is_tensor(embeddings, "embeddings")
        if embeddings.dim() == 0 or len(labels) != len(embeddings):
            raise ValueError(f"embeddings: expected shape [{len(labels)}, ...], got {list(embeddings.shape)}")
        self.labels = labels
        self.embeddings = embeddings
        self.class_names = class_names

    @classmethod
    def from_dataframe(cls, source_dataframe: Any) -> FeaturesDataset:
        """The rows of a pandas DataFrame; classes are numbered in the order in which they come.

        Args:
            source_dataframe: columns ``embedding``, of tensors or arrays of one shape, and ``class_name``.

        Raises:
            ValueError: without one of the columns.
        """
        if not {"embedding", "class_name"}.issubset(source_dataframe.columns):
            raise ValueError(
                "source_dataframe: expected the columns embedding and class_name, "
                f"got {list(source_dataframe.columns)}"
            )
        names = list(source_dataframe["class_name"])
        numbers = {name: k for k, name in enumerate(dict.fromkeys(names))}
        if not names:
            warnings.warn("source_dataframe is empty, and so is the data set", UserWarning, stacklevel=2)
            return cls([], torch.empty(0), [])
        embeddings = torch.from_numpy(np.stack(list(source_dataframe["embedding"])))
        return cls([numbers[name] for name in names], embeddings, list(numbers))

    @classmethod
    def from_dict(cls, source_dict: Mapping[str, Tensor | NDArray[Any]]) -> FeaturesDataset:
        """The features of each class, which are numbered in the order of the dict.

        Args:
            source_dict: ``[rows, ...]`` of each name.

        Raises:
            ValueError: values that are neither tensors nor arrays; an empty dict.
        """
        if not source_dict:
            raise ValueError("source_dict: expected at least one class, got none")
        labels: list[int] = []
        parts = []
        for k, (name, rows) in enumerate(source_dict.items()):
            if not isinstance(rows, (Tensor, np.ndarray)):
                raise ValueError(
                    f"source_dict: expected a tensor or an array for {name!r}, got {type(rows).__name__}"
                )
            parts.append(torch.as_tensor(rows))
            labels += [k] * len(rows)
        return cls(labels, torch.cat(parts), list(source_dict))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.embeddings[index], self.labels[index]

    def __getitems__(self, items: list[int]) -> Any:
        """What a DataLoader asks for: the rows of a batch."""
        if type(self).__getitem__ is not FeaturesDataset.__getitem__:
            return [self[item] for item in items]
        return Rows(self.embeddings, self.labels, items)

    def __len__(self) -> int:
        return len(self.labels)

    def get_labels(self) -> list[int]:
        return self.labels

    def number_of_classes(self) -> int:
        return len(self.class_names)
