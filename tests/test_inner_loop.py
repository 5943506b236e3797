"""The engine against a loop over tasks in plain PyTorch: every kind of module, rate, optimiser and policy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from metafast import MLP, Conv4, inner_loop
from metafast._chain import layers_of
from metafast._stateless import first_layer
from metafast.inner_loop import BatchingWarning, OptimizerState
from tests.cases import assert_same

TASKS, SUPPORT, QUERY, WAYS = 3, 6, 5, 3
Named = dict[str, Tensor]


class Chain(nn.Module):
    """Layers one after the other, of which recurrent ones give their outputs; not a ``Sequential``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x[0] if isinstance(x, tuple) else x
        return x.flatten(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


class Branches(nn.Module):
    """Control flow that depends on the values, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.mean(1))
        return y if y.sum() > 0 else 2 * y


def block(inputs: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)
    )


def head(features: int) -> tuple[nn.Module, nn.Module]:
    return nn.Flatten(), nn.Linear(features, WAYS)


IMAGES, ROWS, VECTORS = (2, 8, 8), (5, 8), (8,)
#: What the module is made of: its constructor, the shape of a row, and how it is computed.
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: nn.Linear(8, WAYS), VECTORS, "fused"),
    "linear without bias": (lambda: nn.Linear(8, WAYS, bias=False), VECTORS, "fused"),
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, WAYS)), VECTORS, "fused"),
    "deep mlp": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, WAYS)
        ),
        ROWS,
        "fused",
    ),
    "mlp of two kinds": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, WAYS)),
        VECTORS,
        "batched",
    ),
    "mlp with batch norm": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, WAYS)),
        VECTORS,
        "batched",
    ),
    "chain": (
        lambda: nn.Sequential(
            nn.Flatten(),
            nn.Sequential(nn.Linear(128, 32), nn.BatchNorm1d(32, affine=False), nn.ReLU()),
            nn.Sequential(nn.Linear(32, 48, bias=False), nn.Tanh()),
            *(nn.Linear(48, 50), nn.BatchNorm1d(50, eps=1e-2), nn.Tanh()),
            *(nn.Linear(50, 6), nn.ReLU(), nn.Linear(6, WAYS)),
        ),
        IMAGES,
        "batched",
    ),
    "wide first layer": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(128, 32, bias=False), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, WAYS)
        ),
        IMAGES,
        "batched",
    ),
    "wide first layer inside": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(40, 80), nn.Sigmoid()), nn.Linear(80, WAYS), nn.Tanh()),
        (40,),
        "batched",
    ),
    "blocks": (lambda: nn.Sequential(block(2, 4), block(4, 3), *head(12)), IMAGES, "batched"),
    "Conv4": (lambda: nn.Sequential(Conv4(2, 4), nn.Linear(4, WAYS)), (2, 16, 16), "batched"),
    "Conv4 without parameters of BatchNorm": (
        lambda: Chain(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Tanh(), *head(144)),
        IMAGES,
        "batched",
    ),
    "strided": (
        lambda: Chain(nn.Conv2d(2, 4, 3, 2, (1, 0)), nn.ReLU(), nn.Conv2d(4, 5, 2, dilation=2), *head(10)),
        IMAGES,
        "batched",
    ),
    "same padding": (
        lambda: Chain(nn.Conv2d(2, 4, 3, padding="same", bias=False), nn.GELU(), *head(256)),
        IMAGES,
        "batched",
    ),
    "grouped": (lambda: Chain(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), *head(144)), IMAGES, "batched"),
    "reflected": (
        lambda: Chain(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), nn.Tanh(), *head(256)),
        IMAGES,
        "batched",
    ),
    "many planes": (
        lambda: Chain(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.AvgPool2d(2), *head(12)),
        IMAGES,
        "batched",
    ),
    "one dimension": (
        lambda: Chain(nn.Conv1d(5, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), *head(24)),
        ROWS,
        "batched",
    ),
    "three dimensions": (
        lambda: Chain(
            nn.Unflatten(1, (2, 1)), nn.Conv3d(2, 3, (1, 3, 3)), nn.BatchNorm3d(3), nn.ReLU(), *head(108)
        ),
        IMAGES,
        "batched",
    ),
    "layer norm": (
        lambda: Chain(nn.Conv2d(2, 4, 3), nn.LayerNorm([4, 6, 6]), nn.ReLU(), *head(144)),
        IMAGES,
        "batched",
    ),
    "layer norm without parameters": (
        lambda: Chain(nn.Linear(8, 8), nn.LayerNorm(8, elementwise_affine=False), *head(40)),
        ROWS,
        "batched",
    ),
    "group norm": (lambda: Chain(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), *head(144)), IMAGES, "batched"),
    "instance norm": (
        lambda: Chain(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh(), *head(144)),
        IMAGES,
        "batched",
    ),
    "transformer": (
        lambda: Chain(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), *head(40)),
        ROWS,
        "batched",
    ),
    "attention": (lambda: Chain(Attention(), *head(40)), ROWS, "batched"),
    "recurrent": (lambda: Chain(nn.LSTM(8, 4, batch_first=True), *head(20)), ROWS, "loop"),
    "branches": (Branches, ROWS, "loop"),
}
each_module = pytest.mark.parametrize("name", MODULES)


def make(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module in float64, and a batch of tasks."""
    build, shape, _ = MODULES[name]
    module = build().double()
    x = torch.rand(TASKS, SUPPORT + QUERY, *shape, dtype=torch.float64)
    y = torch.randint(0, WAYS, (TASKS, SUPPORT + QUERY))
    return module, (x[:, :SUPPORT], y[:, :SUPPORT], x[:, SUPPORT:], y[:, SUPPORT:])


def without_statistics(module: nn.Module) -> nn.Module:
    """A copy in torch's own layers whose BatchNorm knows the batch alone."""
    copy = deepcopy(module)
    for layer in list(copy.modules()):
        for name, child in list(layer.named_children()):
            if isinstance(child, Conv4):
                chain = nn.Sequential(*(nn.Sequential(*b) for b in child.encoder))
                plain = nn.Sequential(nn.Sequential(), nn.Flatten())
                plain.encoder = chain
                plain.forward = lambda x, chain=chain: chain(x).flatten(1)  # type: ignore[method-assign]
                setattr(layer, name, plain)
    for layer in copy.modules():
        if isinstance(layer, _BatchNorm):
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return copy


def rate_of(lr: Any, step: int, name: str) -> Any:
    if isinstance(lr, (list, tuple)) or (isinstance(lr, Tensor) and lr.dim()):
        lr = lr[step]
    return lr[name] if isinstance(lr, dict) else lr


def by_hand(
    module: nn.Module,
    tasks: tuple[Tensor, ...],
    lr: Any,
    steps: int,
    *,
    loss: Callable[..., Tensor] = cross_entropy,
    adapt: Callable[[str], bool] = lambda name: True,
    optimizer: str = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    first_order: bool = False,
    truncate: int | None = None,
    initial: Named | None = None,
) -> Tensor:
    """Query outputs ``[T, m, ...]``: each task on its own, each derivative by torch.autograd."""
    plain = without_statistics(module)
    outs = []
    for t in range(TASKS):
        support_x, support_y, query_x, _ = (value[t] for value in tasks)
        own: Named = dict(module.named_parameters())
        for name, value in (initial or {}).items():
            own[name] = value[t] if value.dim() > own[name].dim() else value
        moving = [name for name in own if adapt(name)]
        state: dict[str, Any] = {}
        for k in range(steps):
            # torch's fused attention has no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                value = loss(functional_call(plain, own, (support_x,)), support_y)
            grads = torch.autograd.grad(value, [own[name] for name in moving], create_graph=True)
            constant = first_order or (truncate is not None and k < steps - truncate)
            new = dict(own)
            for name, g in zip(moving, grads, strict=True):
                g = (g.detach() if constant else g) + weight_decay * own[name]
                if optimizer == "adam":
                    m, v = state.get(name, (0.0, 0.0))
                    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                    state[name] = (m, v)
                    g = (m / (1 - 0.9 ** (k + 1))) / ((v / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)
                elif momentum:
                    g = momentum * state[name] + g if name in state else g
                    state[name] = g
                new[name] = own[name] - rate_of(lr, k, name) * g
            own = new
        with sdpa_kernel(SDPBackend.MATH):
            outs.append(functional_call(plain, own, (query_x,)))
    return torch.stack(outs)


def outer(outputs: Tensor, tasks: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of a loss that all of them are in."""
    loss = cross_entropy(outputs.flatten(0, 1), tasks[3].flatten())
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return outputs, *found


def agree(name: str, lr: Any, steps: int, recompute: bool = False, **options: Any) -> None:
    module, tasks = make(name)
    rates = [lr] if isinstance(lr, Tensor) else []
    leaves = [*module.parameters(), *(r for r in rates if r.requires_grad)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchingWarning)
        adapted = inner_loop(module, *tasks[:2], lr, steps, recompute=recompute, **options)
        actual = outer(adapted(tasks[2]), tasks, leaves)
    assert adapted.path == MODULES[name][2]
    assert_same(actual, outer(by_hand(module, tasks, lr, steps, **options), tasks, leaves), 1e-12)


@each_module
@pytest.mark.parametrize("first_order", [False, True])
def test_every_module(name: str, first_order: bool) -> None:
    lr = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)
    agree(name, lr, 2, first_order=first_order)


@pytest.mark.parametrize("name", [name for name in MODULES if MODULES[name][2] != "fused"])
def test_recomputed_steps(name: str) -> None:
    lr = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)
    agree(name, lr, 2, recompute=True)


@pytest.mark.parametrize("name", ["linear", "mlp", "wide first layer inside", "grouped", "branches"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"optimizer": "adam"},
        {"optimizer": "adam", "weight_decay": 0.1},
    ],
    ids=lambda o: "-".join(map(str, o)),
)
def test_optimizers(name: str, options: dict[str, Any]) -> None:
    module, tasks = make(name)
    leaves = list(module.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchingWarning)
        outs = [
            inner_loop(module, *tasks[:2], 0.1, 3, recompute=recompute, **options)(tasks[2])
            for recompute in (False, True)
        ]
    expected = outer(by_hand(module, tasks, 0.1, 3, **options), tasks, leaves)
    # Adam divides small gradients by their size.
    tolerance = 1e-8 if "optimizer" in options else 1e-12
    for out in outs:
        assert_same(outer(out, tasks, leaves), expected, tolerance)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_values_are_those_of_torch_optim(optimizer: str) -> None:
    module, tasks = make("mlp with batch norm")
    options: dict[str, Any] = {"weight_decay": 0.05} | ({"momentum": 0.8} if optimizer == "sgd" else {})
    adapted = inner_loop(module, *tasks[:2], 0.05, 4, optimizer=optimizer, **options)
    for t in range(TASKS):
        copy = without_statistics(module)
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
        own = kind(copy.parameters(), lr=0.05, **options)
        for _ in range(4):
            own.zero_grad()
            cross_entropy(copy(tasks[0][t]), tasks[1][t]).backward()
            own.step()
        for key, value in copy.named_parameters():
            torch.testing.assert_close(adapted.parameters[key][t], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["linear", "mlp", "chain", "wide first layer", "blocks"])
@pytest.mark.parametrize("kind", ["number", "scalar", "tensors", "elements", "steps of tensors", "steps"])
def test_rates(name: str, kind: str) -> None:
    """Every form of the rate, with its gradient."""
    module, tasks = make(name)

    def leaf(*shape: int) -> Tensor:
        return (0.05 + 0.3 * torch.rand(shape, dtype=torch.float64)).requires_grad_()

    own = dict(module.named_parameters())
    lr: Any = {
        "number": lambda: 0.2,
        "scalar": leaf,
        "tensors": lambda: {key: leaf() for key in own},
        "elements": lambda: {key: leaf(*value.shape) for key, value in own.items()},
        "steps of tensors": lambda: [{key: leaf() for key in own}, 0.1, leaf()],
        "steps": lambda: leaf(3),
    }[kind]()
    parts = lr if isinstance(lr, list) else [lr]
    rates = [r for part in parts for r in (part.values() if isinstance(part, dict) else [part])]
    leaves = [*own.values(), *(r for r in rates if isinstance(r, Tensor))]
    adapted = inner_loop(module, *tasks[:2], lr, 3)
    fused = MODULES[name][2] == "fused" and not isinstance(lr, list)
    assert adapted.path == ("fused" if fused else "batched")
    expected = outer(by_hand(module, tasks, lr, 3), tasks, leaves)
    assert_same(outer(adapted(tasks[2]), tasks, leaves), expected, 1e-12)


@pytest.mark.parametrize("name", ["mlp", "chain", "wide first layer", "blocks", "branches"])
@pytest.mark.parametrize("truncate", [0, 1, 2, 5])
@pytest.mark.filterwarnings("ignore::metafast.inner_loop.BatchingWarning")
def test_truncated(name: str, truncate: int) -> None:
    module, tasks = make(name)
    leaves = list(module.parameters())
    actual = inner_loop(module, *tasks[:2], 0.2, 3, truncate=truncate)(tasks[2])
    expected = outer(by_hand(module, tasks, 0.2, 3, truncate=truncate), tasks, leaves)
    assert_same(outer(actual, tasks, leaves), expected, 1e-12)


@pytest.mark.parametrize("name", ["mlp", "chain", "wide first layer", "blocks"])
@pytest.mark.parametrize("constant", [{}, {"first_order": True}, {"truncate": 1}, {"truncate": 0}], ids=str)
def test_rows_that_require_gradients(name: str, constant: dict[str, Any]) -> None:
    """Such as features: they are a part of the gradients that the steps follow, where these are no constants."""
    module, tasks = make(name)
    leaves = [tasks[0].requires_grad_(), tasks[2].requires_grad_(), *module.parameters()]
    actual = inner_loop(module, *tasks[:2], 0.2, 2, **constant)(tasks[2])
    expected = by_hand(module, tasks, 0.2, 2, **constant)
    assert_same(outer(actual, tasks, leaves), outer(expected, tasks, leaves), 1e-12)


@pytest.mark.parametrize(
    ("name", "adapt", "chosen"),
    [
        ("blocks", ["3"], lambda name: name.startswith("3.")),
        ("blocks", "0", lambda name: name.startswith("0.")),
        ("blocks", ["0.0.weight", "3.bias"], lambda name: name in ("0.0.weight", "3.bias")),
        ("chain", ["8"], lambda name: name.startswith("8.")),
        ("chain", "1", lambda name: name.startswith("1.")),
        ("chain", ["3", "4.bias"], lambda name: name.startswith("3.") or name == "4.bias"),
    ],
    ids=["head", "body", "two", "head of a chain", "body of a chain", "middle of a chain"],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_some_parameters_adapt(name: str, adapt: Any, chosen: Callable[[str], bool], recompute: bool) -> None:
    """ANIL, BOIL: the others are shared by the tasks, and get gradients."""
    module, tasks = make(name)
    leaves = list(module.parameters())
    adapted = inner_loop(module, *tasks[:2], 0.2, 2, adapt=adapt, recompute=recompute)
    assert list(adapted.parameters) == [name for name, _ in module.named_parameters() if chosen(name)]
    expected = outer(by_hand(module, tasks, 0.2, 2, adapt=chosen), tasks, leaves)
    assert_same(outer(adapted(tasks[2]), tasks, leaves), expected, 1e-12)


def test_what_requires_no_gradient_does_not_adapt() -> None:
    module, tasks = make("mlp")
    first: Any = next(iter(module.children()))
    first.weight.requires_grad_(False)
    adapted = inner_loop(module, *tasks[:2], 0.2, 2)
    assert list(adapted.parameters) == ["0.bias", "2.weight", "2.bias"]
    actual = outer(adapted(tasks[2]), tasks, [first.bias])
    expected = by_hand(module, tasks, 0.2, 2, adapt=lambda name: name != "0.weight")
    assert_same(actual, outer(expected, tasks, [first.bias]), 1e-12)


@pytest.mark.parametrize("name", ["linear", "mlp", "chain", "wide first layer", "blocks", "branches"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.filterwarnings("ignore::metafast.inner_loop.BatchingWarning")
def test_initial_values_of_each_task(name: str, steps: int) -> None:
    """A generated head (ProtoMAML): given values in place of the module's, of each task or of all."""
    module, tasks = make(name)
    *_, (weight, own_weight), (bias, own_bias) = [
        *[("", torch.empty(0))],
        *list(module.named_parameters())[-2:],
    ]
    initial = {
        weight: torch.randn(TASKS, *own_weight.shape, dtype=torch.float64, requires_grad=True),
        bias: torch.randn(own_bias.shape, dtype=torch.float64, requires_grad=True),
    }
    leaves = [*initial.values(), *(v for k, v in module.named_parameters() if k not in initial)]
    actual = inner_loop(module, *tasks[:2], 0.2, steps, parameters=initial)(tasks[2])
    expected = by_hand(module, tasks, 0.2, steps, initial=initial)
    assert_same(outer(actual, tasks, leaves), outer(expected, tasks, leaves), 1e-12)


@pytest.mark.parametrize("name, weight", [("wide first layer", "1.weight"), ("chain", "1.0.weight")])
@pytest.mark.parametrize("of_each_task", [True, False])
def test_initial_values_of_a_wide_first_layer(name: str, weight: str, of_each_task: bool) -> None:
    module, tasks = make(name)
    own = dict(module.named_parameters())
    shape = own[weight].shape
    value = torch.randn((TASKS, *shape) if of_each_task else shape, dtype=torch.float64) / 10
    initial = {weight: value.requires_grad_()}
    leaves = [value, *(v for key, v in own.items() if key not in initial)]
    actual = inner_loop(module, *tasks[:2], 0.2, 2, parameters=initial)(tasks[2])
    expected = by_hand(module, tasks, 0.2, 2, initial=initial)
    assert_same(outer(actual, tasks, leaves), outer(expected, tasks, leaves), 1e-12)


@pytest.mark.parametrize("name", ["linear", "mlp", "chain", "wide first layer", "blocks"])
def test_after_each_step(name: str) -> None:
    """The loss of every step, as MAML++ weights them."""
    module, tasks = make(name)
    lr = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    adapted = inner_loop(module, *tasks[:2], lr, 3)
    for step in range(4):
        own = adapted.after(step)
        assert_same([own(tasks[2])], [by_hand(module, tasks, lr, step)], 1e-12)
        shapes = {key: (TASKS, *value.shape) for key, value in module.named_parameters()}
        assert {key: tuple(value.shape) for key, value in own.parameters.items()} == shapes
        plain = without_statistics(module)
        for t in range(TASKS):
            values = {key: value[t] for key, value in own.parameters.items()}
            assert_same([functional_call(plain, values, (tasks[2][t],))], [own(tasks[2])[t]], 1e-12)
    with pytest.raises(ValueError, match="step: expected at most 3, those that were taken, got 4"):
        adapted.after(4)


class SeesSizes(TorchDispatchMode):
    """The sizes of all that torch's operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.sizes.add(tuple(out.shape) if isinstance(out, Tensor) else ())
        return out


def test_a_first_layer_adapts_by_its_support_rows_alone() -> None:
    """Which modules begin with one, and that its weight of each task is made only where it is asked for."""

    def wide(*layers: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 32), *layers)

    def found(module: nn.Module, rows: int = 5, *shape: int) -> str | None:
        layer = first_layer(module, torch.empty(2, rows, *(shape or (64,))))
        return None if layer is None else layer.name

    assert found(wide(nn.GELU())) == "0.weight"
    assert found(nn.Sequential(wide(), nn.GELU())) == "0.0.weight"
    assert found(nn.Sequential(nn.Flatten(), wide()), 5, 1, 8, 8) == "1.0.weight"
    assert found(MLP((64, 32, 3), batch_norm=True)) == "1.weight"
    # 2 x 32 x 64 / 4 = 1,024 = 10.7 x (32 + 64)
    assert (found(wide(), 10), found(wide(), 11)) == ("0.weight", None)
    assert found(wide(), 5, 4, 64) is None, "more than one row of the layer for one of the module"
    assert found(wide(), 5, 63) is None, "rows that do not fit, which the layer's own error tells"
    assert found(wide().double()) is None
    assert found(nn.Linear(64, 32)) is None, "a layer alone is a fused operator"
    assert found(nn.Sequential(nn.ReLU(), nn.Linear(64, 32))) is None
    assert found(nn.Sequential(nn.Flatten(2), wide())) is None
    assert found(nn.Sequential()) is None
    assert found(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 32)))) is None
    tied = wide(nn.Linear(64, 32))
    tied[1].weight = tied[0].weight
    assert found(tied) is None
    for k in range(2):
        hooked = nn.Sequential(wide())
        list(hooked.modules())[k].register_forward_hook(lambda *_: None)
        assert found(hooked) is None
        own = nn.Sequential(wide())
        replaced = list(own.modules())[k]
        replaced.forward = replaced.forward  # type: ignore[method-assign]
        assert found(own) is None

    module, tasks = make("wide first layer")
    adapted = inner_loop(module, *tasks[:2], 0.1, 2)
    with SeesSizes() as seen:
        inner_loop(module, *tasks[:2], 0.1, 2)(tasks[2]).sum().backward()
    weights = (TASKS, 32, 128)
    assert weights not in seen.sizes and (TASKS, 128, 32) not in seen.sizes
    assert adapted.parameters["1.weight"].shape == weights


def test_a_chain_makes_no_wide_weight_of_a_task() -> None:
    """Which modules are chains, and that a wide weight of each task is made only where it is asked for."""

    def found(module: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> int:
        labels = torch.zeros(2, 5, dtype=torch.int64)
        layers = layers_of(module, torch.empty(2, 5, *shape, dtype=dtype), labels)
        return 0 if layers is None else len(layers[0])

    def chain(*layers: nn.Module) -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), *layers)

    assert found(MLP((64, 32, 16, 3), batch_norm=True), 1, 8, 8) == 3
    assert found(chain(nn.Tanh(), chain()), 8) == 2
    assert found(nn.Sequential(nn.Flatten(), chain()), 2, 4) == 1
    assert found(chain(), 2, 4) == 0 and found(chain(), 7) == 0, "rows that do not fit"
    assert found(chain().double(), 8) == 0 and found(chain().half(), 8, dtype=torch.float16) == 0
    assert found(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 6)), 8) == 0
    assert found(nn.Sequential(nn.ReLU(), nn.Linear(8, 6)), 8) == 0
    for other in (nn.GELU(), nn.Dropout(), nn.LayerNorm(6), nn.BatchNorm2d(6), nn.SyncBatchNorm(6)):
        assert found(chain(other), 8) == 0
    assert found(nn.Sequential(nn.Flatten(2), chain()), 2, 4) == 0
    assert found(nn.Sequential(), 8) == 0 and found(nn.Sequential(nn.Flatten()), 8) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert found(nn.Sequential(nn.Linear(8, 0)), 8) == 0
    x = torch.empty(2, 5, 8)
    for targets, fit in (
        (torch.empty(2, 5, 6), True),
        (torch.empty(2, 5), False),
        (torch.empty(2, 5, 6).double(), False),
        (torch.zeros(2, 5, dtype=torch.int32), False),
        (torch.zeros(2, 5, 6, dtype=torch.int64), False),
    ):
        assert (layers_of(chain(), x, targets) is not None) == fit
    activation = nn.ReLU()
    assert found(chain(activation, nn.Linear(6, 6), activation, nn.Linear(6, 3)), 8) == 3
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    assert found(tied, 8) == 0
    norm = nn.BatchNorm1d(8)
    assert found(nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm), 8) == 0
    for k in range(3):
        hooked = nn.Sequential(chain())
        list(hooked.modules())[k].register_forward_hook(lambda *_: None)
        assert found(hooked, 8) == 0
        own = nn.Sequential(chain())
        replaced = list(own.modules())[k]
        replaced.forward = replaced.forward  # type: ignore[method-assign]
        assert found(own, 8) == 0

    module, tasks = make("chain")
    with SeesSizes() as seen:
        adapted = inner_loop(module, *tasks[:2], 0.1, 2)
        adapted(tasks[2]).sum().backward()
    for wide in ((32, 128), (48, 32), (50, 48)):
        assert (TASKS, *wide) not in seen.sizes and (TASKS, *wide[::-1]) not in seen.sizes
    assert (TASKS, 6, 50) in seen.sizes, "more support rows, all steps together, than are worth it"
    with pytest.raises(ValueError, match=r"x: expected rows of 128 inputs, got \[2, 8, 7\]"):
        adapted(tasks[2][..., :7])


@pytest.mark.parametrize("number", [-1, WAYS])
def test_class_numbers_that_a_chain_does_not_have(number: int) -> None:
    module, tasks = make("chain")
    labels = tasks[1].clone()
    labels[1, 2] = number
    message = f"support_y: expected class numbers from 0 to {WAYS - 1}, got {number}"
    with pytest.raises(ValueError, match=message):
        inner_loop(module, tasks[0], labels, 0.2, 1)
    found = torch.func.vmap(lambda y: inner_loop(module, tasks[0], y, 0.2, 1)(tasks[2]))(labels[None])[0]
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all(), "where they cannot be read"


def test_a_bias_that_batch_norm_takes_away() -> None:
    """It changes nothing but the running mean, and still has a gradient: 0."""
    module, tasks = make("mlp with batch norm")
    first: Any = module[0]  # type: ignore[index]
    outputs = []
    for value in (0.0, 3.0):
        first.bias.data.fill_(value)
        adapted = inner_loop(module, *tasks[:2], 0.2, 2)
        outputs.append(adapted(tasks[2]))
        (gradient,) = torch.autograd.grad(outputs[-1].square().sum(), [first.bias])
        assert torch.equal(gradient, torch.zeros_like(first.bias))
        assert torch.equal(adapted.parameters["0.bias"], first.bias.expand(TASKS, -1))
    assert torch.equal(*outputs)


def test_a_loss_of_ones_own() -> None:
    module, tasks = make("blocks")
    leaves = list(module.parameters())

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, label_smoothing=0.2) + 0.01 * outputs.square().sum()

    actual = inner_loop(module, *tasks[:2], 0.2, 2, loss=loss)(tasks[2])
    expected = by_hand(module, tasks, 0.2, 2, loss=loss)
    assert_same(outer(actual, tasks, leaves), outer(expected, tasks, leaves), 1e-12)


@pytest.mark.parametrize("name", ["linear", "mlp", "mlp of two kinds", "chain"])
def test_regression(name: str) -> None:
    module, (support_x, _, query_x, labels) = make(name)
    targets = torch.randn(TASKS, SUPPORT, WAYS, dtype=torch.float64)
    tasks = support_x, targets, query_x, labels
    leaves = list(module.parameters())
    actual = inner_loop(module, *tasks[:2], 0.2, 2, loss="mse")(tasks[2])
    assert_same(
        outer(actual, tasks, leaves),
        outer(by_hand(module, tasks, 0.2, 2, loss=mse_loss), tasks, leaves),
        1e-12,
    )


@pytest.mark.parametrize("policy, training", [("frozen", True), ("frozen", False), ("running", False)])
@pytest.mark.parametrize("name", ["blocks", "chain"])
def test_normalised_by_running_statistics(name: str, policy: str, training: bool) -> None:
    """Those of the layers, which stay as they are."""
    module, tasks = make(name)
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 2)
    before = deepcopy(module.state_dict())
    module.train(training)
    actual = inner_loop(module, *tasks[:2], 0.2, 2, batch_norm=policy)(tasks[2])
    frozen = deepcopy(module).eval()
    outs = []
    for t in range(TASKS):
        own: Named = dict(module.named_parameters())
        for _ in range(2):
            loss = cross_entropy(functional_call(frozen, own, (tasks[0][t],)), tasks[1][t])
            grads = torch.autograd.grad(loss, list(own.values()), create_graph=True)
            own = {key: value - 0.2 * g for (key, value), g in zip(own.items(), grads, strict=True)}
        outs.append(functional_call(frozen, own, (tasks[2][t],)))
    leaves = list(module.parameters())
    assert_same(outer(actual, tasks, leaves), outer(torch.stack(outs), tasks, leaves), 1e-12)
    assert all(norm.training == training for norm in norms)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


class Normed(Branches):
    """As :class:`Branches`, with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x.mean(1))[:, None])


MODULES_WITH_RUNNING = {
    "mlp with batch norm": MODULES["mlp with batch norm"],
    "chain": MODULES["chain"],
    "blocks": MODULES["blocks"],
    "Conv4": MODULES["Conv4"],
    "loop": (Normed, ROWS, "loop"),
}


def statistics_of(
    module: nn.Module, parameters: list[Named], rows: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """By torch's own layers, of each BatchNorm layer the mean over the tasks of the rows' mean and variance."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    plain = without_statistics(module)
    for name, layer in plain.named_modules():
        if isinstance(layer, _BatchNorm):

            def see(_: Any, inputs: tuple[Tensor, ...], __: Any, name: str = name) -> None:
                x = inputs[0].detach().transpose(0, 1).flatten(1)
                found.setdefault(name, []).append((x.mean(1), x.var(1)))

            layer.register_forward_hook(see)
    for own, x in zip(parameters, rows, strict=True):
        functional_call(plain, own, (x,))
    return {
        name: (torch.stack([m for m, _ in each]).mean(0), torch.stack([v for _, v in each]).mean(0))
        for name, each in found.items()
    }


@pytest.mark.parametrize("name", MODULES_WITH_RUNNING)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.filterwarnings("ignore::metafast.inner_loop.BatchingWarning")
def test_running_statistics_follow(name: str, recompute: bool, tables: bool) -> None:
    """In training each call moves them towards its own, the mean over the tasks: the layer's, or those of its step."""
    MODULES["of this test"] = MODULES_WITH_RUNNING[name]
    module, tasks = make("of this test")
    steps, shown = 2, deepcopy(module)
    expected = inner_loop(module, *tasks[:2], 0.2, steps)
    buffers = {key: value for key, value in module.named_buffers() if value.dim()}
    table = {key: torch.stack([value] * (steps + 1)) for key, value in buffers.items()} if tables else None
    adapted = inner_loop(
        module, *tasks[:2], 0.2, steps, batch_norm="running", per_step=table, recompute=recompute
    )
    outputs = adapted(tasks[2])
    assert adapted.path == MODULES["of this test"][2]
    leaves = list(module.parameters())
    assert_same(outer(outputs, tasks, leaves), outer(expected(tasks[2]), tasks, leaves), 1e-12)
    layers = {key: layer for key, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    running = {
        key: (torch.zeros_like(layer.running_mean), torch.ones_like(layer.running_var))  # type: ignore[arg-type]
        for key, layer in layers.items()
    }
    for t in range(steps + 1):
        values = expected.after(t).parameters
        each = [{key: value[k] for key, value in values.items()} for k in range(TASKS)]
        for key, batch in statistics_of(shown, each, tasks[0] if t < steps else tasks[2]).items():
            share = layers[key].momentum or 1 / (t + 1)
            if table is None:
                running[key] = tuple(
                    (1 - share) * a + share * b for a, b in zip(running[key], batch, strict=True)
                )
            else:
                moved = (1 - share) * 0 + share * batch[0], (1 - share) * 1 + share * batch[1]
                got = [table[f"{key}.running_{kind}"][t] for kind in ("mean", "var")]
                assert_same(got, moved, 1e-12)
    for key, layer in layers.items():
        if table is None:
            assert_same([layer.running_mean, layer.running_var], running[key], 1e-12)
        else:
            assert torch.equal(layer.running_mean, torch.zeros_like(layer.running_mean))  # type: ignore[arg-type]
        assert int(layer.num_batches_tracked) == steps + 1  # type: ignore[arg-type]


@pytest.mark.parametrize("recompute", [False, True])
def test_values_for_each_step(recompute: bool) -> None:
    """Scale and shift of BatchNorm of each step, learnt and not adapted (MAML++)."""
    module, tasks = make("mlp with batch norm")
    names, steps = ("1.weight", "1.bias"), 2
    table = {name: torch.rand(steps + 1, 6, dtype=torch.float64).requires_grad_() for name in names}
    leaves = [*(v for n, v in module.named_parameters() if n not in names), *table.values()]
    adapt = ["0", "3"]
    adapted = inner_loop(module, *tasks[:2], 0.2, steps, adapt=adapt, per_step=table, recompute=recompute)
    plain, outs, early = without_statistics(module), [], []
    for k in range(TASKS):
        own: Named = {n: v for n, v in module.named_parameters() if n not in names}
        for t in range(steps):
            row = {name: value[t] for name, value in table.items()}
            if t == 1:
                early.append(functional_call(plain, {**own, **row}, (tasks[2][k],)))
            loss = cross_entropy(functional_call(plain, {**own, **row}, (tasks[0][k],)), tasks[1][k])
            grads = torch.autograd.grad(loss, list(own.values()), create_graph=True)
            own = {key: value - 0.2 * g for (key, value), g in zip(own.items(), grads, strict=True)}
        row = {name: value[steps] for name, value in table.items()}
        outs.append(functional_call(plain, {**own, **row}, (tasks[2][k],)))
    assert_same(outer(adapted(tasks[2]), tasks, leaves), outer(torch.stack(outs), tasks, leaves), 1e-12)
    assert_same([adapted.after(1)(tasks[2])], [torch.stack(early)], 1e-12)


@pytest.mark.parametrize("name", ["linear", "blocks", "branches"])
@pytest.mark.filterwarnings("ignore::metafast.inner_loop.BatchingWarning")
def test_batches_of_the_support_rows(name: str) -> None:
    """Each step sees its own rows: as many loops of one step, each from where the one before ended."""
    module, tasks = make(name)
    batches = torch.tensor([[0, 3, 5], [1, 1, 2]])
    leaves = list(module.parameters())
    adapted = inner_loop(module, *tasks[:2], 0.2, 2, batches=batches)
    values: Any = None
    for rows in batches:
        values = inner_loop(
            module, tasks[0][:, rows], tasks[1][:, rows], 0.2, 1, parameters=values
        ).parameters
    expected = inner_loop(module, *tasks[:2], 0.2, 0, parameters=values)
    assert_same(outer(adapted(tasks[2]), tasks, leaves), outer(expected(tasks[2]), tasks, leaves), 1e-12)


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"optimizer": "adam"}, {"optimizer": "adam", "betas": (0.0, 0.99)}]
)
def test_the_optimizers_state_goes_on(options: dict[str, Any]) -> None:
    """Two loops, the second with the first one's state, are one of as many steps."""
    module, tasks = make("blocks")
    leaves = list(module.parameters())
    whole = inner_loop(module, *tasks[:2], 0.05, 4, **options)
    first = inner_loop(module, *tasks[:2], 0.05, 1, **options)
    second = inner_loop(
        module, *tasks[:2], 0.05, 3, parameters=first.parameters, state=first.state, **options
    )
    assert second.state is not None and second.state.steps == 4
    assert_same(outer(second(tasks[2]), tasks, leaves), outer(whole(tasks[2]), tasks, leaves), 1e-12)


