"""The classifier of prototypical networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat._class_means import class_means as compute_prototypes
from metafast.distance import pairwise_distance

__getattr__ = absent(__name__)

EPS = 1e-8


def _normalized(x: Tensor, epsilon: float = EPS) -> Tensor:
    """Rows ``[n, d]`` divided by their lengths plus ``epsilon``."""
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + epsilon)


class PrototypicalClassifier(nn.Module):
    """Minus the distance of queries to the class means of a support set.

    Snell, Swersky and Zemel, *Prototypical Networks for Few-shot Learning*, 2017. Under it are
    :func:`metafast.prototypes` and :func:`metafast.pairwise_distance`.

    Args:
        support: features ``[n, d]``, to fit at once.
        labels: ``[n]``; logit k belongs to the k-th of the labels there are in ascending order.
        distance: ``"euclidean"``, squared; ``"cosine"``, which normalises; or a function of prototypes and queries to
            distances ``[queries, prototypes]``.
        normalize: divide prototypes and queries by their lengths.
    """

    #: Of the class the function; of a classifier, as in the original, whether it normalises.
    normalize: Any = staticmethod(_normalized)

    def __init__(
        self,
        support: Tensor | None = None,
        labels: Tensor | None = None,
        distance: str | Callable[[Tensor, Tensor], Tensor] = "euclidean",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        named = {"euclidean": self.euclidean_distance, "cosine": self.cosine_distance}
        if isinstance(distance, str) and distance not in named:
            raise ValueError(f"distance: expected euclidean, cosine or a function, got {distance!r}")
        self.distance: Callable[[Tensor, Tensor], Tensor]
        self.distance = named[distance] if isinstance(distance, str) else distance
        self.normalize = normalize or distance == "cosine"
        self.prototypes: Tensor | None = None
        if support is not None and labels is not None:
            self.fit_(support, labels)

    def fit_(self, support: Tensor, labels: Tensor) -> Tensor:
        """Take the class means of ``support [n, d]`` for the prototypes, and return them."""
        means = compute_prototypes(support, labels)
        self.prototypes = _normalized(means) if self.normalize else means
        return self.prototypes

    @staticmethod
    def cosine_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """Minus the inner products, ``[queries, prototypes]``; the cosine where rows have length 1."""
        return -(queries @ prototypes.t())

    @staticmethod
    def euclidean_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """The squared distances, ``[queries, prototypes]``."""
        return pairwise_distance(queries, prototypes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[m, classes]`` of features ``[m, d]``.

        Raises:
            AssertionError: there is no support set yet.
        """
        assert self.prototypes is not None, "no prototypes yet: call fit_(support, labels)"
        if self.normalize:
            x = _normalized(x)
        return -self.distance(self.prototypes, x)
