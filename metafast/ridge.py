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
    for name, value in (("regularisation", regularisation), ("scale", scale), ("offset", offset)):
        _check.scalar(value, name, support, "support")
    if not isinstance(regularisation, Tensor) and not regularisation > 0:
        raise ValueError(f"regularisation: expected a positive number, got {regularisation}")
    if support.dtype in (torch.bfloat16, torch.float16) or query.dtype != support.dtype:
        support, query = support.float(), query.float()
    if soft:
        labels = labels.to(support.dtype)
    learned = [
        value.to(support.dtype) if isinstance(value, Tensor) else None
        for value in (regularisation, scale, offset)
    ]
    fixed = [1.0 if isinstance(value, Tensor) else float(value) for value in (regularisation, scale, offset)]
    kept = 2 if soft else 1
    tasks = support.shape[0]
    if (
        support.dim() == query.dim() == 3
        and labels.dim() == kept + 1
        and tasks == query.shape[0] == labels.shape[0]
        and all(value is None or value.dim() == 0 or value.shape == (tasks,) for value in learned)
    ):
        per_task = [None if value is None else value.expand(tasks) for value in learned]
        return call(RIDGE, support, labels, query, *per_task, *fixed, num_classes)[0]
    lead = _check.broadcast_tasks(
        ("support", support.shape[:-2]),
        ("labels", labels.shape[: labels.dim() - kept]),
        ("query", query.shape[:-2]),
        *(
            (name, () if v is None else v.shape)
            for name, v in zip(("regularisation", "scale", "offset"), learned, strict=True)
        ),
    )
    tasks = torch.Size(lead).numel()

    def fold(value: Tensor | None, kept: int) -> Tensor | None:
        if value is None:
            return None
        own = value.shape[value.dim() - kept :]
        return value.expand((*lead, *own)).reshape((tasks, *own))

    folded = (fold(support, 2), fold(labels, kept), fold(query, 2), *(fold(value, 0) for value in learned))
    logits = call(RIDGE, *folded, *fixed, num_classes)[0]
    return logits.reshape(*lead, query.shape[-2], num_classes)


# The closed forms are written once, for tensors and for Dual numbers.
def _per_task(value: Any) -> Any:
    return value if isinstance(value, (float, torch.SymFloat)) else value[:, None, None]


def _either(value: Any, fixed: float) -> Any:
    return fixed if value is None else value


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


def _given(value: Any, gradient: Any) -> Any:
    return None if value is None else gradient


def _plain_ridge(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularisation: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    *fixed: Any,
) -> Any:
    """What RIDGE computes, in plain PyTorch."""
    solved = _either(regularisation, fixed[0])
    return _forward(
        support, labels, query, solved, _either(scale, fixed[1]), _either(offset, fixed[2]), fixed[3]
    )


def _ridge_vjp(
    need: Any,
    grads: Any,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularisation: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    fixed_regularisation: float,
    fixed_scale: float,
    fixed_offset: float,
    num_classes: int,
    *saved: Tensor,
) -> Any:
    if grads[0] is not None and grads[1] is None and grads[2] is None and grads[3] is None:
        out = RIDGE_VJP(
            grads[0], support, labels, query, regularisation, scale, fixed_regularisation, fixed_scale, *saved
        )
    else:
        scalars = _either(regularisation, fixed_regularisation), _either(scale, fixed_scale)
        out = _tape_vjp(grads, support, labels, query, *scalars, num_classes)
    of_scalars = map(_given, (regularisation, scale, offset), out[3:])
    return out[0], _soft(labels, out[1]), out[2], *of_scalars, None, None, None, None


def _tape_vjp(
    grads: Any,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularisation: Any,
    scale: Any,
    num_classes: int,
) -> Any:
    """The gradients where what is saved for the backward has one too, as only a user of the bare operator can ask."""
    to_logits, to_weight, to_alpha, to_factor = grads
    with _check.without_autocast(support):
        weight, alpha, solver = _solution(support, labels, regularisation, num_classes)
        if to_logits is None:
            to_logits = query.new_zeros(*query.shape[:2], num_classes)
        upstream = (to_logits, to_weight, to_alpha)
        out = list(_backward(upstream, support, labels, query, scale, weight, alpha, solver))
        if to_factor is not None:
            factor = cholesky(_gram(support, regularisation))
            # The transpose of the tangent of the factor.
            turned = torch.linalg.solve_triangular(factor, upper_half(to_factor @ factor.mT), upper=True)
            to_gram = torch.linalg.solve_triangular(factor.mT, turned, upper=False, left=False)
            out[0] = out[0] + (to_gram + to_gram.mT) @ support
            out[3] = out[3] + to_gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return out


def _duals(values: Any, tangents: Any, fixed: Any) -> list[Any]:
    """Dual numbers of support, labels, query and the scalars; class numbers, and fixed scalars, stay what they are."""
    given = [
        Dual(value, tangent) if value is not None and value.is_floating_point() else value
        for value, tangent in zip(values, tangents, strict=False)
    ]
    return [*given[:3], *(_either(v, f) for v, f in zip(given[3:], fixed, strict=False))]


