"""Images in a folder of each class."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from metafast.compat import absent
from metafast.compat.easyfsl.datasets._images import read_image
from metafast.compat.easyfsl.datasets.default_configs import DEFAULT_IMAGE_FORMATS, default_transform
from metafast.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset

__getattr__ = absent(__name__)


class EasySet(FewShotDataset):
    """The images of several folders, which are read with Pillow when they are asked for.

    Args:
        specs_file: a JSON file of a dict with the lists ``class_names`` and ``class_roots``, the folder of each.
        image_size: height and width.
        transform: from a Pillow image of three channels to what is given; None: :func:`default_transform`.
        training: of that transform.
        supported_formats: suffixes of files to take, in lower case; None: bmp, png, jpeg and jpg.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such JSON file.
    """

    def __init__(
        self,
        specs_file: str | os.PathLike[str],
        image_size: int = 84,
        transform: Callable[[Any], Any] | None = None,
        training: bool = False,
        supported_formats: Collection[str] | None = None,
    ) -> None:
        specs = self.load_specs(Path(specs_file))
        self.images, self.labels = self.list_data_instances(specs["class_roots"], supported_formats)
        self.class_names: list[str] = specs["class_names"]
        self.transform = transform or default_transform(image_size, training)

    @staticmethod
    def load_specs(specs_file: Path) -> dict[str, Any]:
        """The dict of the file, checked."""
        if specs_file.suffix != ".json":
            raise ValueError(f"specs_file: expected a file that ends with .json, got {specs_file}")
        with open(specs_file, encoding="utf-8") as file:
            specs: dict[str, Any] = json.load(file)
        if not isinstance(specs, dict) or not {"class_names", "class_roots"} <= specs.keys():
            raise ValueError(f"specs_file: expected a dict with class_names and class_roots in {specs_file}")
        names, roots = specs["class_names"], specs["class_roots"]
        if len(names) != len(roots):
            raise ValueError(
                f"specs_file: expected as many class_roots as class_names, got {len(roots)} and {len(names)}"
            )
        return specs

    @staticmethod
    def list_data_instances(
        class_roots: Sequence[str], supported_formats: Collection[str] | None = None
    ) -> tuple[list[str], list[int]]:
        """The images of the folders in order, and for each the number of its folder."""
        formats = DEFAULT_IMAGE_FORMATS if supported_formats is None else supported_formats
        images: list[str] = []
        labels: list[int] = []
        for number, root in enumerate(class_roots):
            paths = sorted(Path(root).glob("*"))
            own = [str(path) for path in paths if path.suffix.lower() in formats and path.is_file()]
            images += own
            labels += [number] * len(own)
        if not images:
            warnings.warn(
                "class_roots: no image in any of the folders, so the data set is empty",
                UserWarning,
                stacklevel=3,
            )
        return images, labels

    def __getitem__(self, item: int) -> tuple[Any, int]:
        return self.transform(read_image(self.images[item])), self.labels[item]

    def __len__(self) -> int:
        return len(self.labels)

    def get_labels(self) -> list[int]:
        return self.labels

    def number_of_classes(self) -> int:
        return len(self.class_names)


def specs_file_of(split: str, folder: Path) -> Path:
    """The JSON file of a split.

    Raises:
        ValueError: it is not there.
    """
    path = folder / f"{split}.json"
    if not path.is_file():
        raise ValueError(f"split: expected a split with a file in {folder}, and there is no {path.name}")
    return path
