"""CUB-200-2011."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metafast.compat import absent
from metafast.compat.torchmeta._images import Images
from metafast.compat.torchmeta.datasets._classes import Combinations, LocalClassDataset, image_files
from metafast.data._splits import published_split

__getattr__ = absent(__name__)


class CUBClassDataset(LocalClassDataset):
    """The species of a split by their names, see :class:`CUB`."""

    folder = "cub"
    files = "CUB_200_2011/images of the archive CUB_200_2011.tgz, with a folder for each species,"
    mode = "RGB"

    def _read(self) -> tuple[list[Any], Mapping[str, Images]]:
        labels = list(published_split("cub", self.meta_split))
        return labels, image_files(self.root, "CUB_200_2011/images", labels, ".jpg")


class CUB(Combinations):
    """Tasks of CUB-200-2011 (Wah et al., 2011), with the splits of Chen et al. (2019): 100, 50 and 50 species.

    Images are Pillow's, coloured, of different sizes, and read from their files when they are asked for. ``root`` holds
    the folder ``cub`` with the archive's folder ``CUB_200_2011``; all arguments are those of ``CIFARFS``.
    """

    classes = CUBClassDataset
