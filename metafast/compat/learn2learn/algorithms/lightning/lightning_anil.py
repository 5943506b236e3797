"""ANIL as a module of PyTorch Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from metafast.compat.learn2learn.algorithms.lightning.lightning_episodic_module import recording
from metafast.compat.learn2learn.algorithms.lightning.lightning_maml import LightningMAML


class LightningANIL(LightningMAML):
    """Almost no inner loop: only the classifier adapts.

    Args:
        features: the shared module.
        classifier: the one that adapts, of its outputs.
        loss: of outputs and labels; None: cross-entropy.
        kwargs: options, with ``adaptation_steps`` and ``adaptation_lr``.

    Raises:
        ValueError: other ways in training than in testing.
    """

    def __init__(
        self,
        features: nn.Module,
        classifier: nn.Module,
        loss: Callable[..., Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(classifier, loss, **kwargs)
        # The names of the original, which its state dicts have.
        self.features = features
        self.classifier = self.model
        del self.model

    def meta_learn(
        self, batch: Any, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        self.features.train()
        with recording():
            data, labels = (value.clone() for value in batch)
            return self.adapted(self.classifier.clone(), self.features(data), labels, ways, shots, queries)
