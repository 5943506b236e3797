"""Task transforms: from all samples of a data set to those of a task, and to its data.

Each is called with a list of ``DataDescription``, or None for all samples, and gives another list. What is random is
drawn from Python's ``random``, in the order of learn2learn 0.2.0.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch

from metafast import _check
from metafast.compat import absent
from metafast.compat._draws import sample, shuffle
from metafast.compat.learn2learn.data.meta_dataset import by_label
from metafast.compat.learn2learn.data.task_dataset import DataDescription, Draft, Groups, Load, Stage

__getattr__ = absent(__name__)


class TaskTransform:
    """What the transforms share.

    Args:
        dataset: a :class:`MetaDataset`.
    """

    _groups: tuple[Any, Groups] | None = None

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def new_task(self) -> list[DataDescription]:
        """A description of all samples."""
        return [DataDescription(i) for i in range(len(self.dataset))]

    def drafts(self, description: Any) -> bool:
        """Whether :meth:`draft` takes this: nothing yet, or a draft by the labels of the same data set."""
        own = description is None or (isinstance(description, Draft) and description.dataset is self.dataset)
        # A subclass with a call of its own has the last word.
        return own and type(self).__call__ in (TaskTransform.__call__, LoadData.__call__)

    def draft(self, draft: Draft | None) -> Draft:
        """The task after this transform; ``draft`` is changed."""
        if draft is None:
            labels = self.dataset.indices_to_labels
            if self._groups is None or self._groups[0] is not labels:
                self._groups = labels, _grouped(labels[i] for i in range(len(self.dataset)))
            draft = Draft(self.dataset, self._groups[1], interleaved=True)
        self.change(draft)
        return draft

    def change(self, draft: Draft) -> None:
        """Keep some of the rows, in another order, or add a stage."""
        raise NotImplementedError

    def __call__(self, task_description: list[DataDescription] | None) -> list[DataDescription]:
        if task_description is None:
            return self.draft(None).written()
        # The rows of this draft are places in the description.
        labels = self.dataset.indices_to_labels
        groups = _grouped(labels[description.index] for description in task_description)
        draft = Draft(self.dataset, groups, interleaved=True)
        self.change(draft)
        rows = draft.rows()
        kept = [task_description[row] for row in rows]
        if len(set(rows)) < len(rows):
            kept = [copy.deepcopy(description) for description in kept]
        draft.describe(kept)
        return kept


def _grouped(labels: Iterable[Any]) -> Groups:
    return list(by_label(enumerate(labels)).items())


class LoadData(TaskTransform):
    """Samples in place of their indices.

    Args:
        dataset: any data set of pairs.
    """

    def drafts(self, description: Any) -> bool:
        # It needs no labels, so that a data set that has none will do.
        return isinstance(description, Draft) and type(self).__call__ is LoadData.__call__

    def change(self, draft: Draft) -> None:
        draft.stages.append(Load(self.dataset))

    def __call__(self, task_description: list[DataDescription] | None) -> list[DataDescription]:
        if task_description is None:
            task_description = self.new_task()
        load = Load(self.dataset)
        for description in task_description:
            description.transforms.append(load)
        return task_description


class FilterLabels(TaskTransform):
    """Only samples of some labels.

    Args:
        dataset: a :class:`MetaDataset`.
        labels: those to keep.
    """

    def __init__(self, dataset: Any, labels: Sequence[Any]) -> None:
        super().__init__(dataset)
        self.labels = list(labels)
        self._kept = set(self.labels)

    def change(self, draft: Draft) -> None:
        draft.groups = [group for group in draft.groups if group[0] in self._kept]


class ConsecutiveLabels(TaskTransform):
    """Samples in ascending order of their labels in the data set; before or after :class:`RemapLabels` alike.

    Args:
        dataset: a :class:`MetaDataset`.
    """

    def change(self, draft: Draft) -> None:
        draft.groups = sorted(draft.groups, key=itemgetter(0))
        draft.interleaved = False


class _Remap(Stage):
    def __init__(self, labels: list[Any]) -> None:
        self.numbers = {label: k for k, label in enumerate(labels)}

    def __call__(self, data: Any) -> list[Any]:
        data = list(data)
        label = data[1].item() if hasattr(data[1], "item") else data[1]
        if label not in self.numbers:
            raise ValueError(f"dataset: expected one of the labels {list(self.numbers)}, got {label!r}")
        data[1] = self.numbers[label]
        return data

    def batch(self, data: list[Any], labels: Sequence[Any]) -> list[Any]:
        return [data[0], torch.tensor([self.numbers[label] for label in labels])]


class RemapLabels(TaskTransform):
    """Labels from 0 to the number of classes - 1.

    Args:
        dataset: a :class:`MetaDataset`.
        shuffle: number the classes at random.
    """

    def __init__(self, dataset: Any, shuffle: bool = True) -> None:
        super().__init__(dataset)
        self.shuffle = shuffle

    def change(self, draft: Draft) -> None:
        # The order of the set is that of the original, which is shuffled.
        labels = list({label for label, _ in draft.groups})
        if self.shuffle:
            shuffle(labels)
        draft.stages.append(_Remap(labels))


class NWays(TaskTransform):
    """Samples of some classes at random.

    Args:
        dataset: a :class:`MetaDataset`.
        n: how many classes.

    Raises:
        ValueError: in the call, more than there are.
    """

    def __init__(self, dataset: Any, n: int = 2) -> None:
        _check.count(n, "n")
        super().__init__(dataset)
        self.n = n

    def new_task(self) -> list[DataDescription]:
        return self.draft(None).written()

    def draft(self, draft: Draft | None) -> Draft:
        if draft is not None:
            return super().draft(draft)
        labels = _drawn(self.dataset.labels, self.n, "n", "labels")
        members = self.dataset.labels_to_indices
        return Draft(self.dataset, [(label, members[label]) for label in labels], interleaved=False)

    def change(self, draft: Draft) -> None:
        labels = _drawn(list({label for label, _ in draft.groups}), self.n, "n", "labels")
        draft.groups = [group for group in draft.groups if group[0] in labels]


class KShots(TaskTransform):
    """Some samples of each class at random.

    Args:
        dataset: a :class:`MetaDataset`.
        k: how many of each.
        replacement: whether a sample may come more than once.

    Raises:
        ValueError: in the call, more than a class has, without replacement.
    """

    def __init__(self, dataset: Any, k: int = 1, replacement: bool = False) -> None:
        _check.count(k, "k")
        super().__init__(dataset)
        self.k = k
        self.replacement = replacement

    def change(self, draft: Draft) -> None:
        draft.groups = [
            (
                label,
                random.choices(members, k=self.k)
                if self.replacement
                else _drawn(members, self.k, "k", f"samples of the class {label!r}"),
            )
            for label, members in draft.groups
        ]
        draft.interleaved = False


class FusedNWaysKShots(TaskTransform):
    """Some samples of some classes at random, as :class:`FilterLabels`, :class:`NWays` and :class:`KShots` in a row.

    Args:
        dataset: a :class:`MetaDataset`.
        n: how many classes.
        k: how many of each.
        replacement: whether a sample may come more than once.
        filter_labels: the classes to draw from; None: all.

    Raises:
        ValueError: in the call, more than there are.
    """

    def __init__(
        self,
        dataset: Any,
        n: int = 2,
        k: int = 1,
        replacement: bool = False,
        filter_labels: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(dataset)
        self.n = n
        self.k = k
        self.replacement = replacement
        self.filter_labels = list(dataset.labels if filter_labels is None else filter_labels)
        self.filter = FilterLabels(dataset, self.filter_labels)
        self.nways = NWays(dataset, n)
        self.kshots = KShots(dataset, k, replacement)

    def new_task(self) -> list[DataDescription]:
        return self.draft(None).written()

    def draft(self, draft: Draft | None) -> Draft:
        if draft is not None:
            return super().draft(draft)
        groups: Groups = []
        for label in _drawn(self.filter_labels, self.n, "n", "labels"):
            members = self.dataset.labels_to_indices.get(label, ())
            if self.replacement:
                drawn = [random.choice(members) for _ in range(self.k)]
            else:
                drawn = _drawn(members, self.k, "k", f"samples of the class {label!r}")
            groups.append((label, drawn))
        return Draft(self.dataset, groups, interleaved=False)

    def change(self, draft: Draft) -> None:
        for transform in (self.filter, self.nways, self.kshots):
            transform.change(draft)


def _drawn(population: Sequence[Any], k: int, name: str, what: str) -> list[Any]:
    if k > len(population):
        raise ValueError(f"{name}: expected at most {len(population)}, the number of {what}, got {k}")
    return sample(population, k)
