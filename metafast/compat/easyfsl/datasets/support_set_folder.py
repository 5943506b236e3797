"""A support set in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from metafast.compat import absent
from metafast.compat.easyfsl.datasets._images import read_image
from metafast.compat.easyfsl.datasets.default_configs import default_transform

__getattr__ = absent(__name__)

NOT_A_TENSOR_ERROR_MESSAGE = "transform: expected tensors from it, got something else"

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class SupportSetFolder(Dataset[Any]):
    """The images of the folders in ``root``, one of each class, which are read at once.

    Files and classes are those of torchvision's ImageFolder: classes in the order of their names, of each all images at
    any depth. ``classes``, ``class_to_idx``, ``samples``, ``imgs`` and ``targets`` are as there.

    Args:
        root: the folder.
        device: where images and labels are.
        image_size: height and width.
        transform: from what ``loader`` gives to tensors of one shape; None: :func:`default_transform`.
        target_transform: of the labels of items.
        loader: from a path to an image, which is a Pillow image of three channels unless it is given.
        is_valid_file: whether to take a file; None: the usual suffixes of images.
        allow_empty: take classes without images.

    Raises:
        FileNotFoundError: no folder in ``root``, or one without images.
        TypeError: a transform that gives no tensors.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        image_size: int = 84,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        loader: Callable[[str], Any] = read_image,
        is_valid_file: Callable[[str], bool] | None = None,
        allow_empty: bool = False,
    ) -> None:
        self.root = str(root)
        self.device = device
        self.transform = transform or default_transform(image_size, training=False)
        self.target_transform = target_transform
        self.loader = loader
        folder = os.path.expanduser(self.root)
        self.classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if not self.classes:
            raise FileNotFoundError(f"root: expected a folder of each class in {self.root}, got none")
        self.class_to_idx = {name: k for k, name in enumerate(self.classes)}
        self.samples: list[tuple[str, int]] = []
        for name, number in self.class_to_idx.items():
            own = [path for path in _files(os.path.join(folder, name)) if (is_valid_file or _is_image)(path)]
            if not own and not allow_empty:
                raise FileNotFoundError(
                    f"root: expected images of each class, got none in {name} of {self.root}"
                )
            self.samples += [(path, number) for path in own]
        self.imgs = self.samples
        self.targets = [number for _, number in self.samples]
        images = [self[k][0] for k in range(len(self))]
        for image in images:
            if not isinstance(image, Tensor):
                raise TypeError(NOT_A_TENSOR_ERROR_MESSAGE)
        self.images = torch.stack(images).to(device)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, label = self.samples[index]
        image = self.transform(self.loader(path))
        return image, label if self.target_transform is None else self.target_transform(label)

    def __len__(self) -> int:
        return len(self.samples)

    def get_images(self) -> Tensor:
        """``[n, channels, height, width]``."""
        return self.images

    def get_labels(self) -> Tensor:
        """``[n]`` int64, numbers of ``classes``."""
        return torch.tensor(self.targets).to(self.device)


def _files(folder: str) -> list[str]:
    found = sorted(os.walk(folder, followlinks=True))
    return [os.path.join(parent, name) for parent, _, names in found for name in sorted(names)]


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES)
