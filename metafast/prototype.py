"""Class means and the prototypical loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metafast import _check, reference
from metafast._autodiff import differentiable
from metafast._batching import fold_into_tasks
from metafast._library import call, fallback, operator
from metafast.distance import (
    DISTANCE,
    DISTANCE_JVP,
    DISTANCE_VJP,
    METRICS,
    distance_vjp_tangent,
    metric_index,
)

MEANS = operator("prototypes")
MEANS_VJP = operator("prototypes_vjp")
LOSS = operator("prototypical_loss")
LOSS_VJP = operator("prototypical_loss_vjp")


def prototypes(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    r"""Mean of the features of each class: :math:`c_k = \sum_i w_{ik} x_i / \sum_i w_{ik}`.

    The weights are 1 for the rows of class k (``labels`` of class numbers) or given (soft labels). Classes may be
    unbalanced and in any order; a class without a row, or of weight zero, has prototype 0. Snell, Swersky and Zemel,
    *Prototypical Networks for Few-shot Learning*, 2017. Differentiable to any order, in soft labels too.

    Args:
        features: ``[..., n, d]``, float32, float64, bfloat16 or float16 (half types are summed in float32).
        labels: ``[..., n]`` int64 class numbers, or ``[..., n, num_classes]`` weights of the dtype of ``features``.
        num_classes: C.

    Returns:
        ``[..., C, d]`` in the dtype of ``features``.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: shapes or devices do not fit; on the CPU, a class number outside 0 to C - 1 (on a GPU the
            prototypes of that task are NaN).

    Example:
        >>> prototypes(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([0, 0, 1]), 2)
        tensor([[2.],
                [7.]])
    """
    _check.features(features, "features", "[..., n, d]")
    _check.is_tensor(labels, "labels")
    _check.class_count(num_classes)
    _check.same_device(labels, "labels", features, "features")
    if labels.is_floating_point():
        return _soft_prototypes(features, labels, num_classes)
    _check.class_labels(labels, "labels")
    _check.same_size(labels, -1, "labels", features, -2, "features")
    if features.dim() == 3 and labels.dim() == 2 and features.shape[0] == labels.shape[0]:
        return call(MEANS, features, labels, num_classes)
    if features.dim() == 2 and labels.dim() == 1:
        return call(MEANS, features.unsqueeze(0), labels.unsqueeze(0), num_classes).squeeze(0)
    lead = _check.broadcast_tasks(("features", features.shape[:-2]), ("labels", labels.shape[:-1]))
    n, d = features.shape[-2:]
    tasks = torch.Size(lead).numel()
    out = call(
        MEANS,
        features.expand(*lead, n, d).reshape(tasks, n, d),
        labels.expand(*lead, n).reshape(tasks, n),
        num_classes,
    )
    return out.reshape(*lead, num_classes, d)


def _soft_prototypes(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """A batched matrix product is the whole of it, and torch's is as fast as one gets."""
    _check.features(labels, "labels", "[..., n] of int64 or [..., n, C] of weights")
    _check.same_kind(labels, "labels", features, "features")
    _check.same_size(labels, -2, "labels", features, -2, "features")
    if labels.shape[-1] != num_classes:
        raise ValueError(f"labels: expected {num_classes} weights a row, got shape {list(labels.shape)}")
    _check.broadcast_tasks(("features", features.shape[:-2]), ("labels", labels.shape[:-2]))
    with _check.without_autocast(features):
        if features.dtype in (torch.bfloat16, torch.float16):
            return reference.prototypes(features.float(), labels.float(), num_classes).to(features.dtype)
        return reference.prototypes(features, labels, num_classes)


