"""Fine-tuned prototypes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from metafast.compat import absent
from metafast.compat.easyfsl.methods._fine_tuning import FineTuning

__getattr__ = absent(__name__)


class Finetune(FineTuning):
    r"""Cosines to prototypes that descend the cross-entropy of the support set by Adam.

    The loss is the mean cross-entropy of :math:`\tau \cos(x_i, c_k)` over the support rows, and the class means are
    the first :math:`c_k`. The backbone is frozen. After Chen, Liu, Kira, Wang and Huang, *A Closer Look at Few-shot
    Classification*, 2019, whose own methods are :class:`metafast.learners.Baseline` and its like.

    Args:
        *args: of :class:`FewShotClassifier`.
        fine_tuning_steps: of Adam.
        fine_tuning_lr: its rate.
        temperature: :math:`\tau`, in the loss and in ``use_softmax``.
        **kwargs: of :class:`FewShotClassifier`.
    """

    def __init__(
        self,
        *args: Any,
        fine_tuning_steps: int = 200,
        fine_tuning_lr: float = 1e-4,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            fine_tuning_steps=fine_tuning_steps,
            fine_tuning_lr=fine_tuning_lr,
            temperature=temperature,
            **kwargs,
        )

    def _scores(self, features: Tensor) -> Tensor:
        return self.cosine_distance_to_prototypes(features)

    def _loss(self, support: Tensor, numbers: Tensor, queries: Tensor) -> Tensor:
        return cross_entropy(support, numbers)

    @staticmethod
    def is_transductive() -> bool:
        return False
