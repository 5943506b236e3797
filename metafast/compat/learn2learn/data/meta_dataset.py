"""Data sets that know the samples of each label."""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from metafast.compat import absent
from metafast.compat.learn2learn.data.utils import LabelledImages, OnDeviceDataset
from metafast.data._pickle import load_plain_pickle
from metafast.training.files import write_atomically

__getattr__ = absent(__name__)

Indices = dict[Any, list[int]]
Labels = dict[int, Any]


def tensors_of(dataset: Any) -> tuple[Tensor, Tensor] | None:
    """Data and labels of a data set whose samples are rows of these two tensors as they are."""
    plain = type(dataset) is TensorDataset or (type(dataset) is OnDeviceDataset and dataset.transform is None)
    if plain and len(dataset.tensors) == 2 and dataset.tensors[1].dim() == 1:
        return dataset.tensors
    return None


def batch_of(dataset: Any, rows: Sequence[int]) -> list[Any] | None:
    """``[x, y]`` of all these samples at once; None where they have to be made one by one."""
    if isinstance(dataset, MetaDataset):
        return dataset._batch(rows)
    tensors = tensors_of(dataset)
    return None if tensors is None else _rows_of(tensors, rows)


def _rows_of(tensors: tuple[Tensor, Tensor], rows: Sequence[int]) -> list[Any]:
    index = torch.tensor(rows, dtype=torch.int64)
    return [tensor.index_select(0, index.to(tensor.device)) for tensor in tensors]


class MetaDataset(Dataset[Any]):
    """A data set with the samples of each label.

    Where the data set has an attribute ``_bookkeeping_path``, they are read from that file, or written to it if there
    is none.

    Args:
        dataset: of pairs of data and label.
        labels_to_indices: the samples of each label; None: read from the data set, of which every sample is made once.
        indices_to_labels: the label of each sample, in place of it.

    Attributes:
        labels: in the order of their first samples.
        labels_to_indices: the samples of each label.
        indices_to_labels: the label of each sample.

    Raises:
        TypeError: ``dataset`` is no torch Dataset.
        ValueError: labels that are no single values; a damaged bookkeeping file.
    """

    labels: list[Any]
    labels_to_indices: Indices
    indices_to_labels: Labels
    #: Those of the tensors that whole tasks may be taken from.
    _labels: Tensor | None = None

    def __init__(
        self,
        dataset: Any,
        labels_to_indices: Mapping[Any, Sequence[int]] | None = None,
        indices_to_labels: Mapping[int, Any] | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset: expected a torch.utils.data.Dataset, got {type(dataset).__name__}")
        self.dataset: Any = dataset
        if hasattr(dataset, "_bookkeeping_path"):
            self.load_bookkeeping(dataset._bookkeeping_path)
        else:
            self.create_bookkeeping(labels_to_indices, indices_to_labels)

    def __getitem__(self, item: int) -> Any:
        return self.dataset[item]

    def __len__(self) -> int:
        return len(self.dataset)

    def create_bookkeeping(
        self,
        labels_to_indices: Mapping[Any, Sequence[int]] | None = None,
        indices_to_labels: Mapping[int, Any] | None = None,
    ) -> None:
        """Find the samples of each label, or take those given."""
        if labels_to_indices is not None:
            found: Any = {i: label for label, members in labels_to_indices.items() for i in members}
            self._keep(labels_to_indices, found)
        elif indices_to_labels is not None:
            self._keep(by_label(indices_to_labels.items()), indices_to_labels)
        else:
            tensors = tensors_of(self.dataset)
            if tensors is not None:
                labels = tensors[1].tolist()
            elif isinstance(self.dataset, LabelledImages):
                labels = self.dataset.all_labels()
            else:
                labels = [_single(self.dataset[i][1]) for i in range(len(self.dataset))]
            self._keep(by_label(enumerate(labels)), dict(enumerate(labels)))

    def _keep(self, labels_to_indices: Any, indices_to_labels: Any) -> None:
        self.labels_to_indices = labels_to_indices
        self.indices_to_labels = indices_to_labels
        self.labels = list(labels_to_indices)
        tensors = tensors_of(self.dataset)
        # Whole tasks are taken from the tensors where these have the labels of the bookkeeping.
        agree = tensors is not None and dict(enumerate(tensors[1].tolist())) == indices_to_labels
        self._labels = tensors[1] if tensors is not None and agree else None

    def load_bookkeeping(self, path: str | os.PathLike[str]) -> None:
        """Read the samples of each label from a file, or write them to it if there is none."""
        if not Path(path).exists():
            self.create_bookkeeping()
            self.serialize_bookkeeping(path)
            return
        with Path(path).open("rb") as file:
            kept = load_plain_pickle(file, str(path))
        missing = {"labels_to_indices", "indices_to_labels", "labels"}.difference(kept)
        if missing:
            raise ValueError(f"{path} must hold {', '.join(sorted(missing))}")
        self._keep(kept["labels_to_indices"], kept["indices_to_labels"])
        self.labels = kept["labels"]

    def serialize_bookkeeping(self, path: str | os.PathLike[str]) -> None:
        """Write the samples of each label to a file."""
        kept = {name: getattr(self, name) for name in ("labels_to_indices", "indices_to_labels", "labels")}
        write_atomically(Path(path), pickle.dumps(kept, protocol=pickle.HIGHEST_PROTOCOL))

    def _batch(self, rows: Sequence[int]) -> list[Any] | None:
        # The data set may have been given a transform or other tensors since.
        tensors = tensors_of(self.dataset)
        if tensors is None or tensors[1] is not self._labels:
            return None
        return _rows_of(tensors, rows) if type(self).__getitem__ is MetaDataset.__getitem__ else None


def _single(label: Any) -> Any:
    try:
        return label.item() if hasattr(label, "item") else label
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"dataset: expected one label for each sample, got {label!r}") from error


