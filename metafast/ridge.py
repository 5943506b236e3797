"""The closed-form ridge regression head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast import _check, reference
from metafast._autodiff import differentiable
from metafast._batching import fold_into_tasks
from metafast._dual import Dual, cholesky, inverse, tangent_of, upper_half
from metafast._library import call, fallback, operator

RIDGE = operator("ridge_logits")
RIDGE_VJP = operator("ridge_logits_vjp")


def ridge_logits(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularisation: float | Tensor,
    scale: float | Tensor = 1.0,
    offset: float | Tensor = 0.0,
    *,
    num_classes: int | None = None,
) -> Tensor:
    r"""Logits of a linear head that solves ridge regression on the support rows.

    .. math:: W = X^T (X X^T + \lambda I)^{-1} Y = (X^T X + \lambda I)^{-1} X^T Y, \qquad z = s \, X_q W + o

    with Y one-hot or given. There is no bias: append a column of ones to the features for one, as R2-D2 does.
    Bertinetto, Henriques, Torr and Vedaldi, *Meta-learning with differentiable closed-form solvers*, 2019. One fused
    operator gives the logits, and another all gradients, by the same Cholesky factor of the n x n matrix. That costs
    n^2 d + n^3 / 3 operations a task: little for few shots, more than the d x d matrix would where n is well above d.
    Differentiable to any order.

    Args:
        support: X, ``[..., n, d]`` features; half types are promoted to float32.
        labels: ``[..., n]`` int64 class numbers, or targets Y ``[..., n, C]`` of the dtype of ``support``.
        query: ``[..., m, d]`` features of the dtype of ``support``.
        regularisation: lambda, a positive number, or a tensor that broadcasts over the leading dimensions and gets
            its gradient. Where a tensor makes :math:`X X^T + \lambda I` not positive definite, the task's logits are
            NaN.
        scale: s, a number or such a tensor.
        offset: o, a number or such a tensor.
        num_classes: C; needed with class numbers, for they do not tell it.

    Returns:
        ``[..., m, C]`` in float32 or float64.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: ``regularisation`` is a number that is not positive; shapes or devices do not fit;
            ``num_classes`` is missing, or is not the width of the targets; on the CPU, a class number outside 0 to
            C - 1 (on a GPU the results of that task are NaN).

    Example:
        >>> support = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> ridge_logits(support, torch.tensor([0, 1]), support, 1.0, num_classes=2)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    _check.features(support, "support", "[..., n, d]")
    _check.features(query, "query", "[..., m, d]")
    _check.is_tensor(labels, "labels")
    _check.same_kind(query, "query", support, "support")
    _check.same_device(labels, "labels", support, "support")
    _check.same_size(query, -1, "query", support, -1, "support")
    if num_classes is not None:
        _check.class_count(num_classes)
    soft = labels.is_floating_point()
    if soft:
        _check.features(labels, "labels", "[..., n] of int64 or [..., n, C] of targets")
        _check.same_kind(labels, "labels", support, "support")
        _check.same_size(labels, -2, "labels", support, -2, "support")
        if num_classes is not None and num_classes != labels.shape[-1]:
            raise ValueError(f"labels: expected {num_classes} targets a row, got shape {list(labels.shape)}")
        num_classes = labels.shape[-1]
    else:
        _check.class_labels(labels, "labels")
        _check.same_size(labels, -1, "labels", support, -2, "support")
        if num_classes is None:
            raise ValueError("num_classes: expected with int64 labels, got None")
    scalars: dict[str, Any] = {"regularisation": regularisation, "scale": scale, "offset": offset}
    for name, value in scalars.items():
        _check.scalar(value, name, support, "support")
    if not isinstance(regularisation, Tensor) and not regularisation > 0:
        raise ValueError(f"regularisation: expected a positive number, got {regularisation}")
    if support.dtype in (torch.bfloat16, torch.float16) or query.dtype != support.dtype:
        support, query = support.float(), query.float()
    if soft:
        labels = labels.to(support.dtype)
    kept = 2 if soft else 1
    learned = {name: v.to(support.dtype) for name, v in scalars.items() if isinstance(v, Tensor)}
    lead = _check.broadcast_tasks(
        ("support", support.shape[:-2]),
        ("labels", labels.shape[: labels.dim() - kept]),
        ("query", query.shape[:-2]),
        *((name, value.shape) for name, value in learned.items()),
    )
    tasks = torch.Size(lead).numel()

    def fold(value: Tensor, kept: int) -> Tensor:
        own = value.shape[value.dim() - kept :]
        if len(lead) == 1 and value.dim() == kept + 1 and value.shape[0] == tasks:
            return value
        return value.expand((*lead, *own)).reshape((tasks, *own))

    def per_task(name: str) -> Tensor:
        value = scalars[name]
        return fold(learned[name], 0) if isinstance(value, Tensor) else support.new_full((tasks,), value)

    logits = call(
        RIDGE,
        fold(support, 2),
        fold(labels, kept),
        fold(query, 2),
        per_task("regularisation"),
        per_task("scale"),
        per_task("offset"),
        num_classes,
    )[0]
    return logits if len(lead) == 1 else logits.reshape(*lead, query.shape[-2], num_classes)


