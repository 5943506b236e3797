"""Data sets of classes, and data sets of tasks."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import combinations
from typing import Any

import numpy as np

from metafast.compat import absent
from metafast.compat.torchmeta._chain import Transform, chained, is_compose, wrap_transform
from metafast.compat.torchmeta.transforms.categorical import Categorical, FixedCategory
from metafast.compat.torchmeta.transforms.target_transforms import DefaultTargetTransform
from metafast.compat.torchmeta.utils.data.task import ConcatTask

__getattr__ = absent(__name__)

__all__ = ["ClassDataset", "CombinationMetaDataset", "MetaDataset"]

_SPLITS = ("train", "val", "test")


class _OfSplit:
    """What has a meta-split: exactly one of ``meta_train``, ``meta_val`` and ``meta_test``, or else ``meta_split``."""

    def __init__(self, meta_train: bool, meta_val: bool, meta_test: bool, meta_split: str | None) -> None:
        flags = (meta_train, meta_val, meta_test)
        if sum(flags) > 1:
            raise ValueError(
                f"meta_train, meta_val, meta_test: expected one of them to be true, got {', '.join(map(str, flags))}"
            )
        if not sum(flags):
            if meta_split is None:
                raise ValueError(
                    "meta_split: expected a split, meta_train=True, meta_val=True or meta_test=True, or meta_split "
                    "train, val or test; got none"
                )
            if meta_split not in _SPLITS:
                raise ValueError(f"meta_split: expected train, val or test, got {meta_split!r}")
            flags = tuple(meta_split == split for split in _SPLITS)  # type: ignore[assignment]
        self.meta_train, self.meta_val, self.meta_test = map(bool, flags)
        self._meta_split: str = meta_split or _SPLITS[flags.index(True)]

    @property
    def meta_split(self) -> str:
        """``"train"``, ``"val"`` or ``"test"``."""
        return self._meta_split


class ClassDataset(_OfSplit):
    """Data sets of one class each, by number; to be derived from, with ``__getitem__`` and ``num_classes``.

    Args:
        meta_train, meta_val, meta_test: the split; one of them is true, or
        meta_split: ``"train"``, ``"val"`` or ``"test"``.
        class_augmentations: a list of augmentations such as ``Rotation([90, 180])``; each of their parts repeats all
            classes, changed by it, under the next numbers.

    Raises:
        ValueError: no split, or several.
        TypeError: augmentations that are no list.
    """

    def __init__(
        self,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        class_augmentations: list[Any] | None = None,
    ) -> None:
        super().__init__(meta_train, meta_val, meta_test, meta_split)
        if class_augmentations is not None and not isinstance(class_augmentations, list):
            raise TypeError(f"class_augmentations: expected a list, got {type(class_augmentations).__name__}")
        unique: dict[Any, None] = {}
        for augmentations in class_augmentations or ():
            for augmentation in augmentations:
                if augmentation in unique:
                    warnings.warn(
                        f"class_augmentations: {augmentation!r} is there already, and is taken once",
                        stacklevel=2,
                    )
                unique[augmentation] = None
        self.class_augmentations = list(unique)

    def get_class_augmentation(self, index: int) -> Any:
        """That of a class, or None."""
        number = index // self.num_classes - 1
        return None if number < 0 else self.class_augmentations[number]

    def get_transform(self, index: int, transform: Transform | None = None) -> Transform | None:
        """``transform`` after the augmentation of the class."""
        return chained(self.get_class_augmentation(index), transform)

    def get_target_transform(self, index: int) -> FixedCategory:
        """What puts the augmentation of the class beside a target."""
        return FixedCategory(self.get_class_augmentation(index))

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no __getitem__")

    @property
    def num_classes(self) -> int:
        """The classes that are not augmented."""
        raise NotImplementedError(f"{type(self).__name__} has no num_classes")

    def __len__(self) -> int:
        return self.num_classes * (len(self.class_augmentations) + 1)


class MetaDataset(_OfSplit):
    """A data set of tasks, by number; to be derived from, with ``__getitem__`` and ``__len__``.

    Args:
        meta_train, meta_val, meta_test: the split; one of them is true, or
        meta_split: ``"train"``, ``"val"`` or ``"test"``.
        target_transform: of targets.
        dataset_transform: of tasks, such as ``ClassSplitter(...)``.

    Raises:
        ValueError: no split, or several.
    """

    def __init__(
        self,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        target_transform: Transform | None = None,
        dataset_transform: Transform | None = None,
    ) -> None:
        super().__init__(meta_train, meta_val, meta_test, meta_split)
        self.target_transform = target_transform
        self.dataset_transform = dataset_transform
        self.seed()

    def seed(self, seed: int | None = None) -> None:
        """Begin the NumPy generator ``np_random`` anew, and that of the dataset transform."""
        self.np_random = np.random.RandomState(seed=seed)
        _seed(self.dataset_transform, seed)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def sample_task(self) -> Any:
        """A task, drawn by ``np_random``."""
        return self[self.np_random.randint(len(self))]

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no __getitem__")

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} has no __len__")


class CombinationMetaDataset(MetaDataset):
    """Tasks of any ``num_classes_per_task`` classes of a ``ClassDataset``, by the tuple of their numbers.

    Args:
        dataset: a ``ClassDataset``.
        num_classes_per_task: N of N-way.
        target_transform: of targets, which come as a pair of label and class augmentation; None numbers the
            augmentations. A ``Categorical`` in it begins anew with every task.
        dataset_transform: of tasks.

    Raises:
        TypeError: ``num_classes_per_task`` is no int.
    """

    def __init__(
        self,
        dataset: Any,
        num_classes_per_task: int,
        target_transform: Transform | None = None,
        dataset_transform: Transform | None = None,
    ) -> None:
        if not isinstance(num_classes_per_task, int):
            raise TypeError(
                f"num_classes_per_task: expected an int, got {type(num_classes_per_task).__name__}"
            )
        if num_classes_per_task < 1:
            raise ValueError(f"num_classes_per_task: expected at least 1, got {num_classes_per_task}")
        self.dataset = dataset
        self.num_classes_per_task = num_classes_per_task
        if target_transform is None:
            target_transform = DefaultTargetTransform(dataset.class_augmentations)
        super().__init__(
            meta_train=dataset.meta_train,
            meta_val=dataset.meta_val,
            meta_test=dataset.meta_test,
            meta_split=dataset.meta_split,
            target_transform=target_transform,
            dataset_transform=dataset_transform,
        )

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in combinations(range(len(self.dataset)), self.num_classes_per_task))

    def sample_task(self) -> Any:
        """A task of different classes, drawn by ``np_random``."""
        classes = self.np_random.choice(len(self.dataset), size=self.num_classes_per_task, replace=False)
        return self[tuple(classes.tolist())]

    def __getitem__(self, index: Sequence[int]) -> Any:
        """
        Raises:
            ValueError: another number of classes.
        """
        if isinstance(index, int) or len(index) != self.num_classes_per_task:
            example = ", ".join(map(str, range(self.num_classes_per_task)))
            raise ValueError(
                f"index: expected {self.num_classes_per_task} numbers of classes, such as [({example})], got {index!r}"
            )
        task = ConcatTask(
            [self.dataset[number] for number in index],
            self.num_classes_per_task,
            target_transform=wrap_transform(self.target_transform, self._of_task, Categorical),
        )
        return task if self.dataset_transform is None else self.dataset_transform(task)

    def _of_task(self, transform: Categorical) -> Categorical:
        """A copy that knows no targets."""
        transform.reset()
        if transform.num_classes is None:
            transform.num_classes = self.num_classes_per_task
        return deepcopy(transform)

    def __len__(self) -> int:
        """How many combinations there are, or the largest number that ``len`` can give."""
        length = math.comb(len(self.dataset), self.num_classes_per_task)
        if length > sys.maxsize:
            warnings.warn(
                f"there are {length:.3g} combinations of {self.num_classes_per_task} out of {len(self.dataset)} "
                f"classes; len gives {sys.maxsize}, the largest number that it can",
                stacklevel=2,
            )
        return min(length, sys.maxsize)


def _seed(transform: Any, seed: int | None) -> None:
    if is_compose(transform):
        for part in transform.transforms:
            _seed(part, seed)
    elif hasattr(transform, "seed"):
        transform.seed(seed=seed)