def _forward_tangent(tangents: Any, inputs: Any, fixed: Any, num_classes: int) -> Any:
    with _check.without_autocast(inputs[0]):
        support, labels, query, regularisation, scale, offset = _duals(inputs, tangents, fixed)
        return _forward(support, labels, query, regularisation, scale, offset, num_classes)


def _backward_tangent(grad: Dual, tangents: Any, inputs: Any, fixed: Any) -> Any:
    """The tangents of RIDGE_VJP along those of the gradient and the first five inputs."""
    with _check.without_autocast(inputs[0]):
        support, labels, query, regularisation, scale = _duals(inputs, tangents, fixed)
        weight, alpha, solver = _solution(support, labels, regularisation, grad.shape[2])
        return _backward((grad, None, None), support, labels, query, scale, weight, alpha, solver)


def _ridge_jvp(tangents: Any, *args: Any) -> Any:
    out = _forward_tangent(tangents, args[:6], args[6:9], args[9])
    return tuple(_filled(o.tangent, o.value) for o in out)


# RIDGE_VJP is the gradient of <grad, RIDGE>, whose second derivative is symmetric: its vjp for the inputs is its own
# tangent, and its vjp for the upstream gradient is the tangent of RIDGE. What was saved is a function of the inputs.
def _ridge_vjp_vjp(need: Any, grads: Any, grad: Tensor, *args: Any) -> Any:
    inputs, fixed, labels = args[:5], args[5:7], args[1]
    to_grad = None
    if need[0]:
        # The offset moves the logits as any tensor would; its value does not matter.
        offset = None if grads[5] is None else torch.zeros_like(grads[5])
        tangents = _of_given(grads, (*inputs, offset))
        to_grad = _forward_tangent(tangents, (*inputs, offset), (*fixed, 0.0), grad.shape[2])[0].tangent
    out = _backward_tangent(Dual(grad), _of_given(grads, inputs), inputs, fixed)
    of_inputs = [tangent_of(value) for value in out[:5]]
    of_scalars = map(_given, inputs[3:], of_inputs[3:])
    of_labels = _soft(labels, of_inputs[1])
    return to_grad, of_inputs[0], of_labels, of_inputs[2], *of_scalars, None, None, None, None, None


def _of_given(grads: Any, inputs: Any) -> list[Any]:
    """Where an input is no tensor its gradient is empty."""
    return [None if value is None else grad for value, grad in zip(inputs, grads, strict=False)]


def _ridge_vjp_jvp(tangents: Any, grad: Tensor, *args: Any) -> Any:
    out = _backward_tangent(Dual(grad, tangents[0]), tangents[1:6], args[:5], args[5:7])
    return _like_the_kernel([_filled(o.tangent, o.value) for o in out], args[1], *args[3:5])


def _plain_ridge_vjp(
    grad: Tensor,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    regularisation: Tensor | None,
    scale: Tensor | None,
    fixed_regularisation: float,
    fixed_scale: float,
    weight: Tensor,
    alpha: Tensor,
    factor: Tensor,
) -> Any:
    """What RIDGE_VJP computes, in plain PyTorch."""
    solver = inverse(_gram(support, _either(regularisation, fixed_regularisation)))
    upstream = (grad, None, None)
    out = _backward(upstream, support, labels, query, _either(scale, fixed_scale), weight, alpha, solver)
    return _like_the_kernel(list(out), labels, regularisation, scale)


def _like_the_kernel(
    out: list[Tensor], labels: Tensor, regularisation: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, ...]:
    """Empty gradients of class numbers and of fixed scalars."""
    if not labels.is_floating_point():
        out[1] = out[1].new_empty(0, *out[1].shape[1:])
    for k, value in ((3, regularisation), (4, scale)):
        if value is None:
            out[k] = out[k].new_empty(0)
    return tuple(out)


differentiable(RIDGE, vjp=_ridge_vjp, jvp=_ridge_jvp, save_outputs=(1, 2, 3))
differentiable(RIDGE_VJP, vjp=_ridge_vjp_vjp, jvp=_ridge_vjp_jvp)
for _op in (RIDGE, RIDGE_VJP):
    fold_into_tasks(_op)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(RIDGE, _device, torch.float32)
fallback(RIDGE, _plain_ridge)
fallback(RIDGE_VJP, _plain_ridge_vjp)


@torch.library.register_fake(RIDGE)
def _(support: Tensor, labels: Tensor, query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tasks, m, d = query.shape
    n, num_classes = support.shape[1], rest[6]
    return (
        query.new_empty(tasks, m, num_classes),
        query.new_empty(tasks, num_classes, d),
        query.new_empty(tasks, n, num_classes),
        query.new_empty(tasks, n, n),
    )


@torch.library.register_fake(RIDGE_VJP)
def _(grad: Tensor, support: Tensor, labels: Tensor, query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tasks, n = support.shape[:2]
    return (
        query.new_empty(support.shape),
        query.new_empty(tasks if labels.is_floating_point() else 0, n, grad.shape[2]),
        query.new_empty(query.shape),
        *(query.new_empty(0 if value is None else tasks) for value in rest[:2]),
        query.new_empty(tasks),
    )
