"""Tiered ImageNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metafast.compat import absent
from metafast.compat.easyfsl.datasets.easy_set import EasySet, specs_file_of

__getattr__ = absent(__name__)

TIERED_IMAGENET_SPECS_DIR = Path("data/tiered_imagenet")


class TieredImageNet(EasySet):
    """The classes of ``data/tiered_imagenet/SPLIT.json`` in the current folder.

    Args:
        split: ``"train"``, ``"val"``, ``"test"``, or another that has such a file.
        **kwargs: of :class:`EasySet`.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, split: str, **kwargs: Any) -> None:
        super().__init__(specs_file=specs_file_of(split, TIERED_IMAGENET_SPECS_DIR), **kwargs)