@each_module
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore::metafast.inner_loop.BatchingWarning")
def test_the_module_stays_as_it_is(name: str, training: bool) -> None:
    """Buffers, modes, methods and gradients, also where a step fails half way."""
    module, tasks = make(name)
    module.train(training)
    state = deepcopy(module.state_dict())
    attributes = [dict(vars(layer)) for layer in module.modules()]
    inner_loop(module, *tasks[:2], 0.2, 2)(tasks[2])

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        inner_loop(module, *tasks[:2], 0.2, 2, loss=fails)
    assert [dict(vars(layer)) for layer in module.modules()] == attributes
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key])
    assert all(value.grad is None for value in module.parameters())


@pytest.mark.parametrize("name", ["blocks", "chain"])
def test_tasks_do_not_meet(name: str) -> None:
    """A task's outputs do not depend on the other tasks, though these are NaN."""
    module, tasks = make(name)
    whole = inner_loop(module, *tasks[:2], 0.2, 2)(tasks[2])
    tasks[0][0], tasks[0][2] = math.nan, math.nan
    alone = inner_loop(module, *tasks[:2], 0.2, 2)(tasks[2])
    torch.testing.assert_close(alone[1], whole[1], rtol=1e-12, atol=1e-12)
    assert alone[0].isnan().all() and alone[2].isnan().all()


