"""What all methods share."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat._class_means import class_numbers
from metafast.compat.easyfsl.methods.utils import compute_prototypes
from metafast.distance import pairwise_distance

__getattr__ = absent(__name__)


class FewShotClassifier(nn.Module):
    """A classifier that takes a support set and then gives scores to queries.

    The columns of the scores are the labels of the support set in ascending order; those of labels 0, 1, ... are the
    labels themselves.

    Args:
        backbone: from images ``[n, ...]`` to features; None: images are features.
        use_softmax: give probabilities.
        feature_centering: taken from all features.
        feature_normalization: p of the norm by which all features are then divided; None: they are not.
    """

    def __init__(
        self,
        backbone: nn.Module | None = None,
        use_softmax: bool = False,
        feature_centering: Tensor | None = None,
        feature_normalization: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone = nn.Identity() if backbone is None else backbone
        self.use_softmax = use_softmax
        self.prototypes = torch.tensor(())
        self.support_features = torch.tensor(())
        self.support_labels = torch.tensor(())
        self.feature_centering = torch.tensor(0.0) if feature_centering is None else feature_centering
        self.feature_normalization = feature_normalization

    @abstractmethod
    def forward(self, query_images: Tensor) -> Tensor:
        """Scores ``[m, classes]`` of images ``[m, ...]``."""
        raise NotImplementedError(f"{type(self).__name__}: a few-shot classifier has a method forward")

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        """Take a support set: images ``[n, ...]``, labels ``[n]``."""
        self.compute_prototypes_and_store_support_set(support_images, support_labels)

    @staticmethod
    def is_transductive() -> bool:
        """Whether the scores of a query depend on the other queries."""
        raise NotImplementedError("a few-shot classifier has a static method is_transductive")

    def compute_features(self, images: Tensor) -> Tensor:
        """Features of images ``[n, ...]``, centred and normalised if that is asked for."""
        features: Tensor = self.backbone(images) - self.feature_centering
        if self.feature_normalization is None:
            return features
        return nn.functional.normalize(features, p=self.feature_normalization, dim=1)

    def softmax_if_specified(self, output: Tensor, temperature: float = 1.0) -> Tensor:
        """The scores as they are, or the softmax of ``temperature`` times the scores."""
        return (temperature * output).softmax(-1) if self.use_softmax else output

    def l2_distance_to_prototypes(self, samples: Tensor) -> Tensor:
        r"""Minus the distance, :math:`-\|x - c_k\|`, of rows ``[m, d]`` to the prototypes: ``[m, classes]``."""
        return -pairwise_distance(samples, self.prototypes, "euclidean")

    def cosine_distance_to_prototypes(self, samples: Tensor) -> Tensor:
        r"""The cosine :math:`x \cdot c_k / \|x\| \|c_k\|` of rows ``[m, d]`` and the prototypes: ``[m, classes]``."""
        return 1 - pairwise_distance(samples, self.prototypes, "cosine")

    def compute_prototypes_and_store_support_set(
        self, support_images: Tensor, support_labels: Tensor
    ) -> None:
        """Keep the labels, the features and their class means.

        Raises:
            ValueError: features that are not ``[n, d]``.
        """
        self.support_labels = support_labels
        self.support_features = self.compute_features(support_images)
        self._raise_error_if_features_are_multi_dimensional(self.support_features)
        self.prototypes = compute_prototypes(self.support_features, support_labels)

    def _class_numbers(self) -> Tensor:
        """The place of each support label among the prototypes."""
        return class_numbers(self.support_labels)[0]

    @staticmethod
    def _raise_error_if_features_are_multi_dimensional(features: Tensor) -> None:
        if features.dim() != 2:
            raise ValueError(f"backbone: expected features [n, d] from it, got {list(features.shape)}")
