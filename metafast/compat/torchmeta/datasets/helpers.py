"""Data sets with their usual transforms and splits in one call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from metafast.compat import absent
from metafast.compat.torchmeta._chain import Compose
from metafast.compat.torchmeta._images import CenterCrop, Resize, ToTensor
from metafast.compat.torchmeta.datasets.cifar100 import CIFARFS, FC100
from metafast.compat.torchmeta.datasets.cub import CUB
from metafast.compat.torchmeta.datasets.doublemnist import DoubleMNIST
from metafast.compat.torchmeta.datasets.miniimagenet import MiniImagenet
from metafast.compat.torchmeta.datasets.omniglot import Omniglot
from metafast.compat.torchmeta.datasets.pascal5i import Pascal5i
from metafast.compat.torchmeta.datasets.triplemnist import TripleMNIST
from metafast.compat.torchmeta.transforms import (
    Categorical,
    ClassSplitter,
    Rotation,
    SegmentationPairTransform,
)

TIERED = "its 12 GB of pickles would have to be loaded whole; see metafast.data.image_folder"
__getattr__ = absent(__name__, {"tieredimagenet": TIERED})

__all__ = ["cifar_fs", "cub", "doublemnist", "fc100", "miniimagenet", "omniglot", "pascal5i", "triplemnist"]

Root = str | os.PathLike[str]


def helper_with_default(
    klass: Any,
    folder: Root,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    defaults: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """A meta-dataset whose tasks have ``train`` and ``test`` samples of each class.

    Args:
        klass: the class of the meta-dataset.
        folder: its ``root``.
        shots: ``train`` samples of each class.
        ways: classes of a task.
        shuffle: draw the samples at random.
        test_shots: ``test`` samples of each class; None: as many.
        seed: of ``np_random``.
        defaults: of transform, target_transform and class_augmentations, in place of ``ToTensor()``,
            ``Categorical(ways)`` and none.
        kwargs: of ``klass``; ``num_classes_per_task`` replaces ``ways``, with a warning.
    """
    if "num_classes_per_task" in kwargs:
        warnings.warn("ways: num_classes_per_task is given too, and replaces it", stacklevel=3)
        ways = kwargs.pop("num_classes_per_task")
    chosen = {
        "transform": ToTensor(),
        "target_transform": Categorical(ways),
        "class_augmentations": None,
        **(defaults or {}),
        **kwargs,
    }
    dataset = ClassSplitter(
        klass(folder, num_classes_per_task=ways, **chosen),
        shuffle=shuffle,
        num_train_per_class=shots,
        num_test_per_class=shots if test_shots is None else test_shots,
    )
    dataset.seed(seed)
    return dataset


def omniglot(
    folder: Root,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Tasks of :class:`Omniglot`, images 28 x 28, their three quarter turns as classes; arguments as above."""
    defaults = {
        "transform": Compose([Resize(28), ToTensor()]),
        "class_augmentations": [Rotation([90, 180, 270])],
    }
    return helper_with_default(Omniglot, folder, shots, ways, shuffle, test_shots, seed, defaults, **kwargs)


def miniimagenet(
    folder: Root,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Tasks of :class:`MiniImagenet`, images 84 x 84; arguments as above."""
    defaults = {"transform": Compose([Resize(84), ToTensor()])}
    return helper_with_default(
        MiniImagenet, folder, shots, ways, shuffle, test_shots, seed, defaults, **kwargs
    )


def cifar_fs(
    folder: Root,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Tasks of :class:`CIFARFS`, images 32 x 32; arguments as above."""
    return helper_with_default(CIFARFS, folder, shots, ways, shuffle, test_shots, seed, **kwargs)


def fc100(
    folder: Root,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Tasks of :class:`FC100`, images 32 x 32; arguments as above."""
    return helper_with_default(FC100, folder, shots, ways, shuffle, test_shots, seed, **kwargs)


def cub(
    folder: Root,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Tasks of :class:`CUB`, images the middle 84 x 84 of a shorter side of 126; arguments as above."""
    defaults = {"transform": Compose([Resize(126), CenterCrop(84), ToTensor()])}
    return helper_with_default(CUB, folder, shots, ways, shuffle, test_shots, seed, defaults, **kwargs)


def doublemnist(
    folder: Root,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Tasks of :class:`DoubleMNIST`, images 64 x 64; arguments as above."""
    return helper_with_default(DoubleMNIST, folder, shots, ways, shuffle, test_shots, seed, **kwargs)


def triplemnist(
    folder: Root,
    shots: int,
    ways: int,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Tasks of :class:`TripleMNIST`, images 84 x 84; arguments as above."""
    return helper_with_default(TripleMNIST, folder, shots, ways, shuffle, test_shots, seed, **kwargs)


def pascal5i(
    folder: Root,
    shots: int,
    ways: int = 1,
    shuffle: bool = True,
    test_shots: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Tasks of :class:`Pascal5i`, images and masks 500 x 500; arguments as above."""
    defaults = {"transform": SegmentationPairTransform(500), "class_augmentations": []}
    return helper_with_default(Pascal5i, folder, shots, ways, shuffle, test_shots, seed, defaults, **kwargs)
