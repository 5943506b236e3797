"""Gradient descent with a graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

from torch import Tensor, nn

from metafast.compat.learn2learn._steps import descend


class DifferentiableSGD(nn.Module):
    r"""A call puts :math:`p - \alpha g` in the place of each parameter p of a module, with its graph.

    Args:
        lr: the rate.
    """

    def __init__(self, lr: Any) -> None:
        super().__init__()
        self.lr = lr

    def forward(self, module: nn.Module, gradients: Sequence[Tensor | None] | None = None) -> None:
        """``gradients``: g for each of ``module.parameters()``, None for those that stay; None: their ``grad``."""
        if gradients is None:
            gradients = [parameter.grad for parameter in module.parameters()]
        descend(module, gradients, repeat(self.lr))
