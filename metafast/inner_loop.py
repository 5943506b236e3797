"""The engine: an inner loop of any module, for a batch of tasks at once."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from metafast import _check
from metafast._chain import Chain, Rows, layers_of
from metafast._inner_loss import LOSSES
from metafast._stateless import (
    BATCH_NORM_POLICIES,
    OUTPUT_LOSSES,
    FirstLayer,
    Form,
    Statistics,
    first_layer,
    fused_form,
    stateless,
)
from metafast.backbones import move_running_statistics
from metafast.inner_update import sgd_update
from metafast.linear_head import adapt_linear, adapted_logits
from metafast.mlp import adapt_mlp, adapted_mlp
from metafast.second_order import explained, go_backward, known

OPTIMIZERS = ("sgd", "adam")
#: Of an inner loss under float16 autocast; its gradients are divided by it again.
HALF_SCALE = 1024.0

Loss = str | Callable[[Tensor, Tensor], Tensor]
Named = dict[str, Tensor]
#: Of the layers by their prefixes, mean and variance of each of a layer's calls.
Found = dict[str, list[tuple[Tensor, Tensor]]]
#: Of one step: a number or a tensor ``[]`` for all parameters, or for each by its name.
Rate = float | Tensor | dict[str, Any]


class BatchingWarning(UserWarning):
    """A module cannot be called with the weights of all tasks at once, and is called task after task."""


def inner_loop(
    module: nn.Module,
    support_x: Tensor,
    support_y: Tensor,
    lr: Any,
    steps: int,
    *,
    loss: Loss = "cross_entropy",
    adapt: Iterable[str] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    per_step: Mapping[str, Tensor] | None = None,
    batches: Tensor | None = None,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    state: OptimizerState | None = None,
    first_order: bool = False,
    truncate: int | None = None,
    batch_norm: str = "transductive",
    recompute: bool = False,
) -> Adapted:
    r"""A module after K steps of gradient descent on each task's support rows, for all tasks at once.

    .. math:: \theta_{t+1} = \theta_t - \alpha_t \circ \nabla E_{support}(\theta_t), \qquad t = 0 \ldots K-1

    and exact second-order gradients for everything that requires them: initial parameters, those that do not adapt,
    rates and rows. Finn, Abbeel and Levine, *Model-Agnostic Meta-Learning*, 2017.

    A linear layer, and a ``Sequential`` of linear layers with one kind of activation, is a fused operator
    (:func:`metafast.adapt_linear`, :func:`metafast.adapt_mlp`). Any other module is called by ``torch.func.vmap`` with
    the weights of all tasks stacked; a module that cannot be, task after task, with a warning. ``Adapted.path`` says
    which it was. The module itself, its buffers and its gradients are left as they are (but for ``batch_norm``). A wide
    linear layer that the rows reach first keeps what they add to its weight, while plain SGD with one rate for it
    adapts it: no task's weight is made then, unless ``Adapted.parameters`` is asked for. In a ``Sequential`` of linear
    layers, BatchNorm, ReLU and tanh so does every linear layer that is wide beside the support rows of all steps.

    Under autocast the module computes as its operators do there, while parameters, steps and losses stay as they are;
    a fused operator computes in float32. For float16 the inner losses are scaled by 1,024 and their gradients back,
    beside what a ``GradScaler`` does to the outer loss.

    Args:
        module: from rows ``[n, ...]`` to outputs ``[n, ...]``.
        support_x: ``[T, n, ...]``.
        support_y: ``[T, n, ...]``, what the loss compares the outputs with.
        lr: the rates: a number; a tensor ``[]`` or ``[K]``, one for each step; a dict by the adapting parameters' names
            of numbers, tensors ``[]`` (LSLR) or tensors like the parameter (Meta-SGD); or a sequence of K of those but
            ``[K]``. A tensor gets its gradient.
        steps: K, 0 or more.
        loss: ``"cross_entropy"``, ``"mse"`` or a function from outputs and targets of one task to its mean loss.
        adapt: names of the parameters that adapt, or of the submodules whose parameters do; None: all that require
            gradients.
        parameters: initial values in place of the module's own, by name: of the same shape, or ``[T, ...]``.
        per_step: values of parameters that do not adapt, and of buffers, for each call, by name: ``[K + 1, ...]``. Row
            t stands for the module's own in a call after t steps.
        batches: ``[K, b]`` int64: the support rows that each step sees; None: all of them.
        optimizer: ``"sgd"`` or ``"adam"``, each as in ``torch.optim``.
        momentum: of SGD.
        weight_decay: added to the gradient, times the parameter.
        betas: of Adam.
        eps: of Adam.
        state: what the optimiser begins with, such as an earlier loop's ``Adapted.state``; None: nothing.
        first_order: take the gradients that the steps follow for constants (FOMAML).
        truncate: take them for constants in all but the last so many steps; None: in none.
        batch_norm: ``"transductive"``: every call normalises by the statistics of its own rows, of each task, and
            changes no running ones. ``"running"``: a layer in training mode does the same, and its running statistics
            follow, in each call by the mean over the tasks; in evaluation mode it normalises by them. ``"frozen"``: by
            the running statistics in either mode; they stay as they are.
        recompute: keep nothing of a step but its parameters for the backward pass, which computes it once more: memory
            no longer grows with the steps' activations.

    Returns:
        The adapted module: call it with rows ``[T, m, ...]``.

    Raises:
        TypeError: wrong kind of an argument.
        ValueError: unknown names, sizes that do not fit, numbers out of range.
        RuntimeError: ``recompute`` while a CUDA graph is captured.
        SecondOrderError: an operator of the module has no second derivative; it is named. The module's first loop that
            records one goes backward once to find out.

    Example:
        >>> line = torch.nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = line.weight.fill_(0.0)
        >>> x = torch.tensor([[[1.0], [2.0]]])
        >>> adapted = inner_loop(line, x, 2 * x, 0.1, steps=1, loss="mse")
        >>> adapted(torch.tensor([[[3.0]]])).detach()
        tensor([[[3.]]])
    """
    _check_arguments(module, support_x, support_y, steps, loss, truncate, batch_norm)
    _check_optimizer(optimizer, momentum, weight_decay, betas, eps)
    own: Named = dict(module.named_parameters())
    names = adapting(module, adapt)
    tasks = support_x.shape[0]
    start, fixed = _initial(own, names, dict(parameters or {}), tasks)
    by_step = _by_step(module, names, dict(per_step or {}), steps)
    if batch_norm == "transductive" and any(
        name.endswith(("running_mean", "running_var")) for name in by_step
    ):
        raise ValueError("per_step: running statistics have no part in batch_norm 'transductive'")
    _check_batches(batches, steps, support_x)
    _check_state(state, optimizer, start, tasks, own)
    if recompute and support_x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "recompute: a CUDA graph that is being captured cannot draw the random numbers of a step again"
        )
    rates = _rates(lr, steps, {name: own[name] for name in names})
    shared = all(start[name].dim() == own[name].dim() for name in names)
    plain = optimizer == "sgd" and truncate is None and batches is None and state is None
    if isinstance(loss, str) and plain and not fixed and not by_step:
        form = fused_form(module, own, support_x)
        decays = momentum != 0 or weight_decay != 0
        if form is not None and not isinstance(rates, list) and (form.single or not decays):
            options: dict[str, Any] = {"loss": loss, "first_order": first_order}
            if form.single:
                options |= {"momentum": momentum, "weight_decay": weight_decay}
            return _Fused(form, start, own, (support_x, support_y), rates, steps, options)
    leaves = [start, fixed, by_step, rates, support_x]
    first: _First | None = None
    chain: Chain | None = None
    seen: Tensor | _Products | Rows = support_x
    constant = steps if first_order else 0 if truncate is None else max(0, steps - truncate)
    # What stands for wide weights has the rows in it, which are a part of the gradients.
    rows_of_steps = support_x.detach() if constant == steps else support_x
    mixed = 0 < constant < steps and support_x.requires_grad
    along_gradients = optimizer == "sgd" and momentum == weight_decay == 0 and state is None
    if along_gradients and batches is None and not mixed and not _check.autocasts(support_x):
        if isinstance(loss, str) and (layers := layers_of(module, support_x, support_y)) is not None:
            _check_labels(support_y, layers[0][-1].linear.out_features)
            constants = {name: value for name, value in fixed.items() if name not in by_step}
            each = [_rate_of(rates, t) for t in range(steps)]
            chain = Chain(*layers, batch_norm, LOSSES.index(loss), rows_of_steps, start, constants, each)
        elif steps:
            first = _first(module, start, own, rates, rows_of_steps)
    stacked: dict[str, Any] = start
    if chain is not None:
        seen, support_y = chain.of_support, chain.targets(support_y)
    else:
        if first is not None:
            seen = first.of_support
            start = {**start, first.layer.name: support_x.new_zeros(seen.products.shape[1:])}
        stacked = {
            name: value if value.dim() > own[name].dim() else value.expand(tasks, *value.shape)
            for name, value in start.items()
        }
    loss_function = OUTPUT_LOSSES[loss] if isinstance(loss, str) else loss
    function = _Function(module, fixed, by_step, loss_function, batch_norm, first, chain)
    rule = _Sgd(momentum, weight_decay) if optimizer == "sgd" else _Adam(betas, eps, weight_decay)
    trace, begun = [stacked], 0 if state is None else state.steps
    slots: Any = {} if state is None else state.slots
    for t in range(steps):
        # All tasks share the first step's weights, which makes it cheaper.
        alike = shared and t == 0
        step = _Step(function, rule, begun + t, alike, t < constant)
        rows = (seen, support_y)
        if batches is not None:
            rows = (support_x.index_select(1, batches[t]), support_y.index_select(1, batches[t]))
        arguments = (start if alike else trace[-1], slots, _rate_of(rates, t), function.fixed(t), *rows)
        if recompute and torch.is_grad_enabled():
            if t == constant and chain is None and _is_to_be_tried(module):
                # A step that is made again hides its operators.
                with torch.random.fork_rng(_random_state(module)[1]):
                    ends, *_ = step(*arguments)
                _require_second_order(module, support_x, ends, leaves)
                del ends
            values, slots, statistics = _recomputed(step, arguments)
        else:
            values, slots, statistics = step(*arguments)
        function.follow(statistics, t)
        if not torch.is_grad_enabled():
            # No graph holds the parameters of the steps before.
            trace.clear()
        trace.append(values)
    state = OptimizerState(optimizer, begun + steps, slots)
    if constant < steps and chain is None and _is_to_be_tried(module):
        _require_second_order(module, support_x, trace[-1], leaves)
    return _Stacked(function, trace, steps, state, shared=shared and steps == 0)


def _is_to_be_tried(module: nn.Module) -> bool:
    """Whether this is a module's first loop that records a graph."""
    if torch.compiler.is_compiling() or module in known or not torch.is_grad_enabled():
        return False
    # Under a transform of torch.func the loop's graph is not the one at hand.
    return peek_interpreter_stack() is None


