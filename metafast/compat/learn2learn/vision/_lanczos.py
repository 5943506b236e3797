"""Pillow's Lanczos filter, bit for bit, without Pillow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Bits after the point of Pillow's coefficients for images of 8 bits, and the filter's half width.
_BITS = 22
_SUPPORT = 3.0


def _coefficients(before: int, after: int) -> Tensor:
    """The weight of each source pixel in each target pixel, in units of 2 ** -22: ``[after, before]``."""
    scale = before / after
    stretch = max(scale, 1.0)
    weights = torch.zeros(after, before, dtype=torch.float64)
    for i in range(after):
        centre = (i + 0.5) * scale
        first = max(0, int(centre - _SUPPORT * stretch + 0.5))
        last = min(before, int(centre + _SUPPORT * stretch + 0.5))
        row = [_lanczos((j - centre + 0.5) / stretch) for j in range(first, last)]
        total = sum(row)
        weights[i, first:last] = torch.tensor([value / total for value in row], dtype=torch.float64)
    scaled = weights * 2**_BITS
    return torch.trunc(scaled + torch.where(scaled < 0, -0.5, 0.5))


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / _SUPPORT) if -_SUPPORT <= x < _SUPPORT else 0.0


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


def resize(images: Tensor, size: int) -> Tensor:
    """``[N, H, W] -> [N, size, size]``, uint8, as ``Image.resize((size, size), LANCZOS)`` of each."""
    horizontal = _coefficients(images.shape[2], size)
    vertical = _coefficients(images.shape[1], size)
    # Whole numbers below 2 ** 53, which float64 adds up exactly.
    rows = _rounded(images.double() @ horizontal.t())
    return _rounded(vertical @ rows).to(torch.uint8)


def _rounded(sums: Tensor) -> Tensor:
    return torch.floor((sums + 2 ** (_BITS - 1)) / 2**_BITS).clamp(0, 255)
