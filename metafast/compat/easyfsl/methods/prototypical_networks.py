"""Prototypical networks."""

from __future__ import annotations

from torch import Tensor

from metafast.compat import absent
from metafast.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier

__getattr__ = absent(__name__)


class PrototypicalNetworks(FewShotClassifier):
    """Minus the distance, not squared, to the class means of the support set.

    Snell, Swersky and Zemel, *Prototypical Networks for Few-shot Learning*, 2017, has the squared distance. Under it
    are :func:`metafast.prototypes` and :func:`metafast.pairwise_distance`. The arguments are those of
    :class:`FewShotClassifier`.
    """

    def forward(self, query_images: Tensor) -> Tensor:
        features = self.compute_features(query_images)
        self._raise_error_if_features_are_multi_dimensional(features)
        return self.softmax_if_specified(self.l2_distance_to_prototypes(features))

    @staticmethod
    def is_transductive() -> bool:
        return False