def test_dropout_is_of_each_task_and_the_same_when_recomputed() -> None:
    module = nn.Sequential(nn.Linear(8, 200), nn.Dropout(0.5), nn.ReLU(), nn.Linear(200, WAYS)).double()
    x = torch.rand(1, SUPPORT, 8, dtype=torch.float64).expand(TASKS, -1, -1)
    y = torch.randint(0, WAYS, (1, SUPPORT)).expand(TASKS, -1)
    found = []
    for recompute in (False, True):
        torch.manual_seed(5)
        adapted = inner_loop(module, x, y, 0.5, 2, recompute=recompute)
        assert adapted.path == "batched"
        values = adapted.parameters["3.weight"]
        assert not torch.allclose(values[0], values[1])
        found.append(torch.autograd.grad(values.square().sum(), list(module.parameters())))
    assert_same(*found, 1e-12)


@pytest.mark.filterwarnings("ignore::metafast.inner_loop.BatchingWarning")
@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_in_a_loop_over_tasks_is_the_same_in_the_backward_pass(recompute: bool) -> None:
    """What vmap drew before it gave up is drawn again, in every loop of a module, and trials draw nothing."""

    class Last(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1 + 0 * float(x.detach().sum()))

    module = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Linear(8, 8), nn.Dropout(0.5), Last()).double()
    x, y = torch.rand(2, 4, 8, dtype=torch.float64), torch.randint(0, WAYS, (2, 4))
    names = [name for name, _ in module.named_parameters()]

    def function(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        own = dict(zip(names, values, strict=True))
        adapted = inner_loop(module, x, y, 0.5, 2, parameters=own, recompute=recompute)
        return torch.cat([value.flatten(1) for value in adapted.parameters.values()], 1)

    inputs = [value.detach().clone().requires_grad_() for value in module.parameters()]
    for _ in range(2):
        assert gradcheck(function, inputs, fast_mode=True)
    function(*inputs)
    drawn = torch.rand(())
    with torch.no_grad():
        function(*inputs)
    assert torch.equal(torch.rand(()), drawn)


def test_outputs_of_several_tensors() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y, 2 * y

    module = Two(8, WAYS).double()
    tasks = make("linear")[1]

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return cross_entropy(outputs[0] + outputs[1], targets)

    outputs: Any = inner_loop(module, *tasks[:2], 0.2, 2, loss=loss)(tasks[2])
    assert [value.shape for value in outputs] == [(TASKS, QUERY, WAYS)] * 2
    assert torch.equal(outputs[1], 2 * outputs[0])


@pytest.mark.parametrize("name", ["chain", "wide first layer"])
def test_parameters_are_recorded_as_the_steps_were(name: str) -> None:
    """Also where they are made, and seen first without gradients."""
    module, tasks = make(name)
    adapted = inner_loop(module, *tasks[:2], 0.2, 2)
    with torch.no_grad():
        assert all(value.requires_grad for value in adapted.parameters.values())
    assert all(value.requires_grad for value in adapted.after(1).parameters.values())


@pytest.mark.parametrize(
    "name, bias", [("blocks", "3.bias"), ("chain", "8.bias"), ("wide first layer", "4.bias")]
)
def test_without_gradients_nothing_is_recorded(name: str, bias: str) -> None:
    module, tasks = make(name)
    expected = inner_loop(module, *tasks[:2], 0.2, 2)(tasks[2])
    for recompute in (False, True):
        with torch.no_grad():
            adapted = inner_loop(module, *tasks[:2], 0.2, 2, recompute=recompute)
            out = adapted(tasks[2])
        assert not out.requires_grad
        assert torch.equal(adapted.after(2).parameters[bias], adapted.parameters[bias])
        with pytest.raises(ValueError, match="without gradients the parameters of step 2 alone are kept"):
            adapted.after(1)
        assert all(not value.requires_grad for value in adapted.parameters.values())
        assert_same([out], [expected], 1e-12)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["blocks", "wide", "chain"])
