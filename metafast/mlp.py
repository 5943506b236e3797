"""The inner loop of an MLP: K steps of gradient descent on each task, with exact meta-gradients.

With h_0 = x, a_l = W_l h_{l-1} + b_l, h_l = phi(a_l): delta_L = dE/da_L, delta_l = phi'(a_l) o (W_{l+1}^T delta_{l+1}),
and the gradient of layer l is delta_l h_{l-1}^T. The reverse sweep
goes through the steps backwards with the R operator.

h_0 = X is the same in every step: with one rate for the layer W_1 stays W_1 - (sum of rate delta_1)^T X, and a step
changes a_1 by -rate (X X^T + 1) delta_1, the 1 for the bias. So steps need no weight of the first layer but only X X^T,
and the query Q X^T; the sweep has the same form, with R delta_1 for the rate times delta_1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metafast import _check
from metafast._autodiff import differentiable
from metafast._batching import folding_rule, of_groups, of_tasks, register_rule
from metafast._dual import Dual, concatenate, constant, tangent_of, value_of
from metafast._inner_loss import LOSSES, loss_change, loss_gradient, target
from metafast._library import call, fallback, operator

LOOP = operator("mlp_loop")
LOOP_VJP = operator("mlp_loop_vjp")

ACTIVATIONS = ("relu", "tanh")
_RELU = 0


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
    r"""Parameters of an MLP after K steps of gradient descent on each task's support rows.

    :math:`\theta_{t+1} = \theta_t - \alpha_t \circ \nabla E(\theta_t)`, E the mean loss over the rows (for ``"mse"``
    over rows and outputs). Finn, Abbeel and Levine, *Model-Agnostic Meta-Learning*, 2017; a rate for each parameter:
    Li et al., *Meta-SGD*, 2017; for each layer and step: Antoniou, Edwards and Storkey, *How to train your MAML*, 2019.
    Differentiable to any order in every floating argument.

    Args:
        inputs: ``[..., n, in]``, float32 or float64; half types are promoted to float32, as under autocast.
        targets: ``[..., n, out]`` of the dtype of ``inputs`` (``"cross_entropy"``: probabilities, which need not sum to
            1); for ``"cross_entropy"`` also int64 class numbers ``[..., n]``.
        weights: ``[out, in]`` of each layer, shared by the tasks, or ``[..., out, in]``.
        biases: ``[out]`` or ``[..., out]`` of each layer.
        lr: the rate: a number; a tensor ``[]`` or ``[K]`` (a rate for each step); a list with one of these for each
            layer; or a pair of lists like ``weights`` and ``biases``, without leading dimensions, a rate for each
            parameter. Tensors get their gradient.
        steps: K, 0 or more.
        activation: ``"relu"`` or ``"tanh"``, after every layer but the last.
        loss: ``"mse"`` or ``"cross_entropy"``.
        first_order: take the gradients that the steps follow for constants.

    Returns:
        ``(weights [..., out, in], biases [..., out])``, lists with the leading dimensions of all arguments.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: unknown activation or loss; shapes or devices do not fit; on the CPU, a class number outside 0 to
            out - 1 (on other devices the results of that task are NaN).

    Example:
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])
        >>> adapt_mlp(x, y, [torch.zeros(1, 1)], [torch.zeros(1)], 0.1, 1)
        ([tensor([[1.]])], [tensor([0.6000])])
    """
    lead, out = _run(inputs, targets, None, weights, biases, lr, steps, activation, loss, first_order)
    packed = out[1].reshape(*lead, out[1].shape[-1])
    adapted_weights, adapted_biases, end = [], [], 0
    for weight in weights:
        shape = weight.shape[-2:]
        begin, middle = end, end + shape.numel()
        end = middle + shape[0]
        adapted_weights.append(packed[..., begin:middle].unflatten(-1, shape))
        adapted_biases.append(packed[..., middle:end])
    return adapted_weights, adapted_biases


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
    """Outputs ``[..., m, out]`` for the rows of ``query [..., m, in]`` of the MLP that :func:`adapt_mlp` gives.

    The other arguments and the errors are those of :func:`adapt_mlp`.

    Example:
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])
        >>> adapted_mlp(x, y, torch.tensor([[3.0]]), [torch.zeros(1, 1)], [torch.zeros(1)], 0.1, 1)
        tensor([[3.6000]])
    """
    lead, out = _run(inputs, targets, query, weights, biases, lr, steps, activation, loss, first_order)
    return out[0] if len(lead) == 1 else out[0].reshape(*lead, *out[0].shape[-2:])


def _run(
    inputs: Tensor,
    targets: Tensor,
    query: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    lr: Any,
    steps: int,
    activation: str,
    loss: str,
    first_order: bool,
) -> tuple[tuple[int, ...], Any]:
    """The leading dimensions, and what the operator gives for them folded into one."""
    kind, objective = (
        _check.choice(activation, "activation", ACTIVATIONS),
        _check.choice(loss, "loss", LOSSES),
    )
    _check.features(inputs, "inputs", "[..., n, in]")
    _check.count(steps, "steps")
    _check.layers(weights, biases, inputs, "inputs")
    _check.is_tensor(targets, "targets")
    labelled = loss == "cross_entropy" and not targets.is_floating_point()
    if labelled:
        _check.class_labels(targets, "targets")
        _check.same_device(targets, "targets", inputs, "inputs")
    else:
        _check.features(targets, "targets", "[..., n, out]")
        _check.same_kind(targets, "targets", inputs, "inputs")
        _check.same_size(targets, -1, "targets", weights[-1], -2, "the last of weights")
    _check.same_size(targets, -1 if labelled else -2, "targets", inputs, -2, "inputs")
    named = [("inputs", inputs, 2), ("targets", targets, 1 if labelled else 2)]
    if query is not None:
        _check.features(query, "query", "[..., m, in]")
        _check.same_kind(query, "query", inputs, "inputs")
        _check.same_size(query, -1, "query", inputs, -1, "inputs")
        named.append(("query", query, 2))
    rate, rates = _rates(lr, steps, weights, biases, inputs)
    if any(w.dim() != 2 for w in weights) or any(b.dim() != 1 for b in biases):
        named += [("weights", w, 2) for w in weights] + [("biases", b, 1) for b in biases]
    lead = tuple(inputs.shape[:-2])
    if len(lead) != 1 or any(t.shape[: t.dim() - kept] != lead for _, t, kept in named):
        lead = _check.broadcast_tasks(*((name, t.shape[: t.dim() - kept]) for name, t, kept in named))
        tasks = torch.Size(lead).numel()

        def fold(value: Tensor, kept: int) -> Tensor:
            shape = value.shape[value.dim() - kept :]
            return value.expand((*lead, *shape)).reshape((tasks, *shape))

        folded = [fold(t, kept) for _, t, kept in named]
        inputs, targets = folded[:2]
        query = None if query is None else folded[2]
        own = folded[2 if query is None else 3 :]
        if own:
            weights, biases = own[: len(weights)], own[len(weights) :]
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    given = (inputs, targets, query, *weights, *biases, *rates)
    if any(t is not None and t.dtype != dtype and t.is_floating_point() for t in given):
        inputs, query = inputs.to(dtype), None if query is None else query.to(dtype)
        targets = targets if labelled else targets.to(dtype)
        weights, biases = [w.to(dtype) for w in weights], [b.to(dtype) for b in biases]
        rates = [r.to(dtype) for r in rates]
    return lead, call(
        LOOP,
        inputs,
        targets,
        query,
        list(weights),
        list(biases),
        rates,
        rate,
        steps,
        kind,
        objective,
        first_order,
        _pays_factored(inputs, query, weights, rates, steps),
    )


def _pays_factored(
    inputs: Tensor, query: Tensor | None, weights: Sequence[Tensor], rates: Sequence[Tensor], steps: int
) -> bool:
    """Whether to take the steps of the first layer on the products of its rows with each other.

    Forward and backward take 4 n K d o + 2 m d o multiply-adds with the explicit weight ``[o, d]``, and
    2 n d o + 2 m d o + n (n + m) d + 2 n (n K + m) o with the products. Each parameter has to have the same rate.
    """
    n, m = inputs.shape[-2], 0 if query is None else query.shape[-2]
    out, d = weights[0].shape[-2:]
    return len(rates) != 2 * len(weights) and bool(
        (4 * steps - 2) * d * out > (n + m) * d + 2 * (n * steps + m) * out
    )


def _rates(
    lr: Any, steps: int, weights: Sequence[Tensor], biases: Sequence[Tensor], like: Tensor
) -> tuple[float, list[Tensor]]:
    """A number, and the operator's list of tensors."""
    if _check.is_number(lr):
        return lr, []
    if isinstance(lr, Tensor):
        return 0.0, [_check.step_rates(lr, "lr", steps, like)]
    wanted = (
        "a number, a tensor [] or [steps], a list with one of these for each layer, or a pair of lists like weights "
        "and biases"
    )
    if not isinstance(lr, (list, tuple)):
        raise TypeError(f"lr: expected {wanted}, got {type(lr).__name__}")
    if len(lr) == 2 and all(isinstance(part, (list, tuple)) for part in lr):
        parameters = [*weights, *biases]
        rates = [*lr[0], *lr[1]]
        if len(lr[0]) != len(weights) or len(rates) != len(parameters):
            raise ValueError(
                f"lr: expected {len(weights)} rates for weights and for biases, got {len(lr[0])} and {len(lr[1])}"
            )
        for k, (value, parameter) in enumerate(zip(rates, parameters, strict=True)):
            part, layer = divmod(k, len(weights))
            _check.rate_like(value, f"lr[{part}][{layer}]", parameter.shape[part - 2 :], like)
        return 0.0, rates
    if len(lr) != len(weights):
        raise ValueError(f"lr: expected {wanted}; got {len(lr)} entries for {len(weights)} layers")
    return 0.0, [
        torch.full((1,), float(value), dtype=torch.float64, device=like.device)
        if _check.is_number(value)
        else _check.step_rates(value, f"lr[{k}]", steps, like)
        for k, value in enumerate(lr)
    ]


