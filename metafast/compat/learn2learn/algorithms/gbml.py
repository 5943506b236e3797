"""Gradient-based meta-learning with a transform of the gradients: Meta-Curvature, KFO and their kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat.learn2learn._steps import gradients
from metafast.compat.learn2learn.optim.parameter_update import ParameterUpdate
from metafast.compat.learn2learn.optim.update_rules import DifferentiableSGD
from metafast.compat.learn2learn.utils import clone_module

__getattr__ = absent(__name__)


class GBML(nn.Module):
    r"""A module that adapts along transformed gradients: :math:`p \leftarrow p - \alpha\, T_p(\nabla_p E)`.

    Args:
        module: the module.
        transform: from a parameter to the module :math:`T_p`, or to None for the gradient as it is.
        lr: the rate, of the transforms too where they adapt.
        adapt_transform: the transforms' own parameters take a step before each step of the module but the first.
        first_order: take the gradients of the steps for constants.
        allow_unused: parameters that the loss does not depend on stay as they are.
        allow_nograd: parameters that require no gradients stay as they are.
        kwargs: ``compute_update``, a :class:`ParameterUpdate` in place of a new one.

    Raises:
        TypeError: other keyword arguments.
    """

    def __init__(
        self,
        module: nn.Module,
        transform: Callable[[Tensor], nn.Module | None],
        lr: float = 1.0,
        adapt_transform: bool = False,
        first_order: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        given = kwargs.pop("compute_update", None)
        if kwargs:
            raise TypeError(f"kwargs: expected compute_update or nothing, got {', '.join(kwargs)}")
        self.module = module
        self.transform = transform
        self.adapt_transform = adapt_transform
        self.lr = lr
        self.first_order = first_order
        self.allow_unused = allow_unused
        self.allow_nograd = allow_nograd
        self.compute_update = ParameterUpdate(module.parameters(), transform) if given is None else given
        self.diff_sgd = DifferentiableSGD(lr)
        self._params_updated = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def clone(
        self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        adapt_transform: bool | None = None,
    ) -> GBML:
        """The same with copies of module and transforms that keep their graph; None: as this learner was made."""
        return GBML(
            clone_module(self.module),
            self.transform,
            lr=self.lr,
            adapt_transform=self.adapt_transform if adapt_transform is None else adapt_transform,
            first_order=self.first_order if first_order is None else first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
            compute_update=clone_module(self.compute_update),
        )

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_nograd: bool | None = None,
        allow_unused: bool | None = None,
    ) -> None:
        """One step on the parameters of ``module``; None: as the learner was made.

        Raises:
            RuntimeError: parameters without a gradient that are not allowed; the module is as it was.
        """
        second_order = not (self.first_order if first_order is None else first_order)
        unused = self.allow_unused if allow_unused is None else allow_unused
        nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        if self.adapt_transform and self._params_updated:
            slopes = gradients(
                loss,
                list(self.compute_update.parameters()),
                create_graph=second_order,
                # The loss goes backward once more, for the module.
                retain_graph=True,
                allow_unused=unused,
                allow_nograd=False,
            )
            self.diff_sgd(self.compute_update, slopes)
            self._params_updated = False
        keep = second_order or self.adapt_transform
        updates = self.compute_update(
            loss,
            self.module.parameters(),
            create_graph=keep,
            retain_graph=keep,
            allow_unused=unused,
            allow_nograd=nograd,
        )
        self.diff_sgd(self.module, updates)
        self._params_updated = True