def _require_second_order(module: nn.Module, support_x: Tensor, ends: Named, leaves: list[Any]) -> None:
    """Go backward through a module's first loop, so that an operator that cannot is known by its name."""
    inputs = [v for v in tree_flatten(leaves)[0] if isinstance(v, Tensor) and v.requires_grad]
    outputs = [value for value in ends.values() if value.requires_grad]
    if not inputs or not outputs:
        return
    known.add(module)
    try:
        go_backward(outputs, inputs)
    except NotImplementedError as error:
        known.discard(module)
        raise explained(inner_loop, module, support_x[0], error) from error


class _Products(NamedTuple):
    """What a first layer is given of rows: ``[T, m, out]``, products with its initial weight; ``[T, m, n]``, with the
    support rows."""

    products: Tensor
    with_support: Tensor

    def added(self, own: Named, name: str) -> Named:
        """The parameters of a call: in the weight's place what its change adds to the products."""
        return {**own, name: self.with_support @ own[name]}


class _First:
    """A module's :class:`FirstLayer` with its initial weight, and the support rows that its changes combine."""

    def __init__(self, layer: FirstLayer, weight: Tensor, support_x: Tensor) -> None:
        self.layer = layer
        self._weight, self._support = weight, self._rows(support_x)
        self.of_support = self.of(support_x)

    def _rows(self, x: Tensor) -> Tensor:
        return x.flatten(2) if self.layer.flattens else x

    def of(self, x: Tensor) -> _Products:
        rows = self._rows(x)
        # One product for all tasks: torch may make a copy of the weight for each of them otherwise.
        products = rows.flatten(0, 1) @ self._weight.mT
        return _Products(products.unflatten(0, rows.shape[:2]), rows @ self._support.mT)

    def weights(self, change: Tensor) -> Tensor:
        """Those of the tasks, ``[T, out, in]``."""
        return self._weight + change.mT @ self._support


