"""Caltech-UCSD Birds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metafast.compat import absent
from metafast.compat.easyfsl.datasets.easy_set import EasySet, specs_file_of

__getattr__ = absent(__name__)

CUB_SPECS_DIR = Path("data/CUB")


class CUB(EasySet):
    """The classes of ``data/CUB/SPLIT.json`` in the current folder.

    Args:
        split: ``"train"``, ``"val"``, ``"test"``, or another that has such a file.
        **kwargs: of :class:`EasySet`.

    Raises:
        ValueError: there is no such file.
    """

    def __init__(self, split: str, **kwargs: Any) -> None:
        super().__init__(specs_file=specs_file_of(split, CUB_SPECS_DIR), **kwargs)
