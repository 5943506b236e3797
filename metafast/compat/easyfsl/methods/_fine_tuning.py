"""Gradient descent on prototypes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from metafast.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier
from metafast.prototype import prototypical_loss


class FineTuning(FewShotClassifier):
    """A classifier whose prototypes descend a loss by Adam before queries are classified, with the backbone frozen.

    They stay where they end, so that another call goes on from there.
    """

    def __init__(
        self, *args: Any, fine_tuning_steps: int, fine_tuning_lr: float, temperature: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.backbone.requires_grad_(False)
        self.fine_tuning_steps = fine_tuning_steps
        self.fine_tuning_lr = fine_tuning_lr
        self.temperature = temperature

    def forward(self, query_images: Tensor) -> Tensor:
        features = self.compute_features(query_images).detach()
        support, numbers = self.support_features.detach(), self._class_numbers()
        with torch.enable_grad():
            self.prototypes = self.prototypes.detach().requires_grad_()
            optimizer = torch.optim.Adam([self.prototypes], lr=self.fine_tuning_lr)
            for _ in range(self.fine_tuning_steps):
                loss = self._loss(support, numbers, features)
                (self.prototypes.grad,) = torch.autograd.grad(loss, [self.prototypes])
                optimizer.step()
        return self.softmax_if_specified(self._scores(features), temperature=self.temperature).detach()

    @abstractmethod
    def _scores(self, features: Tensor) -> Tensor:
        """Of features by the prototypes, without the temperature."""

    @abstractmethod
    def _loss(self, support: Tensor, numbers: Tensor, queries: Tensor) -> Tensor:
        """What the prototypes descend: ``support [n, d]``, its class numbers ``[n]``, ``queries [m, d]``."""

    def _support_loss(self, support: Tensor, numbers: Tensor, metric: str) -> Tensor:
        """The mean cross-entropy of support rows by the prototypes, at the temperature."""
        classes = len(self.prototypes)
        # Of a support set of one row each, the prototypes themselves, it is the prototypical loss.
        own = torch.arange(classes, device=numbers.device)
        return prototypical_loss(
            self.prototypes, own, support, numbers, classes, metric, temperature=self.temperature
        )[0]
