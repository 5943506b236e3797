"""A layer that computes with transformed parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class ParameterTransform(nn.Module):
    """A layer each of whose parameters goes through a module of its own in every call.

    Args:
        module: the layer, with parameters of its own only.
        transform: from a parameter to its module.

    Raises:
        ValueError: a parameter of a submodule.
    """

    def __init__(self, module: nn.Module, transform: Callable[[Tensor], nn.Module]) -> None:
        super().__init__()
        transforms = {}
        for name, parameter in module.named_parameters():
            if "." in name:
                raise ValueError(f"module: expected a layer without submodules, got the parameter {name}")
            transforms[name] = transform(parameter)
        self.module = module
        self.transform = transform
        self.parameter_transforms = nn.ModuleDict(transforms)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = {
            name: module(getattr(self.module, name)) for name, module in self.parameter_transforms.items()
        }
        return functional_call(self.module, values, args, kwargs)

    def meta_parameters(self) -> Iterator[Tensor]:
        """Those of the transforms."""
        yield from self.parameter_transforms.parameters()
