"""CIFAR-FS, from its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metafast.compat.learn2learn.vision.datasets._split import WORDS, ImageSplit
from metafast.data import cifar_fs


class CIFARFS(ImageSplit):
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

    def read(self) -> None:
        own = Path(self.root, "cifarfs")
        found = cifar_fs(own if own.is_dir() else self.root, WORDS[self.mode][-1])
        order = sorted(range(len(found.names)), key=lambda c: found.names[c])
        self.classes = [found.names[c] for c in order]
        rows: list[int] = []
        for label, c in enumerate(order):
            first, count = int(found.class_starts[c]), int(found.class_sizes[c])
            rows += range(first, first + count)
            self.labels += [label] * count
        self.images = found.images[rows]

    def image(self, i: int) -> Any:
        return self.pillow(self.images[i].permute(1, 2, 0).numpy())
