"""Ridge regression in closed form."""

from __future__ import annotations

import warnings
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from metafast import _check
from metafast.compat import absent

__getattr__ = absent(__name__)

__all__ = ["ridge_regression"]


class Solution(NamedTuple):
    """A linear function: ``weight [C, D]``, and ``bias [C]`` or None."""

    weight: Tensor
    bias: Tensor | None


def ridge_regression(
    embeddings: Tensor,
    targets: Tensor,
    reg_lambda: float | Tensor,
    num_classes: int | None = None,
    use_woodbury: bool | None = None,
    scale: bool = True,
    bias: bool = True,
) -> Solution:
    r"""The weights that minimise :math:`|X W - Y|^2 + \lambda |W|^2`, of one task.

    .. math:: W = (X^T X + \lambda I)^{-1} X^T Y = X^T (X X^T + \lambda I)^{-1} Y

    Bertinetto, Henriques, Torr and Vedaldi, *Meta-learning with differentiable closed-form solvers*, 2019. For the
    logits of queries, over all tasks at once, see :func:`metafast.ridge_logits`.

    Args:
        embeddings: X, ``[N, D]``.
        targets: ``[N]`` integer class numbers, which stand for one-hot rows, or Y ``[N, C]``.
        reg_lambda: a number, or a tensor of one that gets its gradient.
        num_classes: C of class numbers; None takes it from them, with a warning.
        use_woodbury: solve with the N x N matrix (the second form) and not with the D x D one; None: where it is the
            smaller one.
        scale: divide embeddings and targets by the square root of N.
        bias: put a column of ones before the embeddings; the bias is its part of W, which lambda holds back as well.

    Raises:
        TypeError: embeddings that are no floating tensor.
        ValueError: shapes that do not fit.
    """
    _check.features(embeddings, "embeddings", "[N, D]")
    if embeddings.dim() != 2:
        raise ValueError(
            f"embeddings: expected shape [N, D], those of one task, got {list(embeddings.shape)}"
        )
    rows, size = embeddings.shape
    if targets.is_floating_point():
        if targets.dim() != 2:
            raise ValueError(f"targets: expected shape [N, C] of floating targets, got {list(targets.shape)}")
    else:
        if num_classes is None:
            warnings.warn(
                "num_classes: not given, so the largest of the targets makes it; a task whose last class has no row "
                "gets fewer",
                stacklevel=2,
            )
        targets = one_hot(targets, -1 if num_classes is None else num_classes).to(embeddings.dtype)
    _check.same_size(targets, 0, "targets", embeddings, 0, "embeddings")
    if use_woodbury is None:
        use_woodbury = rows <= size + bias
    if bias:
        embeddings = torch.cat([embeddings.new_ones(rows, 1), embeddings], 1)
    if scale:
        embeddings, targets = embeddings / sqrt(rows), targets / sqrt(rows)
    if use_woodbury:
        weights = embeddings.t() @ torch.linalg.solve(_plus(embeddings @ embeddings.t(), reg_lambda), targets)
    else:
        weights = torch.linalg.solve(_plus(embeddings.t() @ embeddings, reg_lambda), embeddings.t() @ targets)
    if bias:
        return Solution(weights[1:].t(), weights[0])
    return Solution(weights.t(), None)


def _plus(gram: Tensor, reg_lambda: float | Tensor) -> Tensor:
    return gram + reg_lambda * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
