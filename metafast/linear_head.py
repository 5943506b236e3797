"""The head of ANIL: a linear layer after K steps of gradient descent on the support rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafast import _check
from metafast._autodiff import differentiable
from metafast._batching import fold_into_tasks, of_groups, of_tasks
from metafast._dual import Dual, constant, stack, tangent_of
from metafast._inner_loss import LOSSES, loss_change, loss_gradient, target
from metafast._library import call, fallback, operator

HEAD = operator("linear_head")
HEAD_VJP = operator("linear_head_vjp")

Rate = float | Tensor | tuple[float | Tensor, float | Tensor | None]


def adapt_linear(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: Rate,
    steps: int,
    *,
    loss: str = "cross_entropy",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    first_order: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""A linear layer after ``steps`` steps of gradient descent on one task's rows: the inner loop of ANIL.

    .. math:: W_{t+1} = W_t - \alpha_t \circ \nabla_W L(X W_t^\top + b_t, Y), \qquad
              b_{t+1} = b_t - \alpha_t \circ \nabla_b L

    with torch's mean cross-entropy or mean squared error L. Raghu et al., *Rapid Learning or Feature Reuse?
    Towards Understanding the Effectiveness of MAML*, 2020. One operator takes all steps of all tasks, and another
    gives the exact second-order gradients of everything. Differentiable to any order.

    Args:
        features: ``[..., n, d]`` rows of each task; half types are promoted to float32.
        labels: ``[..., n]`` int64 class numbers, ``[..., n, C]`` soft labels or, for ``"mse"``, targets.
        weight: ``[C, d]`` shared by all tasks, or ``[..., C, d]``.
        bias: ``[C]`` or ``[..., C]``; None: no bias.
        lr: a number, a tensor ``[]``, ``[K]`` (per step) or ``[K, C]`` (per step and class), or a pair of rates like
            the weight and like the bias (Meta-SGD). A tensor gets its gradient.
        steps: K, 0 or more.
        loss: ``"cross_entropy"`` or ``"mse"``.
        momentum: that of ``torch.optim.SGD``, without dampening.
        weight_decay: that of ``torch.optim.SGD``, of the bias too.
        first_order: take the steps' directions for constants (FOMAML).

    Returns:
        ``(weight [..., C, d], bias [..., C])``, the bias None where none was given.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: unknown loss; shapes or devices do not fit; on the CPU, a class number outside 0 to C - 1 (on a
            GPU the results of that task are NaN).

    Example:
        >>> weight, bias = adapt_linear(
        ...     torch.eye(2), torch.tensor([0, 1]), torch.zeros(2, 2), torch.zeros(2), 1.0, 1
        ... )
        >>> weight
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """
    options = (loss, momentum, weight_decay, first_order)
    query = features[..., :0, :] if isinstance(features, Tensor) and features.dim() > 1 else features
    _, adapted, adapted_bias = _run(features, labels, query, weight, bias, lr, steps, *options, "features")
    return adapted, None if bias is None else adapted_bias


def adapted_logits(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: Rate,
    steps: int,
    *,
    loss: str = "cross_entropy",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    first_order: bool = False,
) -> Tensor:
    r"""Logits of the query rows under the adapted layer: :math:`X_q W_K^\top + b_K`, the whole head of ANIL.

    The adapted layer is that of :func:`adapt_linear`, whose arguments these are.

    Args:
        support: ``[..., n, d]``.
        labels: those of ``support``.
        query: ``[..., m, d]`` of the dtype of ``support``.
        weight, bias, lr, steps, loss, momentum, weight_decay, first_order: as for :func:`adapt_linear`.

    Returns:
        ``[..., m, C]`` in float32 or float64.

    Raises:
        TypeError, ValueError: as :func:`adapt_linear`.

    Example:
        >>> support, labels = torch.eye(2), torch.tensor([0, 1])
        >>> adapted_logits(support, labels, support, torch.zeros(2, 2), None, 1.0, 1)
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])
    """
    options = (loss, momentum, weight_decay, first_order)
    return _run(support, labels, query, weight, bias, lr, steps, *options, "support")[0]


