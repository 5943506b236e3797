"""What the data sets of images have in common."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from metafast.compat.torchmeta._chain import Transform, flattened
from metafast.compat.torchmeta._images import Images, opened, scaled
from metafast.compat.torchmeta._pixels import Budget, Pixels, parted
from metafast.compat.torchmeta.transforms.categorical import Categorical, FixedCategory
from metafast.compat.torchmeta.utils.data._whole import GivesSamples, Samples
from metafast.compat.torchmeta.utils.data.dataset import ClassDataset, CombinationMetaDataset
from metafast.compat.torchmeta.utils.data.task import Dataset
from metafast.data import ImageClasses

#: Bytes of transformed images that a data set keeps in memory at most; what goes beyond is made anew every time.
KEPT = 2**31


class ImagesOfClass(Dataset, GivesSamples):
    """The images of one class, each with the same target.

    Args:
        index: the number of the class.
        images: see ``Images``.
        target: of all of them, before ``target_transform``.
        mode: Pillow's mode to convert images to, None for none.
        transform, target_transform: see :class:`Dataset`.
        kept: the images after ``transform`` as far as it draws nothing, and what it does then.
    """

    def __init__(
        self,
        index: int,
        images: Images,
        target: Any,
        mode: str | None = None,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        kept: _Kept | None = None,
    ) -> None:
        super().__init__(index, transform=transform, target_transform=target_transform)
        self.data = images
        self._target, self._mode, self._kept = target, mode, kept
        self._numbered: tuple[Transform, int] | None = None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = opened(self.data, index, self._mode), self._target
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def _at_once(self, rows: NDArray[np.int64], steady: set[Any]) -> Samples | None:
        kept = self._kept
        if type(self) is not ImagesOfClass or kept is None or self.transform is not kept.transform:
            return None
        if self.data is not kept.images or rows.min() < 0:
            return None
        if kept not in steady:
            if not kept.steady():
                return None
            steady.add(kept)
        number = self._number()
        inputs = None if number is None else kept.pixels.rows(rows, kept.budget)
        return None if inputs is None or number is None else Samples(inputs, number, kept.finish)

    def _number(self) -> int | None:
        """The target of all images after transforms that give the same whenever they are asked, or None."""
        if self._numbered is None or self._numbered[0] is not self.target_transform:
            parts = flattened(self.target_transform)
            steady = all(type(part) in (Categorical, FixedCategory) for part in parts)
            if self.target_transform is None or not steady or type(parts[-1]) is not Categorical:
                return None
            self._numbered = self.target_transform, self.target_transform(self._target)
        return self._numbered[1]


class _Kept:
    """What is kept of a class under one transform of the data set and one augmentation of the class."""

    def __init__(
        self,
        images: Images,
        mode: str | None,
        transform: Transform | None,
        made_of: tuple[Any, Transform | None],
        budget: Budget,
    ) -> None:
        self.images, self.transform, self.made_of, self.budget = images, transform, made_of, budget
        self._mode = mode
        self._begin()

    def is_of(self, images: Images, made_of: tuple[Any, Transform | None]) -> bool:
        """Are the images and the transforms still the same?"""
        same = all(a is b for a, b in zip(self.made_of, made_of, strict=True))
        return same and self.images is images

    def steady(self) -> bool:
        """Does the transform draw nothing? What was made before its parts or their settings changed is forgotten."""
        parts = flattened(self.transform)
        same = len(parts) == len(self._parts) and all(a is b for a, b in zip(parts, self._parts, strict=True))
        if not same or not all(map(_has_settings, self._before, self._settings)):
            self._begin()
        return self._known

    def _begin(self) -> None:
        self._parts = flattened(self.transform)
        parts = parted(self.transform)
        self._known = parts is not None
        self._before, after = parts or ([], [])
        self._settings = [
            {name: value[:] if isinstance(value, list) else value for name, value in vars(part).items()}
            for part in self._before
        ]
        self.pixels = Pixels(self.images, self._mode, self._before)
        self.finish = (scaled, *after)


def _has_settings(part: Any, settings: Mapping[str, Any]) -> bool:
    """Has a transform these attributes? Other values than numbers and lists are compared as objects."""
    now = vars(part)
    return now.keys() == settings.keys() and all(
        now[name] is value
        or (isinstance(value, int | float | list) and type(now[name]) is type(value) and now[name] == value)
        for name, value in settings.items()
    )


class LocalClassDataset(ClassDataset):
    """Classes of images in files that are there already; to be derived from, with :meth:`_read`.

    Args:
        root: the folder that holds the folder ``folder`` of the data set.
        meta_train, meta_val, meta_test, meta_split, class_augmentations: see ``ClassDataset``.
        transform: of Pillow's images.
        download: accepted; nothing is downloaded.

    Raises:
        RuntimeError: files that are not there; the message says what belongs where.
        ValueError: damaged files, no split or several.
    """

    folder: ClassVar[str]
    #: What has to be in the folder.
    files: ClassVar[str]
    mode: ClassVar[str | None] = None

    def __init__(
        self,
        root: str | os.PathLike[str],
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        transform: Transform | None = None,
        class_augmentations: list[Any] | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(meta_train, meta_val, meta_test, meta_split, class_augmentations)
        self.root = os.path.join(os.path.expanduser(root), self.folder)
        self.transform = transform
        try:
            self.labels, self.data = self._read()
        except FileNotFoundError as error:
            raise RuntimeError(
                f"root: expected {self.files} in {self.root!r}; nothing is downloaded, and the HDF5 files that "
                f"torchmeta made of them are not read ({error})"
            ) from error
        self.close()

    def _read(self) -> tuple[list[Any], Mapping[str, Images]]:
        """The labels of the split, and the images of each by its name; or a FileNotFoundError."""
        raise NotImplementedError

    def target(self, label: Any) -> Any:
        """That of a class, before all target transforms."""
        return label

    def __getitem__(self, index: int) -> ImagesOfClass:
        kept = self._kept.get(index)
        label = self.labels[index % self.num_classes]
        images = self.data["/".join(label) if isinstance(label, list) else label]
        made_of = self.get_class_augmentation(index), self.transform
        if kept is None or not kept.is_of(images, made_of):
            transform = self.get_transform(index, self.transform)
            kept = self._kept[index] = _Kept(images, self.mode, transform, made_of, self._budget)
        return ImagesOfClass(
            index,
            images,
            self.target(label),
            self.mode,
            kept.transform,
            self.get_target_transform(index),
            kept,
        )

    @property
    def num_classes(self) -> int:
        return len(self.labels)

    def close(self) -> None:
        """Forget the images that are kept in memory."""
        self._kept: dict[int, _Kept] = {}
        self._budget = Budget(KEPT)


class MultiDigits(LocalClassDataset):
    """Numbers of several digits, in folders ``train``, ``val`` and ``test`` with a folder for each number."""

    image_folder: ClassVar[str]
    mode = "RGB"

    def _read(self) -> tuple[list[Any], Mapping[str, Images]]:
        place = f"{self.image_folder}/{self.meta_split}"
        labels = sorted(entry.name for entry in os.scandir(Path(self.root, place)) if entry.is_dir())
        if not labels:
            raise FileNotFoundError(f"no folders in {place}")
        return list(labels), image_files(self.root, place, labels, ".png")


class Files:
    """Files, each read when it is asked for, as an array of its bytes."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        return np.fromfile(self.paths[row], dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.paths)


