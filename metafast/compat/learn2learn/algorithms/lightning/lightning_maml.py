"""MAML as a module of PyTorch Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from metafast.compat.learn2learn.algorithms.lightning.lightning_episodic_module import (
    LightningEpisodicModule,
    recording,
    support_rows,
)
from metafast.compat.learn2learn.algorithms.maml import MAML
from metafast.compat.learn2learn.utils import accuracy


class LightningMAML(LightningEpisodicModule):
    """MAML: see :class:`MAML`.

    Args:
        model: the module.
        loss: of outputs and labels; None: cross-entropy.
        kwargs: options, with ``adaptation_steps`` and ``adaptation_lr``.

    Raises:
        ValueError: other ways in training than in testing.
    """

    adaptation_steps = 1
    adaptation_lr = 0.1
    options = (*LightningEpisodicModule.options, "adaptation_lr", "adaptation_steps")

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.train_ways != self.test_ways:
            raise ValueError(f"test_ways: expected {self.train_ways}, as train_ways, got {self.test_ways}")
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.model = MAML(model, lr=self.adaptation_lr)

    def meta_learn(
        self, batch: Any, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        with recording():
            data, labels = (value.clone() for value in batch)
            return self.adapted(self.model.clone(), data, labels, ways, shots, queries)

    def adapted(
        self, learner: MAML, data: Tensor, labels: Tensor, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of the queries after the steps on the support rows."""
        learner.train()
        support = support_rows(ways, shots, queries).to(data.device)
        for _ in range(self.adaptation_steps):
            learner.adapt(self.loss(learner(data[support]), labels[support]))
        predictions = learner(data[~support])
        return self.loss(predictions, labels[~support]), accuracy(predictions, labels[~support])
