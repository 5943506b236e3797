"""Meta-SGD: MAML with a learnt rate for each entry of each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat.learn2learn._steps import descend
from metafast.compat.learn2learn.algorithms.base_learner import BaseLearner
from metafast.compat.learn2learn.utils import clone_module, clone_parameters

__getattr__ = absent(__name__)


def meta_sgd_update(
    model: nn.Module, lrs: Sequence[Tensor] | None = None, grads: Sequence[Tensor | None] | None = None
) -> nn.Module:
    r"""Put :math:`p - \alpha \circ g` in the place of each parameter p of a module, with its graph.

    Args:
        model: the module, changed in place.
        lrs: the rates, each like its parameter; None: the parameters' attributes ``_lr``.
        grads: g for each of ``model.parameters()``, None for those that stay; None: the parameters' ``grad``.

    Returns:
        The module.
    """
    if lrs is None or grads is None:
        parameters = list(model.parameters())
        lrs = [getattr(parameter, "_lr", None) for parameter in parameters]  # type: ignore[misc]
        grads = [None if lr is None else p.grad for p, lr in zip(parameters, lrs, strict=True)]
        for parameter, lr in zip(parameters, lrs, strict=True):
            if lr is not None:
                parameter.grad = parameter._lr = None  # type: ignore[attr-defined]
    return descend(model, grads, lrs)


class MetaSGD(BaseLearner):
    """Meta-SGD of any module, one task at a time: a task is as with :class:`MAML`.

    Li, Zhou, Chen and Li, *Meta-SGD: Learning to Learn Quickly for Few-Shot Learning*, 2017.

    Args:
        model: the module.
        lr: all rates at the beginning.
        first_order: take the gradients of the steps for constants.
        lrs: the rates, each like its parameter; None: parameters ``lr``.
    """

    module: nn.Module

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        first_order: bool = False,
        lrs: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(model)
        if lrs is None:
            lrs = nn.ParameterList(torch.full_like(p, lr) for p in model.parameters())  # type: ignore[assignment]
        self.lrs: Any = lrs
        self.first_order = first_order

    def clone(self) -> MetaSGD:
        """A learner around :func:`clone_module` of the module, with copies of the rates that keep their graph."""
        return MetaSGD(
            clone_module(self.module), lrs=clone_parameters(self.lrs), first_order=self.first_order
        )

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One step along the gradients of ``loss``, each entry with its rate.

        Raises:
            RuntimeError: parameters that require no gradients, or that the loss does not depend on.
        """
        second_order = not (self.first_order if first_order is None else first_order)
        grads = torch.autograd.grad(
            loss, list(self.module.parameters()), retain_graph=second_order, create_graph=second_order
        )
        self.module = meta_sgd_update(self.module, self.lrs, grads)
