"""What keeps a module from exact second-order gradients: the operator, the module that it sits in, and the remedy."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

#: What :func:`metafast.inner_loop` is, which stands on this module.
Engine = Callable[..., Any]

#: What is wrong, in the order of its weight: it raises, it is silently wrong, or it is slow.
MISSING, WRONG, SLOW = "no second derivative", "wrong second derivative", "task after task"
#: Nothing can be said, since values are not finite.
UNKNOWN = "not compared"
#: Of the differences that a derivative is compared with; and how far it may be from them, relative to both.
_STEPS, _TOLERANCE = (1e-5, 1e-7, 1e-8), 1e-4
_RATE = 0.05
#: Letters of a reason.
_LONGEST = 100

_REMEDIES: Mapping[str, str] = {
    "cdist": "metafast.cdist takes its place and has derivatives of any order",
    "pdist": "metafast.pairwise_distance of the rows with themselves has derivatives of any order",
    "rnn|gru|lstm": "call the layer under torch.backends.cudnn.flags(enabled=False), as inner_loop does",
    "attention": "call it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), as inner_loop does",
}
_OTHERWISE = (
    "compute it from operators that have a second derivative, or do without second order: first_order=True, or "
    "torch.no_grad() in evaluation"
)
_ONCE = "leave out once_differentiable and write its backward in operations that can be differentiated"
_DETACHED = (
    "write its backward in operations that can be differentiated, on what setup_context saved: no detach(), no .data, "
    "no torch.no_grad(), no numpy"
)
#: Of what vmap says: what it is about, where it does not say so itself, and what to do.
_SLOW: Mapping[str, tuple[str | None, str]] = {
    "autograd.Function": (
        None,
        "give the torch.autograd.Function a setup_context and generate_vmap_rule = True",
    ),
    r"data-dependent control flow|\.item\(\)": (
        "Python's look at a value, by if, while, item(), int() or float(),",
        "choose by torch.where in place of if and while, and keep numbers tensors",
    ),
    "in-place|inplace|broadcast shape": (None, "write the result to a new tensor in place of an old one"),
}
_FINITE = "look at it with a model and rows that give numbers"
_SLOW_OTHERWISE = "see https://docs.pytorch.org/docs/stable/func.ux_limitations.html for what vmap can call"


#: Modules that an inner loop has gone backward through, or is not to try to.
known: WeakSet[nn.Module] = WeakSet()


class SecondOrderError(RuntimeError):
    """An operator has no second derivative; the message names it, the module that it sits in, and the remedy."""


@dataclass(frozen=True)
class Finding:
    """Something that keeps a module from exact or fast second order.

    Attributes:
        kind: ``"no second derivative"``, ``"wrong second derivative"``, ``"task after task"`` or ``"not compared"``.
        module: the innermost module that it happens in, by its name in the model (``""``: the model itself), with its
            class.
        operator: what does not work, as far as it is known.
        remedy: what to do about it.
    """

    kind: str
    module: str
    operator: str
    remedy: str

    @property
    def fatal(self) -> bool:
        """Whether gradients are missing or wrong."""
        return self.kind in (MISSING, WRONG)

    def __str__(self) -> str:
        return f"{self.kind}: {self.operator} in {self.module}; {self.remedy}"


class Report(NamedTuple):
    """What :func:`examine_model` found.

    Attributes:
        path: how :func:`metafast.inner_loop` adapts the model: ``"fused"``, ``"batched"`` or ``"loop"``.
        findings: what is wrong, the worst first.
        notes: what the inner loop computes in another way than the model's layers do by themselves.
    """

    path: str
    findings: list[Finding]
    notes: list[str]


def examine_model(engine: Engine, model: nn.Module, rows: Tensor, **options: Any) -> Report:
    """Adapt a copy of ``model`` in float64 and compare its meta-gradient with differences of what it is of.

    Where they do not agree the same is asked of its submodules, down to the innermost ones that are at fault.

    Args:
        engine: :func:`metafast.inner_loop`.
        model: from rows ``[n, ...]`` to outputs.
        rows: ``[n, ...]``, such as it is trained on.
        options: of ``engine``, such as ``batch_norm``.
    """
    findings, path = _examine(engine, model, rows, options)
    order = (MISSING, WRONG, UNKNOWN, SLOW)
    return Report(
        path, sorted(findings, key=lambda finding: order.index(finding.kind)), _notes(model, options)
    )


def go_backward(ends: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of the sum of ``ends``, whose graph remains.

    Raises:
        NotImplementedError: an operator has none. ``torch.autograd.grad`` by itself passes over those of
            ``once_differentiable``.
    """
    if any(node.name() == "torch::autograd::Error" for node in nodes_of(ends)):
        raise NotImplementedError("a torch.autograd.Function is marked as once_differentiable")
    slopes = [torch.ones_like(value) for value in ends]
    return torch.autograd.grad(ends, inputs, slopes, retain_graph=True, allow_unused=True)


