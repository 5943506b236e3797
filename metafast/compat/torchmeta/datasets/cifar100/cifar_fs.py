"""CIFAR-FS."""

from __future__ import annotations

from metafast.compat import absent
from metafast.compat.torchmeta.datasets._classes import Combinations
from metafast.compat.torchmeta.datasets.cifar100.base import CIFAR100ClassDataset
from metafast.data import cifar_fs

__getattr__ = absent(__name__)


class CIFARFSClassDataset(CIFAR100ClassDataset):
    """The classes of a split, see :class:`CIFARFS`."""

    read = cifar_fs


class CIFARFS(Combinations):
    """Tasks of CIFAR-FS (Bertinetto et al., 2019): 64, 16 and 20 classes of CIFAR-100, from its own archive.

    Images are Pillow's, 32 x 32 and coloured; targets are ``((superclass, class), augmentation)``.

    Args:
        root: folder that holds the folder ``cifar100`` with ``cifar-100-python.tar.gz`` or what is in it.
        num_classes_per_task: N of N-way.
        meta_train, meta_val, meta_test: the split; one of them is true, or
        meta_split: ``"train"``, ``"val"`` or ``"test"``.
        transform: of Pillow's images.
        target_transform: of targets.
        dataset_transform: of tasks, such as ``ClassSplitter(...)``.
        class_augmentations: such as ``[Rotation([90, 180, 270])]``.
        download: accepted; nothing is downloaded.

    Raises:
        TypeError: no ``num_classes_per_task``.
        ValueError: no split or several; damaged files.
        RuntimeError: files that are not there.
    """

    classes = CIFARFSClassDataset
