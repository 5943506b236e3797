"""Gradients of a task's loss, and the step along them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metafast.compat._steps import stepped
from metafast.compat.learn2learn.utils import paired, update_module

_UNUSED = "to not have been used in the graph"


def gradients(
    loss: Tensor,
    parameters: Sequence[Tensor],
    *,
    create_graph: bool,
    retain_graph: bool,
    allow_unused: bool,
    allow_nograd: bool,
) -> list[Tensor | None]:
    """Of the loss for each parameter; None for those that require none, and for unused ones, where these are allowed.

    Raises:
        RuntimeError: such parameters where they are not; the graph of the loss can still be used if the parameters
            require no gradients.
    """
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if len(wanted) < len(parameters) and not allow_nograd:
        raise RuntimeError(
            f"{len(parameters) - len(wanted)} of {len(parameters)} parameters do not require gradients: "
            "allow_nograd=True leaves them as they are"
        )
    if not wanted:
        return [None] * len(parameters)
    try:
        found = torch.autograd.grad(
            loss, wanted, retain_graph=retain_graph, create_graph=create_graph, allow_unused=allow_unused
        )
    except RuntimeError as error:
        if _UNUSED not in str(error):
            raise
        raise RuntimeError(
            "the loss does not depend on all parameters: allow_unused=True leaves the others as they are"
        ) from error
    rest = iter(found)
    return [next(rest) if parameter.requires_grad else None for parameter in parameters]


def descend(module: nn.Module, grads: Sequence[Tensor | None], rates: Iterable[Any]) -> nn.Module:
    """Put ``p - rate g`` in the place of each parameter that has a gradient."""
    memo = {}
    for (parameter, grad), rate in zip(paired(module, grads, "grads"), rates, strict=False):
        if grad is not None:
            memo[parameter] = stepped(parameter, grad, rate)
    return update_module(module, memo=memo)
