"""Laplacian regularisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metafast.compat import absent
from metafast.compat.easyfsl.methods.bd_cspn import BDCSPN
from metafast.compat.easyfsl.methods.utils import k_nearest_neighbours
from metafast.distance import pairwise_distance

__getattr__ = absent(__name__)


class LaplacianShot(BDCSPN):
    r"""Probabilities of labels that neighbouring queries share.

    With :math:`a_{ik}` the squared distance of query i to the rectified prototype k (see :class:`BDCSPN`) and
    :math:`w_{ij} = 1` where j is one of the nearest neighbours of i, steps of

    .. math:: y_i \leftarrow softmax_k(-a_{ik} + \lambda \sum_j w_{ij} y_{jk})

    until the objective they bound stays, to :math:`10^{-6}` of it.

    Ziko, Dolz, Granger and Ben Ayed, *Laplacian Regularized Few-Shot Learning*, 2020.

    Args:
        *args: of :class:`FewShotClassifier`; the results are probabilities whatever ``use_softmax`` is.
        inference_steps: at most so many.
        knn: neighbours of a query, itself among them.
        lambda_regularization: :math:`\lambda`.
        **kwargs: of :class:`FewShotClassifier`.

    Raises:
        ValueError: in the call, fewer queries than ``knn``.
    """

    def __init__(
        self,
        *args: Any,
        inference_steps: int = 20,
        knn: int = 3,
        lambda_regularization: float = 0.7,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.knn = knn
        self.inference_steps = inference_steps
        self.lambda_regularization = lambda_regularization

    def forward(self, query_images: Tensor) -> Tensor:
        features = self.compute_features(query_images)
        self.rectify_prototypes(features)
        distances = pairwise_distance(features, self.prototypes)
        return self.bound_updates(distances, self.compute_pairwise_affinities(features))

    def compute_pairwise_affinities(self, features: Tensor) -> Tensor:
        """``[m, m]``: 1 in row i where j is one of the nearest neighbours of i, 0 elsewhere."""
        neighbours = k_nearest_neighbours(features, self.knn)
        return features.new_zeros(len(features), len(features)).scatter_(1, neighbours, 1.0)

    def compute_upper_bound(self, soft_assignments: Tensor, initial_scores: Tensor, kernel: Tensor) -> float:
        r"""The objective :math:`\sum_{ik} y_{ik} (\log(y_{ik} + 10^{-12}) + a_{ik} - \lambda \sum_j w_{ij} y_{jk})`.

        Args:
            soft_assignments: y ``[m, classes]``.
            initial_scores: a ``[m, classes]``.
            kernel: w ``[m, m]``.
        """
        shared = self.lambda_regularization * (kernel @ soft_assignments)
        terms = (soft_assignments + 1e-12).log() + initial_scores - shared
        return (soft_assignments * terms).sum().item()

    def bound_updates(self, initial_scores: Tensor, kernel: Tensor) -> Tensor:
        """The steps, of a ``[m, classes]`` and w ``[m, m]``, from the softmax of -a: y ``[m, classes]``."""
        y = (-initial_scores).softmax(dim=1)
        before = float("inf")
        for step in range(self.inference_steps):
            y = (self.lambda_regularization * (kernel @ y) - initial_scores).softmax(dim=1)
            bound = self.compute_upper_bound(y, initial_scores, kernel)
            if step > 1 and abs(bound - before) <= 1e-6 * abs(before):
                break
            before = bound
        return y