def _run(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lr: Rate,
    steps: int,
    loss: str,
    momentum: float,
    weight_decay: float,
    first_order: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kind = _check.choice(loss, "loss", LOSSES)
    _check.features(support, name, "[..., n, d]")
    _check.features(query, "query", "[..., m, d]")
    _check.features(weight, "weight", "[C, d] or [..., C, d]")
    _check.same_kind(query, "query", support, name)
    _check.same_kind(weight, "weight", support, name)
    _check.same_size(query, -1, "query", support, -1, name)
    _check.same_size(weight, -1, "weight", support, -1, name)
    _check.count(steps, "steps")
    _check.number(momentum, "momentum")
    _check.number(weight_decay, "weight_decay")
    classes = weight.shape[-2]
    if bias is not None:
        _check.floating(bias, "bias")
        _check.same_kind(bias, "bias", support, name)
        if bias.dim() < 1 or bias.shape[-1] != classes:
            raise ValueError(f"bias: expected shape [{classes}] or [..., {classes}], got {list(bias.shape)}")
    soft = _check_labels(labels, support, name, classes, loss)
    if support.dtype in (torch.bfloat16, torch.float16) or _check.autocasts(support):
        support, query, weight = support.float(), query.float(), weight.float()
        bias = None if bias is None else bias.float()
        labels = labels.float() if soft else labels
    rate, rates, bias_rates = _rates(lr, weight, bias, steps)

    n, d = support.shape[-2:]
    rows = labels.dim() - (2 if soft else 1)
    lead = support.shape[:-2]
    flat = (
        len(lead) == 1
        and labels.shape[:rows] == lead
        and query.shape[:-2] == lead
        and weight.dim() == 2
        and (bias is None or bias.dim() == 1)
    )
    if not flat:
        lead = torch.Size(
            _check.broadcast_tasks(
                (name, lead),
                ("labels", labels.shape[:rows]),
                ("query", query.shape[:-2]),
                ("weight", weight.shape[:-2]),
                ("bias", () if bias is None else bias.shape[:-1]),
            )
        )
        support, labels = _fold(support, 2, lead), _fold(labels, labels.dim() - rows, lead)
        query = _fold(query, 2, lead)
    # On the Gram matrix where that is less work: 12 n C d + 3 n^2 d against 12 K n C d.
    gram = (rates is None or rates.shape[-1] == 1) and bias_rates is None and 4 * classes * (steps - 1) > n
    logits, adapted, adapted_bias, _ = call(
        HEAD,
        support,
        labels,
        query,
        _fold_shared(weight, 2, lead),
        None if bias is None else _fold_shared(bias, 1, lead),
        None if rates is None else _fold_shared(rates, 3, lead),
        None if bias_rates is None else _fold_shared(bias_rates, 2, lead),
        rate,
        steps,
        kind,
        float(momentum),
        float(weight_decay),
        first_order,
        gram,
    )
    if flat:
        return logits, adapted, adapted_bias
    return (
        logits.reshape(*lead, query.shape[-2], classes),
        adapted.reshape(*lead, classes, d),
        adapted_bias.reshape(*lead, adapted_bias.shape[-1]),
    )


def _fold(value: Tensor, kept: int, lead: Sequence[int]) -> Tensor:
    """``[..., own]`` as ``[T, own]``."""
    own = value.shape[value.dim() - kept :]
    return value.expand((*lead, *own)).reshape((torch.Size(lead).numel(), *own))


def _fold_shared(value: Tensor, kept: int, lead: Sequence[int]) -> Tensor:
    """``[own]`` of all tasks as ``[1, own]``; ``[..., own]`` as ``[T, own]``."""
    return value.unsqueeze(0) if value.dim() == kept else _fold(value, kept, lead)


def _check_labels(labels: Any, support: Tensor, name: str, classes: int, loss: str) -> bool:
    """Are they soft?"""
    _check.is_tensor(labels, "labels")
    _check.same_device(labels, "labels", support, name)
    if labels.is_floating_point():
        _check.features(labels, "labels", "[..., n, C]")
        _check.same_kind(labels, "labels", support, name)
        _check.same_size(labels, -2, "labels", support, -2, name)
        if labels.shape[-1] != classes:
            raise ValueError(f"labels: expected {classes} values a row, got shape {list(labels.shape)}")
        return True
    if loss != "cross_entropy":
        raise TypeError(f"labels: expected targets [..., n, C] for the loss {loss!r}, got {labels.dtype}")
    _check.class_labels(labels, "labels")
    _check.same_size(labels, -1, "labels", support, -2, name)
    return False


def _rates(
    lr: Any, weight: Tensor, bias: Tensor | None, steps: int
) -> tuple[float, Tensor | None, Tensor | None]:
    """``lr`` as the operator wants it: a number, or ``[..., K, C, d]`` and perhaps ``[..., K, C]`` with sizes of 1."""
    if isinstance(lr, tuple):
        if len(lr) != 2:
            raise ValueError(f"lr: expected a pair of rates, like the weight and the bias, got {len(lr)}")
        own = _like(lr[0], weight, "lr[0]", "weight").unsqueeze(-3)
        if bias is None:
            if lr[1] is not None:
                raise ValueError("lr[1]: expected None, since bias is None")
            return 0.0, own, None
        return 0.0, own, _like(lr[1], bias, "lr[1]", "bias").unsqueeze(-2)
    if not isinstance(lr, Tensor):
        _check.number(lr, "lr")
        return float(lr), None, None
    _check.floating(lr, "lr")
    _check.same_device(lr, "lr", weight, "weight")
    lr = lr.to(weight.dtype)
    if lr.dim() > 2:
        raise ValueError(f"lr: expected shape [], [K] or [K, C], got {list(lr.shape)}")
    if lr.dim() > 0 and lr.shape[0] != steps:
        raise ValueError(f"lr: expected {steps} rates, one for each step, got shape {list(lr.shape)}")
    if lr.dim() == 2 and lr.shape[1] != weight.shape[-2]:
        raise ValueError(f"lr: expected {weight.shape[-2]} rates a step, got shape {list(lr.shape)}")
    return 0.0, lr.reshape(*(lr.shape or (1,)), *(() if lr.dim() == 2 else (1,)), 1), None


def _like(rate: Any, parameter: Tensor, name: str, parameter_name: str) -> Tensor:
    if not isinstance(rate, Tensor):
        _check.number(rate, name)
        return parameter.new_full((1,) * (1 if parameter_name == "bias" else 2), float(rate))
    _check.floating(rate, name)
    _check.same_device(rate, name, parameter, parameter_name)
    if rate.shape != parameter.shape:
        raise ValueError(
            f"{name}: expected the shape of {parameter_name}, {list(parameter.shape)}, got {list(rate.shape)}"
        )
    return rate.to(parameter.dtype)


class _Step(NamedTuple):
    """What a step of the loop leaves for the reverse sweep, tensors or Dual numbers."""

    weight: Any
    logits: Any
    error: Any
    direction: Any
    bias_direction: Any
    rate: Any
    bias_rate: Any


def _rate(rates: Any, rate: float, step: int, tasks: int) -> Any:
    if rates is None:
        return rate
    return of_tasks(rates, tasks)[:, step if rates.shape[1] > 1 else 0]


def _adapt(
    support: Any,
    labels: Any,
    weight: Any,
    bias: Any,
    rates: Any,
    bias_rates: Any,
    rate: float,
    steps: int,
    loss: int,
    momentum: float,
    weight_decay: float,
    first_order: bool,
) -> tuple[Any, Any, list[_Step], Any]:
    """The adapted weight and bias, the steps and the targets: the closed form, on tensors or Dual numbers."""
    tasks = support.shape[0]
    weight = of_tasks(weight, tasks)
    bias = None if bias is None else of_tasks(bias, tasks)
    tape: list[_Step] = []
    for step in range(steps):
        own_rate = _rate(rates, rate, step, tasks)
        own_bias_rate = _rate(bias_rates, rate, step, tasks)
        if bias_rates is None and rates is not None:
            own_bias_rate = own_rate[..., 0]
        logits = support @ weight.mT
        if bias is not None:
            logits = logits + bias.unsqueeze(-2)
        if not tape:
            labels = target(labels, logits)
        error = loss_gradient(logits, labels, loss)
        direction = error.mT @ support
        bias_direction = None if bias is None else error.sum(-2)
        if weight_decay:
            direction = direction + weight_decay * weight
            bias_direction = None if bias is None else bias_direction + weight_decay * bias
        if momentum and step:
            direction = direction + momentum * tape[-1].direction
            bias_direction = None if bias is None else bias_direction + momentum * tape[-1].bias_direction
        if first_order:
            direction = constant(direction)
            bias_direction = None if bias is None else constant(bias_direction)
        tape.append(_Step(weight, logits, error, direction, bias_direction, own_rate, own_bias_rate))
        weight = weight - own_rate * direction
        if bias is not None:
            bias = bias - own_bias_rate * bias_direction
    return weight, bias, tape, labels


def _head(support: Any, labels: Any, query: Any, weight: Any, bias: Any, *rest: Any) -> tuple[Any, Any, Any]:
    """Logits, weight and bias: what the operator gives but its tape."""
    adapted, adapted_bias, _, _ = _adapt(support, labels, weight, bias, *rest)
    logits = query @ adapted.mT
    if bias is not None:
        logits = logits + adapted_bias.unsqueeze(-2)
    return logits, adapted, adapted_bias


def _plus(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _head_vjp(
    grad_logits: Any,
    grad_weight: Any,
    grad_bias: Any,
    support: Any,
    labels: Any,
    query: Any,
    weight: Any,
    bias: Any,
    rates: Any,
    bias_rates: Any,
    rate: float,
    steps: int,
    loss: int,
    momentum: float,
    weight_decay: float,
    first_order: bool,
) -> tuple[Any, ...]:
    """The gradients of <grads, :func:`_head`> for the first seven arguments behind them; None: zero.

    The reverse sweep through the weights, on tensors or Dual numbers.
    """
    adapted, _, tape, targets = _adapt(
        support,
        labels,
        weight,
        bias,
        rates,
        bias_rates,
        rate,
        steps,
        loss,
        momentum,
        weight_decay,
        first_order,
    )
    to_weight, to_bias, to_query = grad_weight, None if bias is None else grad_bias, None
    if grad_logits is not None:
        to_weight = _plus(to_weight, grad_logits.mT @ query)
        to_query = grad_logits @ adapted
        if bias is not None:
            to_bias = _plus(to_bias, grad_logits.sum(-2))
    if to_weight is None:
        to_weight = adapted * 0.0
    if bias is not None and to_bias is None:
        to_bias = to_weight.sum(-1) * 0.0
    soft = not isinstance(labels, Tensor) or labels.is_floating_point()
    to_support = to_targets = along = bias_along = None
    to_rates: list[Any] = []
    to_bias_rates: list[Any] = []
    for step in reversed(tape):
        to_rates.insert(0, -(to_weight * step.direction))
        if bias is not None:
            to_bias_rates.insert(0, -(to_bias * step.bias_direction))
        if first_order:
            continue
        before: Any = None if along is None else momentum * along
        along = _plus(-(step.rate * to_weight), before)
        along_error = support @ along.mT
        to_weight = to_weight + weight_decay * along
        if bias is not None:
            before = None if bias_along is None else momentum * bias_along
            bias_along = _plus(-(step.bias_rate * to_bias), before)
            along_error = along_error + bias_along.unsqueeze(-2)
            to_bias = to_bias + weight_decay * bias_along
        curved, mixed = loss_change(step.logits, targets, along_error, loss)
        to_targets = _plus(to_targets, -mixed)
        to_support = _plus(to_support, step.error @ along + curved @ step.weight)
        to_weight = to_weight + curved.mT @ support
        if bias is not None:
            to_bias = to_bias + curved.sum(-2)
    return (
        to_support,
        to_targets if soft else None,
        to_query,
        of_groups(to_weight, weight.shape[0]),
        None if bias is None else of_groups(to_bias, bias.shape[0]),
        _to_rates(rates, to_rates, None if bias is None or bias_rates is not None else to_bias_rates),
        None if bias is None else _to_rates(bias_rates, to_bias_rates, None),
    )


def _to_rates(rates: Any, steps: list[Any], bias_steps: list[Any] | None) -> Any:
    """The steps' gradients of their rates ``[T, C, d]`` (a bias's ``[T, C]``), summed to the shape of ``rates``."""
    if rates is None or not steps:
        return None
    groups, per_step, per_class, *per_feature = rates.shape
    if per_feature == [1]:
        steps = [step.sum(-1, keepdim=True) for step in steps]
        if bias_steps is not None:
            steps = [a + b.unsqueeze(-1) for a, b in zip(steps, bias_steps, strict=True)]
    every = stack(steps, 1)
    if per_step == 1 and len(steps) > 1:
        every = every.sum(1, keepdim=True)
    if per_class == 1 and every.shape[2] > 1:
        every = every.sum(2, keepdim=True)
    return of_groups(every, groups)


def _filled(gradients: Sequence[Any], inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """Every gradient as a tensor: zeros where there is none, empty where there is no such input."""
    like = inputs[0]
    filled = []
    for k, (gradient, value) in enumerate(zip(gradients, inputs, strict=True)):
        if gradient is not None:
            filled.append(gradient)
        elif k == 1 and not value.is_floating_point():
            filled.append(like.new_empty((0, like.shape[1], inputs[3].shape[1])))
        elif k == 4 and value is None:
            filled.append(like.new_empty((0, inputs[3].shape[1])))
        else:
            filled.append(like.new_empty(0) if value is None else torch.zeros_like(value))
    return tuple(filled)


_TENSORS = 7  # support, labels, query, weight, bias, rates, bias_rates


def _duals(values: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
    return [
        Dual(v, t) if isinstance(v, Tensor) and v.is_floating_point() else v
        for v, t in zip(values, tangents, strict=True)
    ]


def _tangents(numbers: Sequence[Any]) -> list[Tensor | None]:
    return [
        None if x is None else torch.zeros_like(x.value) if x.tangent is None else x.tangent for x in numbers
    ]


def _head_rule(need: Any, grads: Any, *saved: Any) -> Any:
    args, (adapted, tape) = saved[:-2], saved[-2:]
    gradients = HEAD_VJP(*grads[:3], *args, adapted, tape)
    given = (g if n else None for g, n in zip(gradients, need, strict=False))
    return (*given, *(None,) * (len(args) - _TENSORS))


def _head_jvp(tangents: Any, *args: Any) -> Any:
    numbers = _duals(args[:_TENSORS], tangents[:_TENSORS])
    logits, weight, bias = _tangents(_head(*numbers, *args[_TENSORS:-1]))
    if bias is None:
        bias = args[0].new_empty((args[0].shape[0], 0))
    return logits, weight, bias, None


def _vjp_tangent(tangents: Any, *args: Any) -> tuple[Tensor, ...]:
    """The tangent of HEAD_VJP; what it was saved is a function of its other arguments."""
    tensors = 3 + _TENSORS
    numbers = _duals(args[:tensors], tangents[:tensors])
    gradients = _head_vjp(*numbers, *args[tensors:-3])
    return _filled([tangent_of(g) if g is not None else None for g in gradients], args[3:tensors])


# HEAD_VJP is the gradient of <grads, HEAD>, whose second derivative is symmetric: its vjp for the arguments of HEAD is
# its own tangent, and its vjp for the upstream gradients is the tangent of HEAD.
def _vjp_vjp(need: Any, grads: Any, *args: Any) -> Any:
    inputs = args[3 : 3 + _TENSORS]
    along = [
        g if isinstance(v, Tensor) and v.is_floating_point() else None
        for g, v in zip(grads, inputs, strict=True)
    ]
    upstream: Sequence[Any] = (None, None, None)
    if any(need[:3]):
        numbers = _duals(inputs, along)
        upstream = _tangents(_head(*numbers, *args[3 + _TENSORS : -3]))
    second = _vjp_tangent((None, None, None, *along), *args)
    return (
        *(u if n else None for u, n in zip(upstream, need, strict=False)),
        *(s if n else None for s, n in zip(second, need[3:], strict=False)),
        *(None,) * (len(args) - 3 - _TENSORS),
    )


differentiable(HEAD, vjp=_head_rule, jvp=_head_jvp, save_outputs=(1, 3), constant_outputs=(3,))
differentiable(HEAD_VJP, vjp=_vjp_vjp, jvp=_vjp_tangent)
fold_into_tasks(HEAD)
fold_into_tasks(HEAD_VJP)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(HEAD, _device, torch.float32)


def _tape_shape(support: Tensor, weight: Tensor, gram: bool) -> tuple[int, int, int]:
    """``[T, n + C, n]``, the rows padded to whole vectors of every width."""
    tasks, n = support.shape[:2]
    return tasks, n + weight.shape[1] if gram else 0, (n + 15) // 16 * 16


@torch.library.register_fake(HEAD)
def _(
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rates: Tensor | None,
    bias_rates: Tensor | None,
    rate: float,
    steps: int,
    loss: int,
    momentum: float,
    weight_decay: float,
    first_order: bool,
    gram: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tasks, m, d = query.shape
    classes = weight.shape[1]
    return (
        query.new_empty(tasks, m, classes),
        query.new_empty(tasks, classes, d),
        query.new_empty(tasks, 0 if bias is None else classes),
        query.new_empty(_tape_shape(support, weight, gram)),
    )


@torch.library.register_fake(HEAD_VJP)
def _(grad_logits: Any, grad_weight: Any, grad_bias: Any, *args: Any) -> tuple[Tensor, ...]:
    inputs = args[:_TENSORS]
    return tuple(value.new_empty(value.shape) for value in _filled((None,) * _TENSORS, inputs))


def _fallback(*args: Any) -> tuple[Tensor, ...]:
    logits, weight, bias = _head(*args[:-1])
    if bias is None:
        bias = weight.new_empty((weight.shape[0], 0))
    return logits, weight, bias, weight.new_zeros(_tape_shape(args[0], args[3], args[-1]))


def _fallback_vjp(*args: Any) -> tuple[Tensor, ...]:
    return _filled(_head_vjp(*args[:-3]), args[3 : 3 + _TENSORS])


fallback(HEAD, _fallback)
fallback(HEAD_VJP, _fallback_vjp)