def test_finite_differences(recompute: bool, kind: str) -> None:
    """First and second derivatives of the whole, third ones of the support loss."""
    if kind == "wide":
        module = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, WAYS)
        )
        assert first_layer(module, torch.empty(2, 4, 1, 4, 4)) is not None
    elif kind == "chain":
        module = MLP((16, 24, 20, WAYS), "tanh", batch_norm=True)
        rows, labels = torch.empty(2, 4, 1, 4, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.int64)
        assert layers_of(module.double(), rows, labels) is not None
    else:
        module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), *head(32))
    module = module.double()
    x, y = torch.rand(2, 4, 1, 4, 4, dtype=torch.float64), torch.randint(0, WAYS, (2, 4))
    names = [name for name, _ in module.named_parameters()]

    def function(rows: Tensor, lr: Tensor, *values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        adapted = inner_loop(module, rows, y, lr, 2, parameters=parameters, recompute=recompute)
        return adapted(x.flip(1))

    leaves = [x.clone(), torch.tensor([0.3, 0.2], dtype=torch.float64), *module.parameters()]
    inputs = [value.detach().clone().requires_grad_() for value in leaves]
    assert gradcheck(function, inputs, fast_mode=kind != "blocks" or recompute)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["blocks", "mlp with batch norm", "branches", "mlp"])
