"""Class means, and the loss of prototypical networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from metafast import _check
from metafast.compat import absent
from metafast.compat.torchmeta._numbers import plain
from metafast.distance import pairwise_distance
from metafast.prototype import prototypes as class_means
from metafast.prototype import prototypical_loss as fused_loss

__getattr__ = absent(__name__)

__all__ = ["get_num_samples", "get_prototypes", "prototypical_loss"]


def get_num_samples(targets: Tensor, num_classes: int, dtype: torch.dtype | None = None) -> Tensor:
    """How many rows of each class there are, ``[B, C]``.

    Args:
        targets: ``[B, N]`` int64 class numbers.
        num_classes: C.
        dtype: of the result; None: int64.

    Raises:
        TypeError: targets of another dtype.
        RuntimeError: a class number outside 0 to C - 1.
    """
    _check.class_labels(targets, "targets")
    ones = torch.ones_like(targets, dtype=dtype)
    return ones.new_zeros(targets.shape[0], num_classes).scatter_add_(1, targets, ones)


def get_prototypes(embeddings: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Means of the rows of each class, by :func:`metafast.prototypes`; 0 for a class without rows.

    Snell, Swersky and Zemel, *Prototypical Networks for Few-shot Learning*, 2017.

    Args:
        embeddings: ``[B, N, D]``.
        targets: ``[B, N]`` int64 class numbers.
        num_classes: C.

    Returns:
        ``[B, C, D]``, row k that of class k.

    Raises:
        TypeError: embeddings that are no floating tensor, or targets that are no int64.
        ValueError: shapes or devices that do not fit; on the CPU, a class number outside 0 to C - 1.
    """
    _check.features(embeddings, "embeddings", "[B, N, D]")
    _check.class_labels(targets, "targets")
    _check.same_size(targets, -1, "targets", embeddings, -2, "embeddings")
    try:
        return class_means(embeddings, targets, plain(num_classes))
    except ValueError as error:
        # Its arguments have other names.
        raise ValueError(str(error).replace("labels", "targets").replace("features", "embeddings")) from None


def prototypical_loss(prototypes: Tensor, embeddings: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
    """Cross entropy of minus the squared distances of the rows to the prototypes.

    Without further arguments it is :func:`metafast.prototypical_loss`, of one support row for each class; else the
    distances are :func:`metafast.pairwise_distance`. Snell, Swersky and Zemel, *Prototypical Networks for Few-shot
    Learning*, 2017.

    Args:
        prototypes: ``[B, C, D]``.
        embeddings: ``[B, M, D]``.
        targets: ``[B, M]`` int64 class numbers.
        kwargs: for torch's ``cross_entropy``.

    Raises:
        TypeError: no floating tensors.
        ValueError: shapes or devices that do not fit.
    """
    _check.features(prototypes, "prototypes", "[B, C, D]")
    _check.features(embeddings, "embeddings", "[B, M, D]")
    _check.same_device(embeddings, "embeddings", prototypes, "prototypes")
    _check.same_size(embeddings, -1, "embeddings", prototypes, -1, "prototypes")
    _check.broadcast_tasks(("prototypes", prototypes.shape[:-2]), ("embeddings", embeddings.shape[:-2]))
    dtype = torch.promote_types(prototypes.dtype, embeddings.dtype)
    prototypes, embeddings = prototypes.to(dtype), embeddings.to(dtype)
    # Whether a number is of a class the fused operator finds out by reading it, as a graph would not.
    if (
        not kwargs
        and not torch.compiler.is_compiling()
        and _numbers_of_classes(prototypes, embeddings, targets)
    ):
        tasks, classes = prototypes.shape[:2]
        numbers = torch.arange(classes).expand(tasks, -1)
        try:
            loss = fused_loss(prototypes, numbers, embeddings, targets, classes)[0].mean()
        except ValueError:
            # Of numbers that are of no class torch ignores -100, and refuses the others in its own words.
            pass
        else:
            return loss if _check.autocasts(embeddings) else loss.to(dtype)
    return cross_entropy(-pairwise_distance(prototypes, embeddings), targets, **kwargs)


def _numbers_of_classes(prototypes: Tensor, embeddings: Tensor, targets: Any) -> bool:
    """May they be those of a class for each row, on the CPU?"""
    if type(targets) is not Tensor or targets.dtype != torch.int64 or not targets.is_cpu:
        return False
    return (
        prototypes.dim() == 3
        and prototypes.shape[0] == embeddings.shape[0]
        and targets.shape == embeddings.shape[:2]
    )
