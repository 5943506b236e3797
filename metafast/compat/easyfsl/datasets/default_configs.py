"""The transforms of images where none are given. Pillow reads and resizes; torchvision is not needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metafast.compat import absent
from metafast.compat.easyfsl.datasets import _transforms as transforms

__getattr__ = absent(__name__)

IMAGENET_NORMALIZATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

DEFAULT_IMAGE_FORMATS = {".bmp", ".png", ".jpeg", ".jpg"}


def default_transform(image_size: int, training: bool) -> Callable[[Any], Any]:
    """From a Pillow image to a normalised tensor ``[3, image_size, image_size]``.

    Args:
        image_size: height and width.
        training: a part of the image at random, of colours at random, mirrored or not, drawn from torch's generator.
            Otherwise the middle of the image.
    """
    parts = _random(image_size) if training else _middle(image_size)
    return transforms.Compose([*parts, transforms.ToTensor(), transforms.Normalize(**IMAGENET_NORMALIZATION)])


def default_mini_imagenet_loading_transform(image_size: int) -> Callable[[Any], Any]:
    """From a Pillow image to a tensor of twice ``image_size``, to keep in memory."""
    return transforms.Compose([transforms.Resize(int(image_size * 2.0)), transforms.ToTensor()])


def default_mini_imagenet_serving_transform(image_size: int, training: bool) -> Callable[[Any], Any]:
    """What :func:`default_transform` does, of a tensor from memory."""
    parts = _random(image_size) if training else _middle(image_size)
    return transforms.Compose([*parts, transforms.Normalize(**IMAGENET_NORMALIZATION)])


def _random(image_size: int) -> list[Callable[[Any], Any]]:
    return [
        transforms.RandomResizedCrop(image_size),
        transforms.ColorJitter(0.4),
        transforms.RandomHorizontalFlip(),
    ]


def _middle(image_size: int) -> list[Callable[[Any], Any]]:
    return [transforms.Resize(int(image_size * 1.15)), transforms.CenterCrop(image_size)]