@pytest.mark.filterwarnings("ignore::metafast.inner_loop.BatchingWarning")
def test_under_autocast(name: str, dtype: torch.dtype) -> None:
    """Layers compute in its dtype, and again so in a backward pass outside; parameters, steps and losses do not."""
    torch.manual_seed(0)
    module, tasks = make(name)
    exact = outer(inner_loop(module, *tasks[:2], 0.2, 2)(tasks[2]), tasks, list(module.parameters()))
    module, leaves = module.float(), list(module.float().parameters())
    tasks = tuple(value.float() if value.is_floating_point() else value for value in tasks)
    seen: list[torch.dtype] = []
    last = list(module.modules())[-1]

    def see(_: nn.Module, __: Any, out: Tensor) -> None:
        seen.append(out.dtype)

    last.register_forward_hook(see)
    found = []
    for recompute in (False, True):
        with torch.autocast("cpu", dtype):
            adapted = inner_loop(module, *tasks[:2], 0.2, 2, recompute=recompute)
            outputs = adapted(tasks[2])
            assert torch.is_autocast_enabled("cpu")
        assert outputs.dtype == torch.float32
        assert all(value.dtype == torch.float32 for value in adapted.parameters.values())
        found.append(outer(outputs, tasks, leaves))
    assert_same(found[1], found[0], 1e-5)
    assert set(seen) == {dtype}
    for got, want in zip(found[0], exact, strict=True):
        away, length = (got.double() - want).detach().norm(), want.detach().norm()
        assert away < 0.15 * length + 0.02


