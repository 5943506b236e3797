"""An optimiser that is a module, whose own parameters are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metafast.compat.learn2learn.utils import update_module


class LearnableOptimizer(nn.Module):
    r"""A step puts :math:`p - \alpha\, T_p(g)` in the place of each parameter p of a model, g its ``grad``.

    The new parameters hang on those of the transforms alone, so that the next loss's ``backward`` gives the transforms
    their gradients, as for hyper-gradient descent.

    Args:
        model: the model; its parameters become tensors with a graph, which it keeps as its own.
        transform: from a parameter to the module :math:`T_p`, or to None for the gradient as it is.
        lr: the rate.

    Raises:
        TypeError: ``model`` is no module.
    """

    def __init__(
        self, model: nn.Module, transform: Callable[[Tensor], nn.Module | None], lr: float = 1.0
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        # Within a dict the model is no part of this module.
        self.info = {"model": model}
        self.transforms = nn.ModuleList(transform(p) for p in model.parameters())  # type: ignore[misc]
        self.lr = lr

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the model; ``closure`` computes gradients before it, and its result is returned."""
        model = self.info["model"]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, transform in zip(model.parameters(), self.transforms, strict=True):
            if _slope(parameter) is not None:
                slope = parameter.grad.detach()  # type: ignore[union-attr]
                update = -self.lr * (slope if transform is None else transform(slope))
                parameter.detach_()
                parameter.update = update  # type: ignore[attr-defined]
        update_module(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.retain_grad()
        return loss

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Set the gradients of the model's parameters to zero."""
        for parameter in self.info["model"].parameters():
            if _slope(parameter) is not None:
                parameter.grad = None if set_to_none else torch.zeros_like(parameter)


def _slope(parameter: Tensor) -> Tensor | None:
    """The gradient, without a warning where there can be none."""
    return parameter.grad if parameter.is_leaf or parameter.retains_grad else None
