"""Nested containers of tensors, and copies of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metafast.compat import absent

__all__ = ["flatten", "get_func_params"]


def flatten(x: Any) -> list[Any]:
    """What is in nested lists, tuples, sets and values of dicts, in their order; of anything else a list of it."""
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, (list, tuple, set)):
        return [x]
    return [leaf for entry in x for leaf in flatten(entry)]


def get_func_params(
    module: nn.Module, device: torch.device | str | None = None, safe_copy: bool = True
) -> list[Tensor]:
    """The parameters of a module as leaves of a new graph, each requiring a gradient if it does in the module.

    Args:
        module: a parameter that is registered twice comes once.
        device: to move them to; None: they stay where they are.
        safe_copy: copy the values; False: share the memory with the module's.
    """
    return [_copy_tensor(p, safe_copy, device) for p in module.parameters()]


def _copy_tensor(t: Tensor, safe_copy: bool, device: torch.device | str | None = None) -> Tensor:
    t_copy = t.detach()
    if safe_copy:
        t_copy = t_copy.clone()
    if device is not None:
        t_copy = t_copy.to(device)
    return t_copy.requires_grad_(t.requires_grad)


def _recursive_copy_and_cast(target: Any, device: torch.device | str | None) -> Any:
    return _recursive_map(target, lambda x: _copy_tensor(x, True, device) if torch.is_tensor(x) else x)


def _recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    """The same nested lists, tuples, sets and dicts, with ``map_fn`` of everything else."""
    if isinstance(target, dict):
        return type(target)({key: _recursive_map(value, map_fn) for key, value in target.items()})
    if isinstance(target, (list, tuple, set)):
        return type(target)(_recursive_map(value, map_fn) for value in target)
    return map_fn(target)


__getattr__ = absent(__name__)
