"""Prototypical networks as a module of PyTorch Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from metafast.compat.learn2learn.algorithms.lightning.lightning_episodic_module import (
    LightningEpisodicModule,
    support_rows,
)
from metafast.compat.learn2learn.nn.protonet import PrototypicalClassifier
from metafast.compat.learn2learn.utils import accuracy


class LightningPrototypicalNetworks(LightningEpisodicModule):
    """Prototypical networks: see :class:`PrototypicalClassifier`.

    Args:
        features: from images to features.
        loss: of logits and labels; None: cross-entropy.
        kwargs: options, with ``distance_metric``.
    """

    distance_metric = "euclidean"
    options: tuple[str, ...] = (*LightningEpisodicModule.options, "distance_metric")

    def __init__(self, features: nn.Module, loss: Callable[..., Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.features = features
        self.classifier = self.make_classifier()

    def make_classifier(self) -> Any:
        return PrototypicalClassifier(distance=self.distance_metric)

    def fit_classifier(self, support: Tensor, labels: Tensor, ways: int) -> None:
        self.classifier.fit_(support, labels)

    def meta_learn(
        self, batch: Any, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        self.features.train()
        data, labels = (value.squeeze(0) for value in batch)
        labels, order = labels.sort(stable=True)
        embeddings = self.features(data[order])
        support = support_rows(ways, shots, queries).to(labels.device)
        self.fit_classifier(embeddings[support], labels[support], ways)
        logits = self.classifier(embeddings[~support])
        return self.loss(logits, labels[~support]), accuracy(logits, labels[~support])
