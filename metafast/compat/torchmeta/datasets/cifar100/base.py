"""CIFAR-100."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from metafast.compat import absent
from metafast.compat.torchmeta._images import Images
from metafast.compat.torchmeta.datasets._classes import LocalClassDataset, by_name
from metafast.data import ImageClasses
from metafast.data._splits import published_split

__getattr__ = absent(__name__)


class CIFAR100ClassDataset(LocalClassDataset):
    """Classes of CIFAR-100, whose labels are lists of superclass and class."""

    folder = "cifar100"
    files = "cifar-100-python.tar.gz, or its folder cifar-100-python,"
    read: ClassVar[Callable[..., ImageClasses]]

    def _read(self) -> tuple[list[Any], Mapping[str, Images]]:
        images = by_name(type(self).read(self.root, self.meta_split, complete=False))
        superclass = {}
        for part in ("trainval", "test"):
            for pair in published_split("cifar_fs", part):
                above, name = pair.split("/")
                superclass[name] = above
        labels = sorted([superclass[name], name] for name in images)
        return labels, {"/".join(label): images[label[1]] for label in labels}

    def target(self, label: Any) -> tuple[str, str]:
        return tuple(label)
