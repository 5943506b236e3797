"""Images as bytes in memory, each decoded and transformed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metafast.compat.torchmeta._chain import Transform, flattened
from metafast.compat.torchmeta._images import CenterCrop, Images, Resize, ToTensor, opened, pixels
from metafast.compat.torchmeta.transforms.augmentations import HorizontalFlip, Rotation, VerticalFlip

#: Transforms that draw nothing, by what they take: an image of Pillow's, or a tensor of one image or many.
_OF_IMAGES = (CenterCrop, HorizontalFlip, Resize, Rotation, VerticalFlip)
_TORCHVISION = "torchvision.transforms.transforms"
_THEIRS = {
    "image": ("CenterCrop", "Grayscale", "Pad", "Resize"),
    "to tensor": ("ToTensor",),
    "tensor": ("Normalize",),
}


def parted(transform: Transform | None) -> tuple[list[Transform], list[Transform]] | None:
    """The parts before ``ToTensor`` and those after it; None for a transform that may draw, or is not known."""
    parts = flattened(transform)
    kinds = [_kind(part) for part in parts]
    if kinds.count("to tensor") != 1:
        return None
    middle = kinds.index("to tensor")
    if set(kinds[:middle]) - {"image"} or set(kinds[middle + 1 :]) - {"tensor"}:
        return None
    return parts[:middle], parts[middle + 1 :]


def _kind(part: Any) -> str:
    """What a transform takes, ``"unknown"`` for those that are not ours or torchvision's own."""
    if type(part) in _OF_IMAGES:
        return "image"
    if type(part) is ToTensor:
        return "to tensor"
    if type(part).__module__ == _TORCHVISION:
        return next((kind for kind, names in _THEIRS.items() if type(part).__name__ in names), "unknown")
    return "unknown"


class Budget:
    """How many bytes may yet be kept."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, count: int) -> bool:
        """Were there as many?"""
        if count > self.left:
            return False
        self.left -= count
        return True


class Pixels:
    """The images of a class after some of Pillow's transforms, ``[n, channels, height, width]`` uint8.

    Each is made when it is first asked for. Arrays that these transforms leave as they are serve without a copy.
    """

    def __init__(self, images: Images, mode: str | None, before: Sequence[Callable[[Any], Any]]) -> None:
        self._images, self._mode, self._before = images, mode, before
        self._kept: NDArray[np.uint8] | None = None
        self._there = np.zeros(len(images), dtype=np.bool_)
        self._left = len(images)
        self._refused = False

    def rows(self, rows: NDArray[np.int64], budget: Budget) -> NDArray[np.uint8] | None:
        """Some of them, or None where they differ in size or would take more than is left."""
        if self._kept is None:
            self._refused = self._refused or not self._begin(int(rows[0]), budget)
            if self._refused:
                return None
        assert self._kept is not None
        if self._left:
            for row in dict.fromkeys(rows[~self._there[rows]].tolist()):
                made = self._made(row)
                if made.shape != self._kept.shape[1:] or made.dtype != np.uint8:
                    return None
                self._keep(row, made)
        return self._kept[rows]

    def _begin(self, row: int, budget: Budget) -> bool:
        if isinstance(self._images, np.ndarray) and self._mode is None:
            image = opened(self._images, row)
            if self._transformed(image) is image:
                self._kept = _channels_first(self._images)
                self._left = 0
                return True
        made = self._made(row)
        if made.dtype != np.uint8 or not budget.take(made.size * len(self._images)):
            return False
        self._kept = np.empty((len(self._images), *made.shape), dtype=np.uint8)
        self._keep(row, made)
        return True

    def _keep(self, row: int, made: NDArray[Any]) -> None:
        assert self._kept is not None
        self._kept[row], self._there[row] = made, True
        self._left -= 1

    def _made(self, row: int) -> NDArray[Any]:
        return pixels(self._transformed(opened(self._images, row, self._mode))).numpy()

    def _transformed(self, image: Any) -> Any:
        for step in self._before:
            image = step(image)
        return image


def _channels_first(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