def _first(module: nn.Module, start: Named, own: Named, rates: Any, support_x: Tensor) -> _First | None:
    """The module's first layer, if all its steps are along its rows' gradients, which are as one for a rate alone."""
    layer = first_layer(module, support_x)
    if layer is None or layer.name not in start or start[layer.name].dim() != own[layer.name].dim():
        return None
    of_weight = [
        rate[layer.name] for rate in (rates if isinstance(rates, list) else [rates]) if isinstance(rate, dict)
    ]
    if any(isinstance(rate, Tensor) and rate.dim() for rate in of_weight):
        return None
    return _First(layer, start[layer.name], support_x)


class OptimizerState(NamedTuple):
    """What an optimiser remembers.

    Attributes:
        optimizer: ``"sgd"`` or ``"adam"``.
        steps: that it has made.
        slots: for each parameter by its name: momentum of SGD; means of gradients and of their squares of Adam, each
            ``[T, ...]``, or as the parameter.
    """

    optimizer: str
    steps: int
    slots: Mapping[str, Any]


class Adapted:
    """A module that has adapted to T tasks: called with rows ``[T, m, ...]`` it gives their outputs.

    Attributes:
        path: how it did: ``"fused"``, ``"batched"`` or ``"loop"``.
        parameters: those that adapted, ``[T, ...]``, by their names in the module.
        state: the optimiser's after the last step; None where a fused operator has run the loop.
    """

    path: str
    parameters: Named
    state: OptimizerState | None = None

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def after(self, step: int) -> Adapted:
        """The module after so many of its steps, such as for the loss of each step (MAML++).

        Raises:
            ValueError: more steps than were taken; fewer, where no gradients were recorded (only the last is kept).
        """
        raise NotImplementedError


