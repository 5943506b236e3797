"""What the methods compute with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from metafast import _check
from metafast.compat import absent
from metafast.compat._class_means import class_means
from metafast.distance import cdist

__getattr__ = absent(__name__)


def compute_prototypes(support_features: Tensor, support_labels: Tensor) -> Tensor:
    r"""Class means :math:`c_k = \frac{1}{|S_k|} \sum_{i \in S_k} x_i`; see :func:`metafast.prototypes`.

    Args:
        support_features: ``[n, ...]``.
        support_labels: ``[n]``, any numbers.

    Returns:
        ``[classes, ...]``, in ascending order of the labels there are.

    Raises:
        TypeError: features that are no floating tensor.
        ValueError: another number of labels than of features.
    """
    _check.floating(support_features, "support_features")
    _check.is_tensor(support_labels, "support_labels")
    if support_features.dim() == 0:
        raise ValueError("support_features: expected shape [n, ...], got a scalar")
    if support_labels.dim() != 1:
        raise ValueError(f"support_labels: expected shape [n], got {list(support_labels.shape)}")
    _check.same_size(support_labels, 0, "support_labels", support_features, 0, "support_features")
    return class_means(support_features, support_labels)


def entropy(logits: Tensor) -> Tensor:
    r"""Mean over the rows of :math:`-\sum_k p_k \log(p_k + 10^{-12})` of the softmax p.

    Args:
        logits: ``[n, classes]``.

    Returns:
        a tensor ``[]``.
    """
    p = logits.softmax(dim=1)
    return -(p * (p + 1e-12).log()).sum(dim=1).mean()


def k_nearest_neighbours(features: Tensor, k: int, p_norm: float = 2) -> Tensor:
    """Numbers of the k - 1 rows that are nearest to each row, nearest first, ``[n, k - 1]``.

    Of the k nearest rows the first is left out, which is the row itself, or one that is equal to it.

    Args:
        features: ``[n, d]``.
        k: how many, with the row itself.
        p_norm: of the distance.

    Raises:
        ValueError: k is not from 1 to n.
    """
    if not 1 <= k <= len(features):
        raise ValueError(f"k: expected a number from 1 to {len(features)}, the rows of features, got {k}")
    return cdist(features, features, p_norm).topk(k, largest=False).indices[:, 1:]


def power_transform(features: Tensor, power_factor: float) -> Tensor:
    r"""Each entry x as :math:`(\max(x, 0) + 10^{-6})^\beta`; Hu, Gripon and Pateux, 2020.

    Args:
        features: of any shape.
        power_factor: the exponent.
    """
    return (features.relu() + 1e-6).pow(power_factor)


def strip_prefix(state_dict: Mapping[str, Any], prefix: str) -> OrderedDict[str, Any]:
    """A copy without ``prefix`` at the beginning of keys; keys that do not begin with it stay.

    Args:
        state_dict: of a module.
        prefix: such as ``"module."``.
    """
    return OrderedDict((key.removeprefix(prefix), value) for key, value in state_dict.items())
