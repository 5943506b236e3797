"""Transductive information maximisation."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from metafast.compat import absent
from metafast.compat.easyfsl.methods._fine_tuning import FineTuning
from metafast.compat.easyfsl.methods.utils import entropy

__getattr__ = absent(__name__)


class TIM(FineTuning):
    r"""Cosines to prototypes that descend minus the information about the queries' labels by Adam.

    With p the softmax of :math:`\tau \cos(x_i, c_k)` and :math:`\bar p` its mean over the queries, the loss is

    .. math:: w_s \, \text{mean cross-entropy of the support rows} + w_m \sum_k \bar p_k \log \bar p_k
              - \frac{w_c}{m} \sum_{ik} p_{ik} \log(p_{ik} + 10^{-12})

    Boudiaf et al., *Transductive Information Maximization For Few-Shot Learning*, 2020. The backbone is frozen.

    Args:
        *args: of :class:`FewShotClassifier`.
        fine_tuning_steps: of Adam.
        fine_tuning_lr: its rate.
        cross_entropy_weight: :math:`w_s`.
        marginal_entropy_weight: :math:`w_m`.
        conditional_entropy_weight: :math:`w_c`.
        temperature: :math:`\tau`, in the loss and in ``use_softmax``.
        **kwargs: of :class:`FewShotClassifier`.
    """

    def __init__(
        self,
        *args: Any,
        fine_tuning_steps: int = 50,
        fine_tuning_lr: float = 1e-4,
        cross_entropy_weight: float = 1.0,
        marginal_entropy_weight: float = 1.0,
        conditional_entropy_weight: float = 0.1,
        temperature: float = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            fine_tuning_steps=fine_tuning_steps,
            fine_tuning_lr=fine_tuning_lr,
            temperature=temperature,
            **kwargs,
        )
        self.cross_entropy_weight = cross_entropy_weight
        self.marginal_entropy_weight = marginal_entropy_weight
        self.conditional_entropy_weight = conditional_entropy_weight

    def _scores(self, features: Tensor) -> Tensor:
        return self.cosine_distance_to_prototypes(features)

    def _loss(self, support: Tensor, numbers: Tensor, queries: Tensor) -> Tensor:
        marginal = queries.softmax(1).mean(0)
        return (
            self.cross_entropy_weight * cross_entropy(support, numbers)
            + self.marginal_entropy_weight * (marginal * marginal.log()).sum()
            + self.conditional_entropy_weight * entropy(queries)
        )

    @staticmethod
    def is_transductive() -> bool:
        return True
