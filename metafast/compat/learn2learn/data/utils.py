"""Small things around data sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from metafast import _check
from metafast.compat import absent
from metafast.data._decode import need_pillow

_NO_DOWNLOAD = "this package downloads nothing"
__getattr__ = absent(
    __name__,
    dict.fromkeys(
        (
            "download_file",
            "download_file_from_google_drive",
            "get_confirm_token",
            "save_response_content",
            "CHUNK_SIZE",
        ),
        _NO_DOWNLOAD,
    ),
)


class InfiniteIterator:
    """An iterator that begins again whenever ``dataloader`` is at its end.

    Raises:
        ValueError: in the call of ``next``, a ``dataloader`` without anything.
    """

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self.dataloader = dataloader
        self.iterator = iter(dataloader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self.iterator)
        except StopIteration:
            self.iterator = iter(self.dataloader)
        try:
            return next(self.iterator)
        except StopIteration:
            raise ValueError("dataloader: expected something in it, got nothing") from None


def partition_task(
    data: Tensor, labels: Tensor, shots: int = 1
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Part a task into the first rows of each class, its support set, and the others, its query set.

    Both come class after class, in ascending order of the labels.

    Args:
        data: ``[n, ...]``.
        labels: ``[n]``, as many of each.
        shots: support rows of each class.

    Returns:
        ``(support data, support labels), (query data, query labels)``.

    Raises:
        ValueError: numbers that do not fit.
    """
    _check.same_size(labels, 0, "labels", data, 0, "data")
    _check.count(shots, "shots")
    counts = labels.unique(return_counts=True)[1]
    each = int(counts[0]) if len(counts) else 0
    if bool((counts != each).any()):
        raise ValueError(f"labels: expected as many rows of each class, got {counts.tolist()}")
    if shots > each:
        raise ValueError(f"shots: expected at most {each}, the rows of each class, got {shots}")
    order = labels.argsort(stable=True).reshape(len(counts), each)
    parts = []
    for rows in (order[:, :shots].flatten(), order[:, shots:].flatten()):
        parts.append((data[rows.to(data.device)], labels[rows]))
    return parts[0], parts[1]


class LabelledImages(Dataset[Any]):
    """Images of files that are there already, as Pillow's, with their labels.

    Args:
        root: folder of the files; ``~`` is the user's.
        transform: called with each image.
        target_transform: called with each label.
        download: not used: nothing is downloaded, files that are not there are an error.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        download: bool = False,
    ) -> None:
        self.root = os.path.expanduser(root)
        self.transform = transform
        self.target_transform = target_transform
        self.labels: list[int] = []

    def image(self, i: int) -> Any:
        """An image without the transform."""
        raise NotImplementedError

    def pillow(self, pixels: Any) -> Any:
        """An image ``[H, W]`` or ``[H, W, 3]`` of NumPy as Pillow's.

        Raises:
            ImportError: Pillow is not installed.
        """
        need_pillow(type(self).__name__)
        from PIL import Image

        return Image.fromarray(pixels)

    def all_labels(self) -> list[Any]:
        """Those of all images, without the images."""
        return (
            self.labels if self.target_transform is None else [self.target_transform(y) for y in self.labels]
        )

    def __getitem__(self, i: int) -> Any:
        label = self.labels[i]
        image = self.image(i)
        return (
            image if self.transform is None else self.transform(image),
            label if self.target_transform is None else self.target_transform(label),
        )

    def __len__(self) -> int:
        return len(self.labels)


class OnDeviceDataset(TensorDataset):
    """A whole data set as two tensors.

    Args:
        dataset: of pairs of a tensor and a label; each is made once.
        device: where they are; None: where the data are. On the CPU of a machine with CUDA they are pinned.
        transform: called with the data of a sample whenever it is asked for.
    """

    def __init__(
        self,
        dataset: Any,
        device: torch.device | str | None = None,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        rows, numbers = [], []
        for i in range(len(dataset)):
            x, y = dataset[i]
            rows.append(x)
            numbers.append(y)
        data, labels = torch.stack(rows), torch.tensor(numbers)
        if device is not None:
            data, labels = data.to(device), labels.to(device)
        if data.device.type == "cpu" and torch.cuda.is_available():
            data, labels = data.pin_memory(), labels.pin_memory()
        super().__init__(data, labels)
        self.transform = transform
        if hasattr(dataset, "_bookkeeping_path"):
            self._bookkeeping_path = dataset._bookkeeping_path

    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        return (x if self.transform is None else self.transform(x)), y