def explained(engine: Engine, module: nn.Module, rows: Tensor, error: Exception) -> SecondOrderError:
    """The error that the backward pass of an inner loop ended with, in words."""
    findings = []
    # A module that cannot be copied, or not be called in float64 and on its own, has no places to be told.
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        findings = [f for f in _examine(engine, module, rows, {})[0] if f.kind == MISSING]
    if not findings:
        operator = _operator(error, set())
        findings = [Finding(MISSING, type(module).__name__, operator, _remedy(operator, error))]
    return SecondOrderError("; ".join(map(str, findings)))


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Unit(nn.Module):
    """A module whose first floating point input is scaled by a parameter, and whose outputs are one vector."""

    def __init__(self, module: nn.Module, call: _Call) -> None:
        super().__init__()
        self.module = module
        self._flat, self._shape = tree_flatten((call.args, call.kwargs))
        tensors = [k for k, value in enumerate(self._flat) if isinstance(value, Tensor) and value.dim() > 0]
        # Of integers too, which are not scaled.
        self._place = next((k for k in tensors if _floats(self._flat[k])), tensors[0] if tensors else None)
        device = None if self._place is None else self._flat[self._place].device
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64, device=device))

    @property
    def rows(self) -> Tensor | None:
        return None if self._place is None else self._flat[self._place]

    def forward(self, x: Tensor) -> Tensor:
        flat = list(self._flat)
        assert self._place is not None
        flat[self._place] = x * self.scale if _floats(x) else x
        args, kwargs = tree_unflatten(flat, self._shape)
        outputs = [
            value.reshape(-1) for value in tree_flatten(self.module(*args, **kwargs))[0] if _floats(value)
        ]
        return torch.cat(outputs) if outputs else 0 * self.scale.reshape(1)


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _examine(
    engine: Engine, model: nn.Module, rows: Tensor, options: dict[str, Any]
) -> tuple[list[Finding], str]:
    copy = deepcopy(model).double()
    x = rows.detach().double() if rows.is_floating_point() else rows.detach()
    calls = _calls(copy, x)
    names = {module: name for name, module in copy.named_modules()}
    whole = _check(engine, copy, calls.get(copy, _Call((x,), {})), options)

    def blame(module: nn.Module, found: _Checked, kind: str) -> list[Finding]:
        below = []
        for child in _called_below(module, calls):
            part = _check(engine, child, calls[child], options)
            if kind in part.looked_for:
                below += blame(child, part, kind)
        if below or kind not in found.kinds:
            return below
        name = names[module]
        where = f"{name} ({type(module).__name__})" if name else type(module).__name__
        error = found.kinds[kind]
        functions = _functions(module, calls[module]) if module in calls else set()
        if kind == SLOW:
            about, remedy = _slow(module, error)
            return [Finding(kind, where, " or ".join(sorted(functions)) or about, remedy)]
        if kind == UNKNOWN:
            return [Finding(kind, where, "outputs or gradients that are not finite", _FINITE)]
        operator = _operator(error, functions)
        return [Finding(kind, where, operator, _DETACHED if kind == WRONG else _remedy(operator, error))]

    findings = [finding for kind in whole.looked_for for finding in blame(copy, whole, kind)]
    return findings, _path(engine, copy, x, options)


