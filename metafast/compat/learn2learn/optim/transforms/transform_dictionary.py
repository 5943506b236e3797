"""Transforms of chosen parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class TransformDictionary:
    """A transform for each parameter by a dict; the gradients of the others stay as they are.

    Args:
        dictionary: from a parameter, or a module for all of its parameters, to the transform.

    Raises:
        ValueError: a key that is neither.
    """

    def __init__(self, dictionary: Mapping[Any, Callable[..., nn.Module]]) -> None:
        self.param_to_transform: dict[Tensor, Callable[..., nn.Module]] = {}
        for key, transform in dictionary.items():
            if not isinstance(key, (nn.Module, nn.Parameter)):
                raise ValueError(
                    f"dictionary: expected modules or parameters as keys, got {type(key).__name__}"
                )
            for parameter in key.parameters() if isinstance(key, nn.Module) else (key,):
                self.param_to_transform[parameter] = transform

    def __call__(self, param: Tensor, *args: Any, **kwargs: Any) -> nn.Module | None:
        transform = self.param_to_transform.get(param)
        return None if transform is None else transform(param, *args, **kwargs)
