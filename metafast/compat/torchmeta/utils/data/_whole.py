"""All samples of a task at once, where each of them would be the same however often it is asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from metafast.compat.torchmeta.utils.data.task import ConcatTask, SubsetTask

Rows = NDArray[np.int64]


class Samples(NamedTuple):
    """Some samples of a data set.

    Attributes:
        inputs: ``[n, ...]``, before ``finish``.
        targets: ``[n, ...]``, or the one number of them all.
        finish: what each input goes through yet, of many at once.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any] | int
    finish: Sequence[Callable[[Tensor], Tensor]] = ()

    def alike(self, other: Samples) -> bool:
        """Can both be finished at once?"""
        return (
            self.inputs.shape[1:] == other.inputs.shape[1:]
            and self.inputs.dtype == other.inputs.dtype
            and self.finish == other.finish
            and isinstance(self.targets, int) == isinstance(other.targets, int)
        )


class GivesSamples:
    """A data set of this package that can give many samples at once."""

    def _at_once(self, rows: Rows, steady: set[Any]) -> Samples | None:
        """Those of some rows; None: they are to be asked for each.

        Args:
            rows: one or more; too large a number is an IndexError, a negative one as in ``__getitem__``, or None.
            steady: what was found to draw nothing, while a batch is put together.
        """
        raise NotImplementedError(f"{type(self).__name__} has no _at_once")


class Whole:
    """All samples of a task, those of each class at once."""

    def __init__(self, parts: list[Samples], rows: int) -> None:
        self.parts = parts
        self.rows = rows


def whole(task: Any, steady: set[Any]) -> Whole | None:
    """The samples of a task, of data sets that are :class:`GivesSamples`; None: they are to be asked for each."""
    rows: Rows | None = None
    while type(task) is SubsetTask:
        own = np.asarray(task.indices, dtype=np.int64)
        rows = own if rows is None else own[rows]
        task = task.dataset
    if rows is None:
        rows = np.arange(len(task))
    if not len(rows):
        return None
    if type(task) is not ConcatTask:
        parts = [(task, rows)]
    else:
        if rows.min() < 0:
            return None
        ends = np.asarray(task.cumulative_sizes)
        owners = ends.searchsorted(rows, side="right")
        cuts = np.flatnonzero(owners[1:] != owners[:-1]) + 1
        first = [0, *cuts.tolist()]
        parts = [
            (task.datasets[owner], rows[a:b] - (ends[owner - 1] if owner else 0))
            for a, b, owner in zip(first, [*first[1:], len(rows)], owners[first].tolist(), strict=True)
        ]
    found: list[Samples] = []
    for dataset, wanted in parts:
        samples = dataset._at_once(wanted, steady) if isinstance(dataset, GivesSamples) else None
        if samples is None or (found and not samples.alike(found[0])):
            return None
        found.append(samples)
    return Whole(found, len(rows))


class Together(Sequence[Any]):
    """Tasks that were drawn together: what a list of them would be, but put together at once."""

    def collated(self) -> Any:
        """torch's ``default_collate`` of the tasks."""
        raise NotImplementedError(f"{type(self).__name__} has no collated")

    def _made(self) -> list[Any]:
        raise NotImplementedError(f"{type(self).__name__} has no _made")

    @cached_property
    def _tasks(self) -> list[Any]:
        return self._made()

    def __getitem__(self, index: Any) -> Any:
        return self._tasks[index]


def collated(tasks: Sequence[Any]) -> Any:
    """torch's ``default_collate`` of tasks, :class:`Whole` or what it gave of their samples, in dictionaries or not."""
    first = tasks[0]
    if isinstance(first, OrderedDict) and all(task.keys() == first.keys() for task in tasks):
        return OrderedDict((name, collated([task[name] for task in tasks])) for name in first)
    if isinstance(first, Whole):
        rows, begin = first.rows, first.parts[0]
        if all(
            isinstance(task, Whole) and task.rows == rows and task.parts[0].alike(begin) for task in tasks
        ):
            found = _finished([part for task in tasks for part in task.parts])
            return [values.unflatten(0, (len(tasks), rows)) for values in found]
    return default_collate([alone(task) for task in tasks])


def alone(task: Any) -> Any:
    """``default_collate`` of the samples of one task."""
    if isinstance(task, OrderedDict):
        return OrderedDict((name, alone(part)) for name, part in task.items())
    return _finished(task.parts) if isinstance(task, Whole) else task


def _finished(parts: Sequence[Samples]) -> list[Tensor]:
    """Inputs and targets of samples that are alike."""
    inputs = torch.from_numpy(_joined([part.inputs for part in parts]))
    for step in parts[0].finish:
        inputs = step(inputs)
    targets = [part.targets for part in parts]
    if isinstance(targets[0], int):
        numbers = np.repeat(np.array(targets, dtype=np.int64), [len(part.inputs) for part in parts])
        return [inputs, torch.from_numpy(numbers)]
    return [inputs, torch.from_numpy(_joined(targets))]


def _joined(values: Sequence[Any]) -> NDArray[Any]:
    return np.concatenate(values) if len(values) > 1 else values[0]
