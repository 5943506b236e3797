"""Omniglot: 1,623 handwritten characters of 50 alphabets, 20 drawings each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metafast.compat import absent
from metafast.compat.torchmeta._chain import Transform
from metafast.compat.torchmeta._images import Images
from metafast.compat.torchmeta.datasets._classes import LocalClassDataset
from metafast.compat.torchmeta.utils.data.dataset import CombinationMetaDataset
from metafast.data._splits import published_split
from metafast.data.omniglot import ARCHIVES, characters, read_drawings, unpack

__getattr__ = absent(__name__)


class _Drawings:
    """The drawings of a character ``[105, 105]`` uint8, ink 255, unpacked when they are asked for."""

    def __init__(self, packed: list[bytes]) -> None:
        self._packed = packed

    def __getitem__(self, row: int) -> NDArray[np.uint8]:
        return (1 - unpack([self._packed[row]])[0]) * np.uint8(255)

    def __len__(self) -> int:
        return len(self._packed)


class OmniglotClassDataset(LocalClassDataset):
    """The characters of a split, see :class:`Omniglot`.

    Labels are lists of archive, alphabet and character, in ascending order.
    """

    folder = "omniglot"
    files = "images_background.zip and images_evaluation.zip of the repository brendenlake/omniglot"

    def __init__(
        self,
        root: str | os.PathLike[str],
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        use_vinyals_split: bool = True,
        transform: Transform | None = None,
        class_augmentations: list[Any] | None = None,
        download: bool = False,
    ) -> None:
        self.use_vinyals_split = use_vinyals_split
        super().__init__(
            root,
            meta_train=meta_train,
            meta_val=meta_val,
            meta_test=meta_test,
            meta_split=meta_split,
            transform=transform,
            class_augmentations=class_augmentations,
            download=download,
        )

    def _read(self) -> tuple[list[Any], Mapping[str, Images]]:
        if self.meta_val and not self.use_vinyals_split:
            raise ValueError(
                "meta_val: expected use_vinyals_split=True, for the other splits have no validation"
            )
        archives: tuple[str, ...] = ARCHIVES if self.use_vinyals_split else (ARCHIVES[int(self.meta_test)],)
        wanted = set(published_split("omniglot_vinyals", self.meta_split)) if self.use_vinyals_split else None
        found: dict[tuple[str, ...], list[bytes]] = {}
        for archive in archives:
            path = Path(self.root, f"{archive}.zip")
            names = [name for name in characters(path) if wanted is None or name in wanted]
            drawings: list[list[bytes]] = [[] for _ in names]
            read_drawings(path, {name: row for row, name in enumerate(names)}, drawings)
            found |= {
                (archive, *name.split("/")): of_name for name, of_name in zip(names, drawings, strict=True)
            }
        absent_ones = set() if wanted is None else wanted - {"/".join(label[1:]) for label in found}
        if absent_ones:
            raise ValueError(
                f"root: expected all characters of the split in the zip files of {self.root!r}, got none of "
                f"{min(absent_ones)} and {len(absent_ones) - 1} more"
            )
        labels = sorted(found)
        return [list(label) for label in labels], {
            "/".join(label): _Drawings(found[label]) for label in labels
        }

    def target(self, label: Any) -> str:
        return "/".join(label)


class Omniglot(CombinationMetaDataset):
    """Tasks of Omniglot (Lake, Salakhutdinov and Tenenbaum, 2015), from its two zip files as they are.

    Images are Pillow's, 105 x 105 of 8 bits, ink 255; those of a character come in the order of their drawers.

    Args:
        root: folder that holds the folder ``omniglot`` with the zip files.
        num_classes_per_task: N of N-way.
        meta_train, meta_val, meta_test: the split; one of them is true, or
        meta_split: ``"train"``, ``"val"`` or ``"test"``.
        use_vinyals_split: the 1,028, 172 and 423 characters of Vinyals et al. (2016); else the background set trains,
            the evaluation set tests, and there is no validation.
        transform: of Pillow's images.
        target_transform: of targets, ``("images_background/Greek/character01", augmentation)``.
        dataset_transform: of tasks, such as ``ClassSplitter(...)``.
        class_augmentations: such as ``[Rotation([90, 180, 270])]``.
        download: accepted; nothing is downloaded.

    Raises:
        TypeError: no ``num_classes_per_task``.
        ValueError: no split or several; damaged files.
        RuntimeError: files that are not there.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        num_classes_per_task: int | None = None,
        meta_train: bool = False,
        meta_val: bool = False,
        meta_test: bool = False,
        meta_split: str | None = None,
        use_vinyals_split: bool = True,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        dataset_transform: Transform | None = None,
        class_augmentations: list[Any] | None = None,
        download: bool = False,
    ) -> None:
        dataset = OmniglotClassDataset(
            root,
            meta_train=meta_train,
            meta_val=meta_val,
            meta_test=meta_test,
            meta_split=meta_split,
            use_vinyals_split=use_vinyals_split,
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
