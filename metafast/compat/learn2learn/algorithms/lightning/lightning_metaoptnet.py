"""MetaOptNet as a module of PyTorch Lightning."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metafast.compat.learn2learn.algorithms.lightning.lightning_episodic_module import LightningEpisodicModule
from metafast.compat.learn2learn.algorithms.lightning.lightning_protonet import LightningPrototypicalNetworks
from metafast.compat.learn2learn.nn.metaoptnet import SVClassifier


class LightningMetaOptNet(LightningPrototypicalNetworks):
    """MetaOptNet: see :class:`SVClassifier`.

    Args:
        features: from images to features.
        loss: of logits and labels; None: cross-entropy.
        kwargs: options, with ``svm_C_reg`` and ``svm_max_iters``.
    """

    svm_C_reg = 0.1
    svm_max_iters = 15
    options = (*LightningEpisodicModule.options, "svm_C_reg", "svm_max_iters")

    def make_classifier(self) -> Any:
        return SVClassifier(C_reg=self.svm_C_reg, max_iters=self.svm_max_iters)

    def fit_classifier(self, support: Tensor, labels: Tensor, ways: int) -> None:
        self.classifier.fit_(support, labels, ways=ways)
