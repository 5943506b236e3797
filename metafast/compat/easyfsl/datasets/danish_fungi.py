"""Danish Fungi 2020."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metafast.compat import absent
from metafast.compat.easyfsl.datasets._images import pandas, read_image, read_table
from metafast.compat.easyfsl.datasets.default_configs import default_transform
from metafast.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset

__getattr__ = absent(__name__)

WHOLE_DANISH_FUNGI_SPECS_FILE = Path("data/fungi/DF20_metadata.csv")


class DanishFungi(FewShotDataset):
    """The images ``root/image_path`` of a CSV file, whose classes are its ``scientific_name``.

    Args:
        root: folder of the images.
        specs_file: the CSV file, with the columns ``image_path`` and ``scientific_name``.
        image_size: height and width.
        transform: from a Pillow image of three channels to what is given; None: :func:`default_transform`.
        training: of that transform.
        image_file_extension: that of the files, where the CSV file has ``.JPG``.

    Raises:
        FileNotFoundError: no such CSV file.
        ValueError: a column that is not there.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        specs_file: str | os.PathLike[str] = WHOLE_DANISH_FUNGI_SPECS_FILE,
        image_size: int = 84,
        transform: Callable[[Any], Any] | None = None,
        training: bool = False,
        image_file_extension: str = ".JPG",
    ) -> None:
        self.root = Path(root)
        self.image_file_extension = image_file_extension
        self._specs_file = Path(specs_file)
        rows = read_table(self._specs_file, "image_path", "scientific_name")
        numbers = {name: k for k, name in enumerate(dict.fromkeys(name for _, name in rows))}
        self.class_names = list(numbers)
        self.transform = transform or default_transform(image_size, training)
        self._images = [self.root / path.replace(".JPG", image_file_extension) for path, _ in rows]
        self._labels = [numbers[name] for _, name in rows]

    def load_specs(self, specs_file: Path) -> Any:
        """A pandas DataFrame of the CSV file, with the column ``label`` besides.

        Raises:
            ImportError: pandas is not installed.
        """
        table = pandas().read_csv(specs_file)
        names = list(table["scientific_name"])
        numbers = {name: k for k, name in enumerate(dict.fromkeys(names))}
        paths = [path.replace(".JPG", self.image_file_extension) for path in table["image_path"]]
        return table.assign(image_path=paths, label=[numbers[name] for name in names])

    @property
    def data(self) -> Any:
        """:meth:`load_specs` of this data set."""
        return self.load_specs(self._specs_file)

    def __getitem__(self, item: int) -> tuple[Any, int]:
        return self.transform(read_image(self._images[item])), self._labels[item]

    def __len__(self) -> int:
        return len(self._labels)

    def get_labels(self) -> list[int]:
        return self._labels
