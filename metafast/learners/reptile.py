"""Reptile: the initial parameters move towards those that tasks adapt to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.data import Episodes
from metafast.inner_loop import OPTIMIZERS, Adapted, OptimizerState
from metafast.learners.maml import MAML
from metafast.learners.outcome import Outcome

#: Seed of the mini-batches of evaluation.
EVALUATION_SEED = 0


class Reptile(MAML):
    r"""A model that takes K optimiser steps on mini-batches of a task; the way it goes is the outer gradient.

    .. math:: g = \theta - mean_{tasks}\, \theta_K

    The gradient of ``Outcome.loss`` in the initial parameters is g, so that an outer ``SGD`` with the rate
    :math:`\epsilon` makes Reptile's step :math:`\theta + \epsilon (mean\, \theta_K - \theta)`. The value of the loss is
    that of the query rows, which have no part in the gradient. Nothing is differentiated through the steps.

    The mini-batches go through the support rows in a new order for each pass. Adam's mean square, and its number of
    steps, live on from one training call to the next (as the mean over its tasks); evaluation begins with them and
    leaves them as they are, and its mini-batches are the same in every call.

    Source: Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms" (2018), and its released code.

    Args:
        model: see :class:`MAML`.
        lr: the inner rate.
        steps: K in training; evaluation usually takes more, such as 50.
        batch_size: rows of a mini-batch, or all support rows if they are fewer.
        optimizer: of the inner steps, ``"adam"`` or ``"sgd"``.
        beta2: of Adam, whose first beta is 0.
        options: the others of :class:`MAML`, but for ``first_order`` and ``recompute``.

    Raises:
        TypeError, ValueError: as of :class:`MAML`.
    """

    inner_steps: Tensor

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        steps: int = 5,
        *,
        batch_size: int = 10,
        optimizer: str = "adam",
        beta2: float = 0.999,
        **options: Any,
    ) -> None:
        for name in ("first_order", "recompute"):
            if name in options:
                raise TypeError(f"{name}: Reptile differentiates through no step and has no such option")
        _check.sizes(batch_size=batch_size)
        _check.choice(optimizer, "optimizer", OPTIMIZERS)
        _check.number(beta2, "beta2")
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2: expected a number from 0 to below 1, got {beta2}")
        super().__init__(model, lr, steps, first_order=True, **options)
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.beta2 = beta2
        parameters = dict(model.named_parameters())
        for k, name in enumerate(self.adapt if optimizer == "adam" else ()):
            self.register_buffer(f"mean_square_{k}", torch.zeros_like(parameters[name]))
        self.register_buffer("inner_steps", torch.zeros((), dtype=torch.int64))

    def running_statistics(self) -> list[Tensor]:
        """Tensors that follow the data in training: several processes make them the mean of theirs."""
        if self.optimizer == "sgd":
            return []
        return [self.get_buffer(f"mean_square_{k}") for k in range(len(self.adapt))]

    def batches(self, rows: int, device: torch.device) -> Tensor:
        """``[K, b]``, the support rows of each step."""
        generator = None if self.training else torch.Generator().manual_seed(EVALUATION_SEED)
        size = min(self.batch_size, rows)
        passes = -(-self.steps * size // rows)
        orders = [torch.randperm(rows, generator=generator) for _ in range(passes)]
        drawn = torch.cat(orders) if orders else torch.empty(0, dtype=torch.int64)
        return drawn[: self.steps * size].reshape(self.steps, size).to(device)

    def adapted(self, episodes: Episodes, **options: Any) -> Adapted:
        given: dict[str, Any] = {"batches": self.batches(episodes.support_x.shape[1], episodes.device)}
        if self.optimizer == "adam":
            squares = dict(zip(self.adapt, self.running_statistics(), strict=True))
            slots = {name: (torch.zeros_like(value), value) for name, value in squares.items()}
            given |= {"optimizer": "adam", "betas": (0.0, self.beta2)}
            given["state"] = OptimizerState("adam", int(self.inner_steps), slots)
        with torch.no_grad():
            return super().adapted(episodes, **{**given, **options})

    def forward(self, episodes: Episodes) -> Outcome:
        with torch.no_grad():
            adapted = self.adapted(episodes)
            loss, outputs = self.outcome(adapted, episodes)
        if not self.training:
            return Outcome(loss, outputs)
        if adapted.state is not None:
            self._keep(adapted.state)
        own = dict(self.model.named_parameters())
        # Zero, with the gradient g.
        ways = [
            ((own[name] - own[name].detach()) * (own[name].detach() - value.mean(0))).sum()
            for name, value in adapted.parameters.items()
        ]
        return Outcome(loss + torch.stack(ways).sum(), outputs)

    def _keep(self, state: OptimizerState) -> None:
        self.inner_steps.fill_(state.steps)
        for kept, name in zip(self.running_statistics(), self.adapt, strict=False):
            kept.copy_(state.slots[name][1].reshape(-1, *kept.shape).mean(0))
