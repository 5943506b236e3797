"""Power transform and optimal transport."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metafast.compat import absent
from metafast.compat.easyfsl.methods.few_shot_classifier import FewShotClassifier
from metafast.compat.easyfsl.methods.utils import power_transform
from metafast.distance import pairwise_distance
from metafast.prototype import prototypes

__getattr__ = absent(__name__)

MAXIMUM_SINKHORN_ITERATIONS = 1000


class PTMAP(FewShotClassifier):
    r"""The transport plan from queries to classes, between prototypes that move to the means by that plan.

    Features are transformed by :func:`power_transform`. The plan comes from :math:`e^{-\lambda \|x_i - c_k\|^2}` by
    Sinkhorn's iterations, and :math:`c \leftarrow c + \alpha (\bar c - c)` with the means :math:`\bar c` of support
    rows and queries, weighted by the plan (:func:`metafast.prototypes` of soft labels).

    Hu, Gripon and Pateux, *Leveraging the Feature Distribution in Transfer-based Few-Shot Learning*, 2020.

    Args:
        *args: of :class:`FewShotClassifier`; the results are plans whatever ``use_softmax`` is.
        fine_tuning_steps: of the prototypes.
        fine_tuning_lr: :math:`\alpha`.
        lambda_regularization: :math:`\lambda`.
        power_factor: of the power transform.
        **kwargs: of :class:`FewShotClassifier`.
    """

    def __init__(
        self,
        *args: Any,
        fine_tuning_steps: int = 10,
        fine_tuning_lr: float = 0.2,
        lambda_regularization: float = 10.0,
        power_factor: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.fine_tuning_steps = fine_tuning_steps
        self.fine_tuning_lr = fine_tuning_lr
        self.lambda_regularization = lambda_regularization
        self.power_factor = power_factor

    def forward(self, query_images: Tensor) -> Tensor:
        features = self.compute_features(query_images)
        rows = torch.cat((self.support_features, features))
        own = one_hot(self._class_numbers(), len(self.prototypes)).to(rows.dtype)
        for _ in range(self.fine_tuning_steps):
            self.update_prototypes(rows, torch.cat((own, self.compute_soft_assignments(features))))
        return self.compute_soft_assignments(features)

    def compute_features(self, images: Tensor) -> Tensor:
        return power_transform(super().compute_features(images), self.power_factor)

    def compute_soft_assignments(self, query_features: Tensor) -> Tensor:
        """The plan from queries ``[m, d]`` to the prototypes: ``[m, classes]``."""
        return self.compute_optimal_transport(pairwise_distance(query_features, self.prototypes))

    def compute_optimal_transport(self, cost_matrix: Tensor, epsilon: float = 1e-6) -> Tensor:
        """The plan whose rows sum to 1 and whose columns to m // classes, by Sinkhorn's iterations.

        Args:
            cost_matrix: ``[m, classes]``.
            epsilon: it ends when an iteration changes the sums of rows by less, or after 1,000 of them.
        """
        queries, classes = cost_matrix.shape
        plan = torch.exp(-self.lambda_regularization * cost_matrix)
        plan = plan / plan.sum()
        for _ in range(MAXIMUM_SINKHORN_ITERATIONS):
            of_rows = plan.sum(1)
            plan = plan * (1 / (of_rows + 1e-10)).unsqueeze(1)
            plan = plan * (queries // classes / (plan.sum(0) + 1e-10))
            if (of_rows - plan.sum(1)).abs().max() < epsilon:
                break
        return plan

    def update_prototypes(self, all_features: Tensor, all_assignments: Tensor) -> None:
        """Move the prototypes towards the means of rows ``[n, d]`` by weights ``[n, classes]``."""
        means = prototypes(all_features, all_assignments, len(self.prototypes))
        self.prototypes = self.prototypes + self.fine_tuning_lr * (means - self.prototypes)

    @staticmethod
    def is_transductive() -> bool:
        return True
