"""FC100."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metafast.compat import absent
from metafast.compat.torchmeta._images import Images
from metafast.compat.torchmeta.datasets._classes import Combinations
from metafast.compat.torchmeta.datasets.cifar100.base import CIFAR100ClassDataset
from metafast.data import fc100
from metafast.data._splits import published_split

__getattr__ = absent(__name__)


class FC100ClassDataset(CIFAR100ClassDataset):
    """The classes of a split, see :class:`FC100`."""

    read = fc100

    def _read(self) -> tuple[list[Any], Mapping[str, Images]]:
        labels, data = super()._read()
        order = published_split("fc100", self.meta_split)
        return sorted(labels, key=lambda label: (order.index(label[0]), label[1])), data


class FC100(Combinations):
    """Tasks of FC100 (Oreshkin et al., 2018): 60, 20 and 20 classes of CIFAR-100, parted by superclass.

    Files, arguments and errors are those of ``CIFARFS``.
    """

    classes = FC100ClassDataset