def prototypical_loss(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    num_classes: int,
    metric: str = "sqeuclidean",
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Loss and logits of a prototypical network's head.

    .. math:: z_{ik} = -\tau \, D(q_i, c_k), \qquad L = \frac{1}{m} \sum_i \big(\log \sum_k e^{z_{ik}} - z_{i y_i}\big)

    with the class means :math:`c_k` of the support rows and a metric D of :func:`pairwise_distance`. Snell, Swersky
    and Zemel, *Prototypical Networks for Few-shot Learning*, 2017. One fused operator computes both results, and
    another all gradients. Differentiable to any order.

    Args:
        support: ``[..., n, d]`` features; half types are promoted to float32.
        support_labels: ``[..., n]`` int64 class numbers. A class without a row has logit -inf.
        query: ``[..., m, d]`` features of the dtype of ``support``.
        query_labels: ``[..., m]`` int64 class numbers.
        num_classes: C, the ways.
        metric: ``"sqeuclidean"``, ``"euclidean"``, ``"cityblock"`` or ``"cosine"``.
        temperature: multiplies the distances; a number, or a tensor that broadcasts over the leading dimensions and
            gets its gradient.

    Returns:
        ``(loss [...], logits [..., m, C])`` in float32 or float64, both differentiable. m = 0 gives a loss of nan.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: unknown metric; shapes or devices do not fit; on the CPU, a class number outside 0 to C - 1 (on a
            GPU the results of that task are NaN).

    Example:
        >>> support = torch.tensor([[0.0], [2.0]])
        >>> loss, logits = prototypical_loss(support, torch.tensor([0, 1]), support, torch.tensor([0, 1]), 2)
        >>> logits
        tensor([[-0., -4.],
                [-4., -0.]])
    """
    index = metric_index(metric)
    _check.features(support, "support", "[..., n, d]")
    _check.features(query, "query", "[..., m, d]")
    _check.class_labels(support_labels, "support_labels")
    _check.class_labels(query_labels, "query_labels")
    _check.class_count(num_classes)
    _check.same_kind(query, "query", support, "support")
    _check.same_device(support_labels, "support_labels", support, "support")
    _check.same_device(query_labels, "query_labels", support, "support")
    _check.same_size(query, -1, "query", support, -1, "support")
    _check.same_size(support_labels, -1, "support_labels", support, -2, "support")
    _check.same_size(query_labels, -1, "query_labels", query, -2, "query")
    _check.scalar(temperature, "temperature", support, "support")
    if support.dtype in (torch.bfloat16, torch.float16) or query.dtype != support.dtype:
        support, query = support.float(), query.float()
    scale, learned = 1.0, None
    if isinstance(temperature, Tensor):
        learned = temperature.to(support.dtype)
    else:
        scale = float(temperature)

    if (
        learned is None
        and support.dim() == query.dim() == 3
        and support_labels.dim() == query_labels.dim() == 2
        and support.shape[0] == query.shape[0] == support_labels.shape[0] == query_labels.shape[0]
    ):
        loss, logits, _ = call(
            LOSS, support, support_labels, query, query_labels, None, scale, num_classes, index
        )
        return loss, logits
    lead = _check.broadcast_tasks(
        ("support", support.shape[:-2]),
        ("support_labels", support_labels.shape[:-1]),
        ("query", query.shape[:-2]),
        ("query_labels", query_labels.shape[:-1]),
        ("temperature", () if learned is None else learned.shape),
    )
    tasks = torch.Size(lead).numel()

    def fold(value: Tensor, kept: int) -> Tensor:
        own = value.shape[value.dim() - kept :]
        return value.expand((*lead, *own)).reshape((tasks, *own))

    loss, logits, _ = call(
        LOSS,
        fold(support, 2),
        fold(support_labels, 1),
        fold(query, 2),
        fold(query_labels, 1),
        None if learned is None else fold(learned, 0),
        scale,
        num_classes,
        index,
    )
    return loss.reshape(lead), logits.reshape(*lead, query.shape[-2], num_classes)


def _means_vjp(need: Any, grads: Any, features: Tensor, labels: Tensor, num_classes: int) -> Any:
    return MEANS_VJP(grads[0], labels), None, None


def _means_jvp(tangents: Any, features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return MEANS(tangents[0], labels, num_classes)


def _means_vjp_vjp(need: Any, grads: Any, grad: Tensor, labels: Tensor) -> Any:
    return MEANS(grads[0], labels, grad.shape[1]), None


def _means_vjp_jvp(tangents: Any, grad: Tensor, labels: Tensor) -> Tensor:
    return MEANS_VJP(tangents[0], labels)


def _scaled(temperature: Tensor | None, scale: float) -> float | Tensor:
    return scale if temperature is None else scale * temperature[:, None, None]


def _loss_parts(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    num_classes: int,
    metric: int,
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor], Tensor]:
    """Class means, distances, and the softmax of the logits, from differentiable operators.

    The third result masks what belongs to the logits: 0 for an absent class, NaN for a task with a bad label.
    """
    means = MEANS(support, support_labels, num_classes)
    distance = DISTANCE(query, means, metric)
    present = reference.one_hot(support_labels, num_classes).any(-2, keepdim=True)
    bad = sum(reference.nan_where_invalid(y, num_classes, distance) for y in (support_labels, query_labels))

    def mask(value: Tensor) -> Tensor:
        return torch.where(present, value, 0.0) + bad

    logits = torch.where(present, -_scaled(temperature, scale) * distance, -torch.inf)
    return means, distance, mask, logits.softmax(-1)


def _loss_vjp(need: Any, grads: Any, *saved: Any) -> Any:
    support, support_labels, query, query_labels, temperature, scale, _, metric, logits, means = saved
    grad_support, grad_query, grad_temperature = LOSS_VJP(
        *grads, support, support_labels, query, query_labels, temperature, scale, logits, means, metric
    )
    return (
        grad_support,
        None,
        grad_query,
        None,
        None if temperature is None else grad_temperature,
        None,
        None,
        None,
    )


def _loss_jvp(
    tangents: Any,
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    num_classes: int,
    metric: int,
) -> Any:
    means, distance, mask, probability = _loss_parts(
        support, support_labels, query, query_labels, temperature, scale, num_classes, metric
    )
    means_tangent = MEANS(tangents[0], support_labels, num_classes)
    along = -_scaled(temperature, scale) * DISTANCE_JVP(query, means, tangents[2], means_tangent, metric)
    if temperature is not None:
        along = along - _scaled(tangents[4], scale) * distance
    along = mask(along)
    own = torch.where(reference.one_hot(query_labels, num_classes), along, 0.0).sum(-1)
    return ((probability * along).sum(-1) - own).mean(-1), along, means_tangent


def _loss_upstream(
    grad_loss: Tensor | None, grad_logits: Tensor | None, probability: Tensor, query_labels: Tensor
) -> Tensor:
    """The gradient for the logits, without the mask of the present classes."""
    upstream = torch.zeros_like(probability) if grad_logits is None else grad_logits
    if grad_loss is None:
        return upstream
    target = reference.one_hot(query_labels, probability.shape[-1]).to(probability.dtype)
    return upstream + grad_loss[:, None, None] / probability.shape[1] * (probability - target)


def _plain_loss_vjp(
    grad_loss: Tensor | None,
    grad_logits: Tensor | None,
    grad_means: Tensor | None,
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    logits: Tensor,
    means: Tensor,
    metric: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What LOSS_VJP computes, from the parts."""
    means, distance, mask, probability = _loss_parts(
        support, support_labels, query, query_labels, temperature, scale, means.shape[1], metric
    )
    upstream = mask(_loss_upstream(grad_loss, grad_logits, probability, query_labels))
    to_query, to_means = DISTANCE_VJP(-_scaled(temperature, scale) * upstream, query, means, metric)
    if grad_means is not None:
        to_means = to_means + grad_means
    to_support = MEANS_VJP(to_means, support_labels)
    if temperature is None:
        return to_support, to_query, query.new_empty(0)
    return to_support, to_query, -scale * (upstream * distance).sum((-2, -1))


def _loss_vjp_tangent(
    tangents: Any,
    grad_loss: Tensor | None,
    grad_logits: Tensor | None,
    grad_means: Tensor | None,
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    logits: Tensor,
    means: Tensor,
    metric: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangent of LOSS_VJP along the first three arguments, support, query and temperature (None: no change).

    ``logits`` and ``means`` are functions of the other arguments, and are computed anew.
    """
    to_loss, to_logits, to_grad_means, to_support, _, to_query, _, to_temperature = tangents[:8]
    num_classes = means.shape[1]
    means, distance, mask, probability = _loss_parts(
        support, support_labels, query, query_labels, temperature, scale, num_classes, metric
    )
    tau = _scaled(temperature, scale)
    upstream = mask(_loss_upstream(grad_loss, grad_logits, probability, query_labels))
    to_means = MEANS(to_support, support_labels, num_classes)
    moved = DISTANCE_JVP(query, means, to_query, to_means, metric)
    along = -tau * moved
    if temperature is not None:
        along = along - _scaled(to_temperature, scale) * distance
    along = mask(along)
    change = torch.zeros_like(distance)
    if to_loss is not None or to_logits is not None:
        change = _loss_upstream(to_loss, to_logits, probability, query_labels)
    if grad_loss is not None:
        turned = probability * (along - (probability * along).sum(-1, keepdim=True))
        change = change + grad_loss[:, None, None] / query.shape[1] * turned
    change = mask(change)
    weight_change = -tau * change
    if temperature is not None:
        weight_change = weight_change - _scaled(to_temperature, scale) * upstream
    out_query, out_means = distance_vjp_tangent(
        -tau * upstream, query, means, weight_change, to_query, to_means, metric
    )
    if to_grad_means is not None:
        out_means = out_means + to_grad_means
    out_support = MEANS_VJP(out_means, support_labels)
    if temperature is None:
        return out_support, out_query, query.new_empty(0)
    return out_support, out_query, -scale * (change * distance + upstream * moved).sum((-2, -1))


# LOSS_VJP is the gradient of <grads, LOSS>, whose second derivative is symmetric: its vjp for support, query and
# temperature is its own tangent, and its vjp for the upstream gradients is the tangent of LOSS.
def _loss_vjp_vjp(need: Any, grads: Any, *args: Any) -> Any:
    support, support_labels, query, query_labels = args[3:7]
    temperature, scale, _, means, metric = args[7:]
    to_support = torch.zeros_like(support) if grads[0] is None else grads[0]
    to_query = torch.zeros_like(query) if grads[1] is None else grads[1]
    to_temperature = None
    if temperature is not None:
        to_temperature = torch.zeros_like(temperature) if grads[2] is None else grads[2]
    upstream = (None, None, None)
    if any(need[:3]):
        upstream = _loss_jvp(
            (to_support, None, to_query, None, to_temperature),
            support,
            support_labels,
            query,
            query_labels,
            temperature,
            scale,
            means.shape[1],
            metric,
        )
    tangents = (None, None, None, to_support, None, to_query, None, to_temperature)
    out_support, out_query, out_temperature = _loss_vjp_tangent(tangents, *args)
    return (
        *(value if needed else None for value, needed in zip(upstream, need, strict=False)),
        out_support,
        None,
        out_query,
        None,
        None if temperature is None else out_temperature,
        None,
        None,
        None,
        None,
    )


differentiable(MEANS, vjp=_means_vjp, jvp=_means_jvp)
differentiable(MEANS_VJP, vjp=_means_vjp_vjp, jvp=_means_vjp_jvp)
differentiable(LOSS, vjp=_loss_vjp, jvp=_loss_jvp, save_outputs=(1, 2))
differentiable(LOSS_VJP, vjp=_loss_vjp_vjp, jvp=_loss_vjp_tangent)
for _op in (MEANS, MEANS_VJP, LOSS, LOSS_VJP):
    fold_into_tasks(_op)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(LOSS, _device, torch.float32)


@torch.library.register_fake(MEANS)
def _(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return features.new_empty(features.shape[0], num_classes, features.shape[2])


@torch.library.register_fake(MEANS_VJP)
def _(grad: Tensor, labels: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], labels.shape[1], grad.shape[2])


@torch.library.register_fake(LOSS)
def _(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    num_classes: int,
    metric: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tasks, m, d = query.shape
    return (
        query.new_empty(tasks),
        query.new_empty(tasks, m, num_classes),
        query.new_empty(tasks, num_classes, d),
    )


@torch.library.register_fake(LOSS_VJP)
def _(
    grad_loss: Tensor | None,
    grad_logits: Tensor | None,
    grad_prototypes: Tensor | None,
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    logits: Tensor,
    prototypes: Tensor,
    metric: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tasks = query.shape[0]
    return (
        query.new_empty(support.shape),
        query.new_empty(query.shape),
        query.new_empty(0 if temperature is None else tasks),
    )


def _fallback_loss(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    temperature: Tensor | None,
    scale: float,
    num_classes: int,
    metric: int,
) -> tuple[Tensor, Tensor, Tensor]:
    means = reference.prototypes(support, support_labels, num_classes)
    distance = reference.pairwise_distance(query, means, METRICS[metric])
    tau = scale if temperature is None else scale * temperature
    return *reference.distance_loss(distance, support_labels, query_labels, tau), means


fallback(MEANS, reference.prototypes)
fallback(MEANS_VJP, reference.prototypes_vjp)
fallback(LOSS, _fallback_loss)
fallback(LOSS_VJP, _plain_loss_vjp)
