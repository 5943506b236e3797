"""Tasks: descriptions of samples, and what is made of them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, overload

from torch.utils.data import default_collate

from metafast.compat import absent
from metafast.compat.learn2learn.data.meta_dataset import MetaDataset, batch_of

__getattr__ = absent(__name__)


class DataDescription:
    """A sample of a task.

    Attributes:
        index: its number in the data set.
        transforms: what is called one after the other, the first with the index.
    """

    __slots__ = ("index", "transforms")

    def __init__(self, index: int) -> None:
        self.index = index
        self.transforms: list[Callable[[Any], Any]] = []


class Stage:
    """What is done with each sample of a task."""

    def __call__(self, data: Any) -> Any:
        raise NotImplementedError

    def of(self, label: Any) -> Callable[[Any], Any]:
        """What is called with each sample of this label."""
        return self

    def batch(self, data: list[Any], labels: Sequence[Any]) -> list[Any] | None:
        """Of all samples ``[x [n, ...], y [n]]`` with these labels at once; None where it has to be one by one."""
        return None


class Load(Stage):
    """From an index to its sample."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, data: Any) -> Any:
        return self.dataset[data]


Groups = list[tuple[Any, Sequence[int]]]


class Draft(Sequence[DataDescription]):
    """A task description that is not written out, until somebody looks.

    Its rows are those of the groups, one group after the other, or in ascending order where they are interleaved.
    """

    def __init__(self, dataset: Any, groups: Groups, interleaved: bool) -> None:
        self.dataset = dataset
        self.groups = groups
        self.interleaved = interleaved
        self.stages: list[Stage] = []
        self._written: list[DataDescription] | None = None

    def rows(self) -> list[int]:
        rows = list(chain.from_iterable([members for _, members in self.groups]))
        if self.interleaved:
            rows.sort()
        return rows

    def labels(self) -> list[Any]:
        """Of the rows."""
        if self.interleaved:
            pairs = [(row, label) for label, members in self.groups for row in members]
            return [label for _, label in sorted(pairs, key=itemgetter(0))]
        return [label for label, members in self.groups for _ in members]

    def made(self) -> Iterator[tuple[int, list[Callable[[Any], Any]]]]:
        """The rows, and what is called for each."""
        of = {label: [stage.of(label) for stage in self.stages] for label, _ in self.groups}
        for row, label in zip(self.rows(), self.labels(), strict=True):
            yield row, of[label]

    @property
    def is_written(self) -> bool:
        return self._written is not None

    def written(self) -> list[DataDescription]:
        """The description. Its owner may change it, and the samples are made one by one from now on."""
        if self._written is None:
            self._written = [DataDescription(row) for row in self.rows()]
            self.describe(self._written)
        return self._written

    def describe(self, descriptions: list[DataDescription]) -> None:
        """Add what is called for each row to its description."""
        if self.stages:
            for description, (_, calls) in zip(descriptions, self.made(), strict=True):
                description.transforms += calls

    def batch(self) -> list[Any] | None:
        """``[x, y]`` of all samples at once; None where that is not possible."""
        if not self.stages:
            return None
        load, *others = self.stages
        if not isinstance(load, Load):
            return None
        if others and load.dataset is not self.dataset:
            return None
        data = batch_of(load.dataset, self.rows())
        labels = self.labels() if others else []
        for stage in others:
            data = None if data is None else stage.batch(data, labels)
        return data

    def __len__(self) -> int:
        return (
            sum(len(members) for _, members in self.groups) if self._written is None else len(self._written)
        )

    @overload
    def __getitem__(self, k: int) -> DataDescription: ...

    @overload
    def __getitem__(self, k: slice) -> list[DataDescription]: ...

    def __getitem__(self, k: Any) -> Any:
        return self.written()[k]


