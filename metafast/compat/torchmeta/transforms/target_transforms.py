"""Transforms of targets, and of images together with their masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metafast.compat import absent
from metafast.compat.torchmeta._chain import Compose
from metafast.compat.torchmeta._images import Resize, ToTensor

__getattr__ = absent(__name__)


class TargetTransform:
    """A transform of targets, to be derived from."""

    def __call__(self, target: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no __call__")

    def __repr__(self) -> str:
        return type(self).__name__


class DefaultTargetTransform(TargetTransform):
    """The class augmentation in a target ``(label, augmentation)`` as a number, 0 for none."""

    def __init__(self, class_augmentations: Sequence[Any]) -> None:
        self.class_augmentations = class_augmentations
        self._numbers: dict[Any, int] = {each: k for k, each in enumerate(class_augmentations, 1)}
        self._numbers[None] = 0

    def __call__(self, target: Any) -> tuple[Any, int]:
        if not (isinstance(target, tuple) and len(target) == 2):
            raise TypeError(f"target: expected a pair of label and class augmentation, got {target!r}")
        label, augmentation = target
        return label, self._numbers[augmentation]


class SegmentationPairTransform:
    """An image and its mask as tensors ``[..., target_size, target_size]``; the mask by the nearest pixels."""

    def __init__(self, target_size: int) -> None:
        size = (target_size, target_size)
        self.image_transform = Compose([Resize(size), ToTensor()])
        self.mask_transform = Compose([Resize(size, nearest=True), ToTensor()])

    def __call__(self, image: Any, mask: Any) -> tuple[Tensor, Tensor]:
        return self.image_transform(image), self.mask_transform(mask)
