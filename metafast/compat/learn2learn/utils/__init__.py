"""Copies and updates of modules that keep their graph."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.distributions import Distribution

from metafast.compat import absent

__getattr__ = absent(__name__)

Kind = TypeVar("Kind")


def magic_box(x: Any) -> Any:
    r"""DiCE's operator :math:`\exp(x - \bot x)`: 1, with the gradient of ``x``; what is no tensor is returned as it is.

    Foerster et al., *DiCE: The Infinitely Differentiable Monte Carlo Estimator*, 2018.
    """
    return (x - x.detach()).exp() if isinstance(x, Tensor) else x


def clone_parameters(param_list: Iterable[Tensor]) -> list[Tensor]:
    """Copies of tensors, with their graph."""
    return [param.clone() for param in param_list]


def clone_named_parameters(param_dict: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Copies of a dict's tensors, with their graph."""
    return {name: param.clone() for name, param in param_dict.items()}


def clone_module(module: Kind, memo: dict[Any, Any] | None = None) -> Kind:
    """A copy of a module whose parameters are ``torch.clone`` of the module's: gradients flow back to it.

    Buffers are the module's own, as the running statistics of BatchNorm, but for those that require gradients. Tensors
    and modules that are registered twice stay one. What is no module is returned as it is.

    Args:
        module: the module.
        memo: what is copied already, for modules that share tensors; one dict for several calls.
    """
    return module if not isinstance(module, nn.Module) else _clone(module, {} if memo is None else memo)


def _clone(module: Any, memo: dict[Any, Any]) -> Any:
    # The entries hold what they are copies of, whose ids are not used again meanwhile.
    if id(module) in memo:
        return memo[id(module)][1]
    compiled = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
    if isinstance(module, compiled):
        warnings.warn(
            "a module of torch.compile has no second derivative: the clone is one of the module before it was compiled",
            stacklevel=2,
        )
        return _clone(module._orig_mod, memo)
    clone = module.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    memo[id(module)] = (module, clone)
    copied = clone.__dict__
    parameters = copied["_parameters"] = copied["_parameters"].copy()
    for name, value in parameters.items():
        if value is not None:
            parameters[name] = _clone_tensor(value, memo)
    buffers = copied["_buffers"] = copied["_buffers"].copy()
    for name, value in buffers.items():
        if value is not None and value.requires_grad:
            buffers[name] = _clone_tensor(value, memo)
    modules = copied["_modules"] = copied["_modules"].copy()
    for name, value in modules.items():
        if isinstance(value, nn.Module):
            modules[name] = _clone(value, memo)
    if isinstance(clone, nn.RNNBase):
        clone._init_flat_weights()
    return clone


def _clone_tensor(value: Tensor, memo: dict[Any, Any]) -> Tensor:
    key = id(value)
    if key not in memo:
        memo[key] = (value, value.clone())
    copied: Tensor = memo[key][1]
    return copied


def detach_module(module: Any, keep_requires_grad: bool = False) -> None:
    """Cut a cloned module's parameters, and buffers with a graph, from their graph, in place.

    Args:
        module: the module; anything else is left alone.
        keep_requires_grad: what required gradients does so again, as a leaf.
    """
    if not isinstance(module, nn.Module):
        return
    for child in module.modules():
        for value in (*child._parameters.values(), *child._buffers.values()):
            if value is not None and value.requires_grad:
                value.detach_()
                value.requires_grad_(keep_requires_grad)


def update_module(
    module: nn.Module, updates: Sequence[Tensor | None] | None = None, memo: dict[Any, Any] | None = None
) -> nn.Module:
    r"""Put :math:`p + u` in the place of each parameter p of a module, with its graph.

    Tensors that are registered twice stay one; the flat weights of an RNN are made anew.

    Args:
        module: the module, changed in place.
        updates: u for each of ``module.parameters()``, None for those that stay; None: the tensors' attributes
            ``update``, of buffers too, which are None afterwards.
        memo: what stands in whose place already.

    Returns:
        The module.
    """
    memo = {} if memo is None else memo
    if updates is not None:
        for param, update in paired(module, updates, "updates"):
            param.update = update
    for child in module.modules():
        changed = _replace(child._parameters, memo)
        changed = _replace(child._buffers, memo) or changed
        if changed and isinstance(child, nn.RNNBase):
            child._init_flat_weights()
    return module


def _replace(values: dict[str, Any], memo: dict[Any, Any]) -> bool:
    changed = False
    for name, value in values.items():
        if value is None:
            continue
        if value not in memo:
            update = getattr(value, "update", None)
            if update is None:
                continue
            value.update = None
            memo[value] = value + update
        values[name] = memo[value]
        changed = True
    return changed


def paired(module: nn.Module, values: Sequence[Any], name: str) -> list[tuple[Any, Any]]:
    """A module's parameters, each with its value; as the original, a warning where their numbers differ."""
    parameters = list(module.parameters())
    if len(parameters) != len(values):
        warnings.warn(
            f"{name}: expected {len(parameters)}, one for each parameter, got {len(values)}; the rest stays as it is",
            stacklevel=3,
        )
    return list(zip(parameters, values, strict=False))


def clone_distribution(dist: Distribution) -> Distribution:
    """A copy of a distribution: its tensors and modules keep their graph."""
    clone = copy.copy(dist)
    for name, item in vars(dist).items():
        copied: Any
        if isinstance(item, Tensor):
            copied = item.clone()
        elif isinstance(item, nn.Module):
            copied = clone_module(item)
        elif isinstance(item, Distribution):
            copied = clone_distribution(item)
        else:
            copied = copy.deepcopy(item)
        clone.__dict__[name] = copied
    return clone


def detach_distribution(dist: Distribution) -> Distribution:
    """Cut a distribution's tensors and modules from their graph, in place; it is returned."""
    for name, item in vars(dist).items():
        if isinstance(item, Tensor):
            dist.__dict__[name] = item.detach()
        elif isinstance(item, nn.Module):
            detach_module(item)
        elif isinstance(item, Distribution):
            detach_distribution(item)
    return dist


def accuracy(preds: Tensor, targets: Tensor) -> Tensor:
    """The share of rows of ``preds [n, C]`` whose largest entry is that of ``targets [n]``, a 0-d float tensor."""
    return (preds.argmax(dim=1) == targets).sum().float() / preds.size(0)


def flatten_config(args: Any, prefix: str | None = None) -> dict[str | None, Any]:
    """One dict of nested dicts, dataclasses and namespaces, its keys joined by dots."""
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if dataclasses.is_dataclass(args) and not isinstance(args, type):
        args = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    if not isinstance(args, dict):
        return {prefix: args}
    flat: dict[str | None, Any] = {}
    for name, value in args.items():
        flat |= flatten_config(value, name if prefix is None else f"{prefix}.{name}")
    return flat
