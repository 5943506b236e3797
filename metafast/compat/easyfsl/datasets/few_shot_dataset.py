"""What a data set needs for tasks to be drawn from it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch.utils.data import Dataset

from metafast.compat import absent

__getattr__ = absent(__name__)


class FewShotDataset(Dataset[Any]):
    """A data set of images with labels, which knows all its labels without reading the images."""

    @abstractmethod
    def __getitem__(self, item: int) -> Any:
        """``(image, label)`` of a row."""
        raise NotImplementedError(f"{type(self).__name__}: a data set of torch has a method __getitem__")

    @abstractmethod
    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__}: a data set of torch has a method __len__")

    @abstractmethod
    def get_labels(self) -> Any:
        """The labels of all rows, in their order."""
        raise NotImplementedError(f"{type(self).__name__}: a FewShotDataset has a method get_labels")