# The closed forms are written once, for tensors and for Dual numbers.
def _per_task(value: Any) -> Any:
    return value[:, None, None]


def _targets(labels: Any, num_classes: int, like: Tensor) -> Any:
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        hot = reference.one_hot(labels, num_classes).to(like.dtype)
        return hot + reference.nan_where_invalid(labels, num_classes, like)
    return labels


def _gram(support: Any, regularisation: Any) -> Any:
    n = support.shape[1]
    like = support.value if isinstance(support, Dual) else support
    return support @ support.mT + _per_task(regularisation) * torch.eye(
        n, dtype=like.dtype, device=like.device
    )


def _solution(support: Any, labels: Any, regularisation: Any, num_classes: int) -> tuple[Any, Any, Any]:
    """``weight [T, C, d]``, ``alpha [T, n, C]`` and the inverse of the matrix ``[T, n, n]``."""
    like = support.value if isinstance(support, Dual) else support
    solver = inverse(_gram(support, regularisation))
    alpha = solver @ _targets(labels, num_classes, like)
    return alpha.mT @ support, alpha, solver


def _forward(
    support: Any, labels: Any, query: Any, regularisation: Any, scale: Any, offset: Any, num_classes: int
) -> tuple[Any, Any, Any, Any]:
    weight, alpha, _ = _solution(support, labels, regularisation, num_classes)
    logits = (query @ weight.mT) * _per_task(scale) + _per_task(offset)
    return logits, weight, alpha, cholesky(_gram(support, regularisation))


