"""Class means of labels that are any numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from metafast.prototype import prototypes


def class_numbers(labels: Tensor) -> tuple[Tensor, int]:
    """The place of each label ``[n]`` among all there are in ascending order, int64, and how many there are."""
    values = labels.tolist()
    classes = sorted(set(values))
    if classes == list(range(len(classes))):
        return labels.long(), len(classes)
    place = {label: k for k, label in enumerate(classes)}
    return torch.tensor([place[label] for label in values], device=labels.device), len(classes)


def class_means(support: Tensor, labels: Tensor) -> Tensor:
    """Means of the rows of each label, in ascending order of the labels there are: ``[classes, ...]``.

    Args:
        support: ``[n, ...]``.
        labels: ``[n]``, any numbers.
    """
    numbers, classes = class_numbers(labels)
    rows = support.flatten(1) if support.dim() > 1 else support.unsqueeze(1)
    means = prototypes(rows, numbers.to(support.device), classes)
    return means if support.dim() == 2 else means.reshape(-1, *support.shape[1:])