def _path(engine: Engine, model: nn.Module, x: Tensor, options: dict[str, Any]) -> str:
    """How the engine adapts the model itself."""
    targets = torch.zeros(1, x.shape[0], dtype=torch.float64, device=x.device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        # Of a step with a loss by name, which the fused operators take, and of no step at all.
        fused: str = engine(model, x[None], targets, _RATE, 0, loss="mse", **options).path
        if fused == "fused":
            return fused
        adapted = engine(
            model, x[None], targets, _RATE, 1, loss=lambda out, _: out.square().mean(), **options
        )
        path: str = adapted.path
        return path


def _calls(model: nn.Module, x: Tensor) -> dict[nn.Module, _Call]:
    """The first call of each module in a call of the model."""
    found: dict[nn.Module, _Call] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in found:
            kept = tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, (args, kwargs))
            found[module] = _Call(*kept)

    handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in model.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            buffers = deepcopy(dict(model.named_buffers()))
            model(x)
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
    finally:
        for handle in handles:
            handle.remove()
    return found


def _called_below(module: nn.Module, calls: Mapping[nn.Module, _Call]) -> list[nn.Module]:
    """The nearest modules below that were called."""
    below = []
    for child in module.children():
        below += [child] if child in calls else _called_below(child, calls)
    return below


class _Checked(NamedTuple):
    #: For each kind of finding what was raised or warned of; nothing is where numbers disagree.
    kinds: dict[str, Exception]

    @property
    def looked_for(self) -> set[str]:
        """The kinds that may be in its submodules: what raises has not been compared with differences."""
        return {*self.kinds, WRONG} if MISSING in self.kinds else set(self.kinds)


def _check(engine: Engine, module: nn.Module, call: _Call, options: dict[str, Any]) -> _Checked:
    """Adapt the module by one step on two tasks, and compare the derivative of the outputs with differences."""
    unit = _Unit(module, call)
    # Rows that are not finite are another module's doing.
    if unit.rows is None or not bool(unit.rows.isfinite().all()):
        return _Checked({})
    known.add(unit)
    random = torch.Generator().manual_seed(0)
    x = torch.stack([unit.rows, unit.rows * 0.9 if _floats(unit.rows) else unit.rows])
    y = torch.zeros(x.shape[:2], dtype=torch.float64, device=x.device)
    start = {name: value.detach().clone().requires_grad_() for name, value in unit.named_parameters()}

    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        place = torch.arange(outputs.numel(), dtype=torch.float64, device=outputs.device)
        return (outputs * place.add(1).sin()).mean() + outputs.square().mean() / 2

    def value(parameters: dict[str, Tensor]) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            adapted = engine(
                unit, x, y, _RATE, 1, loss=loss, parameters=parameters, adapt=list(start), **options
            )
            out = adapted(x)
            return torch.stack([loss(each, y) for each in out]).sum()

    kinds: dict[str, Exception] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = value(start)
        try:
            found = go_backward([outcome], list(start.values()))
        except NotImplementedError as error:
            kinds[MISSING] = error
    slow = next((w.message for w in caught if w.category.__name__ == "BatchingWarning"), None)
    if isinstance(slow, Exception):
        kinds[SLOW] = slow
    if MISSING not in kinds:
        numbers = [outcome, *(g for g in found if g is not None)]
        if not all(bool(number.isfinite().all()) for number in numbers):
            kinds[UNKNOWN] = RuntimeError("")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if not _agrees(value, start, found, random):
                    kinds[WRONG] = RuntimeError("")
    return _Checked(kinds)


