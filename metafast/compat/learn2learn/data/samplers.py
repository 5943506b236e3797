"""Samplers for PyTorch's DataLoader."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator

from torch.utils.data import Sampler

from metafast.compat import absent
from metafast.compat.learn2learn.data.task_dataset import DataDescription, Taskset

__getattr__ = absent(__name__)


class TasksetSampler(Sampler[list[int]]):
    """The indices of each task's samples, as a ``batch_sampler`` of a DataLoader of the data set.

    Args:
        taskset: its tasks, without end where it has none.
        shuffle: go through a finite number of tasks in random order.
    """

    def __init__(self, taskset: Taskset, shuffle: bool = True) -> None:
        self.taskset = taskset
        self.shuffle = shuffle

    def description2indices(self, task_description: Iterable[DataDescription]) -> list[int]:
        return [description.index for description in task_description]

    def __len__(self) -> int:
        """The number of tasks.

        Raises:
            TypeError: they are without end.
        """
        if self.taskset.num_tasks == -1:
            raise TypeError("taskset: without end, it has no length")
        return self.taskset.num_tasks

    def __iter__(self) -> Iterator[list[int]]:
        if self.taskset.num_tasks == -1:
            while True:
                yield self.description2indices(self.taskset.sample_task_description())
        order = list(range(self.taskset.num_tasks))
        if self.shuffle:
            random.shuffle(order)
        known = self.taskset.sampled_descriptions
        for i in order:
            if i not in known:
                known[i] = self.taskset.sample_task_description()
            yield self.description2indices(known[i])
