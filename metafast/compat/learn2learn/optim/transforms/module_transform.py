"""Any module as a transform of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


class ReshapedTransform(nn.Module):
    """A module that sees gradients in another shape.

    Args:
        transform: the module.
        shape: of its inputs.
    """

    def __init__(self, transform: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.transform = transform
        self.in_shape = tuple(shape)

    def forward(self, grad: Tensor) -> Tensor:
        out: Tensor = self.transform(grad.reshape(self.in_shape))
        return out.reshape(grad.shape)


class ModuleTransform:
    """A transform for each parameter: the gradient as one row ``[1, numel]`` through a module of its own.

    Args:
        module_cls: makes the module of the row's sizes before and after it, such as ``torch.nn.Linear``.
    """

    def __init__(self, module_cls: Callable[[int, int], nn.Module]) -> None:
        self.module_cls = module_cls

    def __call__(self, parameter: Tensor) -> ReshapedTransform:
        numel = parameter.numel()
        return ReshapedTransform(self.module_cls(numel, numel), (1, numel))
