"""The usual benchmarks in one call, over files that are there already."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, KeysView
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from metafast.compat import absent
from metafast.compat.learn2learn.data.meta_dataset import FilteredMetaDataset, MetaDataset
from metafast.compat.learn2learn.data.task_dataset import Taskset
from metafast.compat.learn2learn.data.transforms import (
    ConsecutiveLabels,
    FusedNWaysKShots,
    KShots,
    LoadData,
    NWays,
    RemapLabels,
)
from metafast.compat.learn2learn.vision.datasets import CIFARFS, FC100, FullOmniglot, MiniImagenet
from metafast.compat.learn2learn.vision.transforms import RandomClassRotation

__getattr__ = absent(__name__)

_MODES = ("train", "validation", "test")
#: Classes that train, and those that train or validate, of Omniglot's 1,623.
_TRAIN, _TRAINVAL = 1100, 1200


class BenchmarkTasksets(NamedTuple):
    """The three task sets of a benchmark."""

    train: Taskset
    validation: Taskset
    test: Taskset


def list_tasksets() -> KeysView[str]:
    """The names that :func:`get_tasksets` knows."""
    return _TASKSETS.keys()


def get_tasksets(
    name: str,
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    num_tasks: int = -1,
    root: str | os.PathLike[str] = "~/data",
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> BenchmarkTasksets:
    """Task sets of a benchmark, whose images are in memory as tensors.

    Args:
        name: one of :func:`list_tasksets`.
        train_ways: classes of a training task.
        train_samples: images of each, for support and query together.
        test_ways: classes of the other tasks.
        test_samples: images of each.
        num_tasks: of each task set; -1: without end.
        root: folder of the files, see :mod:`..datasets`.
        device: where the images are; None: the CPU.
        kwargs: ``data_augmentation`` of mini-ImageNet: None, numbers from 0 to 255, or ``"normalize"``, from 0 to 1.

    Raises:
        ValueError: an unknown name or option.
        FileNotFoundError: files that are not there.
    """
    if name not in _TASKSETS:
        raise ValueError(f"name: expected one of {', '.join(_TASKSETS)}, got {name!r}")
    augmentation = kwargs.pop("data_augmentation", None)
    if kwargs:
        raise ValueError(f"kwargs: expected data_augmentation or nothing, got {', '.join(kwargs)}")
    if augmentation is not None and (name, augmentation) != ("mini-imagenet", "normalize"):
        raise ValueError(
            f"data_augmentation: expected None, or 'normalize' of mini-imagenet, got {augmentation!r} of {name}; "
            "for others give the data set of learn2learn.vision.datasets a transform of your own"
        )
    ways, samples = (train_ways, test_ways, test_ways), (train_samples, test_samples, test_samples)
    sets, chain = _TASKSETS[name](root, device, augmentation)
    return BenchmarkTasksets(
        *(
            Taskset(data, chain(data, mode, n, k), num_tasks=num_tasks)
            for data, mode, n, k in zip(sets, _MODES, ways, samples, strict=True)
        )
    )


def _omniglot(root: Any, device: Any, augmentation: Any) -> Any:
    images, labels = _omniglot_tensors(os.path.expanduser(root))
    data = MetaDataset(TensorDataset(images.to(device or "cpu"), labels))
    classes = list(range(len(data.labels)))
    random.shuffle(classes)
    parts = (classes[:_TRAIN], classes[_TRAIN:_TRAINVAL], classes[_TRAINVAL:])
    return [FilteredMetaDataset(data, part) for part in parts], _omniglot_chain


def _omniglot_tensors(root: str) -> tuple[Tensor, Tensor]:
    data = FullOmniglot(root)
    # Ink is 1; in float32 as torchvision's ToTensor computes.
    return 1.0 - data.resized(28).float() / 255, torch.tensor(data.labels)


def _omniglot_chain(data: MetaDataset, mode: str, ways: int, samples: int) -> list[Any]:
    return [
        FusedNWaysKShots(data, n=ways, k=samples),
        LoadData(data),
        RemapLabels(data),
        ConsecutiveLabels(data),
        RandomClassRotation(data, [0.0, 90.0, 180.0, 270.0]),
    ]


def _chain(data: MetaDataset, mode: str, ways: int, samples: int) -> list[Any]:
    numbered = [RemapLabels(data), ConsecutiveLabels(data)]
    drawn = [NWays(data, ways), KShots(data, samples), LoadData(data)]
    return [*drawn, *(reversed(numbered) if mode == "validation" else numbered)]


def _images(make: Callable[..., Any], tensor: Callable[[Any], Tensor]) -> Callable[..., Any]:
    def tasksets(root: Any, device: Any, augmentation: Any) -> Any:
        sets = []
        for mode in _MODES:
            data = make(root, mode=mode)
            images = tensor(data) / (255 if augmentation == "normalize" else 1)
            sets.append(MetaDataset(TensorDataset(images.to(device or "cpu"), torch.tensor(data.labels))))
        return sets, _chain

    return tasksets


_TASKSETS: dict[str, Callable[..., Any]] = {
    "omniglot": _omniglot,
    "mini-imagenet": _images(MiniImagenet, lambda data: data.x),
    "fc100": _images(FC100, lambda data: torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255),
    "cifarfs": _images(CIFARFS, lambda data: data.images.float() / 255),
}

__all__ = ["BenchmarkTasksets", "get_tasksets", "list_tasksets"]
