"""Pairwise distances of batches of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metafast import _check, reference
from metafast._autodiff import differentiable
from metafast._batching import fold_into_tasks
from metafast._library import call, fallback, operator

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
        return call(DISTANCE, x, y, index)
    if x.dim() == y.dim() == 2:
        return call(DISTANCE, x.unsqueeze(0), y.unsqueeze(0), index).squeeze(0)
    lead = _check.broadcast_tasks(("x", x.shape[:-2]), ("y", y.shape[:-2]))
    n, m, d = x.shape[-2], y.shape[-2], x.shape[-1]
    tasks = torch.Size(lead).numel()
    out = call(
        DISTANCE,
        x.expand(*lead, n, d).reshape(tasks, n, d),
        y.expand(*lead, m, d).reshape(tasks, m, d),
        index,
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


def _filled(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


def _sqrt_slopes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of sqrt at the squared distances; 0 where the distance is 0."""
    distance = DISTANCE(x, y, _EUCLIDEAN)
    zero = distance == 0
    inverse = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, distance))
    return inverse / 2, -(inverse**3) / 4


class _Unit:
    """Rows ``x`` of length 1 and what their derivatives need; a clamped norm is a constant."""

    def __init__(self, x: Tensor) -> None:
        norm = reference.clamped_norm(x)
        self.scale = 1 / norm
        self.rows = x * self.scale
        self.free = (norm > reference.COSINE_EPS).to(x.dtype)

    def along(self, value: Tensor) -> Tensor:
        return self.free * (self.rows * value).sum(-1, keepdim=True)

    def project(self, value: Tensor) -> Tensor:
        """The derivative of ``rows`` along ``value``; it is symmetric, so its transpose as well."""
        return self.scale * (value - self.rows * self.along(value))

    def project_tangent(self, value: Tensor, change: Tensor, move: Tensor) -> Tensor:
        """The derivative of ``project(value)`` along ``change`` of ``value`` and ``move`` of ``x``."""
        rows, turned = self.rows, self.project(move)
        scale = -self.scale.square() * self.along(move)
        bend = turned * self.along(value) + rows * self.free * (turned * value).sum(-1, keepdim=True)
        return scale * (value - rows * self.along(value)) + self.project(change) - self.scale * bend


def distance_vjp_tangent(
    grad: Tensor, x: Tensor, y: Tensor, to_grad: Tensor | None, to_x: Tensor, to_y: Tensor, metric: int
) -> tuple[Tensor, Tensor]:
    """The tangent of ``DISTANCE_VJP(grad, x, y)`` along ``to_grad``, ``to_x`` and ``to_y``."""
    if metric == _COSINE:
        with _check.without_autocast(x):
            unit_x, unit_y = _Unit(x), _Unit(y)
            turned_x, turned_y = unit_x.project(to_x), unit_y.project(to_y)
            back = grad.transpose(-1, -2)
            change_x, change_y = grad @ turned_y, back @ turned_x
            if to_grad is not None:
                change_x = change_x + to_grad @ unit_y.rows
                change_y = change_y + to_grad.transpose(-1, -2) @ unit_x.rows
            grad_x = unit_x.project_tangent(grad @ unit_y.rows, change_x, to_x)
            grad_y = unit_y.project_tangent(back @ unit_x.rows, change_y, to_y)
            return -grad_x, -grad_y
    parts = [] if to_grad is None else [DISTANCE_VJP(to_grad, x, y, metric)]
    if metric == _SQEUCLIDEAN:
        parts.append(DISTANCE_VJP(grad, to_x, to_y, metric))
    if metric == _EUCLIDEAN:
        first, second = _sqrt_slopes(x, y)
        moved = DISTANCE_JVP(x, y, to_x, to_y, _SQEUCLIDEAN)
        parts.append(DISTANCE_VJP(grad * second * moved, x, y, _SQEUCLIDEAN))
        parts.append(DISTANCE_VJP(grad * first, to_x, to_y, _SQEUCLIDEAN))
    if not parts:
        return torch.zeros_like(x), torch.zeros_like(y)
    grads_x, grads_y = zip(*parts, strict=True)
    return sum(grads_x[1:], grads_x[0]), sum(grads_y[1:], grads_y[0])


# With f the distance: the vjp V(g, x, y) is the gradient of <g, f(x, y)>, whose second derivative is symmetric. So
# the vjp of V for x and y is its own tangent, and its vjp for g is the tangent of f.
def _vjp_vjp(need: Any, grads: Any, grad: Tensor, x: Tensor, y: Tensor, metric: int) -> Any:
    u, v = _filled(grads[0], x), _filled(grads[1], y)
    return DISTANCE_JVP(x, y, u, v, metric), *distance_vjp_tangent(grad, x, y, None, u, v, metric), None


def _vjp_jvp(tangents: Any, grad: Tensor, x: Tensor, y: Tensor, metric: int) -> Any:
    return distance_vjp_tangent(grad, x, y, tangents[0], tangents[1], tangents[2], metric)


# The tangent J(x, y, u, v) is linear in u and v with transpose V, and its gradient for x and y is V's tangent.
def _jvp_vjp(need: Any, grads: Any, x: Tensor, y: Tensor, u: Tensor, v: Tensor, metric: int) -> Any:
    to_u, to_v = DISTANCE_VJP(grads[0], x, y, metric)
    return *distance_vjp_tangent(grads[0], x, y, None, u, v, metric), to_u, to_v, None


def _jvp_jvp(tangents: Any, x: Tensor, y: Tensor, u: Tensor, v: Tensor, metric: int) -> Any:
    to_x, to_y, to_u, to_v, _ = tangents
    out = DISTANCE_JVP(x, y, to_u, to_v, metric)
    if metric == _SQEUCLIDEAN:
        out = out + DISTANCE_JVP(to_x, to_y, u, v, metric)
    if metric == _EUCLIDEAN:
        first, second = _sqrt_slopes(x, y)
        moved = DISTANCE_JVP(x, y, to_x, to_y, _SQEUCLIDEAN)
        out = out + second * moved * DISTANCE_JVP(x, y, u, v, _SQEUCLIDEAN)
        out = out + first * DISTANCE_JVP(to_x, to_y, u, v, _SQEUCLIDEAN)
    if metric == _COSINE:
        with _check.without_autocast(x):
            unit_x, unit_y = _Unit(x), _Unit(y)
            zero_u, zero_v = torch.zeros_like(u), torch.zeros_like(v)
            out = out - unit_x.project_tangent(u, zero_u, to_x) @ unit_y.rows.transpose(-1, -2)
            out = out - unit_x.rows @ unit_y.project_tangent(v, zero_v, to_y).transpose(-1, -2)
            out = out - unit_x.project(u) @ unit_y.project(to_y).transpose(-1, -2)
            out = out - unit_x.project(to_x) @ unit_y.project(v).transpose(-1, -2)
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
