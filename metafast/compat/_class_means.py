"""Class means of labels that are any numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from metafast.prototype import prototypes


def class_means(support: Tensor, labels: Tensor) -> Tensor:
    """Means of the rows of each label, in ascending order of the labels there are: ``[classes, ...]``.

    Args:
        support: ``[n, ...]``.
        labels: ``[n]``, any numbers.
    """
    classes, numbers = torch.unique(labels, return_inverse=True)
    means = prototypes(support.flatten(1), numbers.to(support.device), classes.shape[0])
    return means.reshape(-1, *support.shape[1:])
