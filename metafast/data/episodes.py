"""The batch of few-shot tasks that samplers give and learners take."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from metafast.data._arguments import integer


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Episodes:
    """A batch of `T` few-shot tasks, the task dimension first.

    All tasks have the same number of ways, of support rows `n` and of query rows `m`; the classes of a task
    may have different numbers of rows. A batch of regression tasks has 0 ways and floating-point targets. One of tasks
    without support rows (`n = 0`) holds rows to classify as they are, such as those of :class:`RowSampler`.

    Args:
        support_x: inputs to learn from, `[T, n, ...]`, any dtype.
        support_y: their labels, `[T, n]` int64, in `0..ways-1`; in regression their targets,
            `[T, n, outputs ...]`, floating point.
        query_x: inputs to predict, `[T, m, ...]`, dtype and trailing shape of `support_x`.
        query_y: their labels, `[T, m]` int64, in `0..ways-1`; in regression their targets
            `[T, m, outputs ...]`, dtype and trailing shape of `support_y`.
        ways: number of classes in a task; 0 for regression.

    Construction checks types, shapes, dtypes and devices, none of which reads a value back from a device;
    :func:`check` looks at labels and targets too. `episodes[a:b]` has some of the tasks, `episodes[i]` one.

    Raises:
        TypeError: a field that is no tensor, labels that are not int64, targets that are not floating point,
            `ways` that is no integer.
        ValueError: shapes or devices that do not fit together.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    ways: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "ways", integer("ways", self.ways, minimum=0))
        for name in ("support_x", "support_y", "query_x", "query_y"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if value.device != self.support_x.device:
                raise ValueError(
                    f"{name} must be on the device of support_x, {self.support_x.device}, got {value.device}"
                )
        for name in ("support_x", "query_x"):
            value = getattr(self, name)
            if value.dim() < 2:
                raise ValueError(f"{name} must have shape [tasks, rows, ...], got {list(value.shape)}")
        for name, inputs in (("support_y", self.support_x), ("query_y", self.query_x)):
            value = getattr(self, name)
            if self.regression:
                self._check_targets(name, value, inputs)
                continue
            if value.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, got {value.dtype}")
            if value.shape != inputs.shape[:2]:
                raise ValueError(
                    f"{name} must have shape {list(inputs.shape[:2])}, one label for each row of "
                    f"{name[:-1]}x, got {list(value.shape)}"
                )
        if self.query_x.shape[0] != self.support_x.shape[0]:
            raise ValueError(
                f"query_x must have as many tasks as support_x, {self.support_x.shape[0]}, "
                f"got {self.query_x.shape[0]}"
            )
        if self.query_x.shape[2:] != self.support_x.shape[2:]:
            raise ValueError(
                f"query_x must have the trailing shape of support_x, {list(self.support_x.shape[2:])}, "
                f"got {list(self.query_x.shape[2:])}"
            )
        if self.query_x.dtype != self.support_x.dtype:
            raise TypeError(
                f"query_x must have the dtype of support_x, {self.support_x.dtype}, got {self.query_x.dtype}"
            )

    def _check_targets(self, name: str, value: Tensor, inputs: Tensor) -> None:
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating point for 0 ways (regression), got {value.dtype}")
        if value.dim() < 3 or value.shape[:2] != inputs.shape[:2]:
            rows = ", ".join(map(str, inputs.shape[:2]))
            raise ValueError(
                f"{name} must have shape [{rows}, outputs], the targets of each row of {name[:-1]}x, "
                f"got {list(value.shape)}"
            )
        if value.dtype != self.support_y.dtype:
            raise TypeError(
                f"{name} must have the dtype of support_y, {self.support_y.dtype}, got {value.dtype}"
            )
        if value.shape[2:] != self.support_y.shape[2:]:
            raise ValueError(
                f"{name} must have the trailing shape of support_y, {list(self.support_y.shape[2:])}, "
                f"got {list(value.shape[2:])}"
            )

    @property
    def regression(self) -> bool:
        """Whether there are targets and no classes, which is to say 0 ways."""
        return self.ways == 0

    @property
    def tasks(self) -> int:
        """Number of tasks `T`."""
        return self.support_x.shape[0]

    @property
    def device(self) -> torch.device:
        """The device that holds all four tensors."""
        return self.support_x.device

    def __len__(self) -> int:
        return self.tasks

    def __getitem__(self, tasks: int | slice) -> Episodes:
        """Some of the tasks, which share memory with these; a number gives a batch of one task."""
        if not isinstance(tasks, slice):
            task = integer("tasks", tasks, minimum=-self.tasks)
            if task >= self.tasks:
                raise IndexError(f"tasks must be below {self.tasks}, got {task}")
            tasks = slice(task % self.tasks, task % self.tasks + 1)
        return Episodes(
            self.support_x[tasks], self.support_y[tasks], self.query_x[tasks], self.query_y[tasks], self.ways
        )

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Episodes:
        """The same episodes on `device`, inputs and regression targets (never labels) as `dtype`; None leaves as it is.

        Copies out of pinned memory do not wait for the device.
        """
        non_blocking = self.support_x.is_pinned()
        target_dtype = dtype if self.regression else None

        def moved(value: Tensor, value_dtype: torch.dtype | None) -> Tensor:
            return value.to(device=device, dtype=value_dtype, non_blocking=non_blocking)

        return Episodes(
            moved(self.support_x, dtype),
            moved(self.support_y, target_dtype),
            moved(self.query_x, dtype),
            moved(self.query_y, target_dtype),
            self.ways,
        )

    def pin_memory(self) -> Episodes:
        """The same episodes in page-locked host memory, which a CUDA device copies without waiting."""
        return Episodes(
            self.support_x.pin_memory(),
            self.support_y.pin_memory(),
            self.query_x.pin_memory(),
            self.query_y.pin_memory(),
            self.ways,
        )

    def __repr__(self) -> str:
        return (
            f"Episodes(tasks={self.tasks}, ways={self.ways}, support_x={list(self.support_x.shape)}, "
            f"query_x={list(self.query_x.shape)}, dtype={self.support_x.dtype}, device='{self.device}')"
        )


def check(episodes: Episodes) -> None:
    """Look at everything a learner relies on, the values of the labels included, and raise what is wrong.

    Reads from the device, so it is for the first step of a run and for tests, not for every step.

    Raises:
        TypeError: `episodes` is no :class:`Episodes`.
        ValueError: a label outside `0..ways-1`, a class of a task without a support row while others have some, or a
            regression target that is infinite or NaN; the message names the field, the task and the label or row.
    """
    if not isinstance(episodes, Episodes):
        raise TypeError(f"episodes must be metafast.Episodes, got {type(episodes).__name__}")
    if episodes.regression:
        for name in ("support_y", "query_y"):
            wrong = (~getattr(episodes, name).isfinite()).flatten(2).any(2).nonzero()
            if len(wrong):
                task, row = wrong[0].tolist()
                raise ValueError(
                    f"{name} must be finite, got {getattr(episodes, name)[task, row].tolist()} "
                    f"at task {task}, row {row}"
                )
        return
    ways = episodes.ways
    for name in ("support_y", "query_y"):
        labels = getattr(episodes, name)
        outside = ((labels < 0) | (labels >= ways)).nonzero()
        if len(outside):
            task, row = outside[0].tolist()
            raise ValueError(
                f"{name} must hold labels in 0..{ways - 1}, got {int(labels[task, row])} "
                f"at task {task}, row {row}"
            )
    if not episodes.support_y.shape[1]:
        return
    counts = torch.zeros(episodes.tasks, ways, dtype=torch.int64, device=episodes.device)
    counts.scatter_add_(1, episodes.support_y, torch.ones_like(episodes.support_y))
    missing = (counts == 0).nonzero()
    if len(missing):
        task, label = missing[0].tolist()
        raise ValueError(
            f"support_y must hold every class of 0..{ways - 1} in each task, got no row of class {label} "
            f"in task {task}"
        )
