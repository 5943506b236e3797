"""Model-agnostic meta-learning: clone, adapt, evaluate, go backward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat.learn2learn._steps import descend, gradients
from metafast.compat.learn2learn.algorithms.base_learner import BaseLearner
from metafast.compat.learn2learn.utils import clone_module, update_module

__getattr__ = absent(__name__)


def maml_update(model: nn.Module, lr: Any, grads: Sequence[Tensor | None] | None = None) -> nn.Module:
    r"""Put :math:`p - \alpha g` in the place of each parameter p of a module, with its graph.

    Args:
        model: the module, changed in place.
        lr: the rate, a number or a tensor.
        grads: g for each of ``model.parameters()``, None for those that stay; None: :func:`update_module`'s
            attributes ``update``.

    Returns:
        The module.
    """
    return update_module(model) if grads is None else descend(model, grads, repeat(lr))


class MAML(BaseLearner):
    r"""Model-agnostic meta-learning of any module, one task at a time.

    A task is a :meth:`clone`, some calls of :meth:`adapt`, a loss of the clone's outputs and its ``backward``, which
    reaches the original. Finn, Abbeel and Levine, 2017. All tasks of a batch at once:
    :class:`metafast.learners.MAML`.

    Args:
        model: the module.
        lr: the rate of the steps.
        first_order: take the gradients of the steps for constants.
        allow_unused: parameters that the loss does not depend on stay as they are; None: as ``allow_nograd``.
        allow_nograd: parameters that require no gradients stay as they are.
    """

    module: nn.Module

    def __init__(
        self,
        model: nn.Module,
        lr: Any,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__(model)
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One step of gradient descent on the parameters of ``module``; None: as the learner was made.

        Raises:
            RuntimeError: parameters without a gradient that are not allowed; the module is as it was.
        """
        second_order = not (self.first_order if first_order is None else first_order)
        grads = gradients(
            loss,
            list(self.module.parameters()),
            create_graph=second_order,
            retain_graph=second_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
        )
        self.module = maml_update(self.module, self.lr, grads)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> MAML:
        """A learner around :func:`clone_module` of the module; None: as this learner was made."""
        return MAML(
            clone_module(self.module),
            lr=self.lr,
            first_order=self.first_order if first_order is None else first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
        )