class _Fused(Adapted):
    """A linear layer or an MLP: one operator runs the loop as soon as it is known what is wanted of it."""

    path = "fused"

    def __init__(
        self,
        form: Form,
        start: Named,
        own: Named,
        support: tuple[Tensor, Tensor],
        rates: Any,
        steps: int,
        options: dict[str, Any],
    ) -> None:
        self._form, self._start, self._own, self._support = form, start, own, support
        self._rates, self._steps, self._options = rates, steps, options

    def _arguments(self, x: Tensor | None = None) -> tuple[Any, ...]:
        form, (support_x, support_y) = self._form, self._support
        rows = [support_x, x] if x is not None else [support_x]
        if form.flattens:
            rows = [value.flatten(2) for value in rows]
        weights, biases = (
            [self._start.get(name + kind) for name in form.layers] for kind in ("weight", "bias")
        )
        rates = self._rates
        if isinstance(rates, dict):
            weight_rates, bias_rates = (
                [self._rate_like(name + kind) for name in form.layers] for kind in ("weight", "bias")
            )
            rates = (weight_rates[0], bias_rates[0]) if form.single else (weight_rates, bias_rates)
        layers = (weights[0], biases[0]) if form.single else (weights, biases)
        return rows[0], support_y, *rows[1:], *layers, rates, self._steps

    def _rate_like(self, name: str) -> Tensor | None:
        """A rate for each entry of a parameter, as the operators take them."""
        if name not in self._own:
            return None
        like = self._own[name]
        return torch.as_tensor(self._rates[name], dtype=like.dtype, device=like.device).expand(like.shape)

    @cached_property
    def parameters(self) -> Named:  # type: ignore[override]
        if self._form.single:
            weight, bias = adapt_linear(*self._arguments(), **self._options)
            layers = [(weight, bias)]
        else:
            adapted = adapt_mlp(*self._arguments(), activation=self._form.activation, **self._options)
            layers = list(zip(*adapted, strict=True))
        found = {}
        for name, (weight, bias) in zip(self._form.layers, layers, strict=True):
            found[f"{name}weight"] = weight
            if bias is not None:
                found[f"{name}bias"] = bias
        return found

    def __call__(self, x: Tensor) -> Tensor:
        if self._form.single:
            return adapted_logits(*self._arguments(x), **self._options)
        return adapted_mlp(*self._arguments(x), activation=self._form.activation, **self._options)

    def after(self, step: int) -> Adapted:
        _check_step(step, self._steps)
        rates = self._rates
        if isinstance(rates, Tensor) and rates.dim():
            rates = rates[:step]
        return _Fused(self._form, self._start, self._own, self._support, rates, step, self._options)


class _Stacked(Adapted):
    """Any module, its parameters after each step; ``shared``: those of the last are the same for all tasks."""

    def __init__(
        self,
        function: _Function,
        trace: list[Named],
        steps: int,
        state: OptimizerState | None,
        shared: bool = False,
        records: bool | None = None,
    ) -> None:
        self._function, self._trace, self._steps, self._shared = function, trace, steps, shared
        self.state = state
        self._records = torch.is_grad_enabled() if records is None else records
        self._made: Named | None = None

    @property
    def path(self) -> str:  # type: ignore[override]
        return "batched" if self._function.batched else "loop"

    @property
    def parameters(self) -> Named:  # type: ignore[override]
        if self._made is None:
            # Recorded as the steps were, whoever asks first.
            with torch.set_grad_enabled(self._records):
                made = self._function.whole(self._trace[-1])
            # A view of a parameter requires gradients even so.
            self._made = made if self._records else {name: value.detach() for name, value in made.items()}
        return self._made

    def __call__(self, x: Tensor) -> Tensor:
        out, statistics = self._function.outputs(self._trace[-1], self._shared, self._steps, x)
        self._function.follow(statistics, self._steps)
        return out

    def after(self, step: int) -> Adapted:
        _check_step(step, self._steps)
        if step == self._steps:
            return self
        if len(self._trace) == 1:
            raise ValueError(
                f"step: without gradients the parameters of step {self._steps} alone are kept, not of step {step}"
            )
        return _Stacked(self._function, self._trace[: step + 1], step, None, records=self._records)