class Taskset:
    """Tasks that are drawn from a data set when they are asked for.

    A transform is called with the list of :class:`DataDescription` that the one before it has made (the first with
    None, for all samples) and gives another list. What a task consists of is kept by its number; of ``num_tasks=-1``
    nothing is kept, every access draws another task, and the length is 1.

    Args:
        dataset: of pairs of data and label; :class:`MetaDataset` is put around it if it is none.
        task_transforms: those of :mod:`.transforms`, or any functions of descriptions; or one function in their place.
        num_tasks: how many tasks; -1: without end.
        task_collate: from the list of a task's samples to the task; None: torch's ``default_collate``.

    Raises:
        ValueError: ``num_tasks`` of 0 or below -1.
    """

    def __init__(
        self,
        dataset: Any,
        task_transforms: Any = None,
        num_tasks: int = -1,
        task_collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if num_tasks < -1 or num_tasks == 0:
            raise ValueError(f"num_tasks: expected -1, for no end, or at least 1, got {num_tasks}")
        self.dataset = dataset if isinstance(dataset, MetaDataset) else MetaDataset(dataset)
        self.task_transforms = [] if task_transforms is None else task_transforms
        self.num_tasks = num_tasks
        self.task_collate = default_collate if task_collate is None else task_collate
        self.sampled_descriptions: dict[int, Sequence[DataDescription]] = {}
        self._task_id = 0

    def sample_task_description(self) -> Any:
        """A new task's list of :class:`DataDescription`."""
        description = self._draft()
        return description.written() if isinstance(description, Draft) else description

    def _sample(self) -> Any:
        # A subclass with a method of its own has the last word.
        drawn = self.sample_task_description
        own = getattr(drawn, "__func__", None) is Taskset.sample_task_description
        return self._draft() if own else drawn()

    def _draft(self) -> Any:
        if callable(self.task_transforms):
            return self.task_transforms(None)
        description: Any = None
        for transform in self.task_transforms:
            if hasattr(transform, "draft") and transform.drafts(description):
                description = transform.draft(description)
            else:
                description = transform(
                    description.written() if isinstance(description, Draft) else description
                )
        if description is None:
            raise ValueError("task_transforms: expected at least one, such as LoadData(dataset), got none")
        return description

    def get_task(self, task_description: Iterable[DataDescription]) -> Any:
        """The data of a description."""
        if isinstance(task_description, Draft) and not task_description.is_written:
            task = task_description.batch() if self.task_collate is default_collate else None
            if task is not None:
                return task
            return self.task_collate([_made(row, calls) for row, calls in task_description.made()])
        return self.task_collate([_made(sample.index, sample.transforms) for sample in task_description])

    def sample(self) -> Any:
        """The data of a task at random, by Python's ``random``."""
        return self[random.randint(0, len(self) - 1)]

    def __len__(self) -> int:
        return 1 if self.num_tasks == -1 else self.num_tasks

    def __getitem__(self, i: int) -> Any:
        if self.num_tasks == -1:
            return self.get_task(self._sample())
        if i not in self.sampled_descriptions:
            self.sampled_descriptions[i] = self._sample()
        return self.get_task(self.sampled_descriptions[i])

    def __iter__(self) -> Iterator[Any]:
        self._task_id = 0
        return self

    def __next__(self) -> Any:
        if self.num_tasks == -1:
            return self.get_task(self._sample())
        if self._task_id >= self.num_tasks:
            raise StopIteration
        self._task_id += 1
        return self[self._task_id - 1]

    def __add__(self, other: Any) -> Any:
        raise NotImplementedError("task sets cannot be added: make one of UnionMetaDataset")


def _made(data: Any, transforms: Iterable[Callable[[Any], Any]]) -> Any:
    for transform in transforms:
        data = transform(data)
    return data


class TaskDataset(Taskset):
    """The old name of :class:`Taskset`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        warnings.warn("TaskDataset is deprecated, use Taskset instead.", DeprecationWarning, stacklevel=2)