def image_files(root: str, place: str, labels: Sequence[str], suffix: str) -> dict[str, Images]:
    """The files of each label's folder in ``place``, in the order of their names.

    Raises:
        FileNotFoundError: a label without a folder, or a folder without such files.
    """
    found: dict[str, Images] = {}
    for label in labels:
        folder = os.path.join(root, *place.split("/"), label)
        names = sorted(name for name in os.listdir(folder) if name.endswith(suffix))
        if not names:
            raise FileNotFoundError(f"no {suffix} files in {folder}")
        found[label] = Files([os.path.join(folder, name) for name in names])
    return found


def by_name(classes: ImageClasses) -> dict[str, NDArray[np.uint8]]:
    """The images ``[n, height, width, 3]`` of each class."""
    images = classes.images.permute(0, 2, 3, 1).numpy()
    return {
        name: images[start : start + size]
        for name, start, size in zip(
            classes.names, classes.class_starts.tolist(), classes.class_sizes.tolist(), strict=True
        )
    }


class Combinations(CombinationMetaDataset):
    """Tasks of the classes of a data set of images."""

    classes: ClassVar[type[LocalClassDataset]]

    def __init__(
        self,
        root: str | os.PathLike[str],
        num_classes_per_task: int | None = None,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        dataset_transform: Transform | None = None,
        class_augmentations: list[Any] | None = None,
        download: bool = False,
    ) -> None:
        dataset = self.classes(
            root,
            meta_train=meta_train,
            meta_val=meta_val,
            meta_test=meta_test,
            meta_split=meta_split,
            transform=transform,
            class_augmentations=class_augmentations,
            download=download,
        )
        super().__init__(
            dataset,
            num_classes_per_task,  # type: ignore[arg-type]
            target_transform=target_transform,
            dataset_transform=dataset_transform,
        )
