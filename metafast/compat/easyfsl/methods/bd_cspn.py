"""Prototype rectification."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metafast.compat import absent
from metafast.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier
from metafast.prototype import prototypes

__getattr__ = absent(__name__)


class BDCSPN(FewShotClassifier):
    r"""Cosines to prototypes that the queries have moved.

    The queries are shifted so that their mean is that of the support rows, and each gets the label of the nearest
    prototype by the cosine. The new prototypes are the means of all rows of a class, weighted by :math:`e^{\cos(x, c)}`
    (:func:`metafast.prototypes` of soft labels). Queries are classified as they were before the shift.

    Liu, Song and Qin, *Prototype Rectification for Few-Shot Learning*, 2020. The arguments are those of
    :class:`FewShotClassifier`.
    """

    def rectify_prototypes(self, query_features: Tensor) -> None:
        """Move the prototypes by queries ``[m, d]``."""
        support, classes = self.support_features, len(self.prototypes)
        shifted = query_features + (support.mean(0, keepdim=True) - query_features.mean(0, keepdim=True))
        rows = torch.cat((support, shifted))
        cosines = self.cosine_distance_to_prototypes(rows)
        labels = torch.cat((self._class_numbers(), cosines[len(support) :].argmax(-1)))
        self.prototypes = prototypes(rows, one_hot(labels, classes) * cosines.exp(), classes)

    def forward(self, query_images: Tensor) -> Tensor:
        features = self.compute_features(query_images)
        self.rectify_prototypes(features)
        return self.softmax_if_specified(self.cosine_distance_to_prototypes(features))

    @staticmethod
    def is_transductive() -> bool:
        return True