def test_small_gradients_survive_float16() -> None:
    """A mean over many rows has gradients that float16 alone would round to 0."""
    module = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 1))
    x, y = 1e-3 * torch.rand(2, 2000, 4), torch.zeros(2, 2000, 1)
    with torch.no_grad():
        module[2].weight.mul_(1e-3)
        module[2].bias.fill_(1.0)
        module[0].bias.zero_()
    for exact in (True, False):
        with torch.autocast("cpu", torch.float16, enabled=not exact):
            adapted = inner_loop(module, x, y, 1.0, 1, loss="mse")
        assert adapted.path == "batched"
        moved = adapted.parameters["0.bias"] - module[0].bias
        if exact:
            expected = moved.detach()
    # Without the scale most of what goes back is near its smallest number, 6e-8.
    torch.testing.assert_close(moved, expected, rtol=0.02, atol=1e-10)


def test_recomputation_keeps_less() -> None:
    """What the graph saves beside parameters no longer grows with the activations."""
    module = nn.Sequential(block(1, 8), block(8, 8), *head(128))
    x, y = torch.rand(4, 10, 1, 16, 16), torch.randint(0, WAYS, (4, 10))

    def saved(recompute: bool, steps: int) -> int:
        seen: dict[int, int] = {}

        own = inner_loop(module, x, y, 0.1, steps, recompute=recompute).parameters
        todo, done = [value.grad_fn for value in own.values()], set()
        while todo:
            node = todo.pop()
            if node is None or node in done:
                continue
            done.add(node)
            for name in dir(node):
                if name.startswith("_saved_") or name == "saved_tensors":
                    value = getattr(node, name)
                    for kept in value if isinstance(value, (tuple, list)) else [value]:
                        if isinstance(kept, Tensor):
                            storage = kept.untyped_storage()
                            seen[storage.data_ptr()] = storage.nbytes()
            todo += [above for above, _ in node.next_functions]
        return sum(seen.values())

    plain, again = ([saved(recompute, steps) for steps in (1, 4)] for recompute in (False, True))
    assert again[1] - again[0] < 0.2 * (plain[1] - plain[0])


