"""What the toy regression problems have in common."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from metafast.compat.torchmeta import _numbers
from metafast.compat.torchmeta._chain import Transform
from metafast.compat.torchmeta.transforms.splitters import ClassSplitter_, PerClass, WeightedClassSplitter_
from metafast.compat.torchmeta.utils.data._whole import GivesSamples, Rows, Samples, Together
from metafast.compat.torchmeta.utils.data.dataset import MetaDataset
from metafast.compat.torchmeta.utils.data.task import SubsetTask, Task

Array = NDArray[np.float64]


def of_tasks(values: Array, indices: Rows) -> Array:
    """A parameter of some tasks as ``[B, 1, 1]``."""
    return values[indices][:, None, None]


class RegressionTask(Task, GivesSamples):
    """Inputs and targets ``[n, 1]`` in float64; a sample is a row of each.

    Args:
        index: of the task.
        inputs: ``[n, 1]``.
        targets: ``[n, 1]``, without noise.
        noise_std: standard deviation of the normal noise that ``np_random`` adds to the targets; None or 0: none.
        transform, target_transform: of a row.
        np_random: NumPy's ``RandomState``.
    """

    def __init__(
        self,
        index: int,
        inputs: Array,
        targets: Array,
        noise_std: float | None,
        transform: Transform | None,
        target_transform: Transform | None,
        np_random: np.random.RandomState,
    ) -> None:
        super().__init__(index, None, transform, target_transform)
        self.num_samples, self.noise_std = len(inputs), noise_std
        if noise_std is not None and noise_std > 0:
            targets = targets + noise_std * np_random.randn(len(inputs), 1)
        self._inputs, self._outputs = inputs, targets

    @classmethod
    def _of(
        cls, dataset: RegressionDataset, index: int, inputs: Array, targets: Array, **own: Any
    ) -> RegressionTask:
        """A task of ``dataset`` whose rows are drawn already, with attributes of its own."""
        task = cls.__new__(cls)
        RegressionTask.__init__(task, index, inputs, targets, None, None, None, dataset.np_random)
        task.noise_std = dataset.noise_std
        for name, value in own.items():
            setattr(task, name, value)
        return task

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y = self._inputs[index], self._outputs[index]
        return (
            x if self.transform is None else self.transform(x),
            y if self.target_transform is None else self.target_transform(y),
        )

    def _at_once(self, rows: NDArray[np.int64], steady: set[Any]) -> Samples | None:
        if type(self).__getitem__ is not RegressionTask.__getitem__:
            return None
        if self.transform is not None or self.target_transform is not None:
            return None
        return Samples(self._inputs[rows], self._outputs[rows])


class RegressionDataset(MetaDataset):
    """A number of tasks, whose parameters ``np_random`` draws for all of them when the first is asked for.

    Args:
        num_samples_per_task: rows of a task.
        num_tasks: how many there are.
        noise_std: of the targets' normal noise; None: no noise.
        transform, target_transform: of a row ``[1]`` of a task.
        dataset_transform: of tasks, such as ``ClassSplitter(...)``.
    """

    def __init__(
        self,
        num_samples_per_task: int,
        num_tasks: int,
        noise_std: float | None,
        transform: Transform | None,
        target_transform: Transform | None,
        dataset_transform: Transform | None,
    ) -> None:
        _numbers.count(num_samples_per_task, "num_samples_per_task")
        _numbers.count(num_tasks, "num_tasks")
        super().__init__(
            meta_split="train", target_transform=target_transform, dataset_transform=dataset_transform
        )
        self.num_samples_per_task = num_samples_per_task
        self.num_tasks = num_tasks
        self.noise_std = noise_std
        self.transform = transform
        self._drawn: dict[str, Array] = {}

    def _uniform(self, name: str, low: float, high: float, columns: int | None = None) -> Array:
        """A parameter of all tasks, drawn on the first call."""
        if name not in self._drawn:
            size = self.num_tasks if columns is None else (self.num_tasks, columns)
            self._drawn[name] = self.np_random.uniform(low, high, size=size)
        return self._drawn[name]

    def _task(self, index: int) -> RegressionTask:
        raise NotImplementedError

    def _ready(self) -> bool:
        """Are the parameters of all tasks drawn, and is this a class of this package?"""
        raise NotImplementedError

    def _draw(self, indices: Rows) -> tuple[Array, Array]:
        """Inputs and targets ``[B, n, 1]`` of several tasks, drawn one task after the other."""
        raise NotImplementedError

    def _made(self, index: int, inputs: Array, targets: Array) -> RegressionTask:
        """A task whose rows are drawn already."""
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> Sequence[Any]:
        """What a DataLoader asks for: the tasks of a batch."""
        changed = self.transform is not None or self.target_transform is not None
        noisy = self.noise_std is not None and self.noise_std > 0
        split: Any = self.dataset_transform
        # That draws from a stream of its own.
        known = split is None or (
            type(split) in (ClassSplitter_, WeightedClassSplitter_) and split.np_random is not self.np_random
        )
        if changed or noisy or not known or not self._ready() or not all(type(i) is int for i in indices):
            return [self[index] for index in indices]
        return _Together(self, indices)

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, index: int) -> Any:
        task = self._task(index)
        return task if self.dataset_transform is None else self.dataset_transform(task)


class _Together(Together):
    """Tasks of a data set that needs no more than numbers for them."""

    def __init__(self, dataset: RegressionDataset, indices: list[int]) -> None:
        self._dataset, self._indices = dataset, indices
        self._inputs, self._targets = dataset._draw(np.asarray(indices, dtype=np.int64))
        split, count, rows = dataset.dataset_transform, len(indices), dataset.num_samples_per_task
        self._parts: dict[str, Rows] | None = None
        if isinstance(split, PerClass):
            keys = [hash(index) for index in indices]
            taken = list(split._rows({"regression": rows})) * count
            found = split._parted([rows] * count, taken, keys)
            # A number of a row among those of all tasks.
            self._parts = {
                name: np.array(numbers, np.int64).reshape(count, -1) for name, numbers in found.items()
            }

    def __len__(self) -> int:
        return len(self._indices)

    def collated(self) -> Any:
        if self._parts is None:
            return self._taken(np.arange(self._inputs[..., 0].size).reshape(len(self), -1))
        return OrderedDict((name, self._taken(rows)) for name, rows in self._parts.items())

    def _taken(self, rows: Rows) -> Any:
        if not rows.size:
            # torch's error.
            return default_collate([])
        return [torch.from_numpy(values.reshape(-1, 1)[rows]) for values in (self._inputs, self._targets)]

    def _made(self) -> list[Any]:
        tasks: list[Any] = []
        for k, index in enumerate(self._indices):
            task = self._dataset._made(index, self._inputs[k], self._targets[k])
            first = k * task.num_samples
            tasks.append(
                task
                if self._parts is None
                else OrderedDict(
                    (name, SubsetTask(task, (rows[k] - first).tolist())) for name, rows in self._parts.items()
                )
            )
        return tasks
