"""The sampler of tasks, and what makes tensors of one."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from metafast import _check
from metafast.compat import absent
from metafast.compat._draws import sample_task
from metafast.compat.easyfsl.datasets._rows import Rows
from metafast.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset

__getattr__ = absent(__name__)

GENERIC_TYPING_ERROR_MESSAGE = (
    "Items of the data set must be a tensor and a label: an int, or an integer tensor [] of one."
)

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class TaskSampler(Sampler[list[int]]):
    """The rows of tasks at random, for the ``batch_sampler`` of a DataLoader.

    A task is ``n_way`` labels, and of each ``n_shot + n_query`` rows, all without replacement, label after label. They
    are drawn from Python's ``random`` when they are asked for: after ``random.seed`` they are the original's.

    Args:
        dataset: ``get_labels()`` gives the label of each row.
        n_way: labels of a task.
        n_shot: support rows of each label.
        n_query: query rows of each label.
        n_tasks: how many tasks there are; each run through the sampler draws others.

    Raises:
        TypeError: numbers that are no ints.
        ValueError: negative numbers; fewer labels than ``n_way``, a label with fewer rows than ``n_shot + n_query``.
    """

    def __init__(self, dataset: FewShotDataset, n_way: int, n_shot: int, n_query: int, n_tasks: int) -> None:
        super().__init__()
        numbers = {"n_way": n_way, "n_shot": n_shot, "n_query": n_query, "n_tasks": n_tasks}
        self.n_way, self.n_shot, self.n_query, self.n_tasks = (
            _whole(number, name) for name, number in numbers.items()
        )
        labels: Any = dataset.get_labels()
        labels = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        if any(isinstance(label, Tensor) for label in labels[:1]):
            # Tensors are told apart by their place in memory.
            labels = [int(label) for label in labels]
        self.items_per_label: dict[Any, list[int]] = {}
        for item, label in enumerate(labels):
            if label not in self.items_per_label:
                self.items_per_label[label] = []
            self.items_per_label[label].append(item)
        if self.n_way > len(self.items_per_label):
            raise ValueError(
                f"n_way: expected at most {len(self.items_per_label)}, the labels of the dataset, got {self.n_way}"
            )
        rows = self.n_shot + self.n_query
        for label, items in self.items_per_label.items():
            if len(items) < rows:
                raise ValueError(
                    f"dataset: expected at least n_shot + n_query = {rows} rows of each label, "
                    f"got {len(items)} of label {label!r}"
                )

    def __len__(self) -> int:
        return self.n_tasks

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.n_shot + self.n_query
        labels = sorted(self.items_per_label)
        for _ in range(self.n_tasks):
            yield sample_task(labels, self.items_per_label, self.n_way, rows)

    def episodic_collate_fn(
        self, input_data: Sequence[tuple[Tensor, Tensor | int]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
        """Make a task of its rows, for the ``collate_fn`` of a DataLoader.

        Args:
            input_data: images ``[...]`` of one shape with their labels, as this sampler orders them.

        Returns:
            ``(support [n_way * n_shot, ...], their labels, query [n_way * n_query, ...], their labels, classes)``. The
            labels are int64 numbers of places in ``classes``, the labels of the data set, which are in the order of
            a Python set of them.

        Raises:
            TypeError: an image that is no tensor, a label that is no integer.
            ValueError: a label that is a tensor of several; another number of rows than a task has.
        """
        of_class = self.n_shot + self.n_query
        if len(input_data) != self.n_way * of_class:
            raise ValueError(
                f"input_data: expected n_way * (n_shot + n_query) = {self.n_way * of_class} rows, "
                f"got {len(input_data)}"
            )
        if isinstance(input_data, Rows):
            parts = input_data.split(self.n_way, self.n_shot, self.n_query)
            if parts is not None:
                return parts
        pairs = self._cast_input_data_to_tensor_int_tuple(input_data)
        labels = [label for _, label in pairs]
        classes = list(set(labels))
        number = {label: k for k, label in enumerate(classes)}
        numbers = torch.tensor([number[label] for label in labels], dtype=torch.int64)
        places = torch.arange(len(labels)).reshape(self.n_way, of_class)
        support, query = places[:, : self.n_shot].flatten(), places[:, self.n_shot :].flatten()

        def images(rows: Tensor) -> Tensor:
            # None of them have a shape too.
            first = pairs[0][0].unsqueeze(0)
            return torch.stack([pairs[row][0] for row in rows.tolist()]) if len(rows) else first[:0]

        return images(support), numbers[support], images(query), numbers[query], classes

    @staticmethod
    def _cast_input_data_to_tensor_int_tuple(
        input_data: Sequence[tuple[Tensor, Tensor | int]],
    ) -> list[tuple[Tensor, int]]:
        pairs = []
        for image, label in input_data:
            if not isinstance(image, Tensor):
                raise TypeError(
                    f"image: expected a tensor, got {type(image).__name__}. {GENERIC_TYPING_ERROR_MESSAGE}"
                )
            pairs.append((image, label if type(label) is int else _as_int(label)))
        return pairs


def _whole(value: Any, name: str) -> int:
    try:
        whole = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    _check.count(whole, name)
    return whole


def _as_int(label: Any) -> int:
    if isinstance(label, Tensor):
        if label.dtype not in _INTEGERS:
            raise TypeError(
                f"label: expected an integer dtype, got {label.dtype}. {GENERIC_TYPING_ERROR_MESSAGE}"
            )
        if label.dim() != 0:
            raise ValueError(
                f"label: expected shape [], got {list(label.shape)}. {GENERIC_TYPING_ERROR_MESSAGE}"
            )
        return int(label)
    try:
        return operator.index(label)
    except TypeError:
        raise TypeError(
            f"label: expected an int, got {type(label).__name__}. {GENERIC_TYPING_ERROR_MESSAGE}"
        ) from None