# Closed forms. They run on tensors and on Dual numbers alike, and are made of torch's differentiable operations.
# Parameters, gradients and rates are lists of numbers: the weights [T, out, in], then the biases [T, out].


def _per_task(values: Sequence[Any], own: int, tasks: int) -> list[Any]:
    """Numbers with ``own`` dimensions and perhaps one of groups, for every task."""

    def expand(value: Any) -> Any:
        shape = tuple(value.shape)
        return value.expand((tasks, *shape)) if len(shape) == own else of_tasks(value, tasks)

    return [expand(value) for value in values]


def _over_groups(value: Any, like: Any, own: int) -> Any:
    """The adjoint of ``_per_task``."""
    shape = tuple(like.shape)
    return value.sum(0) if len(shape) == own else of_groups(value, shape[0])


def _all_per_task(weights: Sequence[Any], biases: Sequence[Any], tasks: int) -> list[Any]:
    return [*_per_task(weights, 2, tasks), *_per_task(biases, 1, tasks)]


def _activated(a: Any, activation: int) -> Any:
    return a.relu() if activation == _RELU else a.tanh()


def _sloped(h: Any, along: Any, activation: int) -> Any:
    """``phi'(a) along`` with h = phi(a); as torch has it, the slope of ReLU is 0 at 0."""
    return (
        along * (~(value_of(h) <= 0)).to(value_of(h).dtype) if activation == _RELU else along - h * h * along
    )


