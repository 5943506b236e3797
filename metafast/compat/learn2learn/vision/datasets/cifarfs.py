"""CIFAR-FS, from its images."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metafast.compat.learn2learn.data.utils import LabelledImages
from metafast.data import cifar_fs
from metafast.data._decode import need_pillow

_SPLITS = {"train": "train", "validation": "val", "test": "test"}


class CIFARFS(LabelledImages):
    """A split of CIFAR-FS, read by :func:`metafast.data.cifar_fs`.

    Images are Pillow's, 32 x 32 and coloured; classes are numbered in the order of their names.

    Args:
        root: folder of the images in any layout that :func:`metafast.data.cifar_fs` reads, or the one that holds it
            as ``cifarfs``.
        mode: ``"train"``, ``"validation"`` or ``"test"``.
        transform, target_transform, download: see :class:`LabelledImages`.

    Raises:
        ValueError: an unknown mode, damaged images.
        FileNotFoundError: images that are not there.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        mode: str = "train",
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(root, transform, target_transform, download)
        if mode not in _SPLITS:
            raise ValueError(f"mode: expected train, validation or test, got {mode!r}")
        self.mode = mode
        own = Path(self.root, "cifarfs")
        found = cifar_fs(own if own.is_dir() else self.root, _SPLITS[mode])
        numbers = {name: k for k, name in enumerate(sorted(found.names))}
        self.classes = list(numbers)
        order = sorted(range(len(found.names)), key=lambda c: found.names[c])
        rows: list[int] = []
        for c in order:
            first, count = int(found.class_starts[c]), int(found.class_sizes[c])
            rows += range(first, first + count)
            self.labels += [numbers[found.names[c]]] * count
        self.images = found.images[rows]

    def image(self, i: int) -> Any:
        need_pillow("CIFARFS")
        from PIL import Image

        return Image.fromarray(self.images[i].permute(1, 2, 0).numpy())
