"""A chain of linear layers, BatchNorm, ReLU and tanh for all tasks at once, whose wide layers have no weights of each
task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metafast._inner_loss import loss_gradient, target
from metafast.backbones import MLP, is_hooked
from metafast.inner_update import sgd_update
from metafast.norm_relu_pool import norm_rows, norm_rows_vjp

_ACTIVATIONS = (nn.ReLU, nn.Tanh)


class Changed(NamedTuple):
    r"""The weight of a layer after some steps of each task, :math:`W + C^T A`.

    Every step adds the outer products of the layer's inputs, rows of A, with what comes back to its outputs, times the
    rate, rows of C. So :math:`W z = W_0 z + C^T (A z)` for any row z, and nothing as large as a weight is made for a
    task.
    """

    initial: Tensor
    """``[out, in]``."""
    rows: Tensor
    """A, ``[T, r, in]``."""
    slopes: Tensor
    """C, ``[T, r, out]``."""

    def whole(self) -> Tensor:
        """``[T, out, in]``."""
        return self.initial + self.slopes.mT @ self.rows


#: As of :class:`metafast._stateless.Statistics`.
Found = dict[str, list[tuple[Tensor, Tensor]]]
#: Of parameters by their names: the tensor of all tasks, or ``[T, ...]``, or a wide layer's changed weight.
Values = Mapping[str, Tensor | Changed]


class Rows(NamedTuple):
    """What the first layer sees, ``[T, m, in]``, and its products, which are the same after every step."""

    x: Tensor
    of_initial: Tensor | None
    """With the weight of all tasks, ``[T, m, out]``."""
    of_support: Tensor | None
    """With the support rows, ``[T, m, n]``."""


class Layer(NamedTuple):
    """A linear layer by the prefix of its parameters' names, and what follows it."""

    prefix: str
    linear: nn.Linear
    norm_prefix: str
    norm: nn.BatchNorm1d | None
    activation: type[nn.Module] | None

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """By their names in the chain."""
        for prefix, part in ((self.prefix, self.linear), (self.norm_prefix, self.norm)):
            for name, value in () if part is None else part.named_parameters():
                yield f"{prefix}{name}", value

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.parameters()]


class _Call(NamedTuple):
    """What a layer's backward pass needs of its call."""

    x: Tensor
    before: Tensor
    after: Tensor
    statistics: list[Tensor] | None


def _flat(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module | None]]:
    """The layers in a Sequential and in those inside it; None where somebody looks at one."""
    for name, child in module._modules.items():
        if child is None or is_hooked(child):
            yield prefix, None
        elif type(child) in (nn.Sequential, MLP):
            yield from _flat(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}.", child


def layers_of(module: nn.Module, x: Tensor, y: Tensor) -> tuple[list[Layer], bool] | None:
    """The layers of a chain for rows ``[T, n, ...]``, and whether they flatten the rows; None for any other module, and
    for targets that are neither class numbers ``[T, n]`` nor of the outputs' shape."""
    if type(module) not in (nn.Sequential, MLP) or is_hooked(module):
        return None
    flat = list(_flat(module))
    flattens = bool(flat) and type(flat[0][1]) is nn.Flatten
    if flattens:
        flatten: Any = flat.pop(0)[1]
        if (flatten.start_dim, flatten.end_dim) != (1, -1):
            return None
    if not (flattens or x.dim() == 3) or not flat:
        return None
    layers: list[Layer] = []
    while flat:
        prefix, linear = flat.pop(0)
        norm_prefix, norm, activation = "", None, None
        if type(linear) is not nn.Linear or linear.weight.numel() == 0:
            return None
        if flat and type(flat[0][1]) is nn.BatchNorm1d:
            norm_prefix, norm = flat.pop(0)
        if flat and type(flat[0][1]) in _ACTIVATIONS:
            activation = type(flat.pop(0)[1])
        layers.append(Layer(prefix, linear, norm_prefix, norm, activation))  # type: ignore[arg-type]
    own = [value for _, value in module.named_parameters(remove_duplicate=False)]
    floats = [*own, *(value for value in module.buffers() if value.is_floating_point())]
    tied = len(list(module.parameters())) < len(own)
    if tied or any(value.dtype != x.dtype for value in floats):
        return None
    if x.dtype not in (torch.float32, torch.float64) or x.shape[2:].numel() != layers[0].linear.in_features:
        return None
    if y.is_floating_point():
        fits = y.dtype == x.dtype and y.shape == (*x.shape[:2], layers[-1].linear.out_features)
    else:
        fits = y.dtype == torch.int64 and y.dim() == 2
    return (layers, flattens) if fits else None


