"""Matching networks: Vinyals, Blundell, Lillicrap and Wierstra, *Matching Networks for One Shot Learning*, 2016."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from metafast import _check
from metafast.compat import absent
from metafast.matching import matching_log_probs

__getattr__ = absent(__name__)

__all__ = ["matching_log_probas", "matching_loss", "matching_probas", "pairwise_cosine_similarity"]


def pairwise_cosine_similarity(embeddings1: Tensor, embeddings2: Tensor, eps: float = 1e-8) -> Tensor:
    r""":math:`s_{ij} = x_i \cdot y_j / \max(|x_i| |y_j|, \epsilon)`, differentiable to any order.

    Args:
        embeddings1: x, ``[B, N, D]``.
        embeddings2: y, ``[B, M, D]``.
        eps: what the product of two lengths counts for at least.

    Returns:
        ``[B, N, M]``.

    Raises:
        TypeError: no floating tensors, or of different dtypes.
        ValueError: shapes or devices that do not fit.
    """
    _check.features(embeddings1, "embeddings1", "[B, N, D]")
    _check.features(embeddings2, "embeddings2", "[B, M, D]")
    _check.same_kind(embeddings2, "embeddings2", embeddings1, "embeddings1")
    _check.same_size(embeddings2, -1, "embeddings2", embeddings1, -1, "embeddings1")
    _check.broadcast_tasks(("embeddings1", embeddings1.shape[:-2]), ("embeddings2", embeddings2.shape[:-2]))
    return _Cosine.apply(embeddings1, embeddings2, eps)


def matching_log_probas(
    embeddings: Tensor, targets: Tensor, test_embeddings: Tensor, num_classes: int, eps: float = 1e-8
) -> Tensor:
    r"""Logarithm of the share of each class in the softmax of a row's similarities to the support rows.

    .. math:: \log p_{ki} = \log \sum_{j: y_j = k} e^{s_{ij}} - \log \sum_j e^{s_{ij}}

    Args:
        embeddings: support rows ``[B, N, D]``.
        targets: ``[B, N]`` int64, their class numbers.
        test_embeddings: query rows ``[B, M, D]``.
        num_classes: C.
        eps: see :func:`pairwise_cosine_similarity`.

    Returns:
        ``[B, C, M]``; -inf for a class without support rows.

    Raises:
        TypeError, ValueError: wrong kinds, shapes or class numbers; see :func:`metafast.matching_log_probs`.
    """
    _check.features(embeddings, "embeddings", "[B, N, D]")
    _check.features(test_embeddings, "test_embeddings", "[B, M, D]")
    _check.class_labels(targets, "targets")
    _check.same_size(targets, -1, "targets", embeddings, -2, "embeddings")
    rows = embeddings, targets, test_embeddings
    log_probs = matching_log_probs(*rows, num_classes=num_classes, eps=eps)
    return log_probs.mT.to(embeddings.dtype)


def matching_probas(
    embeddings: Tensor, targets: Tensor, test_embeddings: Tensor, num_classes: int, eps: float = 1e-8
) -> Tensor:
    """The exponential of :func:`matching_log_probas`, ``[B, C, M]``."""
    return matching_log_probas(embeddings, targets, test_embeddings, num_classes, eps).exp()


def matching_loss(
    train_embeddings: Tensor,
    train_targets: Tensor,
    test_embeddings: Tensor,
    test_targets: Tensor,
    num_classes: int,
    eps: float = 1e-8,
    **kwargs: Any,
) -> Tensor:
    """Minus the mean of the :func:`matching_log_probas` of the query rows' own classes.

    Args:
        train_embeddings, train_targets: the support rows ``[B, N, D]`` and their class numbers ``[B, N]``.
        test_embeddings, test_targets: the query rows ``[B, M, D]`` and their class numbers ``[B, M]``.
        num_classes: C.
        eps: see :func:`pairwise_cosine_similarity`.
        kwargs: for torch's ``nll_loss``.
    """
    log_probas = matching_log_probas(train_embeddings, train_targets, test_embeddings, num_classes, eps).mT
    _check.class_labels(test_targets, "test_targets")
    if test_targets.shape != log_probas.shape[:-1]:
        raise ValueError(
            f"test_targets: expected shape {list(log_probas.shape[:-1])}, got {list(test_targets.shape)}"
        )
    # As one row for each query torch's loss takes fewer passes.
    loss = nll_loss(log_probas.flatten(0, -2), test_targets.flatten(), **kwargs)
    return loss.reshape(test_targets.shape) if loss.dim() else loss


def _lengths(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., n, 1]`` and ``[..., 1, m]``."""
    along = torch.linalg.vector_norm(y, dim=-1, keepdim=True).mT
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True), along


class _Cosine(torch.autograd.Function):
    """The similarities, whose backward needs half the passes that the formula's own parts would take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, eps: float) -> Tensor:
        length_x, length_y = _lengths(x, y)
        return (x @ y.mT).div_((length_x * length_y).clamp(min=eps))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, y, ctx.eps = inputs
        ctx.save_for_backward(x, y, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, y, similarity = ctx.saved_tensors
        length_x, length_y = _lengths(x, y)
        product = length_x * length_y
        to_dot = grad / product.clamp(min=ctx.eps)
        # Where eps stands in for the lengths these have no part in it.
        turned = (grad * similarity).masked_fill(product <= ctx.eps, 0)
        tiny = torch.finfo(x.dtype).tiny
        along_x = turned.sum(-1, keepdim=True) / length_x.square().clamp(min=tiny)
        along_y = (turned.sum(-2, keepdim=True) / length_y.square().clamp(min=tiny)).mT
        grad_x = torch.addcmul(to_dot @ y, x, along_x, value=-1)
        grad_y = torch.addcmul(to_dot.mT @ x, y, along_y, value=-1)
        return grad_x.sum_to_size(x.shape), grad_y.sum_to_size(y.shape), None
