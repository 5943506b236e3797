"""Batches of tasks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader, default_collate
from torch.utils.data import Dataset as TorchDataset

from metafast.compat import absent
from metafast.compat.torchmeta.utils.data._whole import Together, alone, collated, whole
from metafast.compat.torchmeta.utils.data.dataset import CombinationMetaDataset
from metafast.compat.torchmeta.utils.data.sampler import (
    CombinationRandomSampler,
    CombinationSequentialSampler,
)

__getattr__ = absent(__name__)


class BatchMetaCollate:
    """Puts the samples of each task together by ``collate_fn``, and so the tasks.

    A task is a data set, or an ``OrderedDict`` of tasks.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def collate_task(self, task: Any) -> Any:
        """The samples of one task.

        Raises:
            NotImplementedError: something else than a task.
        """
        return alone(self._asked(task, set()))

    def __call__(self, batch: Sequence[Any]) -> Any:
        if self.collate_fn is not default_collate or type(self) is not BatchMetaCollate:
            return self.collate_fn([self.collate_task(task) for task in batch])
        if isinstance(batch, Together):
            return batch.collated()
        steady: set[Any] = set()
        return collated([self._asked(task, steady) for task in batch])

    def _asked(self, task: Any, steady: set[Any]) -> Any:
        """The samples of one task, put together, or all at once and not finished."""
        if isinstance(task, OrderedDict):
            return OrderedDict((name, self._asked(part, steady)) for name, part in task.items())
        if not isinstance(task, TorchDataset):
            raise NotImplementedError(
                f"task: expected a torch Dataset or an OrderedDict of them, got {type(task).__name__}"
            )
        found = whole(task, steady) if self.collate_fn is default_collate else None
        return self.collate_fn([task[row] for row in range(len(task))]) if found is None else found  # type: ignore[arg-type]


def no_collate(batch: Sequence[Any]) -> list[Any]:
    """The tasks as they are."""
    return list(batch)


class MetaDataLoader(DataLoader[Any]):
    """torch's ``DataLoader`` of tasks, which come in lists; arguments are its own.

    Tasks of a ``CombinationMetaDataset`` are drawn by :class:`CombinationRandomSampler`, or without ``shuffle`` come in
    the order of :class:`CombinationSequentialSampler`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = True,
        sampler: Any = None,
        batch_sampler: Any = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
    ) -> None:
        if isinstance(dataset, CombinationMetaDataset) and sampler is None:
            sampler = (CombinationRandomSampler if shuffle else CombinationSequentialSampler)(dataset)
            shuffle = False
        super().__init__(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            sampler=sampler,
            batch_sampler=batch_sampler,
            num_workers=num_workers,
            collate_fn=no_collate if collate_fn is None else collate_fn,
            pin_memory=pin_memory,
            drop_last=drop_last,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
        )


class BatchMetaDataLoader(MetaDataLoader):
    """:class:`MetaDataLoader` whose batches are tensors: ``batch["train"]`` is ``inputs [B, n, ...], targets [B, n]``.

    The keys are those of the splitter; without one, a batch is the pair itself. Samples that are the same however often
    they are asked for, such as images of this package with transforms that draw nothing, are taken all at once.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool | None = True,
        sampler: Any = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=BatchMetaCollate(default_collate),
            pin_memory=pin_memory,
            drop_last=drop_last,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
        )