class Chain:
    """The layers with the values of all tasks.

    Args:
        layers: those of :func:`layers_of`.
        flattens: whether they flatten the rows.
        batch_norm: the policy of :func:`metafast.inner_loop`.
        loss: its position in :data:`metafast._inner_loss.LOSSES`.
        support_x: ``[T, n, ...]``.
        start: the initial values of the parameters that adapt.
        fixed: those of the others, but for the ones that change from step to step.
        rates: one for each step.
    """

    def __init__(
        self,
        layers: list[Layer],
        flattens: bool,
        batch_norm: str,
        loss: int,
        support_x: Tensor,
        start: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        rates: list[Any],
    ) -> None:
        self.layers, self.flattens, self.batch_norm, self.loss = layers, flattens, batch_norm, loss
        self.tasks, support = support_x.shape[:2]
        self._lowest = next(k for k, layer in enumerate(layers) if any(name in start for name in layer.names))
        weights = [f"{layer.prefix}weight" for layer in layers]
        # The first layer sees the same rows in every step.
        ranks = [support, *[support * len(rates)] * (len(layers) - 1)]
        self._wide = {
            name
            for name, rank in zip(weights, ranks, strict=True)
            if name in start and _is_wide(start[name], rank, name, rates)
        }
        self._first, self._initial = weights[0], None
        if self._first not in start or self._first in self._wide:
            self._initial = {**fixed, **start}.get(self._first)
        # By the batch's mean nothing of a bias is left.
        biases = [f"{layer.prefix}bias" for layer in layers if self._by_batch(layer)]
        self._without_effect = [name for name in biases if name in start]
        self._support = support_x.flatten(2) if flattens else support_x
        self.of_support = self.rows(support_x)

    def rows(self, x: Tensor) -> Rows:
        """``[T, m, ...]`` as the first layer sees them."""
        flat, inputs = x.flatten(2) if self.flattens else x, self.layers[0].linear.in_features
        if flat.dim() != 3 or flat.shape[2] != inputs:
            raise ValueError(f"x: expected rows of {inputs} inputs, got {list(x.shape[2:])}")
        x = flat
        of_initial = None if self._initial is None else _product(x, self._initial.mT)
        return Rows(x, of_initial, x @ self._support.mT if self._first in self._wide else None)

    def targets(self, y: Tensor) -> Tensor:
        """What the outputs for the support rows are compared with, ``[T, n, out]``."""
        like = self._support.new_empty(*self._support.shape[:2], self.layers[-1].linear.out_features)
        found: Tensor = target(y, like)
        return found

    def whole(self, own: Values) -> dict[str, Tensor]:
        """Each with the dimension of the tasks."""
        dims = {name: value.dim() for layer in self.layers for name, value in layer.parameters()}
        return {
            name: value.whole()
            if isinstance(value, Changed)
            else value
            if value.dim() > dims[name]
            else value.expand(self.tasks, *value.shape)
            for name, value in own.items()
        }

    def outputs(self, values: Values, rows: Rows) -> tuple[Tensor, Found]:
        """``[T, m, out]``, and what running statistics are to follow."""
        calls, found = self._calls(values, rows)
        return calls[-1].after, found

    def step(
        self, own: Values, rate: Any, fixed: Values, rows: Rows, y: Tensor, record: bool
    ) -> tuple[dict[str, Tensor | Changed], Found]:
        """The values after a step of gradient descent; without ``record`` its gradients are constants.

        ``y``: those of :meth:`targets`.
        """
        with torch.set_grad_enabled(record):
            values = {**fixed, **own}
            calls, found = self._calls(values, rows)
            grads, factors = self._gradients(own, values, calls, loss_gradient(calls[-1].after, y, self.loss))
        moved: dict[str, Tensor | Changed] = {}
        for name, (x, grad) in factors.items():
            weight, slopes = own[name], grad * -(rate[name] if isinstance(rate, dict) else rate)
            if isinstance(weight, Tensor):
                moved[name] = Changed(weight, x, slopes)
            elif name == self._first:
                moved[name] = weight._replace(slopes=weight.slopes + slopes)
            else:
                more = torch.cat((weight.rows, x), 1), torch.cat((weight.slopes, slopes), 1)
                moved[name] = Changed(weight.initial, *more)
        for name in self._without_effect:
            # Such a bias stays; a rate that is a tensor, of it alone, has no other part in the graph.
            bias: Any = own[name]
            if isinstance(rate, dict) and isinstance(rate[name], Tensor):
                grads[name] = bias.new_zeros(self.tasks, bias.shape[-1])
        others: Any = {name: own[name] for name in grads}
        rates = {name: rate[name] for name in grads} if isinstance(rate, dict) else rate
        return {**own, **moved, **sgd_update(others, grads, rates)}, found

    def _calls(self, values: Values, rows: Rows) -> tuple[list[_Call], Found]:
        x, calls, found = rows.x, [], {}
        for k, layer in enumerate(self.layers):
            products = rows[1:] if k == 0 else (None, None)
            before = _linear(x, values[f"{layer.prefix}weight"], *products)
            bias: Any = values.get(f"{layer.prefix}bias")
            by_batch = self._by_batch(layer)
            if bias is not None and not by_batch:
                before = before + (bias if bias.dim() == 1 else bias.unsqueeze(1))
            after, statistics, is_relu = before, None, layer.activation is nn.ReLU
            if layer.norm is not None:
                weight, shift = self._scale(layer, values)
                if bias is not None and by_batch:
                    # The mean takes it away again, but it stays a part of the graph.
                    shift = torch.add(shift, bias, alpha=0)
                given = None if by_batch else self._running(layer, values)
                after, *statistics = norm_rows(before, weight, shift, given, layer.norm.eps, is_relu)
                if self._follows(layer.norm):
                    found[layer.norm_prefix] = [_to_follow(statistics, bias, x.shape[1])]
            elif is_relu:
                after = before.relu()
            if layer.activation is nn.Tanh:
                after = after.tanh()
            calls.append(_Call(x, before, after, statistics))
            x = after
        return calls, found

    def _gradients(
        self, own: Values, values: Values, calls: list[_Call], grad: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """Those of the parameters that adapt, from the one for the outputs; of wide weights both factors."""
        grads: dict[str, Tensor] = {}
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for k in range(len(calls) - 1, self._lowest - 1, -1):
            layer, call = self.layers[k], calls[k]
            by_batch, is_relu = self._by_batch(layer), layer.activation is nn.ReLU
            if layer.activation is nn.Tanh:
                grad = grad * (1 - call.after * call.after)
            if call.statistics is not None and layer.norm is not None:
                grad, grads[f"{layer.norm_prefix}weight"], grads[f"{layer.norm_prefix}bias"] = norm_rows_vjp(
                    grad,
                    call.before,
                    *self._scale(layer, values),
                    call.statistics,
                    not by_batch,
                    layer.norm.eps,
                    is_relu,
                )
            elif is_relu:
                grad = grad.masked_fill(call.before <= 0, 0.0)
            weight = f"{layer.prefix}weight"
            if not by_batch:
                grads[f"{layer.prefix}bias"] = grad.sum(1)
            if weight in self._wide:
                factors[weight] = (call.x, grad)
            elif weight in own:
                grads[weight] = grad.mT @ call.x
            if k > self._lowest:
                grad = _back(grad, values[weight])
        return {name: value for name, value in grads.items() if name in own}, factors

    def _by_batch(self, layer: Layer) -> bool:
        """Whether it is normalised by the statistics of the rows at hand."""
        norm = layer.norm
        if norm is None or norm.running_mean is None or self.batch_norm == "transductive":
            return norm is not None
        return norm.training and self.batch_norm != "frozen"

    def _follows(self, norm: nn.BatchNorm1d) -> bool:
        """Whether its running statistics follow those of the rows."""
        return self.batch_norm == "running" and norm.training and norm.running_mean is not None

    def _running(self, layer: Layer, values: Values) -> tuple[Tensor, Tensor]:
        """Mean and variance, ``[T, out]``; what is done to them later, in place, the graph does not see."""
        norm: Any = layer.norm
        mean: Any = values.get(f"{layer.norm_prefix}running_mean", norm.running_mean)
        var: Any = values.get(f"{layer.norm_prefix}running_var", norm.running_var)
        return self._expanded(mean.clone()), self._expanded(var.clone())

    def _scale(self, layer: Layer, values: Values) -> tuple[Tensor, Tensor]:
        """Weight and bias of its BatchNorm, ``[T, out]``."""
        weight: Any = values.get(f"{layer.norm_prefix}weight")
        bias: Any = values.get(f"{layer.norm_prefix}bias")
        if weight is None or bias is None:
            # Not like the layer's own weight: another may be given for one on the meta device.
            outs = layer.linear.out_features
            weight, bias = self._support.new_ones(outs), self._support.new_zeros(outs)
        return self._expanded(weight), self._expanded(bias)

    def _expanded(self, value: Tensor) -> Tensor:
        return value if value.dim() > 1 else value.expand(self.tasks, *value.shape)


def _is_wide(weight: Tensor, rank: int, name: str, rates: list[Any]) -> bool:
    """Whether it is cheaper to keep as :class:`Changed`: all tasks share it, and every step goes along its gradient."""
    of_weight = [rate[name] for rate in rates if isinstance(rate, dict)]
    if weight.dim() > 2 or any(isinstance(rate, Tensor) and rate.dim() for rate in of_weight):
        return False
    return rank * sum(weight.shape) < weight.numel()


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """``x [T, m, a]`` times ``[a, b]``, or ``[T, a, b]``."""
    # One product for all tasks: torch may make a copy of the matrix for each of them otherwise.
    return x @ matrix if matrix.dim() > 2 else (x.flatten(0, 1) @ matrix).unflatten(0, x.shape[:2])


def _linear(x: Tensor, weight: Any, of_initial: Tensor | None, of_support: Tensor | None) -> Tensor:
    if of_initial is None:
        of_initial = _product(x, (weight.initial if isinstance(weight, Changed) else weight).mT)
    if not isinstance(weight, Changed):
        return of_initial
    return torch.baddbmm(of_initial, x @ weight.rows.mT if of_support is None else of_support, weight.slopes)


def _back(grad: Tensor, weight: Any) -> Tensor:
    """From a layer's outputs to its inputs."""
    if not isinstance(weight, Changed):
        return _product(grad, weight)
    return torch.baddbmm(_product(grad, weight.initial), grad @ weight.slopes.mT, weight.rows)


def _to_follow(statistics: list[Tensor], bias: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of a linear layer's outputs, whose bias the statistics do not have."""
    mean, var = statistics
    mean = mean if bias is None else mean + bias
    return mean.detach(), var.detach() * (rows / max(rows - 1, 1))
