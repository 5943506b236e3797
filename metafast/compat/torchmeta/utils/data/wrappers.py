"""All samples of all classes as one data set."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from metafast.compat import absent
from metafast.compat.torchmeta._chain import Transform
from metafast.compat.torchmeta._images import opened
from metafast.compat.torchmeta.utils.data.dataset import CombinationMetaDataset

__getattr__ = absent(__name__)


class NonEpisodicWrapper(Dataset[Any]):
    """The images of a ``CombinationMetaDataset`` as a data set for training without tasks.

    Class comes after class, and then all of them again for each class augmentation. A target is a pair of the label and
    the number of the augmentation, 0 for none.

    Args:
        dataset: whose class data set has ``labels``, ``data`` by label, ``num_classes`` and ``transform``.
        target_transform: of targets.

    Raises:
        ValueError: ``dataset`` is no ``CombinationMetaDataset``.
    """

    def __init__(self, dataset: CombinationMetaDataset, target_transform: Transform | None = None) -> None:
        if not isinstance(dataset, CombinationMetaDataset):
            raise ValueError(f"dataset: expected a CombinationMetaDataset, got {type(dataset).__name__}")
        self.dataset = dataset
        self.target_transform = target_transform
        classes = dataset.dataset
        self._labels = ["/".join(label) if isinstance(label, list) else label for label in classes.labels]
        self._ends = np.cumsum([len(classes.data[label]) for label in self._labels])

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """
        Raises:
            IndexError: no sample has this number.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected a number below {len(self)}, got {index}")
        classes = self.dataset.dataset
        turn, row = divmod(index, self.num_samples)
        number = int(self._ends.searchsorted(row, side="right"))
        label = self._labels[number]
        image = opened(classes.data[label], row - (int(self._ends[number - 1]) if number else 0))
        transform = classes.get_transform(classes.num_classes * turn + number, classes.transform)
        target: Any = (label, turn)
        return (
            image if transform is None else transform(image),
            target if self.target_transform is None else self.target_transform(target),
        )

    @property
    def num_samples(self) -> int:
        """The samples that are not augmented."""
        return int(self._ends[-1])

    @property
    def num_classes(self) -> int:
        """The classes, those of the augmentations too."""
        return len(self._labels) * (len(self.dataset.dataset.class_augmentations) + 1)

    def __len__(self) -> int:
        return self.num_samples * (len(self.dataset.dataset.class_augmentations) + 1)
