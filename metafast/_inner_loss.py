"""The losses of inner loops: their derivatives in closed form, on tensors and on Dual numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metafast import reference
from metafast._dual import value_of

#: The order is that of csrc/math/inner_loss.h.
LOSSES = ("cross_entropy", "mse")


def target(targets: Any, a: Any) -> Any:
    """Class numbers become probabilities, NaN for a task with a bad one."""
    if not isinstance(targets, Tensor) or targets.is_floating_point():
        return targets
    classes = a.shape[-1]
    own = reference.one_hot(targets, classes).to(value_of(a).dtype)
    return own + reference.nan_where_invalid(targets, classes, value_of(a))


def loss_gradient(a: Any, y: Any, loss: int) -> Any:
    """The derivative of the loss for the outputs: 2 (a - y) / (n C), or (sum(y) softmax(a) - y) / n."""
    n, outs = a.shape[-2:]
    if loss == LOSSES.index("mse"):
        return (a - y) * (2 / max(n * outs, 1))
    return (a.softmax(-1) * y.sum(-1, keepdim=True) - y) * (1 / max(n, 1))


def loss_change(a: Any, y: Any, along: Any, loss: int) -> tuple[Any, Any]:
    """Its change along a change of the outputs, and minus its mixed derivative for the targets in that direction."""
    n, outs = a.shape[-2:]
    if loss == LOSSES.index("mse"):
        change = along * (2 / max(n * outs, 1))
        return change, change
    p, scale = a.softmax(-1), 1 / max(n, 1)
    centred = (along - (p * along).sum(-1, keepdim=True)) * scale
    return p * centred * y.sum(-1, keepdim=True), centred
