"""All samples of a task at once, where each of them would be the same however often it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metafast.compat.torchmeta.utils.data.task import ConcatTask, SubsetTask

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """Some samples of a data set.

    Attributes:
        inputs: ``[n, ...]``, before ``finish``.
        targets: ``[n, ...]``, or the one number of them all.
        finish: what each input goes through yet, of many at once.
    """

    inputs: Tensor
    targets: Tensor | int
    finish: Sequence[Callable[[Tensor], Tensor]] = ()


def whole(task: Any) -> list[Tensor] | None:
    """``[inputs, targets]`` of a task, as torch's ``default_collate`` gives them.

    Data sets say by a method ``_samples`` of their own what they can give at once. None: they are to be asked for each.
    """
    rows = np.arange(len(task))
    while type(task) is SubsetTask:
        rows = np.asarray(task.indices, dtype=np.int64)[rows]
        task = task.dataset
    if not len(rows) or rows.min() < 0:
        return None
    if type(task) is not ConcatTask:
        parts = [(task, rows)]
    else:
        ends = np.asarray(task.cumulative_sizes)
        owners = ends.searchsorted(rows, side="right")
        if rows[-1] >= ends[-1] or owners.max() == len(ends):
            return None
        cuts = np.flatnonzero(owners[1:] != owners[:-1]) + 1
        first = [0, *cuts.tolist()]
        parts = [
            (task.datasets[owner], rows[a:b] - (ends[owner - 1] if owner else 0))
            for a, b, owner in zip(first, [*first[1:], len(rows)], owners[first].tolist(), strict=True)
        ]
    found: list[Samples] = []
    for dataset, wanted in parts:
        ask = getattr(dataset, "_samples", None)
        samples = None if ask is None else ask(wanted)
        if samples is None or (found and not _alike(samples, found[0])):
            return None
        found.append(samples)
    inputs = torch.cat([each.inputs for each in found]) if len(found) > 1 else found[0].inputs
    for step in found[0].finish:
        inputs = step(inputs)
    return [inputs, _joined([each.targets for each in found], [len(wanted) for _, wanted in parts])]


def _alike(one: Samples, other: Samples) -> bool:
    return (
        one.inputs.shape[1:] == other.inputs.shape[1:]
        and one.inputs.dtype == other.inputs.dtype
        and one.finish == other.finish
        and isinstance(one.targets, Tensor) == isinstance(other.targets, Tensor)
    )


def _joined(targets: Sequence[Any], counts: list[int]) -> Tensor:
    if isinstance(targets[0], Tensor):
        return torch.cat(list(targets)) if len(targets) > 1 else targets[0]
    return torch.from_numpy(np.repeat(np.array(targets, dtype=np.int64), counts))