def _backward(
    grads: Any, support: Any, labels: Any, query: Any, scale: Any, weight: Any, alpha: Any, solver: Any
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """The gradients for the inputs, from those for the logits, the weight and alpha (the latter None: zero)."""
    to_logits, to_weight, to_alpha = grads
    slope = to_logits.mT @ query
    total = slope * _per_task(scale)
    if to_weight is not None:
        total = total + to_weight
    u = support @ total.mT
    if to_alpha is not None:
        u = u + to_alpha
    u = solver @ u
    return (
        alpha @ (total - u.mT @ support) - u @ weight,
        u,
        (to_logits @ weight) * _per_task(scale),
        -(u * alpha).sum((-2, -1)),
        (slope * weight).sum((-2, -1)),
        to_logits.sum((-2, -1)),
    )


def _filled(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


def _soft(labels: Tensor, gradient: Any) -> Any:
    return gradient if labels.is_floating_point() else None


def _ridge_vjp(
    need: Any,
    grads: Any,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularisation: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_classes: int,
    weight: Tensor,
    alpha: Tensor,
    factor: Tensor,
) -> Any:
    if grads[0] is not None and grads[1] is None and grads[2] is None and grads[3] is None:
        out = RIDGE_VJP(grads[0], support, labels, query, regularisation, scale, weight, alpha, factor)
    else:
        out = _tape_vjp(grads, support, labels, query, regularisation, scale, num_classes)
    return out[0], _soft(labels, out[1]), *out[2:], None


def _tape_vjp(
    grads: Any,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularisation: Tensor,
    scale: Tensor,
    num_classes: int,
) -> Any:
    """The gradients where what is saved for the backward has one too: nobody but a test of the operator asks for it."""
    to_logits, to_weight, to_alpha, to_factor = grads
    with _check.without_autocast(support):
        weight, alpha, solver = _solution(support, labels, regularisation, num_classes)
        if to_logits is None:
            to_logits = query.new_zeros(*query.shape[:2], num_classes)
        out = list(
            _backward((to_logits, to_weight, to_alpha), support, labels, query, scale, weight, alpha, solver)
        )
        if to_factor is not None:
            factor = cholesky(_gram(support, regularisation))
            # The transpose of the tangent of the factor.
            turned = torch.linalg.solve_triangular(factor, upper_half(to_factor @ factor.mT), upper=True)
            to_gram = torch.linalg.solve_triangular(factor.mT, turned, upper=False, left=False)
            out[0] = out[0] + (to_gram + to_gram.mT) @ support
            out[3] = out[3] + to_gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return out


def _ridge_jvp(
    tangents: Any,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularisation: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_classes: int,
) -> Any:
    inputs = (support, labels, query, regularisation, scale, offset)
    out = _forward_tangent(tangents, inputs, num_classes)
    return tuple(_filled(o.tangent, o.value) for o in out)


def _duals(values: Any, tangents: Any) -> list[Any]:
    """Labels that are class numbers stay what they are."""
    return [
        Dual(value, tangent) if value.is_floating_point() else value
        for value, tangent in zip(values, tangents, strict=True)
    ]


def _forward_tangent(tangents: Any, inputs: Any, num_classes: int) -> Any:
    with _check.without_autocast(inputs[0]):
        support, labels, query, regularisation, scale, offset = _duals(inputs, tangents[:6])
        return _forward(support, labels, query, regularisation, scale, offset, num_classes)


def _backward_tangent(grad: Dual, tangents: Any, inputs: Any) -> Any:
    """The tangents of RIDGE_VJP along those of the gradient and the first five inputs."""
    num_classes = grad.shape[2]
    with _check.without_autocast(inputs[0]):
        support, labels, query, regularisation, scale = _duals(inputs, tangents)
        weight, alpha, solver = _solution(support, labels, regularisation, num_classes)
        return _backward((grad, None, None), support, labels, query, scale, weight, alpha, solver)


# RIDGE_VJP is the gradient of <grad, RIDGE>, whose second derivative is symmetric: its vjp for the inputs is its own
# tangent, and its vjp for the upstream gradient is the tangent of RIDGE. What was saved is a function of the inputs.
def _ridge_vjp_vjp(need: Any, grads: Any, grad: Tensor, *args: Any) -> Any:
    inputs, labels = args[:5], args[1]
    to_grad = None
    if need[0]:
        offset = torch.zeros_like(inputs[4])
        to_grad = _forward_tangent(grads, (*inputs, offset), grad.shape[2])[0].tangent
    out = _backward_tangent(Dual(grad), grads[:5], inputs)
    of_inputs = [tangent_of(value) for value in out[:5]]
    return to_grad, of_inputs[0], _soft(labels, of_inputs[1]), *of_inputs[2:], None, None, None


def _ridge_vjp_jvp(tangents: Any, grad: Tensor, *args: Any) -> Any:
    inputs, labels = args[:5], args[1]
    out = [
        _filled(o.tangent, o.value) for o in _backward_tangent(Dual(grad, tangents[0]), tangents[1:6], inputs)
    ]
    if not labels.is_floating_point():
        out[1] = grad.new_zeros(0, labels.shape[1], grad.shape[2])
    return tuple(out)


def _plain_ridge_vjp(
    grad: Tensor,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularisation: Tensor,
    scale: Tensor,
    weight: Tensor,
    alpha: Tensor,
    factor: Tensor,
) -> Any:
    """What RIDGE_VJP computes, in plain PyTorch."""
    solver = inverse(_gram(support, regularisation))
    out = list(_backward((grad, None, None), support, labels, query, scale, weight, alpha, solver))
    if not labels.is_floating_point():
        out[1] = grad.new_empty(0, labels.shape[1], grad.shape[2])
    return tuple(out)


differentiable(RIDGE, vjp=_ridge_vjp, jvp=_ridge_jvp, save_outputs=(1, 2, 3))
differentiable(RIDGE_VJP, vjp=_ridge_vjp_vjp, jvp=_ridge_vjp_jvp)
for _op in (RIDGE, RIDGE_VJP):
    fold_into_tasks(_op)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(RIDGE, _device, torch.float32)
fallback(RIDGE, _forward)
fallback(RIDGE_VJP, _plain_ridge_vjp)


@torch.library.register_fake(RIDGE)
def _(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularisation: Tensor,
    scale: Tensor,
    offset: Tensor,
    num_classes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tasks, m, d = query.shape
    n = support.shape[1]
    return (
        query.new_empty(tasks, m, num_classes),
        query.new_empty(tasks, num_classes, d),
        query.new_empty(tasks, n, num_classes),
        query.new_empty(tasks, n, n),
    )


@torch.library.register_fake(RIDGE_VJP)
def _(
    grad: Tensor,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularisation: Tensor,
    scale: Tensor,
    weight: Tensor,
    alpha: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tasks, n = support.shape[:2]
    return (
        query.new_empty(support.shape),
        query.new_empty(tasks if labels.is_floating_point() else 0, n, grad.shape[2]),
        query.new_empty(query.shape),
        query.new_empty(tasks),
        query.new_empty(tasks),
        query.new_empty(tasks),
    )