class _Function:
    """The module as a function of its parameters, those of one task or of all."""

    def __init__(
        self,
        module: nn.Module,
        fixed: Named,
        by_step: Named,
        loss: Callable[[Tensor, Tensor], Tensor],
        batch_norm: str,
        first: _First | None,
        chain: Chain | None,
    ) -> None:
        self.module, self.loss, self.batch_norm = module, loss, batch_norm
        self.first, self.chain = first, chain
        self.batched = True
        self._fixed, self._by_step = fixed, by_step
        self._statistics = Statistics()

    def fixed(self, step: int) -> Named:
        """What stands for parameters that do not adapt, and for buffers, after so many steps."""
        buffers = dict(self.module.named_buffers())
        # Running statistics change in place, which the graph must not see.
        rows = {
            name: each[step].clone() if name in buffers else each[step]
            for name, each in self._by_step.items()
        }
        return {**self._fixed, **rows}

    def whole(self, own: Any) -> Named:
        """The tasks' parameters, where a layer knows only what has changed."""
        if self.chain is not None:
            return self.chain.whole(own)
        whole: Named = own
        if self.first is not None:
            whole = {**own, self.first.layer.name: self.first.weights(own[self.first.layer.name])}
        return whole

    def follow(self, statistics: Found, step: int) -> None:
        """Let the running statistics follow the batch ones of a call after so many steps."""
        for prefix, calls in statistics.items():
            layer: Any = self.module.get_submodule(prefix[:-1])
            running = [
                self._by_step[prefix + name][step] if prefix + name in self._by_step else getattr(layer, name)
                for name in ("running_mean", "running_var", "num_batches_tracked")
            ]
            for mean, var in calls:
                own = (value.reshape(-1, value.shape[-1]).mean(0) for value in (mean, var))
                move_running_statistics(running, layer.momentum, *own)

    def _call(self, own: Named, fixed: Named, x: Tensor) -> tuple[Tensor, Found]:
        # What the module does to its buffers stays in here.
        buffers = {name: fixed.get(name, value).clone() for name, value in self.module.named_buffers()}
        tensors = {**fixed, **buffers, **own}
        self._statistics.watch(tensors)
        if self.first is not None:
            self.first.layer.watch(tensors)
        out: Tensor = functional_call(self.module, tensors, (x,))
        return tree_map(_from_autocast, out), self._statistics.take()

    def outputs(self, own: Named, shared: bool, step: int, x: Tensor) -> tuple[Tensor, Found]:
        """``[T, m, ...]``, and the batch statistics; ``shared``: the parameters are those of all tasks."""
        tasks = self.chain.tasks if self.chain is not None else next(iter(own.values())).shape[0]
        _check.is_tensor(x, "x")
        if x.dim() < 2 or x.shape[0] != tasks:
            raise ValueError(f"x: expected rows [{tasks}, m, ...], got {list(x.shape)}")
        fixed = self.fixed(step)
        if self.chain is not None:
            return self.chain.outputs({**fixed, **own}, self.chain.rows(x))
        if self.first is not None:
            of_rows = self.first.of(x)
            own, x = of_rows.added(own, self.first.layer.name), of_rows.products
        if shared:
            own = {name: value[0] for name, value in own.items()}

        def of_task(values: Named, rows: Tensor) -> tuple[Tensor, Found]:
            return self._call(values, fixed, rows)

        def in_turn() -> tuple[Tensor, Found]:
            each = (own if shared else {name: value[t] for name, value in own.items()} for t in range(tasks))
            return _stacked([of_task(values, rows) for values, rows in zip(each, x, strict=True)])

        together = vmap(of_task, in_dims=(None if shared else 0, 0), randomness="different")
        with self._prepared(shared):
            found: tuple[Tensor, Found] = self._for_tasks(lambda: together(own, x), in_turn)
            return found

    def gradients(
        self, own: Named, shared: bool, fixed: Named, seen: Tensor | _Products, y: Tensor, create_graph: bool
    ) -> tuple[Named, Found]:
        """Those of each task's loss, ``[T, ...]``, and the batch statistics; ``shared`` as of :meth:`outputs`."""
        if isinstance(seen, Tensor):
            x = seen
        else:
            x = seen.products
            if self.first is not None and not shared:
                own = seen.added(own, self.first.layer.name)
        # float16 has no numbers as small as gradients of a mean often are.
        half = _check.autocasts(x) and torch.get_autocast_dtype(x.device.type) == torch.float16
        scale = HALF_SCALE if half else 1.0

        def loss_of(values: Named, rows: Tensor, targets: Tensor) -> tuple[Tensor, Found]:
            out, statistics = self._call(values, fixed, rows)
            with _check.without_autocast(rows):
                return self.loss(out, targets) * scale, statistics

        def of_task(t: int) -> tuple[Named, Found]:
            with torch.enable_grad():
                values = own if shared else {name: value[t] for name, value in own.items()}
                values = {
                    name: value if value.requires_grad else value.detach().requires_grad_()
                    for name, value in values.items()
                }
                value, statistics = loss_of(values, x[t], y[t])
                found = torch.autograd.grad(
                    value,
                    list(values.values()),
                    create_graph=create_graph,
                    allow_unused=True,
                    materialize_grads=True,
                )
                return dict(zip(own, found, strict=True)), statistics

        def in_turn() -> tuple[Named, Found]:
            return _stacked([of_task(t) for t in range(x.shape[0])])

        each = vmap(
            grad(loss_of, has_aux=True), in_dims=(None if shared else 0, 0, 0), randomness="different"
        )
        with self._prepared(shared):
            grads, statistics = self._for_tasks(lambda: each(own, x, y), in_turn)
        if half:
            grads = {name: g / scale for name, g in grads.items()}
        return grads, statistics

    @contextlib.contextmanager
    def _prepared(self, shared: bool) -> Iterator[None]:
        # Fused attention and cuDNN's recurrent layers have no second derivative.
        with (
            stateless(
                self.module,
                self.batch_norm,
                self.batched and not shared,
                self._statistics,
                None if self.first is None else self.first.layer,
            ),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False) if _recurs(self.module) else contextlib.nullcontext(),
        ):
            yield

    def _for_tasks(self, together: Callable[[], Any], in_turn: Callable[[], Any]) -> Any:
        if not self.batched:
            return in_turn()
        random = None if torch.compiler.is_compiling() else _random_state(self.module)
        try:
            return together()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if random is not None:
                # What was drawn until then is drawn again: with recomputation the backward pass begins here.
                _set_random_state(random)
            # If it is the module's own error, this raises it too.
            found = in_turn()
            reason = str(error).strip().partition("\n")[0]
        self.batched = False
        warnings.warn(
            f"{type(self.module).__name__} cannot be called with the weights of all tasks at once, so the tasks are "
            f"taken one after the other, which is slow: {reason}",
            BatchingWarning,
            stacklevel=2,
        )
        return found


