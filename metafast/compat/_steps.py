"""The step of gradient descent that drop-in modules take for one parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def stepped(parameter: Tensor, grad: Tensor, rate: Any) -> Tensor:
    """``parameter - rate * grad`` for a number or a tensor that gets its gradient."""
    # One node of the graph for a number; on the CPU the fused update of the whole list costs more than small tensors.
    if isinstance(rate, Tensor):
        return parameter - rate * grad
    return parameter.sub(grad, alpha=rate)
