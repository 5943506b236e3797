"""PASCAL-5i: segmentation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metafast.compat import absent
from metafast.compat.torchmeta._chain import Transform
from metafast.compat.torchmeta._images import Images, opened
from metafast.compat.torchmeta.datasets._classes import Files, LocalClassDataset
from metafast.compat.torchmeta.utils.data.dataset import CombinationMetaDataset
from metafast.compat.torchmeta.utils.data.task import Dataset

__getattr__ = absent(__name__)

_FOLDS = 4
_CLASSES = 20


class Pascal5iClassDataset(LocalClassDataset):
    """The classes of a split, see :class:`Pascal5i`; ``data`` holds images, and ``masks`` their masks."""

    folder = "pascal5i"
    files = (
        "VOCdevkit/VOC2012/JPEGImages of PASCAL VOC 2012, Binary_map_aug of the repository icoz69/CaNet, and "
        "pascal-voc-classes.txt, which names the background and the 20 classes, one in a line,"
    )

    def __init__(
        self,
        root: str | os.PathLike[str],
        meta_train: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        transform: Transform | None = None,
        class_augmentations: list[Any] | None = None,
        download: bool = False,
        fold: int = 0,
    ) -> None:
        if fold not in range(_FOLDS):
            raise ValueError(f"fold: expected a number from 0 to {_FOLDS - 1}, got {fold!r}")
        self.fold = fold
        self.masks: dict[str, Files] = {}
        super().__init__(
            root,
            meta_train=meta_train,
            meta_test=meta_test,
            meta_split=meta_split,
            transform=transform,
            class_augmentations=class_augmentations,
            download=download,
        )

    def _read(self) -> tuple[list[Any], Mapping[str, Images]]:
        if self.meta_val:
            raise ValueError("meta_split: expected train or test, for there is no validation, got 'val'")
        names = self.read_labels()
        if len(names) != _CLASSES + 1:
            raise ValueError(
                f"{self.root}: expected {_CLASSES + 1} lines in pascal-voc-classes.txt, got {len(names)}"
            )
        home, images = (
            Path(self.root, "Binary_map_aug", self.meta_split),
            Path("VOCdevkit/VOC2012/JPEGImages"),
        )
        found: dict[str, tuple[list[str], list[str]]] = {}
        for fold in range(_FOLDS):
            if (fold == self.fold) == self.meta_train:
                continue
            for line in (home / f"split{fold}_{self.meta_split}.txt").read_text().splitlines():
                # Such as 2007_000032__01: an image, and the number of a class in it.
                image, number = line[:11], int(line[13:15])
                pictures, masks = found.setdefault(names[number], ([], []))
                pictures.append(str(Path(self.root, images, f"{image}.jpg")))
                masks.append(str(home / str(number) / f"{image}.png"))
        labels = [name for name in names[1:] if name in found]
        self.masks = {name: Files(found[name][1]) for name in labels}
        return list(labels), {name: Files(found[name][0]) for name in labels}

    def read_labels(self) -> list[str]:
        """The background and all classes."""
        lines = Path(self.root, "pascal-voc-classes.txt").read_text().splitlines()
        return [line.strip() for line in lines if line.strip()]

    def __getitem__(self, index: int) -> Any:
        label = self.labels[index % self.num_classes]
        return PascalDataset(
            index,
            (self.data[label], self.masks[label]),
            self.read_labels().index(label),
            transform=self.get_transform(index, self.transform),
            target_transform=self.get_target_transform(index),
        )


class PascalDataset(Dataset):
    """The images, masks and number of one class; ``transform`` takes image and mask together."""

    def __init__(
        self,
        index: int,
        data: tuple[Images, Images],
        class_id: int,
        transform: Any = None,
        target_transform: Transform | None = None,
    ) -> None:
        super().__init__(index, transform=transform, target_transform=target_transform)
        self.data, self.masks = data
        self.transform: Any = transform
        self.class_id = class_id

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        image, mask = opened(self.data, index), opened(self.masks, index)
        if self.transform is not None:
            image, mask = self.transform(image, mask)
        return image, mask, self.class_id


class Pascal5i(CombinationMetaDataset):
    """Tasks of PASCAL-5i (Shaban et al., *One-Shot Learning for Semantic Segmentation*, 2017), one class in each.

    A sample is an image, the mask of its class, and the number of the class, 1 to 20.

    Args:
        root: folder that holds the folder ``pascal5i``.
        num_classes_per_task: 1 is what the data set is made for.
        meta_train, meta_test: the split; one of them is true, or
        meta_split: ``"train"`` or ``"test"``.
        transform: of an image and a mask together, such as ``SegmentationPairTransform(500)``.
        target_transform: of the numbers of classes; samples do not pass it, as in the original.
        dataset_transform: of tasks, such as ``ClassSplitter(...)``.
        class_augmentations: accepted only where they take an image and a mask.
        download: accepted; nothing is downloaded.
        fold: 0 to 3, whose 5 classes test, while the other 15 train.

    Raises:
        TypeError: no ``num_classes_per_task``.
        ValueError: an unknown fold; no split or several; damaged lists.
        RuntimeError: files that are not there.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        num_classes_per_task: int | None = None,
        meta_train: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        transform: Any = None,
        target_transform: Transform | None = None,
        dataset_transform: Transform | None = None,
        class_augmentations: list[Any] | None = None,
        download: bool = False,
        fold: int = 0,
    ) -> None:
        dataset = Pascal5iClassDataset(
            root,
            meta_train=meta_train,
            meta_test=meta_test,
            transform=transform,
            meta_split=meta_split,
            class_augmentations=class_augmentations,
            download=download,
            fold=fold,
        )
        super().__init__(
            dataset,
            num_classes_per_task,  # type: ignore[arg-type]
            target_transform=target_transform,
            dataset_transform=dataset_transform,
        )
