"""Gradient descent on prototypes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from metafast.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier


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
        rows = torch.cat((support, features)) if self.is_transductive() else support
        with torch.enable_grad():
            self.prototypes = self.prototypes.detach().requires_grad_()
            optimizer = torch.optim.Adam([self.prototypes], lr=self.fine_tuning_lr)
            for _ in range(self.fine_tuning_steps):
                logits = self.temperature * self._scores(rows)
                loss = self._loss(logits[: len(support)], numbers, logits[len(support) :])
                (self.prototypes.grad,) = torch.autograd.grad(loss, [self.prototypes])
                optimizer.step()
        return self.softmax_if_specified(self._scores(features), temperature=self.temperature).detach()

    @abstractmethod
    def _scores(self, features: Tensor) -> Tensor:
        """Of features by the prototypes, without the temperature."""

    @abstractmethod
    def _loss(self, support: Tensor, numbers: Tensor, queries: Tensor) -> Tensor:
        """What the prototypes descend.

        Args:
            support: logits ``[n, classes]``.
            numbers: classes of the support rows ``[n]``.
            queries: logits ``[m, classes]`` where the method is transductive.
        """