def _activations(parameters: Sequence[Any], x: Any, activation: int) -> list[Any]:
    layers = len(parameters) // 2
    h = [x]
    for layer in range(layers):
        a = h[-1] @ parameters[layer].mT + parameters[layers + layer].unsqueeze(-2)
        h.append(a if layer == layers - 1 else _activated(a, activation))
    return h


def _deltas(parameters: Sequence[Any], h: Sequence[Any], last: Any, activation: int) -> list[Any]:
    deltas = [last]
    for layer in range(len(parameters) // 2 - 1, 0, -1):
        deltas.insert(0, _sloped(h[layer], deltas[0] @ parameters[layer], activation))
    return deltas


def _outer(deltas: Sequence[Any], h: Sequence[Any]) -> list[Any]:
    return [*(d.mT @ x for d, x in zip(deltas, h, strict=False)), *(d.sum(-2) for d in deltas)]


def _rates_of_step(rates: Sequence[Any], rate: float, t: int, layers: int, tasks: int) -> list[Any]:
    """The rate of every parameter in step t, to be multiplied with it."""
    if len(rates) == 2 * layers:
        return _all_per_task(rates[:layers], rates[layers:], tasks)
    if not rates:
        return [rate] * (2 * layers)
    own = [r[:, t if r.shape[1] > 1 else 0] for r in _per_task(rates, 1, tasks)]
    own = own * layers if len(own) == 1 else own
    return [*(r[:, None, None] for r in own), *(r[:, None] for r in own)]


def _steps(
    inputs: Any,
    targets: Any,
    weights: Sequence[Any],
    biases: Sequence[Any],
    rates: Sequence[Any],
    rate: float,
    steps: int,
    activation: int,
    loss: int,
    first_order: bool,
) -> tuple[list[Any], list[Any]]:
    """The adapted parameters, and of each step the parameters, rates, activations, deltas and gradients."""
    tasks, layers = inputs.shape[0], len(weights)
    parameters = _all_per_task(weights, biases, tasks)
    tape = []
    for t in range(steps):
        h = _activations(parameters, inputs, activation)
        deltas = _deltas(parameters, h, loss_gradient(h[-1], target(targets, h[-1]), loss), activation)
        gradient = _outer(deltas, h)
        if first_order:
            gradient = [constant(g) for g in gradient]
        alpha = _rates_of_step(rates, rate, t, layers, tasks)
        tape.append((parameters, alpha, h, deltas, gradient))
        parameters = [p - a * g for p, a, g in zip(parameters, alpha, gradient, strict=True)]
    return parameters, tape


def _in_order(layers: int) -> list[int]:
    """Positions of weight and bias, layer by layer."""
    return [k for layer in range(layers) for k in (layer, layers + layer)]


def _closed(inputs: Any, targets: Any, query: Any, weights: Sequence[Any], *rest: Any) -> tuple[Any, Any]:
    """What LOOP computes, without the tape."""
    adapted, _ = _steps(inputs, targets, weights, *rest)
    tasks, layers = inputs.shape[0], len(weights)
    value = value_of(inputs)
    if query is None:
        packed = concatenate([adapted[k].reshape((tasks, -1)) for k in _in_order(layers)], -1)
        return value.new_zeros(tasks, 0, weights[-1].shape[-2]), packed
    activation = rest[4]
    return _activations(adapted, query, activation)[-1], value.new_zeros(tasks, 0)


def _closed_vjp(
    grad_outputs: Any,
    grad_parameters: Any,
    inputs: Any,
    targets: Any,
    query: Any,
    weights: Sequence[Any],
    biases: Sequence[Any],
    rates: Sequence[Any],
    rate: float,
    steps: int,
    activation: int,
    loss: int,
    first_order: bool,
) -> list[Any]:
    """What LOOP_VJP computes, where the data's gradients are wanted: back through the query, then step by step."""
    layers = len(weights)
    adapted, tape = _steps(
        inputs, targets, weights, biases, rates, rate, steps, activation, loss, first_order
    )
    nothing = value_of(inputs).new_zeros(0)
    labelled = isinstance(targets, Tensor) and not targets.is_floating_point()
    to_query: Any = nothing
    lam = [torch.zeros_like(value_of(p)) for p in adapted]
    if query is not None:
        to_query = torch.zeros_like(value_of(query))
        if grad_outputs is not None:
            h = _activations(adapted, query, activation)
            deltas = _deltas(adapted, h, grad_outputs, activation)
            lam, to_query = _outer(deltas, h), deltas[0] @ adapted[0]
    elif grad_parameters is not None:
        end = 0
        for k in _in_order(layers):
            shape = tuple(adapted[k].shape)
            begin, end = end, end + torch.Size(shape[1:]).numel()
            lam[k] = grad_parameters[:, begin:end].reshape(shape)
    to_inputs: Any = torch.zeros_like(value_of(inputs))
    to_targets: Any = nothing if labelled else torch.zeros_like(value_of(targets))
    to_rates: list[Any] = [torch.zeros_like(value_of(r)) for r in rates]
    for t in range(steps - 1, -1, -1):
        parameters, alpha, h, deltas, gradient = tape[t]
        if rates:
            along = [-(p * g) for p, g in zip(lam, gradient, strict=True)]
            for k, change in enumerate(_to_rates(along, rates, t, layers)):
                to_rates[k] = to_rates[k] + change
        if first_order:
            continue
        v = [a * p for a, p in zip(alpha, lam, strict=True)]
        # R of every activation and delta along v.
        ra: list[Any] = []
        rh: list[Any] = [None]
        for layer in range(layers):
            a = h[layer] @ v[layer].mT + v[layers + layer].unsqueeze(-2)
            if layer > 0:
                a = a + rh[layer] @ parameters[layer].mT
            ra.append(a)
            rh.append(a if layer == layers - 1 else _sloped(h[layer + 1], a, activation))
        last, mixed = loss_change(h[-1], target(targets, h[-1]), ra[-1], loss)
        if not labelled:
            to_targets = to_targets + mixed
        rdeltas = [last]
        for layer in range(layers - 1, 0, -1):
            change = _sloped(h[layer], deltas[layer] @ v[layer] + rdeltas[0] @ parameters[layer], activation)
            if activation != _RELU:
                # phi'' u = -2 h (1 - h^2) u = -2 h delta
                change = change - h[layer] * deltas[layer - 1] * ra[layer - 1] * 2.0
            rdeltas.insert(0, change)
        to_inputs = to_inputs - (deltas[0] @ v[0] + rdeltas[0] @ parameters[0])
        turned = _outer(rdeltas, h)
        for layer in range(1, layers):
            turned[layer] = turned[layer] + deltas[layer].mT @ rh[layer]
        lam = [p - change for p, change in zip(lam, turned, strict=True)]
    to_parameters = [
        _over_groups(p, like, 2 if k < layers else 1)
        for k, (p, like) in enumerate(zip(lam, [*weights, *biases], strict=True))
    ]
    return [to_inputs, to_targets, to_query, *to_parameters, *to_rates]


def _to_rates(along: Sequence[Any], rates: Sequence[Any], t: int, layers: int) -> list[Any]:
    """The rates' gradients in step t, from those of a rate of every parameter of every task."""
    if len(rates) == 2 * layers:
        return [
            _over_groups(g, r, 2 if k < layers else 1)
            for k, (g, r) in enumerate(zip(along, rates, strict=True))
        ]
    of_layers = [along[layer].sum((-2, -1)) + along[layers + layer].sum(-1) for layer in range(layers)]
    if len(rates) == 1:
        of_layers = [sum(of_layers[1:], of_layers[0])]
    changes = []
    for change, r in zip(of_layers, rates, strict=True):
        size = r.shape[-1]
        place = torch.eye(size, dtype=value_of(change).dtype, device=value_of(change).device)[
            t if size > 1 else 0
        ]
        changes.append(_over_groups(change.unsqueeze(-1) * place, r, 1))
    return changes


def _dual(value: Any, tangent: Any) -> Any:
    """``value`` with its tangent, lists entry by entry; what is not differentiable stays what it is."""
    if isinstance(value, (list, tuple)):
        return [_dual(v, None if tangent is None else tangent[k]) for k, v in enumerate(value)]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return Dual(value, tangent)


def _tangent(number: Any) -> Tensor:
    tangent = tangent_of(number)
    return torch.zeros_like(value_of(number)) if tangent is None else tangent


def _tape_size(
    inputs: Tensor, query: Tensor | None, weights: Sequence[Tensor], steps: int, factored: bool
) -> Any:
    """Numbers of a task's tape, as csrc/cpu/mlp.h lays it out."""

    def padded(width: Any) -> Any:
        return (width + 15) // 16 * 16

    columns = parameters = 0
    for layer, weight in enumerate(weights):
        out, fan_in = weight.shape[-2:]
        columns += padded(out)
        if layer > 0 or not factored:
            parameters += (fan_in * padded(out) if layer == 0 else out * padded(fan_in)) + padded(out)
    rows = 0 if query is None else query.shape[1]
    n = inputs.shape[1]
    products = (n + rows) * padded(n) + n * padded(weights[0].shape[-2]) if factored else 0
    return steps * (2 * n * columns + parameters) + rows * columns + products


def _no_tape(
    inputs: Tensor, query: Tensor | None, weights: Sequence[Tensor], steps: int, factored: bool
) -> Tensor:
    return inputs.new_zeros(inputs.shape[0], _tape_size(inputs, query, weights, steps, factored))


def _loop_vjp(need: Any, grads: Any, *saved: Any) -> Any:
    *args, tape = saved
    data = need[0] or need[1] or need[2]
    out = LOOP_VJP(grads[0], grads[1], *args, tape, data)
    targets, query, layers = args[1], args[2], len(args[3])
    return (
        out[0] if data else None,
        out[1] if data and targets.is_floating_point() else None,
        out[2] if data and query is not None else None,
        out[3 : 3 + layers],
        out[3 + layers : 3 + 2 * layers],
        out[3 + 2 * layers :],
        *(None,) * 6,
    )


def _loop_jvp(tangents: Any, *args: Any) -> Any:
    outputs, parameters = _closed(*(_dual(a, v) for a, v in zip(args[:-1], tangents[:-1], strict=True)))
    return _tangent(outputs), _tangent(parameters), None


def _fallback_loop(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *_closed(*args[:-1]), _no_tape(args[0], args[2], args[3], args[7], args[11])


def _fallback_loop_vjp(*args: Any) -> list[Tensor]:
    *rest, _, _, data = args
    out = _closed_vjp(*rest)
    return out if data else [*(args[2].new_zeros(0) for _ in range(3)), *out[3:]]


def _loop_vjp_tangent(tangents: Any, *args: Any) -> list[Tensor]:
    """The tangent of LOOP_VJP; the tape is a function of the other arguments, and is computed anew."""
    *rest, _, _, data = args
    out = [_tangent(o) for o in _closed_vjp(*(_dual(a, v) for a, v in zip(rest, tangents, strict=False)))]
    return out if data else [*(args[2].new_zeros(0) for _ in range(3)), *out[3:]]


# LOOP_VJP is the gradient of <grads, LOOP>, whose second derivative is symmetric: its vjp for LOOP's arguments is its
# own tangent, and its vjp for the upstream gradients is the tangent of LOOP.
def _loop_vjp_vjp(need: Any, grads: Any, *args: Any) -> Any:
    *own, _, _, data = args[2:]
    targets, query, layers = own[1], own[2], len(own[3])
    directions = (
        grads[0] if data else None,
        grads[1] if data and targets.is_floating_point() else None,
        grads[2] if data and query is not None else None,
        grads[3 : 3 + layers],
        grads[3 + layers : 3 + 2 * layers],
        grads[3 + 2 * layers :],
        *(None,) * 5,
    )
    to_outputs = to_parameters = None
    if need[0] or need[1]:
        moved = _closed(*(_dual(a, v) for a, v in zip(own, directions, strict=True)))
        to_outputs, to_parameters = (_tangent(o) for o in moved)
    out = _loop_vjp_tangent((None, None, *directions), *args[:-1], True)
    return (
        to_outputs if need[0] else None,
        to_parameters if need[1] else None,
        out[0],
        out[1] if targets.is_floating_point() else None,
        out[2] if query is not None else None,
        out[3 : 3 + layers],
        out[3 + layers : 3 + 2 * layers],
        out[3 + 2 * layers :],
        *(None,) * 8,
    )


def _with_groups(op: torch._ops.OpOverload, first: int) -> None:
    """The vmap rule of ``op``, whose weights, biases and rates begin at argument ``first``.

    Those that are shared get a leading dimension of one group for each sample, to be folded as any other.
    """
    rule = folding_rule(op)

    def grouped(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        layers = len(args[first])
        own = (2, 1, 2 if len(args[first + 2]) == 2 * layers else 1)
        values, dims, added = list(args), list(in_dims), []
        for at in range(first, first + 3):
            entries, places = [], []
            for k, value in enumerate(args[at]):
                dim = in_dims[at][k] if in_dims[at] is not None else None
                kept = 1 if at == first + 2 and k >= layers else own[at - first]
                shared = value.dim() - (dim is not None) == kept
                if shared:
                    value = value.unsqueeze(0) if dim is None else value.movedim(dim, 0).unsqueeze(1)
                    dim = None if dim is None else 0
                entries.append(value)
                places.append(dim)
                added.append(shared)
            values[at], dims[at] = entries, places
        out, out_dims = rule(info, tuple(dims), *values)
        if op is LOOP_VJP:
            out = [*out[:3], *(o.squeeze(1) if one else o for o, one in zip(out[3:], added, strict=True))]
        return out, out_dims

    register_rule(op, grouped)


differentiable(LOOP, vjp=_loop_vjp, jvp=_loop_jvp, save_outputs=(2,), constant_outputs=(2,))
differentiable(LOOP_VJP, vjp=_loop_vjp_vjp, jvp=_loop_vjp_tangent)
_with_groups(LOOP, 3)
_with_groups(LOOP_VJP, 5)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(LOOP, _device, torch.float32)
fallback(LOOP, _fallback_loop)
fallback(LOOP_VJP, _fallback_loop_vjp)


@torch.library.register_fake(LOOP)
def _(
    inputs: Tensor,
    targets: Tensor,
    query: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rates: Sequence[Tensor],
    rate: float,
    steps: int,
    activation: int,
    loss: int,
    first_order: bool,
    factored: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tasks = inputs.shape[0]
    packed = sum(w.shape[-2] * (w.shape[-1] + 1) for w in weights)
    return (
        inputs.new_empty(tasks, 0 if query is None else query.shape[1], weights[-1].shape[-2]),
        inputs.new_empty(tasks, packed if query is None else 0),
        inputs.new_empty(tasks, _tape_size(inputs, query, weights, steps, factored)),
    )


@torch.library.register_fake(LOOP_VJP)
def _(
    grad_outputs: Tensor | None,
    grad_parameters: Tensor | None,
    inputs: Tensor,
    targets: Tensor,
    query: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rates: Sequence[Tensor],
    rate: float,
    steps: int,
    activation: int,
    loss: int,
    first_order: bool,
    factored: bool,
    tape: Tensor,
    data: bool,
) -> list[Tensor]:
    return [
        inputs.new_empty(inputs.shape if data else 0),
        inputs.new_empty(targets.shape if data and targets.is_floating_point() else 0),
        inputs.new_empty(query.shape if data and query is not None else 0),
        *(inputs.new_empty(p.shape) for p in (*weights, *biases, *rates)),
    ]
