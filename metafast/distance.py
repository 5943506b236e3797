"""Pairwise distances of batches of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast import _check, reference
from metafast._autodiff import closed_form, differentiable
from metafast._batching import fold_into_tasks
from metafast._library import fallback, operator

#: The metrics, in the order of the enumeration in csrc/math/distance.h.
METRICS = ("sqeuclidean", "euclidean", "cityblock", "cosine")
_SQEUCLIDEAN, _EUCLIDEAN, _CITYBLOCK, _COSINE = range(4)
_INDEX = {name: index for index, name in enumerate(METRICS)}

DISTANCE = operator("pairwise_distance")
DISTANCE_VJP = operator("pairwise_distance_vjp")
DISTANCE_JVP = operator("pairwise_distance_jvp")


def metric_index(metric: Any) -> int:
    if not isinstance(metric, str) or metric not in _INDEX:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    return _INDEX[metric]


def pairwise_distance(x: Tensor, y: Tensor, metric: str = "sqeuclidean") -> Tensor:
    r"""Distance of every row of ``x`` to every row of ``y``.

    ============ ==========================================================
    metric       :math:`D_{ij}`
    ============ ==========================================================
    sqeuclidean  :math:`\sum_k (x_{ik} - y_{jk})^2`
    euclidean    :math:`\sqrt{\sum_k (x_{ik} - y_{jk})^2}`
    cityblock    :math:`\sum_k |x_{ik} - y_{jk}|`
    cosine       :math:`1 - x_i \cdot y_j / (\max(|x_i|, 10^{-8}) \max(|y_j|, 10^{-8}))`
    ============ ==========================================================

    Differences are taken before they are squared, so close rows keep their relative accuracy and equal rows are
    at distance exactly 0. Where a derivative does not exist it is 0: euclidean at equal rows, cityblock at equal
    entries. Differentiable to any order.

    Args:
        x: ``[..., n, d]``, float32, float64, bfloat16 or float16 (half types are summed in float32).
        y: ``[..., m, d]`` of the same dtype; leading dimensions broadcast.
        metric: one of the four above, by SciPy's names.

    Returns:
        ``[..., n, m]`` in the dtype of ``x``; float32 under autocast.

    Raises:
        TypeError: an argument is no floating tensor, or the dtypes differ.
        ValueError: unknown metric; shapes or devices do not fit.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> pairwise_distance(x, x, "euclidean")
        tensor([[0., 5.],
                [5., 0.]])
    """
    index = metric_index(metric)
    _check.features(x, "x", "[..., n, d]")
    _check.features(y, "y", "[..., m, d]")
    _check.same_kind(y, "y", x, "x")
    _check.same_size(y, -1, "y", x, -1, "x")
    if x.dim() == 3 and y.dim() == 3 and x.shape[0] == y.shape[0]:
        return DISTANCE(x, y, index)
    lead = _check.broadcast_tasks(("x", x.shape[:-2]), ("y", y.shape[:-2]))
    n, m, d = x.shape[-2], y.shape[-2], x.shape[-1]
    tasks = torch.Size(lead).numel()
    out = DISTANCE(
        x.expand(*lead, n, d).reshape(tasks, n, d), y.expand(*lead, m, d).reshape(tasks, m, d), index
    )
    return out.reshape(*lead, n, m)


def cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    """``torch.cdist`` with a second derivative, and accurate for close rows, for p = 1 and p = 2.

    The signature is torch's. p = 1 and p = 2 are :func:`pairwise_distance` with ``"cityblock"`` and ``"euclidean"``,
    for which ``compute_mode`` changes nothing; every other p, and every dtype besides the four floating ones, is
    handed to ``torch.cdist`` as it is.
    """
    modes = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")
    _check.is_tensor(x1, "x1")
    _check.is_tensor(x2, "x2")
    if compute_mode not in modes:
        raise ValueError(f"compute_mode: expected one of {modes}, got {compute_mode!r}")
    metric = {1.0: "cityblock", 2.0: "euclidean"}.get(p)
    if metric is None or x1.dtype not in _check.FLOATING:
        return torch.cdist(x1, x2, p, compute_mode)
    return pairwise_distance(x1, x2, metric)


def _distance_vjp(need: Any, grads: Any, x: Tensor, y: Tensor, metric: int) -> Any:
    grad_x, grad_y = DISTANCE_VJP(grads[0], x, y, metric)
    return grad_x, grad_y, None


def _distance_jvp(tangents: Any, x: Tensor, y: Tensor, metric: int) -> Tensor:
    return DISTANCE_JVP(x, y, tangents[0], tangents[1], metric)


def _composed(x: Tensor, y: Tensor, metric: int) -> Tensor:
    """Euclidean and cosine distance from operators whose derivatives of every order are known."""
    if metric == _EUCLIDEAN:
        return reference.safe_sqrt(DISTANCE(x, y, _SQEUCLIDEAN))
    with _check.without_autocast(x):
        return reference.pairwise_distance(x, y, METRICS[metric])


def _composed_vjp(grad: Tensor, x: Tensor, y: Tensor, metric: int) -> Any:
    return torch.func.vjp(lambda a, b: _composed(a, b, metric), x, y)[1](grad)


def _composed_jvp(x: Tensor, y: Tensor, tangent_x: Tensor, tangent_y: Tensor, metric: int) -> Tensor:
    return closed_form(_composed)[1]((tangent_x, tangent_y, None), x, y, metric)


_composed_vjp_rules = closed_form(_composed_vjp)
_composed_jvp_rules = closed_form(_composed_jvp)


def _filled(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


# With B(g, x, y) the vjp and J(x, y, u, v) the jvp, sqeuclidean and cityblock are closed under differentiation:
# B and J are linear in g and in u, v; in x and y sqeuclidean is linear too, and cityblock constant.
def _vjp_vjp(need: Any, grads: Any, grad: Tensor, x: Tensor, y: Tensor, metric: int) -> Any:
    if metric in (_EUCLIDEAN, _COSINE):
        return _composed_vjp_rules[0](need, grads, grad, x, y, metric)
    u, v = _filled(grads[0], x), _filled(grads[1], y)
    to_grad = DISTANCE_JVP(x, y, u, v, metric)
    to_x, to_y = DISTANCE_VJP(grad, u, v, metric) if metric == _SQEUCLIDEAN else (None, None)
    return to_grad, to_x, to_y, None


def _vjp_jvp(tangents: Any, grad: Tensor, x: Tensor, y: Tensor, metric: int) -> Any:
    if metric in (_EUCLIDEAN, _COSINE):
        return _composed_vjp_rules[1](tangents, grad, x, y, metric)
    grad_x, grad_y = DISTANCE_VJP(tangents[0], x, y, metric)
    if metric == _SQEUCLIDEAN:
        more_x, more_y = DISTANCE_VJP(grad, tangents[1], tangents[2], metric)
        grad_x, grad_y = grad_x + more_x, grad_y + more_y
    return grad_x, grad_y


def _jvp_vjp(need: Any, grads: Any, x: Tensor, y: Tensor, u: Tensor, v: Tensor, metric: int) -> Any:
    if metric in (_EUCLIDEAN, _COSINE):
        return _composed_jvp_rules[0](need, grads, x, y, u, v, metric)
    to_u, to_v = DISTANCE_VJP(grads[0], x, y, metric)
    to_x, to_y = DISTANCE_VJP(grads[0], u, v, metric) if metric == _SQEUCLIDEAN else (None, None)
    return to_x, to_y, to_u, to_v, None


def _jvp_jvp(tangents: Any, x: Tensor, y: Tensor, u: Tensor, v: Tensor, metric: int) -> Any:
    if metric in (_EUCLIDEAN, _COSINE):
        return _composed_jvp_rules[1](tangents, x, y, u, v, metric)
    out = DISTANCE_JVP(x, y, tangents[2], tangents[3], metric)
    if metric == _SQEUCLIDEAN:
        out = out + DISTANCE_JVP(tangents[0], tangents[1], u, v, metric)
    return out


differentiable(DISTANCE, vjp=_distance_vjp, jvp=_distance_jvp)
differentiable(DISTANCE_VJP, vjp=_vjp_vjp, jvp=_vjp_jvp)
differentiable(DISTANCE_JVP, vjp=_jvp_vjp, jvp=_jvp_jvp)
for _op in (DISTANCE, DISTANCE_VJP, DISTANCE_JVP):
    fold_into_tasks(_op)
fallback(DISTANCE, lambda x, y, metric: reference.pairwise_distance(x, y, METRICS[metric]))
fallback(DISTANCE_VJP, lambda g, x, y, metric: reference.pairwise_distance_vjp(g, x, y, METRICS[metric]))
fallback(
    DISTANCE_JVP, lambda x, y, u, v, metric: reference.pairwise_distance_jvp(x, y, u, v, METRICS[metric])
)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(DISTANCE, _device, torch.float32)


@torch.library.register_fake(DISTANCE)
def _(x: Tensor, y: Tensor, metric: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], y.shape[1])


@torch.library.register_fake(DISTANCE_VJP)
def _(grad: Tensor, x: Tensor, y: Tensor, metric: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


@torch.library.register_fake(DISTANCE_JVP)
def _(x: Tensor, y: Tensor, tangent_x: Tensor, tangent_y: Tensor, metric: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], y.shape[1])
