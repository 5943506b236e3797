"""Matching networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from metafast import _check
from metafast.attention_lstm import read_with
from metafast.compat import absent
from metafast.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier
from metafast.compat.easyfsl.modules.predesigned_modules import (
    default_matching_networks_query_encoder,
    default_matching_networks_support_encoder,
)

__getattr__ = absent(__name__)


class MatchingNetworks(FewShotClassifier):
    r"""Log-probabilities of labels, by attention to the support rows, with full context embeddings.

    With support features g in context and query features h in context,

    .. math:: \log(10^{-6} + \sum_{i: y_i = k} softmax_i(h \cdot g_i / \|g_i\|))

    A bidirectional LSTM reads the support rows in their order; its two states are added to the features. Another one
    reads them with attention for each query, as many times as there are support rows.

    Vinyals, Blundell, Lillicrap, Kavukcuoglu and Wierstra, *Matching Networks for One Shot Learning*, 2016.

    Args:
        *args: of :class:`FewShotClassifier`.
        feature_dimension: d.
        support_encoder: from ``[1, n, d]`` to a tuple whose first is ``[1, n, 2 d]``; None: an LSTM.
        query_encoder: from ``[m, 2 d]`` and a pair of states ``[m, d]`` to such a pair; None: an LSTM cell.
        **kwargs: of :class:`FewShotClassifier`.
    """

    def __init__(
        self,
        *args: Any,
        feature_dimension: int,
        support_encoder: nn.Module | None = None,
        query_encoder: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.feature_dimension = feature_dimension
        self.support_features_encoder = (
            default_matching_networks_support_encoder(feature_dimension)
            if support_encoder is None
            else support_encoder
        )
        self.query_features_encoding_cell = (
            default_matching_networks_query_encoder(feature_dimension)
            if query_encoder is None
            else query_encoder
        )
        # Of the original's, for subclasses.
        self.softmax = nn.Softmax(dim=1)
        self.contextualized_support_features = torch.tensor(())
        self.one_hot_support_labels = torch.tensor(())

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        """Take a support set: images ``[n, ...]``, labels ``[n]`` int64 from 0 to that of the last column of scores.

        Raises:
            TypeError: labels that are not int64.
            ValueError: features that are not ``[n, feature_dimension]``, another number of labels.
        """
        features = self.compute_features(support_images)
        self._validate_features_shape(features)
        _check.class_labels(support_labels, "support_labels")
        if support_labels.shape != features.shape[:1]:
            raise ValueError(
                f"support_labels: expected shape [{len(features)}], got {list(support_labels.shape)}"
            )
        self.contextualized_support_features = self.encode_support_features(features)
        self.one_hot_support_labels = one_hot(support_labels).to(features.dtype)

    def forward(self, query_images: Tensor) -> Tensor:
        features = self.compute_features(query_images)
        self._validate_features_shape(features)
        queries = self.encode_query_features(features)
        attention = (queries @ normalize(self.contextualized_support_features).T).softmax(1)
        return self.softmax_if_specified((attention @ self.one_hot_support_labels + 1e-6).log())

    def encode_support_features(self, support_features: Tensor) -> Tensor:
        """Support features ``[n, d]`` in the context of each other."""
        read: Tensor = self.support_features_encoder(support_features.unsqueeze(0))[0].squeeze(0)
        return support_features + read[:, : self.feature_dimension] + read[:, self.feature_dimension :]

    def encode_query_features(self, query_features: Tensor) -> Tensor:
        """Query features ``[m, d]`` in the context of the support set."""
        support = self.contextualized_support_features
        read = read_with(self.query_features_encoding_cell, support, query_features, len(support))
        return read.to(query_features.dtype)

    def _validate_features_shape(self, features: Tensor) -> None:
        self._raise_error_if_features_are_multi_dimensional(features)
        if features.shape[1] != self.feature_dimension:
            raise ValueError(
                f"backbone: expected {self.feature_dimension} features from it, as feature_dimension says, "
                f"got {features.shape[1]}"
            )

    @staticmethod
    def is_transductive() -> bool:
        return False
