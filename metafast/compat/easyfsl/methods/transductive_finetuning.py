"""Prototypes fine-tuned on the queries too."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from metafast.compat import absent
from metafast.compat.easyfsl.methods.finetune import Finetune
from metafast.compat.easyfsl.methods.utils import entropy

__getattr__ = absent(__name__)


class TransductiveFinetuning(Finetune):
    r"""Minus the distance to prototypes that descend a loss of support set and queries by Adam.

    With :math:`z_{ik} = -\tau \|x_i - c_k\|` the loss is the mean cross-entropy of the support rows plus the mean
    entropy of the softmax of the queries (:func:`easyfsl.methods.utils.entropy`). The backbone is frozen; Dhillon,
    Chaudhari, Ravichandran and Soatto, *A Baseline for Few-Shot Image Classification*, 2020, fine-tune it too.

    Args:
        *args, fine_tuning_steps, fine_tuning_lr, temperature, **kwargs: of :class:`Finetune`.
    """

    def __init__(
        self,
        *args: Any,
        fine_tuning_steps: int = 25,
        fine_tuning_lr: float = 5e-5,
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
        return self.l2_distance_to_prototypes(features)

    def _loss(self, support: Tensor, numbers: Tensor, queries: Tensor) -> Tensor:
        return cross_entropy(support, numbers) + entropy(queries)

    @staticmethod
    def is_transductive() -> bool:
        return True
