"""Small modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metafast.compat import absent

__getattr__ = absent(__name__)

Module = TypeVar("Module", bound=nn.Module)


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, lmb: Callable[..., Any]) -> None:
        super().__init__()
        self.lmb = lmb

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.lmb(*args, **kwargs)


class Flatten(nn.Module):
    """``[n, ...] -> [n, d]``, of rows in any order in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], -1)


class Scale(nn.Module):
    """The input times a learnt ``alpha``, which broadcasts.

    Args:
        shape: of ``alpha``; None: one number.
        alpha: its initial entries.
    """

    def __init__(self, shape: int | Sequence[int] | None = None, alpha: float = 1.0) -> None:
        super().__init__()
        size = (1,) if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
        self.alpha = nn.Parameter(torch.ones(size) * alpha)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.alpha


def freeze(module: Module) -> Module:
    """Cut the parameters from their graph and let them require no gradients; the module is returned."""
    for parameter in module.parameters():
        parameter.detach_().requires_grad_(False)
    return module


def unfreeze(module: Module) -> Module:
    """Let the parameters require gradients; the module is returned."""
    return module.requires_grad_(True)
