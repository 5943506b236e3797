"""Image transforms, to torchvision's numbers and from its random draws, of Pillow images and of tensors.

Tensors are floats from 0 to 1, ``[channels, height, width]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

#: Red, green and blue in grey.
_LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class Compose:
    """One after the other."""

    transforms: Sequence[Callable[[Any], Any]]

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


@dataclass(frozen=True)
class Resize:
    """To a square, bilinear."""

    size: int

    def __call__(self, image: Any) -> Any:
        if _sides(image) == (self.size, self.size):
            return image
        if isinstance(image, Tensor):
            scaled = interpolate(image[None], (self.size, self.size), mode="bilinear", antialias=True)
            return scaled.squeeze(0)
        from PIL.Image import Resampling

        return image.resize((self.size, self.size), Resampling.BILINEAR)


@dataclass(frozen=True)
class CenterCrop:
    """The square in the middle, of images that are as large at least."""

    size: int

    def __call__(self, image: Any) -> Any:
        height, width = _sides(image)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return _crop(image, top, left, self.size, self.size)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A part of 8 % to 100 % of the area and of sides 3:4 to 4:3, resized to a square."""

    size: int

    def __call__(self, image: Any) -> Any:
        return Resize(self.size)(_crop(image, *self._part(*_sides(image))))

    def _part(self, height: int, width: int) -> tuple[int, int, int, int]:
        ratios = (3 / 4, 4 / 3)
        low, high = torch.log(torch.tensor(ratios)).tolist()
        for _ in range(10):
            area = height * width * _uniform(0.08, 1.0)
            ratio = torch.exp(torch.empty(1).uniform_(low, high)).item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,)))
                return top, int(torch.randint(0, width - w + 1, (1,))), h, w
        # Images so long that nothing fits: the middle.
        w = min(width, round(height * ratios[1]))
        h = min(height, round(width / ratios[0]))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class ColorJitter:
    """Brightness, contrast and saturation times factors between 1 - strength and 1 + strength, in any order."""

    strength: float

    def __call__(self, image: Any) -> Any:
        order = torch.randperm(4).tolist()
        factors = [_uniform(1 - self.strength, 1 + self.strength) for _ in range(3)]
        for change in order:
            # The fourth is the hue, which stays.
            if change < 3:
                image = _CHANGES[change](image, factors[change])
        return image


@dataclass(frozen=True)
class RandomHorizontalFlip:
    """Mirrors every other image."""

    def __call__(self, image: Any) -> Any:
        if torch.rand(1) >= 0.5:
            return image
        if isinstance(image, Tensor):
            return image.flip(-1)
        from PIL.Image import Transpose

        return image.transpose(Transpose.FLIP_LEFT_RIGHT)


@dataclass(frozen=True)
class ToTensor:
    """A tensor of a Pillow image of 8 bits."""

    def __call__(self, image: Any) -> Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        pixels = pixels.view(image.size[1], image.size[0], -1).permute(2, 0, 1).contiguous()
        return pixels.to(torch.get_default_dtype()).div(255)


@dataclass(frozen=True)
class Normalize:
    """Each channel less its mean, divided by its standard deviation."""

    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Tensor) -> Tensor:
        mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


def _uniform(low: float, high: float) -> float:
    return torch.empty(1).uniform_(low, high).item()


def _sides(image: Any) -> tuple[int, int]:
    """Height and width."""
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    width, height = image.size
    return height, width


def _crop(image: Any, top: int, left: int, height: int, width: int) -> Any:
    if isinstance(image, Tensor):
        return image[..., top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height))


def _enhanced(kind: str, image: Any, factor: float) -> Any:
    from PIL import ImageEnhance

    return getattr(ImageEnhance, kind)(image).enhance(factor)


def _blend(image: Tensor, other: Any, factor: float) -> Tensor:
    return (factor * image + (1.0 - factor) * other).clamp(0, 1)


def _grey(image: Tensor) -> Tensor:
    red, green, blue = image.unbind(-3)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(-3)


def _brightness(image: Any, factor: float) -> Any:
    return _blend(image, 0.0, factor) if isinstance(image, Tensor) else _enhanced("Brightness", image, factor)


def _contrast(image: Any, factor: float) -> Any:
    if isinstance(image, Tensor):
        return _blend(image, _grey(image).mean((-3, -2, -1), keepdim=True), factor)
    return _enhanced("Contrast", image, factor)


def _saturation(image: Any, factor: float) -> Any:
    return (
        _blend(image, _grey(image), factor)
        if isinstance(image, Tensor)
        else _enhanced("Color", image, factor)
    )


_CHANGES = (_brightness, _contrast, _saturation)
