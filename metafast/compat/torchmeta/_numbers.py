"""Numbers that callers may give as NumPy's or as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from metafast import _check


def plain(value: Any) -> Any:
    """Python's number for one of NumPy's or a tensor of no dimensions; everything else as it is."""
    return value.item() if isinstance(value, (np.generic, Tensor)) and value.ndim == 0 else value


def count(value: Any, name: str) -> None:
    """Is it an int of 0 or more?"""
    _check.count(plain(value), name)
