"""The attention of matching networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast import _check, reference
from metafast._autodiff import differentiable
from metafast._batching import fold_into_tasks
from metafast._dual import Dual, linear, tangent_of, value_of
from metafast._library import call, fallback, operator

MATCHING = operator("matching_log_probs")
MATCHING_VJP = operator("matching_log_probs_vjp")


def matching_log_probs(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    scale: float | Tensor = 1.0,
    *,
    num_classes: int,
    eps: float = 1e-8,
) -> Tensor:
    r"""Logarithms of the classes' shares in the attention of each query row to the support rows.

    .. math:: \log p_{jc} = \log \sum_{i: y_i = c} e^{s a_{ij}} - \log \sum_i e^{s a_{ij}}, \qquad
        a_{ij} = \frac{x_i \cdot q_j}{\max(|x_i| |q_j|, \epsilon)}

    Vinyals, Blundell, Lillicrap, Kavukcuoglu and Wierstra, *Matching Networks for One Shot Learning*, 2016. One fused
    operator gives the logarithms, and another all gradients. Differentiable to any order. A class without support rows
    has -inf, and without any support row all are NaN.

    Args:
        support: x, ``[..., n, d]`` features; half types are promoted to float32.
        labels: y, ``[..., n]`` int64 class numbers.
        query: q, ``[..., m, d]`` features of the dtype of ``support``.
        scale: s, a number, or a tensor that broadcasts over the leading dimensions and gets its gradient.
        num_classes: C.
        eps: :math:`\epsilon`, a number that is not negative.

    Returns:
        ``[..., m, C]`` in float32 or float64.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: shapes or devices do not fit; ``eps`` is negative; on the CPU, a class number outside 0 to C - 1 (on
            a GPU the results of that task are NaN).

    Example:
        >>> support = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> matching_log_probs(support, torch.tensor([0, 1]), support, num_classes=2).exp()
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])
    """
    _check.features(support, "support", "[..., n, d]")
    _check.features(query, "query", "[..., m, d]")
    _check.class_labels(labels, "labels")
    _check.class_count(num_classes)
    _check.same_kind(query, "query", support, "support")
    _check.same_device(labels, "labels", support, "support")
    _check.same_size(query, -1, "query", support, -1, "support")
    _check.same_size(labels, -1, "labels", support, -2, "support")
    _check.scalar(scale, "scale", support, "support")
    _check.number(eps, "eps")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number that is not negative, got {eps}")
    if support.dtype in (torch.bfloat16, torch.float16) or query.dtype != support.dtype:
        support, query = support.float(), query.float()
    learned = scale.to(support.dtype) if isinstance(scale, Tensor) else None
    lead = _check.broadcast_tasks(
        ("support", support.shape[:-2]),
        ("labels", labels.shape[:-1]),
        ("query", query.shape[:-2]),
        ("scale", () if learned is None else learned.shape),
    )
    tasks = torch.Size(lead).numel()

    def fold(value: Tensor, kept: int) -> Tensor:
        own = value.shape[value.dim() - kept :]
        return value if value.shape == (tasks, *own) else value.expand((*lead, *own)).reshape((tasks, *own))

    log_probs: Tensor = call(
        MATCHING,
        fold(support, 2),
        fold(labels, 1),
        fold(query, 2),
        None if learned is None else fold(learned, 0),
        1.0 if isinstance(scale, Tensor) else float(scale),
        float(eps),
        num_classes,
    )[0]
    return log_probs if len(lead) == 1 else log_probs.reshape(*lead, *log_probs.shape[1:])


# The closed forms are written once, for tensors and for Dual numbers. Support rows come before query rows.
def _inverse_length(rows: Any) -> Any:
    """``[T, rows]``, 0 for a row of zeros."""
    square = (rows * rows).sum(-1)
    zero = value_of(square) == 0
    safe = linear(lambda x: torch.where(zero, 0.0, x), square) + zero.to(value_of(rows).dtype)
    return linear(lambda x: torch.where(zero, 0.0, x), safe.rsqrt())


class _Attention:
    def __init__(
        self, support: Any, labels: Tensor, query: Any, scale: Any, eps: float, num_classes: int
    ) -> None:
        like = value_of(support)
        self.support, self.query = support, query
        self.scale = scale if isinstance(scale, (float, torch.SymFloat)) else scale[:, None, None]
        self.hot = reference.one_hot(labels, num_classes)
        valid = (labels >= 0) & (labels < num_classes)
        self._index = torch.where(valid, labels, 0).unsqueeze(2)
        self.unit, self.query_unit = _inverse_length(support), _inverse_length(query)
        lengths, query_lengths = (torch.linalg.vector_norm(value_of(x), dim=-1) for x in (support, query))
        self.free = lengths.unsqueeze(2) * query_lengths.unsqueeze(1) > eps
        # Numbers alone would be float32 here.
        rest = torch.where(self.free, like.new_zeros(()), like.new_full((), 1 / eps if eps else torch.inf))
        self.inverse = self.masked(self.unit.unsqueeze(2) * self.query_unit.unsqueeze(1)) + rest
        self.cosine = (support @ query.mT) * self.inverse
        self.score = self.cosine * self.scale + reference.nan_where_invalid(labels, num_classes, like)

    def masked(self, number: Any) -> Any:
        """Where eps does not stand for the lengths."""
        return linear(lambda x: torch.where(self.free, x, 0.0), number)

    def of_labels(self, number: Any) -> Any:
        """Of ``[T, C, m]`` what belongs to the class of each support row, ``[T, n, m]``."""
        return linear(lambda x: x.gather(1, self._index.expand(*self._index.shape[:2], x.shape[2])), number)

    def log_sums(self) -> tuple[Any, Any]:
        """Of the exponentials of each class ``[T, C, m]``, and of all ``[T, 1, m]``."""
        value, tangent = value_of(self.score), tangent_of(self.score)
        own = value.unsqueeze(2).masked_fill(~self.hot.unsqueeze(-1), -torch.inf).logsumexp(1)
        total = value.logsumexp(1, keepdim=True)
        if not isinstance(self.score, Dual):
            return own, total
        if tangent is None:
            return Dual(own), Dual(total)
        inside = (value - self.of_labels(own)).exp() * tangent
        outside = (value - total).exp() * tangent
        return Dual(own, self.hot.to(value.dtype).mT @ inside), Dual(total, outside.sum(1, keepdim=True))


def _forward(
    support: Any, labels: Tensor, query: Any, scale: Any, eps: float, num_classes: int
) -> tuple[Any, Any, Any]:
    """What MATCHING computes."""
    at = _Attention(support, labels, query, scale, eps, num_classes)
    own, total = at.log_sums()
    return (own - total).mT, total[:, 0], at.cosine


def _backward(
    grad: Any, support: Any, labels: Tensor, query: Any, scale: Any, eps: float
) -> tuple[Any, Any, Any]:
    """The gradients for support, query and scale."""
    at = _Attention(support, labels, query, scale, eps, grad.shape[2])
    own, total = at.log_sums()
    of_classes = grad.mT
    slope = (at.score - at.of_labels(own)).exp() * at.of_labels(of_classes)
    slope = slope - (at.score - total).exp() * of_classes.sum(1, keepdim=True)
    along = slope * at.cosine
    to_products, turned = slope * at.scale * at.inverse, at.masked(along * at.scale)
    part, query_part = turned.sum(2) * at.unit * at.unit, turned.sum(1) * at.query_unit * at.query_unit
    return (
        to_products @ query - support * part.unsqueeze(2),
        to_products.mT @ support - query * query_part.unsqueeze(2),
        along.sum((1, 2)),
    )


def _matching_vjp(
    need: Any,
    grads: Any,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    scale: Tensor | None,
    fixed_scale: float,
    eps: float,
    num_classes: int,
    *saved: Tensor,
) -> Any:
    out = MATCHING_VJP(grads[0], support, labels, query, scale, fixed_scale, eps, *saved)
    return out[0], None, out[1], None if scale is None else out[2], None, None, None


def _duals(tangents: Any, support: Tensor, query: Tensor, scale: Tensor | None, fixed_scale: float) -> Any:
    """Dual numbers of support, query and scale, which may be a number that is fixed."""
    along = None if scale is None else tangents[2]
    moving = fixed_scale if scale is None else Dual(scale, along)
    return Dual(support, tangents[0]), Dual(query, tangents[1]), moving


def _forward_tangent(tangents: Any, support: Tensor, labels: Tensor, query: Tensor, *rest: Any) -> Dual:
    scale, fixed_scale, eps, num_classes = rest
    with _check.without_autocast(support):
        moving = _duals(tangents, support, query, scale, fixed_scale)
        out: Dual = _forward(moving[0], labels, moving[1], moving[2], eps, num_classes)[0]
        return out


def _backward_tangent(
    grad: Dual, tangents: Any, support: Tensor, labels: Tensor, query: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    scale, fixed_scale, eps = rest
    with _check.without_autocast(support):
        moving = _duals(tangents, support, query, scale, fixed_scale)
        out = _backward(grad, moving[0], labels, moving[1], moving[2], eps)
        return tuple(map(tangent_of, out))


def _matching_jvp(tangents: Any, *args: Any) -> Any:
    support, labels, query, *rest = args
    out = _forward_tangent((tangents[0], tangents[2], tangents[3]), support, labels, query, *rest)
    return torch.zeros_like(out.value) if out.tangent is None else out.tangent, None, None


# MATCHING_VJP is the gradient of <grad, MATCHING>, whose second derivative is symmetric: its vjp for inputs is its own
# tangent, and its vjp for the upstream gradient is the tangent of MATCHING. What was saved is a function of the inputs.
def _matching_vjp_vjp(need: Any, grads: Any, grad: Tensor, *args: Any) -> Any:
    inputs = args[:6]
    to_grad = _forward_tangent(grads, *inputs, grad.shape[2]).tangent if need[0] else None
    to_support, to_query, to_scale = _backward_tangent(Dual(grad), grads, *inputs)
    of_scale = None if inputs[3] is None else to_scale
    return to_grad, to_support, None, to_query, of_scale, *(None,) * 5


def _matching_vjp_jvp(tangents: Any, grad: Tensor, *args: Any) -> Any:
    inputs = args[:6]
    out = _backward_tangent(Dual(grad, tangents[0]), (tangents[1], tangents[3], tangents[4]), *inputs)
    support, _, query, scale = inputs[:4]
    of_scale = support.new_zeros(0) if scale is None else _filled(out[2], scale)
    return _filled(out[0], support), _filled(out[1], query), of_scale


def _filled(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


def _plain_matching(
    support: Tensor, labels: Tensor, query: Tensor, scale: Tensor | None, fixed_scale: float, *rest: Any
) -> Any:
    """What MATCHING computes, in plain PyTorch."""
    return _forward(support, labels, query, fixed_scale if scale is None else scale, *rest)


def _plain_matching_vjp(
    grad: Tensor,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    scale: Tensor | None,
    fixed_scale: float,
    eps: float,
    *saved: Tensor,
) -> Any:
    """What MATCHING_VJP computes, in plain PyTorch."""
    out = _backward(grad, support, labels, query, fixed_scale if scale is None else scale, eps)
    return *out[:2], support.new_zeros(0) if scale is None else out[2]


differentiable(
    MATCHING, vjp=_matching_vjp, jvp=_matching_jvp, save_outputs=(0, 1, 2), constant_outputs=(1, 2)
)
differentiable(MATCHING_VJP, vjp=_matching_vjp_vjp, jvp=_matching_vjp_jvp)
for _op in (MATCHING, MATCHING_VJP):
    fold_into_tasks(_op)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(MATCHING, _device, torch.float32)
fallback(MATCHING, _plain_matching)
fallback(MATCHING_VJP, _plain_matching_vjp)


@torch.library.register_fake(MATCHING)
def _(support: Tensor, labels: Tensor, query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tasks, m = query.shape[:2]
    return (
        query.new_empty(tasks, m, rest[3]),
        query.new_empty(tasks, m),
        query.new_empty(tasks, support.shape[1], m),
    )


@torch.library.register_fake(MATCHING_VJP)
def _(
    grad: Tensor, support: Tensor, labels: Tensor, query: Tensor, scale: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    of_scale = query.new_empty(0 if scale is None else query.shape[0])
    return query.new_empty(support.shape), query.new_empty(query.shape), of_scale