def _agrees(
    value: Callable[[dict[str, Tensor]], Tensor],
    start: dict[str, Tensor],
    found: tuple[Tensor | None, ...],
    random: torch.Generator,
) -> bool:
    """Whether the derivative along a direction is that of differences, for any of some directions and distances.

    One agreement is enough: a kink within the distance makes an honest derivative differ.
    """
    for step in _STEPS:
        drawn = (torch.randn(v.shape, generator=random, dtype=torch.float64) for v in start.values())
        way = [value.to(v.device) for value, v in zip(drawn, start.values(), strict=True)]
        slope = sum(float((g * w).sum()) for g, w in zip(found, way, strict=True) if g is not None)
        above, below = (
            {
                name: (v + away * w).detach().requires_grad_()
                for (name, v), w in zip(start.items(), way, strict=True)
            }
            for away in (step, -step)
        )
        difference = float((value(above) - value(below)).detach()) / (2 * step)
        if abs(difference - slope) <= _TOLERANCE * (abs(difference) + abs(slope)) + 1e-9:
            return True
    return False


def _functions(module: nn.Module, call: _Call) -> set[str]:
    """Names of the ``torch.autograd.Function`` subclasses that a call of the module goes through."""
    unit = _Unit(module, call)
    if unit.rows is None:
        return set()
    with torch.random.fork_rng(), torch.enable_grad():
        nodes = nodes_of([unit(unit.rows)])
    own = [node for node in nodes if isinstance(node, torch._C._FunctionBase)]
    return {type(node).__name__.removesuffix("Backward") for node in own}


def nodes_of(ends: Iterable[Tensor]) -> set[Any]:
    """Of the graph that leads to these tensors."""
    todo: list[Any] = [value.grad_fn for value in ends]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [above for above, _ in node.next_functions]
    return seen


def _slow(module: nn.Module, error: Exception) -> tuple[str, str]:
    """What vmap gave up at, by its own first words if need be, and the remedy."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "torch's recurrent kernel", "write the cell as linear layers and their activations"
    text = str(error).partition(", which is slow: ")[2].removeprefix("vmap: ")
    about, remedy = next(
        (found for part, found in _SLOW.items() if re.search(part, text)), (None, _SLOW_OTHERWISE)
    )
    if about is None:
        about = text if len(text) <= _LONGEST else f"{text[:_LONGEST].rpartition(' ')[0]} ..."
    return about, remedy


def _operator(error: Exception, functions: set[str]) -> str:
    named = re.search(r"derivative for '?(?:aten::)?(\w+)'? is not implemented", str(error))
    if named:
        return named[1]
    if functions:
        return " or ".join(sorted(functions))
    return (
        str(error).strip().partition("\n")[0]
        or "something that leaves the graph (detach(), item(), no_grad())"
    )


def _remedy(operator: str, error: Exception) -> str:
    if "once_differentiable" in str(error):
        return _ONCE
    return next((text for part, text in _REMEDIES.items() if re.search(part, operator.lower())), _OTHERWISE)


def _notes(model: nn.Module, options: Mapping[str, Any]) -> list[str]:
    layers = [type(layer) for layer in model.modules()]
    policy = options.get("batch_norm", "transductive")
    says = {
        "transductive": "the rows of each call, of each task; running statistics are neither read nor changed",
        "running": "the rows of each call in training, which running statistics follow, and by those in evaluation",
        "frozen": "running statistics, which stay as they are",
    }
    notes = []
    if any(issubclass(kind, _BatchNorm) for kind in layers):
        notes.append(f"BatchNorm is {policy}: it normalises by {says[policy]}")
    if any(issubclass(kind, nn.RNNBase) for kind in layers):
        notes.append("recurrent layers are computed without cuDNN, whose layers have no second derivative")
    if any(issubclass(kind, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) for kind in layers):
        notes.append(
            "attention is computed by products and a softmax: the fused forms have no second derivative"
        )
    if any(issubclass(kind, (nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)) for kind in layers):
        notes.append(
            "layer and instance norm are computed as group norm: torch has their derivative under vmap wrong"
        )
    if any(issubclass(kind, nn.modules.dropout._DropoutNd) for kind in layers):
        notes.append("dropout draws a mask for each task")
    return notes
