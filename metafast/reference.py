"""The operators of metafast in plain PyTorch: the oracle of the tests and the documentation of the maths.

Shapes use ``T`` for leading (task) dimensions, ``n`` support rows, ``m`` query rows, ``d`` features and ``C``
classes. These functions also run wherever an operator has no compiled kernel for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: Smaller norms are replaced by it in the cosine distance, as in ``torch.nn.functional.cosine_similarity``.
COSINE_EPS = 1e-8


def safe_sqrt(square: Tensor) -> Tensor:
    """sqrt with derivative 0 (of every order) where the argument is 0."""
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def clamped_norm(x: Tensor) -> Tensor:
    norm = safe_sqrt(x.square().sum(-1, keepdim=True))
    return torch.where(norm <= COSINE_EPS, COSINE_EPS, norm)


def pairwise_distance(x: Tensor, y: Tensor, metric: str = "sqeuclidean") -> Tensor:
    """Distances ``[..., n, m]`` of the rows of ``x [..., n, d]`` to the rows of ``y [..., m, d]``, by differences."""
    if metric == "cosine":
        unit_x, unit_y = x / clamped_norm(x), y / clamped_norm(y)
        return 1 - unit_x @ unit_y.transpose(-1, -2)
    difference = x.unsqueeze(-2) - y.unsqueeze(-3)
    if metric == "cityblock":
        return difference.abs().sum(-1)
    square = difference.square().sum(-1)
    if metric == "sqeuclidean":
        return square
    if metric == "euclidean":
        return safe_sqrt(square)
    raise ValueError(f"metric: expected sqeuclidean, euclidean, cityblock or cosine, got {metric!r}")


def _slopes(x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, ...]:
    """``w, step_x, step_y, x_part, y_part`` of every pair: dD/dx = w step_x + x_part x, dD/dy = w step_y + y_part y."""
    x, y = x.unsqueeze(-2), y.unsqueeze(-3)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    if metric == "cosine":
        x_norm, y_norm = clamped_norm(x).squeeze(-1), clamped_norm(y).squeeze(-1)
        w = 1 / (x_norm * y_norm)
        along = w * (x * y).sum(-1)
        x_part = torch.where(x_norm > COSINE_EPS, along / x_norm.square(), 0.0)
        y_part = torch.where(y_norm > COSINE_EPS, along / y_norm.square(), 0.0)
        return w, -y, -x, x_part, y_part
    step = x - y
    if metric == "cityblock":
        return zero + 1, step.sign(), -step.sign(), zero, zero
    if metric == "euclidean":
        distance = step.square().sum(-1).sqrt()
        return torch.where(distance == 0, 0.0, 1 / distance), step, -step, zero, zero
    return zero + 2, step, -step, zero, zero


def pairwise_distance_vjp(grad: Tensor, x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The gradients of ``sum(grad * pairwise_distance(x, y, metric))`` for ``x`` and ``y``."""
    w, step_x, step_y, x_part, y_part = _slopes(x, y, metric)
    weight = (grad * w).unsqueeze(-1)
    grad_x, grad_y = (weight * step_x).sum(-2), (weight * step_y).sum(-3)
    if metric != "cosine":
        return grad_x, grad_y
    return grad_x + (grad * x_part).sum(-1).unsqueeze(-1) * x, grad_y + (grad * y_part).sum(-2).unsqueeze(
        -1
    ) * y


def pairwise_distance_jvp(x: Tensor, y: Tensor, tangent_x: Tensor, tangent_y: Tensor, metric: str) -> Tensor:
    """The tangent of ``pairwise_distance(x, y, metric)``."""
    w, step_x, step_y, x_part, y_part = _slopes(x, y, metric)
    if metric != "cosine":
        return w * (step_x * (tangent_x.unsqueeze(-2) - tangent_y.unsqueeze(-3))).sum(-1)
    along = (step_x * tangent_x.unsqueeze(-2) + step_y * tangent_y.unsqueeze(-3)).sum(-1)
    of_x, of_y = (x * tangent_x).sum(-1).unsqueeze(-1), (y * tangent_y).sum(-1).unsqueeze(-2)
    return w * along + x_part * of_x + y_part * of_y


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """``labels [..., n]`` as booleans ``[..., n, C]``."""
    return labels.unsqueeze(-1) == torch.arange(num_classes, device=labels.device)