def _from_autocast(value: Any) -> Any:
    halves = (torch.float16, torch.bfloat16)
    cast = isinstance(value, Tensor) and value.dtype in halves and _check.autocasts(value)
    return value.float() if cast else value


def _stacked(each: list[Any]) -> Any:
    """The results of the tasks, their tensors stacked."""
    flat, shape = zip(*map(tree_flatten, each), strict=True)
    return tree_unflatten([torch.stack(values) for values in zip(*flat, strict=True)], shape[0])


def _recurs(module: nn.Module) -> bool:
    return any(isinstance(layer, nn.RNNBase) for layer in module.modules())


class _Sgd(NamedTuple):
    momentum: float
    weight_decay: float

    def __call__(self, own: Named, grads: Named, slots: Any, rate: Rate, t: int) -> tuple[Named, Any]:
        grads = _decayed(own, grads, self.weight_decay)
        if self.momentum:
            if slots:
                grads = {name: self.momentum * slots[name] + g for name, g in grads.items()}
            slots = grads
        return sgd_update(own, grads, rate), slots


class _Adam(NamedTuple):
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def __call__(self, own: Named, grads: Named, slots: Any, rate: Rate, t: int) -> tuple[Named, Any]:
        grads = _decayed(own, grads, self.weight_decay)
        first, second = self.betas
        moments: dict[str, tuple[Tensor, Tensor]] = {}
        directions = {}
        for name, g in grads.items():
            m, v = slots[name] if slots else (torch.zeros_like(g), torch.zeros_like(g))
            m, v = first * m + (1 - first) * g, second * v + (1 - second) * g * g
            moments[name] = (m, v)
            # The root's derivative at 0 would be infinite, times 0.
            seen = v > 0
            root = torch.where(seen, torch.where(seen, v, 1.0).sqrt(), 0.0)
            directions[name] = (m / (1 - first ** (t + 1))) / (
                root / (1 - second ** (t + 1)) ** 0.5 + self.eps
            )
        return sgd_update(own, directions, rate), moments


def _decayed(own: Named, grads: Named, weight_decay: float) -> Named:
    if not weight_decay:
        return grads
    return {name: g + weight_decay * own[name] for name, g in grads.items()}


class _Step(NamedTuple):
    """One step of all tasks."""

    function: _Function
    rule: _Sgd | _Adam
    number: int
    shared: bool
    constant: bool

    def __call__(
        self, own: Named, slots: Any, rate: Rate, fixed: Named, seen: Any, y: Tensor
    ) -> tuple[Named, Any, Found]:
        record = torch.is_grad_enabled() and not self.constant
        if self.function.chain is not None:
            moved: Any
            moved, statistics = self.function.chain.step(own, rate, fixed, seen, y, record)
            return moved, slots, statistics
        with contextlib.nullcontext() if record else torch.no_grad():
            grads, statistics = self.function.gradients(own, self.shared, fixed, seen, y, create_graph=record)
        return *self.rule(own, grads, slots, rate, self.number), statistics


def _recomputed(step: _Step, state: tuple[Any, ...]) -> Any:
    """The step's results, which keep only its arguments: the backward pass makes it again."""
    leaves, arguments = tree_flatten(state)
    results: list[Any] = []

    def run(*given: Any) -> tuple[Tensor, ...]:
        flat, shape = tree_flatten(step(*tree_unflatten(list(given), arguments)))
        results[:] = [shape]
        return tuple(flat)

    flat = Recomputed.apply(run, *leaves)
    return tree_unflatten(list(flat), results[0])


