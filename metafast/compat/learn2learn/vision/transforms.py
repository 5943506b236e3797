"""Task transforms of images."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from metafast.compat import absent
from metafast.compat.learn2learn.data.task_dataset import Draft, Stage
from metafast.compat.learn2learn.data.transforms import TaskTransform

__getattr__ = absent(__name__)


class _Rotation:
    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __call__(self, data: Any) -> tuple[Any, Any]:
        image = data[0]
        turned = rotate(image, self.degrees) if isinstance(image, Tensor) else image.rotate(self.degrees)
        return turned, data[1]


class _Rotations(Stage):
    def __init__(self, degrees: dict[Any, float]) -> None:
        self.degrees = degrees

    def of(self, label: Any) -> Callable[[Any], Any]:
        return _Rotation(self.degrees[label])

    def batch(self, data: list[Any], labels: Sequence[Any]) -> list[Any]:
        images = data[0].clone()
        for degrees in set(self.degrees.values()).difference((0.0,)):
            chosen = torch.tensor([self.degrees[label] == degrees for label in labels], device=images.device)
            images[chosen] = rotate(images[chosen], degrees)
        return [images, data[1]]


def rotate(images: Tensor, degrees: float) -> Tensor:
    """``[..., H, W]`` turned counter-clockwise about the centre; every pixel is the nearest one's, or 0 beyond all."""
    height, width = images.shape[-2:]
    quarters = degrees / 90
    if quarters == int(quarters) and (height == width or quarters % 2 == 0):
        return torch.rot90(images, int(quarters) % 4, (-2, -1))
    # Numbers that float32 does not hold stay as they are.
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    y, x = (
        torch.arange(size, dtype=dtype, device=images.device) - (size - 1) / 2 for size in (height, width)
    )
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=dtype, device=images.device)
    # Divided first, as torchvision does, so that points halfway between two pixels fall to the same one.
    places = torch.stack(torch.broadcast_tensors(x, y[:, None]), dim=-1)
    grid = places @ (turn.t() / torch.tensor([width / 2, height / 2], dtype=dtype, device=images.device))
    planes = images.reshape(1, -1, height, width).to(dtype)
    turned = grid_sample(planes, grid[None], mode="nearest", align_corners=False)
    return turned.reshape(images.shape).to(images.dtype)


class RandomClassRotation(TaskTransform):
    """All images of a class turned by the same angle, drawn from Python's ``random`` for each class of a task.

    After ``LoadData``. Images are tensors ``[..., H, W]`` or Pillow's.

    Args:
        dataset: a ``MetaDataset``.
        degrees: the angles to draw from, counter-clockwise.
    """

    def __init__(self, dataset: Any, degrees: Sequence[float]) -> None:
        super().__init__(dataset)
        self.degrees = degrees

    def change(self, draft: Draft) -> None:
        draft.stages.append(_Rotations({label: random.choice(self.degrees) for label, _ in draft.groups}))
