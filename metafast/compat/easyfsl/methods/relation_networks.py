"""Relation networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier
from metafast.compat.easyfsl.methods.utils import compute_prototypes
from metafast.compat.easyfsl.modules.predesigned_modules import default_relation_module

__getattr__ = absent(__name__)


class RelationNetworks(FewShotClassifier):
    """A learnt measure of how much the maps of a query have to do with the mean maps of each class.

    Sung, Yang, Zhang, Xiang, Torr and Hospedales, *Learning to Compare: Relation Network for Few-Shot Learning*, 2018,
    which has sums in the place of means. :class:`metafast.learners.RelationNet` is the learner that computes the first
    convolution of each map once.

    Args:
        *args: of :class:`FewShotClassifier`; the backbone gives maps ``[n, feature_dimension, h, w]``.
        feature_dimension: channels of a map.
        relation_module: from ``[pairs, 2 feature_dimension, h, w]``, the class first, to ``[pairs, 1]``; None:
            :func:`default_relation_module`.
        **kwargs: of :class:`FewShotClassifier`.
    """

    def __init__(
        self,
        *args: Any,
        feature_dimension: int,
        relation_module: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.feature_dimension = feature_dimension
        self.relation_module = (
            default_relation_module(feature_dimension) if relation_module is None else relation_module
        )

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        """Take a support set: images ``[n, ...]``, labels ``[n]``.

        Raises:
            ValueError: features that are no maps ``[n, feature_dimension, h, w]``.
        """
        features = self.compute_features(support_images)
        self._validate_features_shape(features)
        self.prototypes = compute_prototypes(features, support_labels)

    def forward(self, query_images: Tensor) -> Tensor:
        features = self.compute_features(query_images)
        self._validate_features_shape(features)
        queries, classes = len(features), len(self.prototypes)
        pairs = torch.cat(
            (
                self.prototypes.expand(queries, *self.prototypes.shape),
                features.unsqueeze(1).expand(-1, classes, -1, -1, -1),
            ),
            dim=2,
        )
        scores: Tensor = self.relation_module(pairs.flatten(0, 1)).view(queries, classes)
        return self.softmax_if_specified(scores)

    def _validate_features_shape(self, features: Tensor) -> None:
        if features.dim() != 4 or features.shape[1] != self.feature_dimension:
            raise ValueError(
                f"backbone: expected features [n, {self.feature_dimension}, height, width] from it, "
                f"got {list(features.shape)}"
            )

    @staticmethod
    def is_transductive() -> bool:
        return False