class Recomputed(torch.autograd.Function):
    """A function of tensors whose backward pass computes it once more."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, ...]], *leaves: Any) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.tensors = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        ctx.save_for_backward(*(leaves[k] for k in ctx.tensors))
        kind = leaves[ctx.tensors[0]].device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.random = _random_state(leaves[k] for k in ctx.tensors)
        return run(*leaves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        again = torch.is_grad_enabled()
        # Of a derivative of the derivative the arguments' own history is a part.
        leaves, outputs = replayed(ctx, history=again)
        wanted = [k for k in ctx.tensors if ctx.needs_input_grad[k + 1]]
        with torch.enable_grad():
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [leaves[k] for k in wanted],
                [g for _, g in pairs],
                create_graph=again,
                allow_unused=True,
            )
        out: list[Tensor | None] = [None] * (len(leaves) + 1)
        for k, gradient in zip(wanted, found, strict=True):
            out[k + 1] = gradient
        return tuple(out)


def replayed(node: Any, history: bool) -> tuple[list[Any], tuple[Tensor, ...]]:
    """Arguments, with or without their own history, and results of what a node of :class:`Recomputed` computes."""
    leaves = list(node.others)
    for k, tensor in zip(node.tensors, node.saved_tensors, strict=True):
        leaves[k] = tensor if history else tensor.detach().requires_grad_(tensor.requires_grad)
    with torch.enable_grad(), torch.random.fork_rng(node.random[1]), torch.autocast(*node.autocast):
        _set_random_state(node.random)
        return leaves, node.run(*leaves)


#: Of the CPU, and of CUDA devices by their numbers.
RandomState = tuple[Tensor, dict[int, Tensor]]


def _random_state(of: nn.Module | Iterable[Tensor]) -> RandomState:
    """Of the CPU and of the CUDA devices that these tensors, or a module's, are on."""
    tensors = chain(of.parameters(), of.buffers()) if isinstance(of, nn.Module) else of
    devices = sorted({value.device.index for value in tensors if value.is_cuda})
    if devices and torch.cuda.is_current_stream_capturing():
        # A graph that is captured has its own random numbers, whose state cannot be read.
        devices = []
    return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    for device, value in state[1].items():
        torch.cuda.set_rng_state(value, device)


def _check_arguments(
    module: Any,
    support_x: Any,
    support_y: Any,
    steps: Any,
    loss: Any,
    truncate: Any,
    batch_norm: str,
) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    for name, value in (("support_x", support_x), ("support_y", support_y)):
        _check.is_tensor(value, name)
        if value.dim() < 2:
            raise ValueError(f"{name}: expected [T, n, ...], got {list(value.shape)}")
    _check.same_size(support_y, 0, "support_y", support_x, 0, "support_x")
    _check.same_size(support_y, 1, "support_y", support_x, 1, "support_x")
    if support_x.shape[0] == 0:
        raise ValueError(f"support_x: expected at least one task, got shape {list(support_x.shape)}")
    _check.count(steps, "steps")
    if isinstance(loss, str):
        _check.choice(loss, "loss", LOSSES)
    elif not callable(loss):
        raise TypeError(f"loss: expected a name or a function, got {type(loss).__name__}")
    _check.choice(batch_norm, "batch_norm", BATCH_NORM_POLICIES)
    if truncate is not None:
        _check.count(truncate, "truncate")


def _check_optimizer(optimizer: str, momentum: Any, weight_decay: Any, betas: Any, eps: Any) -> None:
    _check.choice(optimizer, "optimizer", OPTIMIZERS)
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay), ("eps", eps)):
        _check.number(value, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number that is not negative, got {value}")
    if momentum and optimizer != "sgd":
        raise ValueError(f"momentum: expected 0 with optimizer {optimizer!r}, got {momentum}")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas: expected two numbers, got {betas!r}")
    for value in betas:
        _check.number(value, "betas")
        if not 0 <= value < 1:
            raise ValueError(f"betas: expected numbers from 0 to below 1, got {tuple(betas)}")


def _check_step(step: Any, steps: int) -> None:
    _check.count(step, "step")
    if step > steps:
        raise ValueError(f"step: expected at most {steps}, those that were taken, got {step}")


def adapting(module: nn.Module, adapt: Iterable[str] | None) -> list[str]:
    """The names of the parameters that adapt, in the module's order; ``adapt`` as for :func:`inner_loop`."""
    own = dict(module.named_parameters())
    if adapt is None:
        names = [name for name, value in own.items() if value.requires_grad]
    else:
        wanted = [adapt] if isinstance(adapt, str) else list(adapt)
        for part in wanted:
            if not any(name == part or name.startswith(f"{part}.") for name in own):
                raise ValueError(f"adapt: expected names of parameters or submodules, got {part!r}")
        names = [name for name in own if any(name == part or name.startswith(f"{part}.") for part in wanted)]
    if not names:
        raise ValueError(f"adapt: {type(module).__name__} has no parameters that adapt")
    return names


def _initial(
    own: Named, names: Sequence[str], given: Mapping[str, Tensor], tasks: int
) -> tuple[Named, Named]:
    """Initial values of the parameters that adapt, and those of the others."""
    values = dict(own)
    for name, value in given.items():
        if name not in own:
            raise ValueError(f"parameters: expected names of the module's parameters, got {name!r}")
        _check.is_tensor(value, f"parameters[{name!r}]")
        shape = own[name].shape
        if value.shape != shape and (name not in names or value.shape != (tasks, *shape)):
            wanted = f"{list(shape)}" + (f" or {[tasks, *shape]}" if name in names else "")
            raise ValueError(f"parameters[{name!r}]: expected {wanted}, got {list(value.shape)}")
        values[name] = value
    return {name: values[name] for name in names}, {
        name: v for name, v in values.items() if name not in names
    }


def _by_step(module: nn.Module, names: Sequence[str], given: Named, steps: int) -> Named:
    """The values of ``per_step``, once they are known to fit."""
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for name, value in given.items():
        if name not in own or name in names:
            raise ValueError(
                f"per_step: expected names of parameters that do not adapt, or of buffers, got {name!r}"
            )
        _check.is_tensor(value, f"per_step[{name!r}]")
        if value.shape != (steps + 1, *own[name].shape):
            raise ValueError(
                f"per_step[{name!r}]: expected {[steps + 1, *own[name].shape]}, got {list(value.shape)}"
            )
    return given


def _check_batches(batches: Any, steps: int, support_x: Tensor) -> None:
    if batches is None:
        return
    _check.is_tensor(batches, "batches")
    if batches.dtype != torch.int64:
        raise TypeError(f"batches: expected int64, got {batches.dtype}")
    if batches.dim() != 2 or batches.shape[0] != steps:
        raise ValueError(f"batches: expected [{steps}, b], got {list(batches.shape)}")
    if batches.numel() and batches.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(value) for value in batches.aminmax())
        if low < 0 or high >= support_x.shape[1]:
            raise ValueError(
                f"batches: expected rows from 0 to {support_x.shape[1] - 1}, got {low if low < 0 else high}"
            )


