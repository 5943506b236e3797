"""Data sets of one class, and tasks made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Subset
from torch.utils.data import Dataset as TorchDataset

from metafast.compat import absent
from metafast.compat.torchmeta._chain import Transform, chained

__getattr__ = absent(__name__)

__all__ = ["ConcatTask", "Dataset", "SubsetTask", "Task"]


class Dataset(TorchDataset[Any]):
    """The samples of a class or of a task, to be derived from; its hash is that of ``index``.

    Args:
        index: the number of the class, or the numbers of the classes.
        transform: of inputs, which ``__getitem__`` calls.
        target_transform: of targets, which ``__getitem__`` calls.
    """

    def __init__(
        self, index: Any, transform: Transform | None = None, target_transform: Transform | None = None
    ) -> None:
        self.index = index
        self.transform = transform
        self.target_transform = target_transform

    def target_transform_append(self, transform: Transform | None) -> None:
        """Call ``transform`` of what the target transform gave; None changes nothing."""
        self.target_transform = chained(self.target_transform, transform)

    def __hash__(self) -> int:
        return hash(self.index)


class Task(Dataset):
    """A task, to be derived from.

    Args:
        index: of the task.
        num_classes: C, None for regression.
        transform, target_transform: see :class:`Dataset`.
    """

    def __init__(
        self,
        index: Any,
        num_classes: int | None,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        super().__init__(index, transform=transform, target_transform=target_transform)
        self.num_classes = num_classes


class ConcatTask(Task, ConcatDataset[Any]):
    """A task of one :class:`Dataset` for each class, one after the other.

    Args:
        datasets: of the classes.
        num_classes: C.
        target_transform: appended to the target transforms of the data sets.
    """

    def __init__(
        self, datasets: Sequence[Dataset], num_classes: int, target_transform: Transform | None = None
    ) -> None:
        Task.__init__(self, tuple(dataset.index for dataset in datasets), num_classes)
        ConcatDataset.__init__(self, datasets)
        for dataset in datasets:
            dataset.target_transform_append(target_transform)


class SubsetTask(Task, Subset[Any]):
    """Some samples of a task; its hash is that of the task's index and of its own rows.

    Args:
        dataset: the task.
        indices: the rows.
        num_classes: C; None: that of the task.
        target_transform: appended to the target transform of the task.
    """

    def __init__(
        self,
        dataset: Any,
        indices: Sequence[int],
        num_classes: int | None = None,
        target_transform: Transform | None = None,
    ) -> None:
        Task.__init__(self, dataset.index, dataset.num_classes if num_classes is None else num_classes)
        Subset.__init__(self, dataset, indices)
        dataset.target_transform_append(target_transform)

    def __hash__(self) -> int:
        return hash((self.index, tuple(self.indices)))
