"""Class augmentations: images that are changed are classes of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from metafast.compat import absent

__getattr__ = absent(__name__)


def _pillow(image: Any) -> Any:
    from PIL.Image import Image

    if not isinstance(image, Image):
        raise TypeError(f"image: expected one of Pillow's, got {type(image).__name__}")
    return image


class Rotation:
    """Rotation counter-clockwise by ``angle`` degrees; of a list of angles, what holds a rotation by each.

    Args:
        angle: a number, or a list or a tuple of them.
        resample: Pillow's number of the filter; False: the nearest pixel.
        expand: make the image as large as its turned frame.
        center: of the rotation, in pixels from the upper left corner; None: the middle.

    Raises:
        ValueError: in a call, where there are several angles.
        TypeError: in a call, something that is no image of Pillow's.
    """

    def __init__(
        self,
        angle: float | Sequence[float],
        resample: int | bool = False,
        expand: bool = False,
        center: tuple[float, float] | None = None,
    ) -> None:
        self.angle: float | None
        if isinstance(angle, (list, tuple)):
            self.angle, self._angles = None, angle
        else:
            self.angle, self._angles = angle, [angle]  # type: ignore[assignment]
            if self.angle % 360 == 0:  # type: ignore[operator]
                warnings.warn(
                    f"angle: {angle} degrees turn nothing, so these classes repeat those of the data set",
                    stacklevel=2,
                )
        self.resample, self.expand, self.center = resample, expand, center

    def __iter__(self) -> Iterator[Rotation]:
        return (Rotation(angle, self.resample, self.expand, self.center) for angle in self._angles)

    def __call__(self, image: Any) -> Any:
        if self.angle is None:
            raise ValueError(f"angle: expected one number to turn an image by, got {list(self._angles)}")
        return _pillow(image).rotate(self.angle % 360, int(self.resample), self.expand, self.center)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rotation):
            return NotImplemented
        if self.angle is None or other.angle is None:
            return list(self._angles) == list(other._angles)
        return self.angle % 360 == other.angle % 360

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"Rotation({', '.join(map(str, self._angles)) if self.angle is None else self.angle % 360})"

    def __str__(self) -> str:
        return f"Rotation({', '.join(map(str, self._angles))})"


class HorizontalFlip:
    """Left for right, of an image of Pillow's or a tensor ``[..., height, width]``."""

    def __iter__(self) -> Iterator[HorizontalFlip]:
        return iter([HorizontalFlip()])

    def __call__(self, image: Any) -> Any:
        if isinstance(image, Tensor):
            return image.flip(-1)
        from PIL.Image import Transpose

        return _pillow(image).transpose(Transpose.FLIP_LEFT_RIGHT)

    def __repr__(self) -> str:
        return "HorizontalFlip()"


class VerticalFlip:
    """Top for bottom, of an image of Pillow's or a tensor ``[..., height, width]``."""

    def __iter__(self) -> Iterator[VerticalFlip]:
        return iter([VerticalFlip()])

    def __call__(self, image: Any) -> Any:
        if isinstance(image, Tensor):
            return image.flip(-2)
        from PIL.Image import Transpose

        return _pillow(image).transpose(Transpose.FLIP_TOP_BOTTOM)

    def __repr__(self) -> str:
        return "VerticalFlip()"