@pytest.mark.parametrize("name", ["mlp", "chain", "wide first layer", "blocks"])
def test_compiles_whole(name: str) -> None:
    """A meta-step as one graph, with the gradients of the eager one."""
    module, tasks = make(name)
    leaves = list(module.parameters())

    def step(*tasks: Tensor) -> Tensor:
        outputs = inner_loop(module, *tasks[:2], 0.2, 2)(tasks[2])
        return cross_entropy(outputs.flatten(0, 1), tasks[3].flatten())

    expected = torch.autograd.grad(step(*tasks), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(torch.autograd.grad(compiled(*tasks), leaves), expected, 1e-12)


def test_a_module_that_cannot_be_batched_is_named_once() -> None:
    module, tasks = make("branches")
    with pytest.warns(
        BatchingWarning, match="Branches cannot be called with the weights of all tasks"
    ) as caught:
        inner_loop(module, *tasks[:2], 0.2, 3)(tasks[2])
    assert len([w for w in caught if w.category is BatchingWarning]) == 1


def test_the_modules_own_error_is_raised() -> None:
    module = nn.Sequential(block(2, 4), *head(7)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error", BatchingWarning)
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            inner_loop(module, torch.rand(2, 3, 2, 8, 8).double(), torch.zeros(2, 3).long(), 0.1, 1)


X, Y = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
LINE = nn.Linear(4, 2)
NORMED = nn.Sequential(LINE, nn.BatchNorm1d(2))
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "module": (
        lambda: inner_loop(torch.relu, X, Y, 0.1, 1),  # type: ignore[arg-type]
        TypeError,
        "module: expected a torch.nn.Module, got builtin_function_or_method",
    ),
    "support_x": (lambda: inner_loop(LINE, 1, Y, 0.1, 1), TypeError, "support_x: expected a tensor, got int"),  # type: ignore[arg-type]
    "rows": (
        lambda: inner_loop(LINE, X[0, 0], Y, 0.1, 1),
        ValueError,
        "support_x: expected [T, n, ...], got [4]",
    ),
    "no task": (
        lambda: inner_loop(LINE, X[:0], Y[:0], 0.1, 1),
        ValueError,
        "support_x: expected at least one task, got shape [0, 3, 4]",
    ),
    "steps": (lambda: inner_loop(LINE, X, Y, 0.1, -1), ValueError, "steps: expected 0 or more, got -1"),
    "loss": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, loss="hinge"),
        ValueError,
        "loss: expected cross_entropy or mse, got 'hinge'",
    ),
    "loss type": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, loss=None),  # type: ignore[arg-type]
        TypeError,
        "loss: expected a name or a function, got NoneType",
    ),
    "optimizer": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, optimizer="lbfgs"),
        ValueError,
        "optimizer: expected sgd or adam, got 'lbfgs'",
    ),
    "momentum": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, momentum=-0.9),
        ValueError,
        "momentum: expected a finite number that is not negative, got -0.9",
    ),
    "momentum of Adam": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, optimizer="adam", momentum=0.9),
        ValueError,
        "momentum: expected 0 with optimizer 'adam', got 0.9",
    ),
    "betas": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, optimizer="adam", betas=(0.9, 1.0)),
        ValueError,
        "betas: expected numbers from 0 to below 1, got (0.9, 1.0)",
    ),
    "query tasks": (
        lambda: inner_loop(nn.Sequential(LINE, nn.Sigmoid()), X, Y, 0.1, 1)(X[:1]),
        ValueError,
        "x: expected rows [2, m, ...], got [1, 3, 4]",
    ),
    "policy": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, batch_norm="none"),
        ValueError,
        "batch_norm: expected transductive or running or frozen, got 'none'",
    ),
    "adapt": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, adapt=["head"]),
        ValueError,
        "adapt: expected names of parameters or submodules, got 'head'",
    ),
    "nothing adapts": (
        lambda: inner_loop(nn.Flatten(), X, Y, 0.1, 1),
        ValueError,
        "adapt: Flatten has no parameters that adapt",
    ),
    "parameters": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, parameters={"w": X}),
        ValueError,
        "parameters: expected names of the module's parameters, got 'w'",
    ),
    "parameters shape": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, parameters={"weight": X}),
        ValueError,
        "parameters['weight']: expected [2, 4] or [2, 2, 4], got [2, 3, 4]",
    ),
    "rates": (
        lambda: inner_loop(LINE, X, Y, torch.ones(3), 2),
        ValueError,
        "lr: expected a rate for each of 2 steps, got 3",
    ),
    "rate shape": (
        lambda: inner_loop(LINE, X, Y, torch.ones(3, 2), 2),
        ValueError,
        "lr: expected a number, a tensor [] or [K], or a dict, got [3, 2]",
    ),
    "rate names": (
        lambda: inner_loop(LINE, X, Y, {"weight": 0.1}, 1),
        ValueError,
        "lr: expected the names of the parameters that adapt, ['weight', 'bias'], got ['weight']",
    ),
    "rate of a parameter": (
        lambda: inner_loop(LINE, X, Y, [{"weight": torch.ones(3), "bias": 0.1}], 1),
        ValueError,
        "lr[0]['weight']: expected a tensor [] or [2, 4], got [3]",
    ),
    "per step": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, per_step={"bias": torch.ones(2, 2)}),
        ValueError,
        "per_step: expected names of parameters that do not adapt, or of buffers, got 'bias'",
    ),
    "per step shape": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, adapt=["weight"], per_step={"bias": torch.ones(3, 2)}),
        ValueError,
        "per_step['bias']: expected [2, 2], got [3, 2]",
    ),
    "batches": (
        lambda: inner_loop(LINE, X, Y, 0.1, 2, batches=torch.zeros(3, 1).long()),
        ValueError,
        "batches: expected [2, b], got [3, 1]",
    ),
    "batches dtype": (
        lambda: inner_loop(LINE, X, Y, 0.1, 2, batches=torch.zeros(2, 1)),
        TypeError,
        "batches: expected int64, got torch.float32",
    ),
    "batches rows": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, batches=torch.tensor([[0, 3]])),
        ValueError,
        "batches: expected rows from 0 to 2, got 3",
    ),
    "state": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, state={}),  # type: ignore[arg-type]
        TypeError,
        "state: expected an Adapted.state, got dict",
    ),
    "state names": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, state=OptimizerState("sgd", 1, {"weight": X})),
        ValueError,
        "state: expected the names of the parameters that adapt, ['weight', 'bias'], got ['weight']",
    ),
    "state of another": (
        lambda: inner_loop(LINE, X, Y, 0.1, 1, optimizer="adam", state=OptimizerState("sgd", 1, {})),
        ValueError,
        "state: expected that of optimizer 'adam', got that of 'sgd'",
    ),
    "state shape": (
        lambda: inner_loop(
            LINE, X, Y, 0.1, 1, state=OptimizerState("sgd", 1, {"weight": torch.ones(3, 2, 4), "bias": X})
        ),
        ValueError,
        "state: expected [2, 4] or [2, 2, 4] for 'weight', got [3, 2, 4]",
    ),
    "statistics of steps": (
        lambda: inner_loop(NORMED, X, Y, 0.1, 1, per_step={"1.running_mean": torch.zeros(2, 2)}),
        ValueError,
        "per_step: running statistics have no part in batch_norm 'transductive'",
    ),
    "rate kind": (lambda: inner_loop(LINE, X, Y, "0.1", 1), TypeError, "lr: expected a number, got str"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, kind, text = WRONG[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text