def nan_where_invalid(labels: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """0, or NaN for a task with a class number outside 0 to C - 1: ``[..., 1, 1]``."""
    valid = ((labels >= 0) & (labels < num_classes)).all(-1)
    return torch.where(valid, 0.0, torch.nan).to(like.dtype)[..., None, None]


def prototypes(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Class means ``sum_i w_ic x_i / sum_i w_ic``, zeros for a class without weight: ``[..., C, d]``.

    ``labels`` holds class numbers ``[..., n]`` or weights ``[..., n, C]``. A class number outside 0 to C - 1
    makes the prototypes of its task NaN.
    """
    if labels.is_floating_point():
        weight, total = labels.sum(-2), labels.transpose(-1, -2) @ features
    else:
        member = one_hot(labels, num_classes)
        weight = member.sum(-2).to(features.dtype)
        # Not a product with zeros: a row that is not finite is its own class's affair.
        total = torch.where(member.unsqueeze(-1), features.unsqueeze(-2), 0.0).sum(-3)
        total = total + nan_where_invalid(labels, num_classes, features)
        weight = weight + nan_where_invalid(labels, num_classes, features).squeeze(-1)
    empty = weight == 0
    return torch.where(empty.unsqueeze(-1), 0.0, total / torch.where(empty, 1.0, weight).unsqueeze(-1))


def prototypes_vjp(grad: Tensor, labels: Tensor) -> Tensor:
    """Gradient ``[..., n, d]`` of ``sum(grad * prototypes(features, labels, C))`` for features and class numbers."""
    num_classes = grad.shape[-2]
    member = one_hot(labels, num_classes)
    share = grad / member.sum(-2).clamp(min=1).unsqueeze(-1)
    chosen = torch.where(member.unsqueeze(-1), share.unsqueeze(-3), 0.0).sum(-2)
    return chosen + nan_where_invalid(labels, num_classes, grad)


def distance_loss(
    distance: Tensor, support_labels: Tensor, query_labels: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the query rows, and logits ``-temperature * distance``.

    A class without support has logit -inf.
    """
    if isinstance(temperature, Tensor):
        temperature = temperature[..., None, None]
    present = one_hot(support_labels, distance.shape[-1]).any(-2, keepdim=True)
    logits = torch.where(present, -temperature * distance, -torch.inf)
    for labels in (support_labels, query_labels):
        logits = logits + nan_where_invalid(labels, distance.shape[-1], logits)
    own = one_hot(query_labels, distance.shape[-1])
    log_probability = torch.where(own, logits.log_softmax(-1), 0.0).sum(-1)
    return -log_probability.mean(-1), logits


def prototypical_loss(
    support: Tensor,
    support_labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    num_classes: int,
    metric: str = "sqeuclidean",
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """``logits = -temperature * distance(query, prototypes)`` and its mean cross-entropy over the query rows.

    A class without a support row has logit -inf.
    """
    distance = pairwise_distance(query, prototypes(support, support_labels, num_classes), metric)
    return distance_loss(distance, support_labels, query_labels, temperature)


def adapt_linear(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: float | Tensor | tuple[float | Tensor, float | Tensor | None],
    steps: int,
    *,
    loss: str = "cross_entropy",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    first_order: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``weight`` and ``bias`` after ``steps`` of ``torch.optim.SGD``'s rule on each task's own rows."""
    n, classes = features.shape[-2], weight.shape[-2]
    targets = labels
    if not labels.is_floating_point():
        targets = one_hot(labels, classes).to(features.dtype)
        targets = targets + nan_where_invalid(labels, classes, targets)
    parameters = [weight] if bias is None else [weight, bias]
    buffers: list[Tensor] = []
    for step in range(steps):
        logits = features @ parameters[0].transpose(-1, -2)
        if bias is not None:
            logits = logits + parameters[1].unsqueeze(-2)
        if loss == "mse":
            error = 2 * (logits - targets) / (n * classes)
        else:
            error = (targets.sum(-1, keepdim=True) * logits.softmax(-1) - targets) / n
        gradients = [error.transpose(-1, -2) @ features, error.sum(-2)][: len(parameters)]
        gradients = [g + weight_decay * p for g, p in zip(gradients, parameters, strict=True)]
        if step:
            gradients = [momentum * b + g for b, g in zip(buffers, gradients, strict=True)]
        buffers = [g.detach() for g in gradients] if first_order else gradients
        rates: list[Any]
        if isinstance(lr, tuple):
            rates = list(lr)
        elif isinstance(lr, Tensor) and lr.dim() > 0:
            rates = [lr[step].unsqueeze(-1), lr[step]]
        else:
            rates = [lr, lr]
        parameters = [p - r * b for p, r, b in zip(parameters, rates, buffers, strict=False)]
    lead = torch.broadcast_shapes(features.shape[:-2], *(p.shape[:-2] for p in parameters[:1]))
    adapted = parameters[0].expand(*lead, classes, features.shape[-1])
    return adapted, None if bias is None else parameters[1].expand(*lead, classes)


def adapted_logits(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: float | Tensor | tuple[float | Tensor, float | Tensor | None],
    steps: int,
    **options: Any,
) -> Tensor:
    """``query`` through the layer that :func:`adapt_linear` gives."""
    adapted, adapted_bias = adapt_linear(support, labels, weight, bias, lr, steps, **options)
    logits = query @ adapted.transpose(-1, -2)
    return logits if adapted_bias is None else logits + adapted_bias.unsqueeze(-2)


def matching_log_probs(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    scale: float | Tensor = 1.0,
    *,
    num_classes: int,
    eps: float = COSINE_EPS,
) -> Tensor:
    """``log sum_{i: y_i = c} exp(s a_ij) - log sum_i exp(s a_ij)`` with the cosines a: ``[..., m, C]``.

    Half inputs are promoted to float32.
    """
    if support.dtype in (torch.bfloat16, torch.float16):
        support, query = support.float(), query.float()
    lengths = torch.linalg.vector_norm(query, dim=-1, keepdim=True) @ (
        torch.linalg.vector_norm(support, dim=-1, keepdim=True).mT
    )
    scores = query @ support.mT / lengths.clamp(min=eps)
    scores = scores * (scale[..., None, None] if isinstance(scale, Tensor) else scale)
    scores = scores + nan_where_invalid(labels, num_classes, support)
    others = ~one_hot(labels, num_classes).unsqueeze(-3)
    of_class = scores.unsqueeze(-1).masked_fill(others, -torch.inf).logsumexp(-2)
    return of_class - scores.logsumexp(-1, keepdim=True)


def attention_lstm(
    support: Tensor,
    query: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    steps: int,
    *,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
) -> Tensor:
    """``h, c = LSTM([f, softmax(h g^T) g], (h, c)); h = h + f``, ``steps`` times: ``[..., m, d]``.

    Half inputs are promoted to float32.
    """
    if support.dtype in (torch.bfloat16, torch.float16):
        support, query, weight_ih, weight_hh = (v.float() for v in (support, query, weight_ih, weight_hh))
        bias, hidden, cell = (None if v is None else v.float() for v in (bias, hidden, cell))
    hidden = query if hidden is None else hidden
    cell = torch.zeros_like(query) if cell is None else cell
    for _ in range(steps):
        read = (hidden @ support.mT).softmax(-1) @ support
        lead = torch.broadcast_shapes(query.shape, read.shape)
        gates = torch.cat([query.expand(lead), read.expand(lead)], -1) @ weight_ih.mT + hidden @ weight_hh.mT
        entered, kept, new, shown = (gates if bias is None else gates + bias).chunk(4, -1)
        cell = kept.sigmoid() * cell + entered.sigmoid() * new.tanh()
        hidden = shown.sigmoid() * cell.tanh() + query
    return hidden


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
    """``scale X_q W + offset`` with ``W = X^T (X X^T + regularisation I)^-1 Y``: ``[..., m, C]``.

    ``labels`` holds class numbers ``[..., n]``, for which ``num_classes`` is needed, or targets ``[..., n, C]``.
    Half inputs are promoted: torch solves no equations in them.
    """
    if support.dtype in (torch.bfloat16, torch.float16):
        support, query = support.float(), query.float()

    def per_task(value: float | Tensor) -> float | Tensor:
        return value[..., None, None] if isinstance(value, Tensor) else value

    targets = labels.to(support.dtype)
    if not labels.is_floating_point():
        assert num_classes is not None
        targets = one_hot(labels, num_classes).to(support.dtype) + nan_where_invalid(
            labels, num_classes, support
        )
    identity = torch.eye(support.shape[-2], dtype=support.dtype, device=support.device)
    gram = support @ support.mT + per_task(regularisation) * identity
    # Not torch.linalg.solve, whose second derivative by forward mode twice is wrong in torch 2.13.
    weight = support.mT @ (torch.linalg.inv_ex(gram)[0] @ targets)
    return per_task(scale) * (query @ weight) + per_task(offset)


def sgd_update(params: list[Tensor], grads: list[Tensor], lr: float | Tensor | list[Tensor]) -> list[Tensor]:
    """``params_k - lr_k grads_k``."""
    rates: list[float | Tensor] = [*lr] if isinstance(lr, list) else [lr] * len(params)
    return [p - rate * g for p, g, rate in zip(params, grads, rates, strict=True)]


def mlp(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str = "relu") -> Tensor:
    """Outputs ``[..., rows, out]`` of layers with weights ``[..., out, in]`` and biases ``[..., out]``."""
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight.mT + bias.unsqueeze(-2)
        if k < len(weights) - 1:
            x = x.relu() if activation == "relu" else x.tanh()
    return x


def mean_loss(outputs: Tensor, targets: Tensor, loss: str = "mse") -> Tensor:
    """Mean squared error over rows and outputs, or cross-entropy of probabilities or class numbers over the rows."""
    if loss == "mse":
        return (outputs - targets).square().mean((-2, -1))
    if not targets.is_floating_point():
        classes = outputs.shape[-1]
        targets = one_hot(targets, classes) + nan_where_invalid(targets, classes, outputs)
    return -(targets * outputs.log_softmax(-1)).sum(-1).mean(-1)


def adapt_mlp(
    inputs: Tensor,
    targets: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lr: Any,
    steps: int,
    *,
    activation: str = "relu",
    loss: str = "mse",
    first_order: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases for every task after ``steps`` steps of gradient descent on the loss of its rows."""
    layers = len(weights)
    lead = torch.broadcast_shapes(
        inputs.shape[:-2],
        targets.shape[: -2 if targets.is_floating_point() else -1],
        *(w.shape[:-2] for w in weights),
        *(b.shape[:-1] for b in biases),
    )
    parameters = tuple(w.expand(*lead, *w.shape[-2:]) for w in weights)
    parameters += tuple(b.expand(*lead, b.shape[-1]) for b in biases)

    def total(parameters: tuple[Tensor, ...]) -> Tensor:
        out = mlp(inputs, parameters[:layers], parameters[layers:], activation)
        return mean_loss(out, targets, loss).sum()

    for t in range(steps):
        gradients = torch.func.grad(total)(parameters)
        if first_order:
            gradients = tuple(g.detach() for g in gradients)
        if isinstance(lr, (list, tuple)) and isinstance(lr[0], (list, tuple)):
            rates = [*lr[0], *lr[1]]
        else:
            rates = [*lr, *lr] if isinstance(lr, (list, tuple)) else [lr] * (2 * layers)
            rates = [r[t] if isinstance(r, Tensor) and r.dim() == 1 else r for r in rates]
        parameters = tuple(p - r * g for p, r, g in zip(parameters, rates, gradients, strict=True))
    return list(parameters[:layers]), list(parameters[layers:])


def adapted_mlp(
    inputs: Tensor,
    targets: Tensor,
    query: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lr: Any,
    steps: int,
    *,
    activation: str = "relu",
    loss: str = "mse",
    first_order: bool = False,
) -> Tensor:
    """Outputs of the adapted MLP for the query rows."""
    adapted = adapt_mlp(
        inputs,
        targets,
        weights,
        biases,
        lr,
        steps,
        activation=activation,
        loss=loss,
        first_order=first_order,
    )
    return mlp(query, *adapted, activation)


def norm_relu_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
    pool: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``x [..., n, C, H, W]`` normalised per channel, by the statistics of its n images or by given ones ``[..., C]``.

    Then ReLU and the largest of every 2 x 2 pixels. Half inputs are computed with in float32.
    """

    def of_pixels(values: Tensor) -> Tensor:
        return values[..., None, :, None, None]

    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    if mean is None or var is None:
        mean = wide.mean((-4, -2, -1))
        var = (wide - of_pixels(mean)).square().mean((-4, -2, -1))
    y = (wide - of_pixels(mean)) * of_pixels((var + eps).rsqrt() * weight) + of_pixels(bias)
    of_tasks = (*y.shape[:-4], y.shape[-3])
    if relu:
        y = y.relu()
    if pool:
        y = windows(y).max(-1).values
    return y.to(x.dtype), mean.expand(of_tasks), var.expand(of_tasks)


def conv_norm_relu_pool(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`norm_relu_pool` of ``x [..., n, planes, H, W]`` convolved with ``[..., C, planes, 3, 3]``, padding 1."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    wide, kernel = (value.float() if half else value for value in (x, conv_weight))
    height, width = x.shape[-2:]
    border = torch.nn.functional.pad(wide, (1, 1, 1, 1))
    z = torch.zeros((), dtype=wide.dtype, device=x.device)
    for k in range(9):
        shifted = border[..., k // 3 : k // 3 + height, k % 3 : k % 3 + width]
        z = z + (kernel[..., None, :, :, k // 3, k % 3] @ shifted.flatten(-2)).unflatten(-1, (height, width))
    if conv_bias is not None:
        z = z + conv_bias[..., None, :, None, None]
    y, mean, var = norm_relu_pool(z, weight, bias, mean, var, eps=eps)
    return y.to(x.dtype), mean, var


def windows(x: Tensor) -> Tensor:
    """The 2 x 2 windows of ``x [..., H, W]``, row by row: ``[..., H // 2, W // 2, 4]``; odd sizes are cut."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    x = x.narrow(-2, 0, 2 * height).narrow(-1, 0, 2 * width).reshape(*x.shape[:-2], height, 2, width, 2)
    return x.transpose(-3, -2).reshape(*x.shape[:-4], height, width, 4)
