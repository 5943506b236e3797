"""Meta-SGD: MAML whose rates are learnt, one for each parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from metafast.learners.maml import MAML

#: Where the initial rate is drawn from.
INITIAL_RATES = (0.005, 0.1)


class MetaSGD(MAML):
    r"""MAML with a rate for each parameter, trained with them and shared by the steps; it may change sign.

    .. math:: \theta_{t+1} = \theta_t - \alpha \circ \nabla E_{support}(\theta_t)

    Source: Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning" (2017).

    Args:
        model: see :class:`MAML`.
        lr: the initial rate of all parameters; None: one draw from 0.005 to 0.1, as in the paper.
        steps: K, 0 or more; 1 in the paper.
        options: the others of :class:`MAML`.

    Raises:
        TypeError, ValueError: as of :class:`MAML`.
    """

    def __init__(self, model: nn.Module, lr: float | None = None, steps: int = 1, **options: Any) -> None:
        if lr is None:
            low, high = INITIAL_RATES
            lr = low + (high - low) * float(torch.rand(()))
        super().__init__(model, lr, steps, **options)
        parameters = dict(model.named_parameters())
        self.rates = nn.ParameterList(torch.full_like(parameters[name], lr) for name in self.adapt)

    @property
    def lr(self) -> Any:
        """The rates by the names of the parameters that adapt."""
        return dict(zip(self.adapt, self.rates, strict=True))
