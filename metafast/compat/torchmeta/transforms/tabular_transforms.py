"""Transforms of rows of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metafast.compat import absent

__getattr__ = absent(__name__)


class NumpyToTorch:
    """A NumPy array as a contiguous tensor of the same numbers."""

    def __call__(self, numpy_array: NDArray[Any]) -> Tensor:
        if not isinstance(numpy_array, np.ndarray):
            raise TypeError(f"numpy_array: expected a NumPy array, got {type(numpy_array).__name__}")
        return torch.from_numpy(numpy_array).contiguous()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
