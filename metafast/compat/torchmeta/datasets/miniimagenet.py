"""mini-ImageNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metafast.compat import absent
from metafast.compat.torchmeta._images import Images
from metafast.compat.torchmeta.datasets._classes import Combinations, LocalClassDataset, by_name
from metafast.data import mini_imagenet

__getattr__ = absent(__name__)


class MiniImagenetClassDataset(LocalClassDataset):
    """The classes of a split by their names, see :class:`MiniImagenet`."""

    folder = "miniimagenet"
    files = "mini-imagenet-cache-train.pkl, -val.pkl and -test.pkl, or a folder of images for each class,"

    def _read(self) -> tuple[list[Any], Mapping[str, Images]]:
        data = by_name(mini_imagenet(self.root, self.meta_split, complete=False))
        return sorted(data), data


class MiniImagenet(Combinations):
    """Tasks of mini-ImageNet with the splits of Ravi and Larochelle (2017), by :func:`metafast.data.mini_imagenet`.

    Images are Pillow's, 84 x 84 and coloured, from the pickles of Ren et al., which are not let run code, or from
    folders of image files. ``root`` holds them in the folder ``miniimagenet``; all arguments are those of ``CIFARFS``.
    """

    classes = MiniImagenetClassDataset
