"""mini-ImageNet."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafast.compat import absent
from metafast.compat.easyfsl.datasets._images import pandas, read_image, read_table
from metafast.compat.easyfsl.datasets.default_configs import (
    default_mini_imagenet_loading_transform,
    default_mini_imagenet_serving_transform,
    default_transform,
)
from metafast.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset

__getattr__ = absent(__name__)

MINI_IMAGENET_SPECS_DIR = Path("data/mini_imagenet")


class MiniImageNet(FewShotDataset):
    """The images ``root/class_name/image_name`` of a CSV file with these two columns.

    Args:
        root: folder of the images.
        split: for ``data/mini_imagenet/SPLIT.csv`` in the current folder.
        specs_file: the CSV file, if not that of a split.
        image_size: height and width.
        load_on_ram: read all images at once and keep them.
        loading_transform: with ``load_on_ram``, from Pillow images of three channels to tensors of one shape; None:
            :func:`default_mini_imagenet_loading_transform`.
        transform: from such an image, or such a tensor, to what is given; None: :func:`default_transform`, or
            :func:`default_mini_imagenet_serving_transform`.
        training: of that transform.

    Raises:
        FileNotFoundError: no such CSV file.
        ValueError: both ``split`` and ``specs_file``, or neither; a column that is not there.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = None,
        specs_file: str | os.PathLike[str] | None = None,
        image_size: int = 84,
        load_on_ram: bool = False,
        loading_transform: Callable[[Any], Any] | None = None,
        transform: Callable[[Any], Any] | None = None,
        training: bool = False,
    ) -> None:
        self.root = Path(root)
        self._specs_file = _specs_file(split, specs_file)
        rows = read_table(self._specs_file, "class_name", "image_name")
        paths = [self.root / name / image for name, image in rows]
        self.class_names = list(dict.fromkeys(name for name, _ in rows))
        self.class_to_label = {name: k for k, name in enumerate(self.class_names)}
        self.labels = [self.class_to_label[name] for name, _ in rows]
        self.load_on_ram = load_on_ram
        self.loading_transform: Callable[[Any], Any]
        self.images: Any
        if load_on_ram:
            self.loading_transform = loading_transform or default_mini_imagenet_loading_transform(image_size)
            self.transform = transform or default_mini_imagenet_serving_transform(image_size, training)
            self.images = torch.stack([self.load_image_as_tensor(path) for path in paths])
        else:
            self.loading_transform = _same
            self.transform = transform or default_transform(image_size, training)
            self.images = paths

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> tuple[Any, int]:
        image = self.images[item]
        return self.transform(image if self.load_on_ram else read_image(image)), self.labels[item]

    def load_image_as_tensor(self, filename: str | os.PathLike[str]) -> Tensor:
        """What ``loading_transform`` makes of a file."""
        image: Tensor = self.loading_transform(read_image(filename))
        return image

    def load_specs(self, split: str | None = None, specs_file: str | os.PathLike[str] | None = None) -> Any:
        """A pandas DataFrame of the CSV file, with the column ``image_path`` besides.

        Raises:
            ImportError: pandas is not installed.
            ValueError: both arguments, or neither.
        """
        table = pandas().read_csv(_specs_file(split, specs_file))
        pairs = zip(table["class_name"], table["image_name"], strict=True)
        return table.assign(image_path=[self.root / name / image for name, image in pairs])

    @property
    def data_df(self) -> Any:
        """:meth:`load_specs` of this data set."""
        return self.load_specs(specs_file=self._specs_file)

    def get_labels(self) -> list[int]:
        return self.labels


def _same(image: Any) -> Any:
    return image


def _specs_file(split: str | None, specs_file: str | os.PathLike[str] | None) -> Path:
    if (split is None) == (specs_file is None):
        got = "neither" if split is None else "both"
        raise ValueError(f"split, specs_file: expected one of the two, got {got}")
    return MINI_IMAGENET_SPECS_DIR / f"{split}.csv" if specs_file is None else Path(specs_file)