def _check_labels(support_y: Tensor, classes: int) -> None:
    """Class numbers that the outputs have, where they can be read at once; elsewhere a task with another is NaN."""
    if support_y.is_floating_point() or support_y.device.type != "cpu" or not support_y.numel():
        return
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
        return
    low, high = (int(value) for value in support_y.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"support_y: expected class numbers from 0 to {classes - 1}, got {low if low < 0 else high}"
        )


def _check_state(state: Any, optimizer: str, start: Named, tasks: int, own: Named) -> None:
    if state is None:
        return
    if not isinstance(state, OptimizerState):
        raise TypeError(f"state: expected an Adapted.state, got {type(state).__name__}")
    if state.slots and state.slots.keys() != start.keys():
        raise ValueError(
            f"state: expected the names of the parameters that adapt, {list(start)}, got {list(state.slots)}"
        )
    if state.optimizer != optimizer:
        raise ValueError(f"state: expected that of optimizer {optimizer!r}, got that of {state.optimizer!r}")
    for name, slot in state.slots.items():
        shape = own[name].shape
        for value in slot if isinstance(slot, tuple) else (slot,):
            if value.shape not in (shape, (tasks, *shape)):
                raise ValueError(
                    f"state: expected {list(shape)} or {[tasks, *shape]} for {name!r}, got {list(value.shape)}"
                )


def _rates(lr: Any, steps: int, own: Mapping[str, Tensor]) -> Any:
    """A rate for all steps, a tensor ``[K]``, or a list with one for each step."""
    if isinstance(lr, Tensor) and lr.dim() == 1:
        if lr.shape[0] != steps:
            raise ValueError(f"lr: expected a rate for each of {steps} steps, got {lr.shape[0]}")
        return lr
    if isinstance(lr, (list, tuple)):
        if len(lr) != steps:
            raise ValueError(f"lr: expected a rate for each of {steps} steps, got {len(lr)}")
        return [_rate(each, f"lr[{t}]", own) for t, each in enumerate(lr)]
    return _rate(lr, "lr", own)


def _rate(lr: Any, name: str, own: Mapping[str, Tensor]) -> Rate:
    if not isinstance(lr, Mapping):
        if isinstance(lr, Tensor):
            if lr.dim():
                raise ValueError(
                    f"{name}: expected a number, a tensor [] or [K], or a dict, got {list(lr.shape)}"
                )
        else:
            _check.number(lr, name)
        return lr
    if lr.keys() != own.keys():
        raise ValueError(
            f"{name}: expected the names of the parameters that adapt, {list(own)}, got {list(lr)}"
        )
    for key, value in lr.items():
        if not isinstance(value, Tensor):
            _check.number(value, f"{name}[{key!r}]")
        elif value.dim() and value.shape != own[key].shape:
            raise ValueError(
                f"{name}[{key!r}]: expected a tensor [] or {list(own[key].shape)}, got {list(value.shape)}"
            )
    return {key: lr[key] for key in own}


def _rate_of(rates: Any, step: int) -> Rate:
    if isinstance(rates, list) or (isinstance(rates, Tensor) and rates.dim()):
        return rates[step]
    return rates
