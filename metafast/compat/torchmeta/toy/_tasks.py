"""What the toy regression problems have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from metafast.compat.torchmeta import _numbers
from metafast.compat.torchmeta._chain import Transform
from metafast.compat.torchmeta.utils.data._whole import GivesSamples, Samples
from metafast.compat.torchmeta.utils.data.dataset import MetaDataset
from metafast.compat.torchmeta.utils.data.task import Task

Array = NDArray[np.float64]


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

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, index: int) -> Any:
        task = self._task(index)
        return task if self.dataset_transform is None else self.dataset_transform(task)
