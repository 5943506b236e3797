"""SimpleShot."""

from __future__ import annotations

from torch import Tensor

from metafast.compat import absent
from metafast.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier

__getattr__ = absent(__name__)


class SimpleShot(FewShotClassifier):
    """The cosine of the angle to the class means of the support set.

    Wang, Chao, Weinberger and van der Maaten, *SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot
    Learning*, 2019. The arguments are those of :class:`FewShotClassifier`; the paper's centring and normalisation are
    ``feature_centering`` and ``feature_normalization=2``.
    """

    def forward(self, query_images: Tensor) -> Tensor:
        features = self.compute_features(query_images)
        self._raise_error_if_features_are_multi_dimensional(features)
        return self.softmax_if_specified(self.cosine_distance_to_prototypes(features))

    @staticmethod
    def is_transductive() -> bool:
        return False
