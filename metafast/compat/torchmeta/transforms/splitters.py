"""Transforms of a task into parts of it, such as a support and a query set."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from metafast import _check
from metafast.compat import _draws, absent
from metafast.compat.torchmeta import _numbers
from metafast.compat.torchmeta.transforms.utils import apply_wrapper
from metafast.compat.torchmeta.utils.data.task import ConcatTask, SubsetTask, Task

__getattr__ = absent(__name__)

__all__ = ["ClassSplitter", "Splitter", "WeightedClassSplitter"]


class Splitter:
    """A dictionary of parts of a task, to be derived from.

    Args:
        splits: the names of the parts, and what each takes.
        random_state_seed: of the NumPy generator ``np_random``.
    """

    def __init__(self, splits: Mapping[str, Any], random_state_seed: int) -> None:
        self.splits = splits
        self.random_state_seed = random_state_seed
        self.seed(random_state_seed)

    def seed(self, seed: int | None) -> None:
        """Begin ``np_random`` anew."""
        self.np_random = np.random.RandomState(seed=seed)

    def get_indices(self, task: Task) -> Mapping[str, Sequence[int]]:
        """The rows of each part.

        Raises:
            ValueError: something that is no task.
        """
        if isinstance(task, ConcatTask):
            return self.get_indices_concattask(task)
        if isinstance(task, Task):
            return self.get_indices_task(task)
        raise ValueError(f"task: expected a Task or a ConcatTask, got {type(task).__name__}")

    def get_indices_task(self, task: Task) -> Mapping[str, Sequence[int]]:
        """Of a task whose classes are known by its targets."""
        raise NotImplementedError(f"{type(self).__name__} has no get_indices_task")

    def get_indices_concattask(self, task: ConcatTask) -> Mapping[str, Sequence[int]]:
        """Of a task made of one data set for each class."""
        raise NotImplementedError(f"{type(self).__name__} has no get_indices_concattask")

    def _get_class_indices(self, task: Task) -> Mapping[Any, Sequence[int]]:
        """The rows of each target, in the order that they come in; all rows of a regression task."""
        if task.num_classes is None:
            return {"regression": range(len(task))}  # type: ignore[arg-type]
        found = defaultdict(list)
        for row in range(len(task)):  # type: ignore[arg-type]
            sample = task[row]
            if not isinstance(sample, tuple) or len(sample) < 2:
                raise ValueError(
                    f"task: expected samples that are tuples with their target last, got {sample!r}"
                )
            found[sample[-1]].append(row)
        if len(found) != task.num_classes:
            raise ValueError(
                f"task: expected {task.num_classes} different targets, as its num_classes says, got {len(found)}"
            )
        return found

    def __call__(self, task: Task) -> OrderedDict[str, SubsetTask]:
        indices = self.get_indices(task)
        return OrderedDict((split, SubsetTask(task, indices[split])) for split in self.splits)

    def __len__(self) -> int:
        return len(self.splits)


class PerClass(Splitter):
    """A part of the rows of each class for every split.

    With ``shuffle`` a generator that is seeded with the task, the class and ``random_state_seed`` orders the rows
    before they are parted, so that the parts of a task are always the same; ``np_random`` orders those of each part.
    """

    def __init__(self, shuffle: bool, splits: Mapping[str, Any], least: int, random_state_seed: int) -> None:
        self.shuffle = shuffle
        self._min_samples_per_class = least
        super().__init__(splits, random_state_seed)

    def _count(self, split: str, rows: int) -> int:
        """How many of the rows of a class go to a split."""
        raise NotImplementedError

    def _rows(self, sizes: Mapping[Any, int]) -> Sequence[int]:
        """How many rows of each class are parted.

        Raises:
            ValueError: a class with too few.
        """
        for name, size in sizes.items():
            if size < self._min_samples_per_class:
                raise ValueError(
                    f"task: expected at least {self._min_samples_per_class} samples of each class, got {size} of "
                    f"class {name!r}"
                )
        return list(sizes.values())

    def _parted(
        self, sizes: Sequence[int], counts: Sequence[int], keys: Sequence[int]
    ) -> OrderedDict[str, list[int]]:
        """For each split the numbers of its rows, where those of a class follow the ``sizes`` of the ones before."""
        first = [0, *accumulate(sizes)][:-1]
        wanted = [[self._count(split, rows) for rows in counts] for split in self.splits]
        if self.shuffle:
            seeds = [(key + self.random_state_seed) % 2**32 for key in keys]
            parts = _draws.split_orders(self.np_random, seeds, list(counts), first, wanted)
            return OrderedDict(zip(self.splits, parts, strict=True))
        found: OrderedDict[str, list[int]] = OrderedDict()
        begin = [0] * len(first)
        for split, taken in zip(self.splits, wanted, strict=True):
            end = [min(b + t, rows) for b, t, rows in zip(begin, taken, counts, strict=True)]
            found[split] = [f + row for f, b, e in zip(first, begin, end, strict=True) for row in range(b, e)]
            begin = end
        return found

    def get_indices_task(self, task: Task) -> OrderedDict[str, list[int]]:
        classes = self._get_class_indices(task)
        sizes = {name: len(members) for name, members in classes.items()}
        key = hash(task)
        found = self._parted(list(sizes.values()), self._rows(sizes), [key + k for k in range(len(sizes))])
        if list(classes.values()) == [range(sum(sizes.values()))]:
            return found
        rows = [row for members in classes.values() for row in members]
        return OrderedDict((split, [rows[k] for k in taken]) for split, taken in found.items())

    def get_indices_concattask(self, task: ConcatTask) -> OrderedDict[str, list[int]]:
        sizes = [len(dataset) for dataset in task.datasets]  # type: ignore[arg-type]
        key = hash(task)
        keys = [key + hash(dataset) for dataset in task.datasets]
        return self._parted(sizes, self._rows(dict(enumerate(sizes))), keys)


class ClassSplitter_(PerClass):
    """The class behind :func:`ClassSplitter`, with its arguments."""

    def __init__(
        self,
        shuffle: bool = True,
        num_samples_per_class: Mapping[str, int] | None = None,
        num_train_per_class: int | None = None,
        num_test_per_class: int | None = None,
        num_support_per_class: int | None = None,
        num_query_per_class: int | None = None,
        random_state_seed: int = 0,
    ) -> None:
        splits = _named(
            "num_samples_per_class",
            num_samples_per_class,
            (num_train_per_class, num_support_per_class),
            (num_test_per_class, num_query_per_class),
        )
        for split, count in splits.items():
            _numbers.count(count, f"num_samples_per_class[{split!r}]")
        super().__init__(shuffle, splits, sum(splits.values()), random_state_seed)

    def _count(self, split: str, rows: int) -> int:
        return self.splits[split]


class WeightedClassSplitter_(PerClass):
    """The class behind :func:`WeightedClassSplitter`, with its arguments."""

    def __init__(
        self,
        shuffle: bool = True,
        min_num_samples: int | Mapping[str, int] | None = 1,
        max_num_samples: int | Mapping[str, int] | None = None,
        weights: Mapping[str, float] | None = None,
        train_weights: float | None = None,
        test_weights: float | None = None,
        support_weights: float | None = None,
        query_weights: float | None = None,
        force_equal_per_class: bool = False,
        random_state_seed: int = 0,
    ) -> None:
        splits = _named("weights", weights, (train_weights, support_weights), (test_weights, query_weights))
        for split, weight in splits.items():
            _check.number(_numbers.plain(weight), f"weights[{split!r}]")
        if not (min(splits.values()) >= 0 and sum(splits.values()) <= 1):
            raise ValueError(f"weights: expected shares of 0 or more, together at most 1, got {dict(splits)}")
        self.force_equal_per_class = force_equal_per_class
        least = _limits("min_num_samples", 0 if min_num_samples is None else min_num_samples, splits)
        self.min_num_samples = least
        self.max_num_samples = (
            None if max_num_samples is None else _limits("max_num_samples", max_num_samples, splits)
        )
        super().__init__(shuffle, splits, sum(least.values()), random_state_seed)

    def _count(self, split: str, rows: int) -> int:
        count = max(self.min_num_samples[split], int(self.splits[split] * rows))
        return count if self.max_num_samples is None else min(self.max_num_samples[split], count)

    def _rows(self, sizes: Mapping[Any, int]) -> Sequence[int]:
        counts = super()._rows(sizes)
        return [min(counts)] * len(counts) if self.force_equal_per_class else counts


def _named(
    argument: str,
    given: Mapping[str, Any] | None,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
) -> OrderedDict[str, Any]:
    """What each split takes: those given, or train or support, and test or query."""
    if given is None:
        pairs = (("train", "support"), train), (("test", "query"), test)
        given = OrderedDict(
            next((name, value) for name, value in zip(names, values, strict=True) if value is not None)
            for names, values in pairs
            if any(value is not None for value in values)
        )
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}: expected a dictionary of splits, got {type(given).__name__}")
    if not given:
        raise ValueError(
            f"{argument}: expected one or more splits, or an argument for train or test, got none"
        )
    return OrderedDict(given)


def _limits(argument: str, given: Any, splits: Mapping[str, Any]) -> OrderedDict[str, int]:
    """A number for each split."""
    limits = OrderedDict(given if isinstance(given, Mapping) else dict.fromkeys(splits, given))
    if limits.keys() != splits.keys():
        raise ValueError(f"{argument}: expected the keys {', '.join(splits)}, got {', '.join(limits)}")
    for split, value in limits.items():
        _numbers.count(value, f"{argument}[{split!r}]")
    return limits


def ClassSplitter(task: Any = None, *args: Any, **kwargs: Any) -> Any:
    """So many samples of each class for every split.

    Args:
        task: None for the splitter; a task, to split it; or a meta-dataset, to split each of its tasks.
        shuffle: draw the samples at random; else they are taken in their order.
        num_samples_per_class: a number for the name of each split, in place of the next four.
        num_train_per_class, num_test_per_class: of the splits ``train`` and ``test``.
        num_support_per_class, num_query_per_class: of ``support`` and ``query``, without ``train`` and ``test``.
        random_state_seed: of the random draws.

    Raises:
        ValueError: no splits; in a call, a class with too few samples, or too few or too many classes.
        TypeError: numbers of another type.
    """
    return apply_wrapper(ClassSplitter_(*args, **kwargs), task)


def WeightedClassSplitter(task: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A share of the samples of each class for every split.

    Args:
        task: None for the splitter; a task, to split it; or a meta-dataset, to split each of its tasks.
        shuffle: draw the samples at random; else they are taken in their order.
        min_num_samples: of a class in a split, a number or one for each name.
        max_num_samples: the same; None for no limit.
        weights: a share for the name of each split, together at most 1, in place of the next four.
        train_weights, test_weights: of the splits ``train`` and ``test``.
        support_weights, query_weights: of ``support`` and ``query``, where there is no ``train`` or ``test``.
        force_equal_per_class: take as many of each class, a share of the smallest one.
        random_state_seed: of the random draws.

    Raises:
        ValueError: no splits, shares or limits that do not fit; in a call, a class with too few samples, or too few or
            too many classes.
        TypeError: numbers of another type.
    """
    return apply_wrapper(WeightedClassSplitter_(*args, **kwargs), task)