def by_label(pairs: Iterable[tuple[int, Any]]) -> Indices:
    """The samples of each label, of pairs of a sample and its label."""
    found: Indices = defaultdict(list)
    for i, label in pairs:
        found[label].append(i)
    return dict(found)


class UnionMetaDataset(MetaDataset):
    """Several data sets as one, whose labels are numbered anew: those of the first from 0, then those of the second.

    Args:
        datasets: data sets, each put into :class:`MetaDataset` if it is none.
    """

    def __init__(self, datasets: Sequence[Any]) -> None:
        self.datasets = [d if isinstance(d, MetaDataset) else MetaDataset(d) for d in datasets]
        self.indices_to_labels = {}
        self._places: list[tuple[MetaDataset, int]] = []
        before = 0
        for dataset in self.datasets:
            offset = len(self._places)
            numbers = {label: before + k for k, label in enumerate(dataset.labels)}
            for i, label in dataset.indices_to_labels.items():
                self.indices_to_labels[offset + i] = numbers[label]
            self._places += [(dataset, i) for i in range(len(dataset))]
            before += len(dataset.labels)
        self.labels_to_indices = by_label(self.indices_to_labels.items())
        self.labels = list(self.labels_to_indices)

    def __getitem__(self, item: int) -> Any:
        dataset, i = self._places[item]
        data = list(dataset[i])
        data[1] = self.indices_to_labels[item % len(self._places)]
        return data

    def __len__(self) -> int:
        return len(self._places)

    def _batch(self, rows: Sequence[int]) -> list[Any] | None:
        return None


class FilteredMetaDataset(MetaDataset):
    """The samples of some labels of a data set; the labels stay as they are.

    Args:
        dataset: the data set, put into :class:`MetaDataset` if it is none.
        labels: those to keep; what the data set has not is left out.
    """

    def __init__(self, dataset: Any, labels: Iterable[Any]) -> None:
        self.dataset = dataset if isinstance(dataset, MetaDataset) else MetaDataset(dataset)
        self.to_true_indices: list[int] = []
        self.labels_to_indices = {}
        for label in labels:
            members = self.dataset.labels_to_indices.get(label, ())
            if members:
                begin = len(self.to_true_indices)
                self.to_true_indices += members
                known = self.labels_to_indices.setdefault(label, [])
                known += range(begin, len(self.to_true_indices))
        self.indices_to_labels = {
            i: label for label, members in self.labels_to_indices.items() for i in members
        }
        self.labels = list(self.labels_to_indices)

    def __getitem__(self, item: int) -> Any:
        return self.dataset[self.to_true_indices[item]]

    def __len__(self) -> int:
        return len(self.to_true_indices)

    def _batch(self, rows: Sequence[int]) -> list[Any] | None:
        if type(self).__getitem__ is not FilteredMetaDataset.__getitem__:
            return None
        return batch_of(self.dataset, [self.to_true_indices[row] for row in rows])
