"""FEAT."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat.easyfsl.methods.prototypical_networks import PrototypicalNetworks
from metafast.compat.easyfsl.modules.attention_modules import MultiHeadAttention
from metafast.compat.easyfsl.modules.build_from_checkpoint import (
    feat_resnet12_from_checkpoint,
    load_part,
    read_parameters,
)

__getattr__ = absent(__name__)


class FEAT(PrototypicalNetworks):
    """Minus the distance to class means that attention has adapted to each other.

    Ye, Hu, Zhan and Sha, *Few-Shot Learning via Embedding Adaptation with Set-to-Set Functions*, 2020.
    :class:`metafast.learners.FEAT` is the learner, with the paper's contrastive loss.

    Args:
        *args: of :class:`FewShotClassifier`.
        attention_module: called with the prototypes ``[1, classes, d]`` three times, gives a tuple whose first is as
            large, such as :class:`easyfsl.modules.MultiHeadAttention`.
        **kwargs: of :class:`FewShotClassifier`.
    """

    def __init__(self, *args: Any, attention_module: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attention_module = attention_module

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        super().process_support_set(support_images, support_labels)
        means = self.prototypes.unsqueeze(0)
        self.prototypes = self.attention_module(means, means, means)[0][0]

    @classmethod
    def from_resnet12_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        feature_dimension: int = 640,
        use_backbone: bool = True,
        **kwargs: Any,
    ) -> FEAT:
        """The model of a file of the authors' code: a dict whose ``params`` hold ``encoder.*`` and ``slf_attn.*``.

        Args:
            checkpoint_path: the file, which is not let run code.
            device: where the model is.
            feature_dimension: d of the attention.
            use_backbone: with :func:`feat_resnet12`; otherwise images are features.
            **kwargs: of :class:`FewShotClassifier`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: parameters that are not in it.
        """
        backbone: nn.Module = nn.Identity()
        if use_backbone:
            backbone = feat_resnet12_from_checkpoint(checkpoint_path, device)
        attention = MultiHeadAttention(1, feature_dimension, feature_dimension, feature_dimension)
        load_part(attention, read_parameters(checkpoint_path, device), "slf_attn.")
        return cls(backbone, attention_module=attention, **kwargs).to(device)
