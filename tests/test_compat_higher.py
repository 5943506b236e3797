"""The drop-in for higher against the original, torch.optim, closed formulas and differences."""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import mse_loss
from torch.nn.utils import parametrizations

from metafast import compat
from metafast.compat import higher
from metafast.compat.__main__ import main
from metafast.compat.higher import patch
from metafast.data import SinusoidSampler, omniglot
from tests.cases import assert_same
from tests.pages import page

original: Any
try:
    with warnings.catch_warnings():
        # It compares with `is` where it means ==.
        warnings.simplefilter("ignore", SyntaxWarning)
        import higher as original
except ImportError:
    original = None
needs_original = pytest.mark.skipif(original is None, reason="needs higher==0.2.1, see the extra dev")

SCRIPTS = Path(__file__).parent / "scripts"
DATA = (
    Path(os.environ.get("METAFAST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")) / "omniglot"
)
Make = Callable[[Any], torch.optim.Optimizer]
optim = torch.optim

#: Of optimisers that the original has too.
SHARED: dict[str, Make] = {
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD, momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.05),
    "SGD, Nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.05),
    "Adam, AMSGrad": lambda p: optim.Adam(p, lr=0.05, betas=(0.3, 0.5), amsgrad=True),
    "Adadelta": lambda p: optim.Adadelta(p, lr=1.0, eps=0.01, weight_decay=0.05),
    "Adagrad": lambda p: optim.Adagrad(
        p, lr=0.1, lr_decay=0.1, weight_decay=0.05, initial_accumulator_value=0.1
    ),
    "Adamax": lambda p: optim.Adamax(p, lr=0.05, betas=(0.8, 0.7), weight_decay=0.05),
    "ASGD": lambda p: optim.ASGD(p, lr=0.1, lambd=0.05, alpha=0.6, t0=1, weight_decay=0.05),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.02, alpha=0.8, eps=0.01, weight_decay=0.05),
    "RMSprop, centred": lambda p: optim.RMSprop(p, lr=0.02, eps=0.01, centered=True, momentum=0.9),
    "Rprop": lambda p: optim.Rprop(p, lr=0.02),
}
#: Of those that it rejects, and of options that it passes over.
OURS: dict[str, Make] = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
    "AdamW, AMSGrad": lambda p: optim.AdamW(p, lr=0.05, betas=(0.3, 0.5), amsgrad=True),
    "Adam, decoupled": lambda p: optim.Adam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    # The rectification begins with the fourth step.
    "RAdam": lambda p: optim.RAdam(p, lr=0.05, betas=(0.8, 0.9), weight_decay=0.05),
    "RAdam, decoupled": lambda p: optim.RAdam(
        p, lr=0.05, betas=(0.8, 0.95), weight_decay=0.1, decoupled_weight_decay=True
    ),
    "NAdam": lambda p: optim.NAdam(p, lr=0.05, betas=(0.8, 0.95), momentum_decay=0.1, weight_decay=0.05),
    "NAdam, decoupled": lambda p: optim.NAdam(p, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.3, weight_decay=0.05),
    "Adafactor, first rate": lambda p: optim.Adafactor(p, lr=2.0, d=1.5, eps=(1e-4, 0.5)),
    "SGD, maximised": lambda p: optim.SGD(p, lr=0.01, momentum=0.9, maximize=True),
    "RMSprop, maximised": lambda p: optim.RMSprop(p, lr=0.01, maximize=True),
}
ALL = SHARED | OURS


@pytest.fixture
def double() -> Iterator[None]:
    """torch.optim counts in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def rows() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4), torch.randn(5, 2)


def stepped(opt: torch.optim.Optimizer, net: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        mse_loss(net(x), y).backward()
        opt.step()


def values(tensors: Any) -> list[Tensor]:
    return [t.detach().double() for t in tensors]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e, tolerance)


# Optimisers.


def unrolled(library: Any, net: nn.Module, opt: Any, track: bool, **options: Any) -> list[Tensor]:
    """Adapted parameters, and gradients of the model's own and of trainable rates."""
    x, y = torch.arange(20.0).sin().view(5, 4), torch.arange(10.0).cos().view(5, 2)
    rates = [torch.tensor(0.7 * group["lr"], requires_grad=True) for group in opt.param_groups]
    with library.innerloop_ctx(
        net, opt, copy_initial_weights=False, override={"lr": rates}, track_higher_grads=track, **options
    ) as (fmodel, diffopt):
        for _ in range(4):
            diffopt.step(mse_loss(fmodel(x), y))
        loss = mse_loss(fmodel(x), y)
        found = values([*fmodel.parameters(), loss])
        if not track:
            return found
        # The original takes the derivative of ASGD's rate for that of a part of its formula.
        leaves = [*net.parameters(), *([] if isinstance(opt, optim.ASGD) else rates)]
        return found + values(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


@needs_original
@pytest.mark.filterwarnings("ignore:Differentiable (RMSprop|Rprop)|Converting a tensor:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("before", [0, 3], ids=["new", "stepped"])
@pytest.mark.parametrize("name", SHARED)
def test_optimiser_has_the_numbers_of_the_original(name: str, before: int, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        net = network()
        halves = [{"params": net[0].parameters()}, {"params": net[2].parameters()}]
        opt = SHARED[name](halves)
        stepped(opt, net, *rows(), before)
        for track in (True, False):
            ours, theirs = (unrolled(library, net, opt, track) for library in (higher, original))
            assert_close(ours, theirs, 1e-12 if dtype is torch.float64 else 4e-6)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("before", [0, 2], ids=["new", "stepped"])
@pytest.mark.parametrize("name", ALL)
def test_optimiser_has_the_numbers_of_torch(double: None, name: str, before: int) -> None:
    net, (x, y) = network(), rows()
    opt = ALL[name](net.parameters())
    if name.startswith("Adam, AMS") or name == "Adam":
        # Here the original, and so ours, has the epsilon in another place.
        opt.param_groups[0]["eps"] = 0.0
    stepped(opt, net, x, y, before)
    with higher.innerloop_ctx(net, opt) as (fmodel, diffopt):
        for _ in range(5):
            diffopt.step(mse_loss(fmodel(x), y))
    stepped(opt, net, x, y, 5)
    assert_close(values(fmodel.parameters()), values(net.parameters()), 1e-12)
    # What they remember bears the same names, for code that takes it from one to the other.
    for k, p in enumerate(net.parameters()):
        for key, value in opt.state[p].items():
            if value is not None:
                ours = torch.as_tensor(diffopt.state[0][k][key]).detach().double()
                assert_same(ours, value.double(), 1e-12)


@pytest.mark.parametrize("name", ALL)
def test_derivatives_of_optimiser_are_those_of_differences(double: None, name: str) -> None:
    """By the initial parameters and by every number among the hyperparameters, first and second."""
    net = nn.Linear(2, 2, bias=False) if "Adafactor" in name else nn.Linear(2, 1)
    opt = ALL[name](net.parameters())
    x, y = torch.randn(3, 2), torch.randn(3, net.out_features)
    trainable = higher.optim.get_trainable_opt_params(opt)
    if "Rprop" not in name:
        # Inside of these bounds they change nothing.
        trainable.pop("step_sizes", None)
    names = [key for key in trainable if key not in ("momentum", "t0")]
    leaves = higher.utils.flatten([trainable[key] for key in names])
    counts = [len(higher.utils.flatten(trainable[key])) for key in names]

    def loss(*inputs: Tensor) -> Tensor:
        rest = iter(inputs[len(list(net.parameters())) :])
        override = {}
        for key, count in zip(names, counts, strict=True):
            drawn = [next(rest) for _ in range(count)]
            override[key] = [drawn[0] if count == 1 else tuple(drawn)]
        fmodel = higher.monkeypatch(net)
        fmodel.update_params(inputs[: len(list(net.parameters()))])
        diffopt = higher.optim.get_diff_optim(opt, net.parameters(), fmodel, override=override)
        for _ in range(5):
            diffopt.step(mse_loss(fmodel(x), y).exp())
        return mse_loss(fmodel(x), y)

    start = [p.detach().clone().requires_grad_() for p in net.parameters()]
    inputs = [*start, *(leaf.detach().clone().requires_grad_() for leaf in leaves)]
    assert gradcheck(loss, inputs, atol=1e-7, rtol=1e-5)
    assert gradgradcheck(loss, inputs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["Adam", "Adagrad", "RMSprop", "RMSprop, centred", "AdamW", "RAdam", "NAdam"]
)
def test_a_gradient_of_zero_spoils_no_derivative(double: None, name: str) -> None:
    """The root of a mean of squares has an infinite derivative at 0."""
    net = nn.Linear(2, 1, bias=False)
    opt = ALL[name](net.parameters())
    for group in opt.param_groups:
        group["weight_decay"] = 0.0
    opt.state.clear()
    if name == "Adagrad":
        opt = optim.Adagrad(net.parameters(), lr=0.1)
    scale = torch.ones((), requires_grad=True)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(scale * fmodel(torch.tensor([[1.0, 0.0]])).square().sum())
        grads = torch.autograd.grad(fmodel(torch.ones(1, 2)).sum(), [net.weight, scale])
    assert all(bool(g.isfinite().all()) for g in grads)


def test_tensors_that_are_zero_still_get_their_gradient() -> None:
    net, (x, y) = network(), rows()
    decay = torch.zeros((), requires_grad=True)
    with higher.innerloop_ctx(
        net, optim.SGD(net.parameters(), lr=0.1), override={"weight_decay": [decay]}
    ) as (
        fmodel,
        diffopt,
    ):
        diffopt.step(mse_loss(fmodel(x), y))
        (grad,) = torch.autograd.grad(mse_loss(fmodel(x), y), decay)
    assert grad != 0


@needs_original
@pytest.mark.parametrize("name", ["Adam", "ASGD"])
def test_float64_is_exact_where_the_original_counts_in_float32(name: str) -> None:
    """It goes on with what torch.optim keeps in float32."""
    net, (x, y) = network().double(), tuple(t.double() for t in rows())
    opt = SHARED[name](net.parameters())
    opt.param_groups[0]["eps"] = 0.0
    stepped(opt, net, x, y, 2)
    found = []
    for library in (higher, original):
        with library.innerloop_ctx(net, opt) as (fmodel, diffopt):
            diffopt.step(mse_loss(fmodel(x), y))
            found.append(values(fmodel.parameters()))
    stepped(opt, net, x, y, 1)
    assert_close(found[0], values(net.parameters()), 1e-15)
    assert_close(found[1], values(net.parameters()), 1e-7)


# Overrides, callbacks, optimisers of one's own.


def test_override_for_each_group_or_all_and_for_a_step() -> None:
    net, (x, y) = network(), rows()
    opt = optim.SGD([{"params": [p]} for p in net.parameters()], lr=0.1)
    rates = [torch.tensor(0.1 * k, requires_grad=True) for k in range(4)]
    plain = torch.autograd.grad(mse_loss(net(x), y), list(net.parameters()))
    with higher.innerloop_ctx(net, opt, override={"lr": rates}) as (fmodel, diffopt):
        updated = diffopt.step(mse_loss(fmodel(x), y))
        for new, old, g, rate in zip(updated, net.parameters(), plain, rates, strict=True):
            torch.testing.assert_close(new, old - rate * g)
        torch.autograd.grad(sum(p.sum() for p in updated), rates)
    elements = torch.rand(6, 4)
    with higher.innerloop_ctx(net, opt, override={"lr": [elements, 0.0, 0.0, 0.0]}) as (fmodel, diffopt):
        updated = diffopt.step(mse_loss(fmodel(x), y))
        torch.testing.assert_close(updated[0], net[0].weight - elements * plain[0])
        assert torch.equal(updated[3], net[2].bias)
        # From now on, and for all groups.
        diffopt.step(mse_loss(fmodel(x), y), override={"lr": [0.5]})
        assert [group["lr"] for group in diffopt.param_groups] == [0.5] * 4
    assert [group["lr"] for group in opt.param_groups] == [0.1] * 4


def test_rates_of_a_module_serve_as_override() -> None:
    net, (x, y) = network(), rows()
    rates = nn.ParameterList(nn.Parameter(torch.tensor(0.1)) for _ in range(2))
    opt = optim.SGD([{"params": net[0].parameters()}, {"params": net[2].parameters()}], lr=0.1)
    with higher.innerloop_ctx(net, opt, override={"lr": rates}) as (fmodel, diffopt):
        diffopt.step(mse_loss(fmodel(x), y))
        mse_loss(fmodel(x), y).backward()
    assert all(rate.grad is not None and rate.grad != 0 for rate in rates)


def test_grad_callback_takes_and_gives_all_gradients() -> None:
    net, (x, y) = network(), rows()
    net[0].bias.requires_grad_(False)
    opt = optim.SGD(net.parameters(), lr=1.0)
    seen: list[Any] = []

    def clipped(grads: Any) -> list[Tensor | None]:
        seen.append(grads)
        return [None if g is None else g.clamp(-0.01, 0.01) for g in grads]

    fmodel = higher.monkeypatch(net)
    diffopt = higher.get_diff_optim(opt, net.parameters(), fmodel, grad_callback=clipped)
    diffopt.step(mse_loss(fmodel(x), y))
    assert isinstance(seen[0], tuple) and [g is None for g in seen[0]] == [False, True, False, False]
    moved = torch.cat([(p - q).flatten() for p, q in zip(fmodel.parameters(), net.parameters(), strict=True)])
    assert 0 < moved.detach().abs().max() < 0.0101
    before = fmodel.fast_params
    # That of a step takes its place.
    diffopt.step(mse_loss(fmodel(x), y), grad_callback=lambda grads: [None] * 4)
    assert len(seen) == 1 and fmodel.fast_params is not before
    assert all(p is q for p, q in zip(fmodel.fast_params, before, strict=True))
    with pytest.raises(ValueError, match="grad_callback: expected 4 gradients back, got 1"):
        diffopt.step(mse_loss(fmodel(x), y), grad_callback=lambda grads: grads[:1])


def test_first_order_by_a_callback_keeps_the_identity() -> None:
    net, (x, y) = network(), rows()
    opt = optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        diffopt.step(mse_loss(fmodel(x), y), grad_callback=lambda grads: [g.detach() for g in grads])
        loss = mse_loss(fmodel(x), y)
        at_end = torch.autograd.grad(loss, fmodel.fast_params, retain_graph=True)
        at_start = torch.autograd.grad(loss, list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(at_end, at_start, strict=True))


def test_frozen_and_unused_parameters_stay() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.frozen = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.frozen(self.used(x))
            return out

    net, (x, y) = Partly(), rows()
    for track in (True, False):
        for make in (SHARED["SGD, momentum"], SHARED["Adam"]):
            with higher.innerloop_ctx(net, make(net.parameters()), track_higher_grads=track) as (
                fmodel,
                diffopt,
            ):
                for _ in range(3):
                    diffopt.step(mse_loss(fmodel(x), y))
                moved = [
                    not torch.equal(p, q) for p, q in zip(fmodel.parameters(), net.parameters(), strict=True)
                ]
                assert moved == [True, True, False, False, False, False]
                assert [p.requires_grad for p in fmodel.parameters()] == [True] * 4 + [False] * 2


def test_an_optimiser_of_some_parameters() -> None:
    net, (x, y) = network(), rows()
    with higher.innerloop_ctx(net, optim.SGD(net[2].parameters(), lr=0.1)) as (fmodel, diffopt):
        updated = diffopt.step(mse_loss(fmodel(x), y))
    assert updated[0] is fmodel.init_fast_params[0] and updated[1] is fmodel.init_fast_params[1]
    assert not torch.equal(updated[2], net[2].weight)


class SignSGD(optim.SGD):
    pass


class DifferentiableSignSGD(higher.optim.DifferentiableOptimizer):
    def _update(self, grouped_grads: Any, scale: float = 1.0, **kwargs: Any) -> None:
        for group, grads in zip(self.param_groups, grouped_grads, strict=True):
            for k, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is not None:
                    group["params"][k] = higher.optim._add(p, -group["lr"] * scale, g.tanh())


def test_an_optimiser_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(higher.optim, "_opt_mapping", dict(higher.optim._opt_mapping))
    net, (x, y) = network(), rows()
    opt = SignSGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"opt: expected ASGD, .* or a type known to .*, got SignSGD"):
        higher.get_diff_optim(opt, net.parameters())
    with pytest.raises(ValueError, match="opt_type: expected ASGD"):
        higher.create_diff_optim(optim.LBFGS, params=list(net.parameters()))
    higher.register_optim(SignSGD, DifferentiableSignSGD)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        assert type(diffopt) is DifferentiableSignSGD
        grads = torch.autograd.grad(mse_loss(net(x), y), list(net.parameters()))
        updated = diffopt.step(mse_loss(fmodel(x), y), scale=2.0)
        for new, old, g in zip(updated, net.parameters(), grads, strict=True):
            torch.testing.assert_close(new, old - 0.2 * g.tanh())
        mse_loss(fmodel(x), y).backward()
    assert net[0].weight.grad is not None
    with pytest.raises(TypeError, match="abstract"):
        higher.optim.DifferentiableOptimizer(opt, net.parameters())  # type: ignore[abstract]


def test_parts_for_optimisers_of_ones_own() -> None:
    a, b, c, d = torch.rand(4, 3, dtype=torch.float64).requires_grad_().unbind()
    tools = higher.optim
    assert torch.equal(tools._add(a, b), a + b) and torch.equal(tools._add(a, 2, b), a + 2 * b)
    assert torch.equal(tools._add(tensor=a, a1=-0.5, a2=b), a - 0.5 * b)
    assert torch.equal(tools._addcmul(a, b, c), a + b * c)
    assert torch.equal(tools._addcmul(a, b, c, d), a + b * c * d)
    assert torch.equal(tools._addcdiv(a, b, c), a + b / c)
    assert torch.equal(tools._addcdiv(a, b, c, d), a + b * (c / d))
    masked = a * 1
    tools._maybe_mask(masked, torch.tensor([True, False, False]))
    tools._maybe_mask(masked.detach(), torch.tensor([True, False, False]))
    (grad,) = torch.autograd.grad(masked.square().sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), a)
    assert (
        grad[0] == 0
        and second[0] == 0
        and torch.equal(second[1:], torch.full((2,), 2.0, dtype=torch.float64))
    )


def test_state_is_copied_and_left_alone() -> None:
    net, (x, y) = network(), rows()
    opt = optim.Adam(net.parameters(), lr=0.1)
    stepped(opt, net, x, y, 2)
    before = deepcopy(opt.state_dict())
    with higher.innerloop_ctx(net, opt) as (fmodel, diffopt):
        diffopt.step(mse_loss(fmodel(x), y))
        assert diffopt.state[0][0]["step"] == 3
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(state[name], after["state"][key][name]) for name in state)


def test_a_tensor_among_the_hyperparameters_is_copied() -> None:
    net, (x, y) = network(), rows()
    rate = torch.tensor(0.1, requires_grad=True)
    # Not a leaf, which deepcopy refuses.
    opt = optim.SGD(net.parameters(), lr=rate * 2)
    with higher.innerloop_ctx(net, opt) as (fmodel, diffopt):
        diffopt.step(mse_loss(fmodel(x), y))
        mse_loss(fmodel(x), y).backward()
        assert diffopt.param_groups[0]["lr"] == 0.2
    assert rate.grad is None and opt.param_groups[0]["lr"] is not diffopt.param_groups[0]["lr"]


def test_create_diff_optim_from_a_model_tensors_and_groups() -> None:
    net, (x, y) = network(), rows()
    grads = torch.autograd.grad(mse_loss(net(x), y), list(net.parameters()))
    expected = [p - 0.1 * g for p, g in zip(net.parameters(), grads, strict=True)]
    fmodel = higher.monkeypatch(net)
    diffopt = higher.create_diff_optim(optim.SGD, {"lr": 0.1}, fmodel=fmodel)
    assert_close(values(diffopt.step(mse_loss(fmodel(x), y))), values(expected), 1e-6)
    params = list(net.parameters())
    diffopt = higher.create_diff_optim(optim.SGD, {"lr": 0.1}, params=params)
    assert_close(values(diffopt.step(mse_loss(net(x), y), params=params)), values(expected), 1e-6)
    groups = [
        {"params": params[:2], "lr": 0.1},
        {"params": params[2], "lr": 0.1},
        {"params": (params[3],), "lr": 0.0},
    ]
    diffopt = higher.create_diff_optim(optim.SGD, params=groups, override={"lr": [0.1]})
    assert [len(group["params"]) for group in diffopt.param_groups] == [2, 1, 1]
    assert_close(values(diffopt.step(mse_loss(net(x), y), params=params)), values(expected), 1e-6)
    with pytest.raises(
        ValueError, match="params: expected tensors or parameter groups, or a model as fmodel"
    ):
        higher.create_diff_optim(optim.SGD, {"lr": 0.1})


def test_trainable_hyperparameters_there_and_back() -> None:
    net = network()
    opt = optim.Adam(
        [{"params": net[0].parameters(), "lr": 0.2}, {"params": net[2].parameters()}], amsgrad=True
    )
    override = higher.optim.get_trainable_opt_params(opt, device=torch.device("cpu"))
    assert list(override) == ["lr", "betas", "eps", "weight_decay"]
    assert [len(v) for v in override.values()] == [2] * 4
    leaves = higher.utils.flatten(override)
    assert len(leaves) == 10 and all(t.requires_grad and t.is_leaf for t in leaves)
    torch.testing.assert_close(torch.stack(override["lr"]).detach(), torch.tensor([0.2, 1e-3]))
    assert isinstance(override["betas"][0], tuple)
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    higher.optim.apply_trainable_opt_params(opt, override)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1) and type(opt.param_groups[0]["lr"]) is float
    assert opt.param_groups[1]["betas"] == pytest.approx((0.45, 0.4995))
    assert opt.param_groups[0]["amsgrad"] is True
    higher.optim.apply_trainable_opt_params(opt, {"lr": [torch.tensor(3.0)], "amsgrad": [torch.tensor(0.0)]})
    assert [group["lr"] for group in opt.param_groups] == [3.0, 3.0]
    assert opt.param_groups[0]["amsgrad"] is False
    rate = torch.tensor(0.5)
    opt.param_groups[0]["lr"] = rate
    higher.optim.apply_trainable_opt_params(opt, {"lr": [torch.tensor(0.25)]})
    assert opt.param_groups[0]["lr"] is rate and rate == 0.25
    for wrong in ((torch.tensor(1.0),), torch.tensor(1.0), [torch.tensor(1.0)] * 3):
        with pytest.raises(ValueError, match=r"override\['betas'\]: expected values like \("):
            higher.optim.apply_trainable_opt_params(opt, {"betas": [wrong]})


@pytest.mark.parametrize(
    "library", [higher, pytest.param(original, marks=needs_original)], ids=["ours", "original"]
)
def test_nested_containers(library: Any) -> None:
    nested = {"a": [1, (2, 3)], "b": {4}, "c": {"d": 5}}
    assert library.utils.flatten(nested) == [1, 2, 3, 4, 5]
    assert library.utils.flatten(7) == [7]
    assert library.utils._recursive_map(nested, lambda x: -x) == {
        "a": [-1, (-2, -3)],
        "b": {-4},
        "c": {"d": -5},
    }


def test_copies_of_parameters() -> None:
    net = network()
    net[0].bias.requires_grad_(False)
    for safe in (True, False):
        params = higher.utils.get_func_params(net, device="cpu", safe_copy=safe)
        assert [p.requires_grad for p in params] == [True, False, True, True]
        assert all(p.is_leaf and torch.equal(p, q) for p, q in zip(params, net.parameters(), strict=True))
        assert (params[0].data_ptr() == net[0].weight.data_ptr()) is not safe
    assert higher.utils.get_func_params(net, device="meta")[0].is_leaf
    assert higher.utils._copy_tensor(net[0].weight * 2, safe_copy=True).grad_fn is None


# Functional copies.


def test_the_model_gets_a_gradient_only_without_copies() -> None:
    net, (x, y) = network(), rows()
    opt = optim.SGD(net.parameters(), lr=0.1)
    higher.monkeypatch(net)(x).sum().backward()
    for copies in (True, False):
        options = {} if copies else {"copy_initial_weights": False}
        with higher.innerloop_ctx(net, opt, **options) as (fmodel, diffopt):
            diffopt.step(mse_loss(fmodel(x), y))
            mse_loss(fmodel(x), y).backward()
        assert [p.grad is None for p in net.parameters()] == [copies] * 4
        assert (fmodel.init_fast_params[0].grad_fn is None) is copies


def test_history_of_parameters() -> None:
    net, (x, y) = network(), rows()
    with higher.innerloop_ctx(net, optim.SGD(net.parameters(), lr=0.1)) as (fmodel, diffopt):
        steps = [list(fmodel.parameters()), *(diffopt.step(mse_loss(fmodel(x), y)) for _ in range(2))]
        for time, params in enumerate(steps):
            assert all(p is q for p, q in zip(fmodel.parameters(time=time), params, strict=True))
        assert next(fmodel.parameters(time=-2)) is steps[1][0]
        assert fmodel.init_fast_params[0] is steps[0][0]
        assert fmodel.fast_params[0] is next(fmodel.parameters()) is steps[2][0]
        assert [name for name, _ in fmodel.named_parameters()] == [name for name, _ in net.named_parameters()]
        assert all(p is q for (_, p), q in zip(fmodel.named_parameters(), steps[2], strict=True))
        assert all(p is q for p, q in zip(fmodel[2].parameters(), steps[2][2:], strict=True))
        with pytest.raises(IndexError, match="time: expected a number of updates up to 2, got 3"):
            fmodel.parameters(time=3)
        with pytest.raises(ValueError, match="time: expected None for a submodule"):
            fmodel[0].parameters(time=0)
        # A call with parameters of one's own is an update.
        out = fmodel(x, params=steps[0])
        assert torch.equal(out, net(x)) and fmodel.fast_params[0] is steps[0][0]
        assert len(fmodel._fast_params) == 4
        # So are changes of the lists themselves, which code makes.
        fmodel.fast_params[3] = steps[0][3] + 1
        torch.testing.assert_close(fmodel(x), out + 1)
        fmodel._fast_params = [steps[2]]
        torch.testing.assert_close(fmodel(x), fmodel(x, params=steps[2]))


@pytest.mark.parametrize("name", ALL)
def test_without_tracking_every_step_begins_with_constants(name: str) -> None:
    net, (x, y) = network(), rows()
    # A hyperparameter with a gradient would tie what the optimiser remembers to former steps.
    rate = torch.tensor(0.01, requires_grad=True)
    opt = ALL[name](net.parameters())
    with higher.innerloop_ctx(net, opt, override={"lr": [rate]}, track_higher_grads=False) as (
        fmodel,
        diffopt,
    ):
        for _ in range(3):
            diffopt.step(mse_loss(fmodel(x), y))
            assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
            remembered = higher.utils.flatten([diffopt.state, diffopt.param_groups[0]["params"]])
            assert not any(isinstance(value, Tensor) and value.requires_grad for value in remembered)
        assert len(fmodel._fast_params) == 1
        with pytest.raises(ValueError, match=r"time: expected None, 0 or -1, .* got 1"):
            fmodel.parameters(time=1)
        with pytest.raises(RuntimeError, match="init_fast_params: the first parameters are not tracked"):
            _ = fmodel.init_fast_params


def test_tracking_can_be_switched() -> None:
    fmodel = higher.monkeypatch(network())
    fmodel.update_params([p * 2 for p in fmodel.parameters()])
    fmodel.track_higher_grads = False
    fmodel.update_params([p * 0 for p in fmodel.parameters()])
    assert len(fmodel._fast_params) == 1 and not fmodel(torch.ones(1, 4)).any()
    with pytest.raises(ValueError, match="track_higher_grads: expected a bool, got int"):
        fmodel.track_higher_grads = 1


def test_graphs_are_freed_without_the_garbage_collector() -> None:
    net, (x, y) = network(), rows()
    gc.disable()
    try:
        with higher.innerloop_ctx(net, optim.Adam(net.parameters())) as (fmodel, diffopt):
            diffopt.step(mse_loss(fmodel(x), y))
            fmodel[0](x)
        refs = [weakref.ref(fmodel), weakref.ref(diffopt)]
        del fmodel, diffopt
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


def test_buffers_are_copied() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = deepcopy(net.state_dict())
    fmodel = higher.monkeypatch(net)
    fmodel(torch.randn(8, 4))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not torch.equal(fmodel[1].running_mean, net[1].running_mean)
    assert fmodel[1].num_batches_tracked == 1
    patch.buffer_sync(net, fmodel)
    assert torch.equal(fmodel[1].running_mean, net[1].running_mean)
    assert fmodel[1].running_mean is not net[1].running_mean
    with pytest.raises(KeyError, match="fmodule: expected a submodule '1'"):
        patch.buffer_sync(net, nn.Sequential(nn.Linear(4, 3)))


def test_device_moves_parameters_buffers_and_state() -> None:
    net, (x, y) = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), rows()
    opt = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    stepped(opt, net, x, y, 1)
    for copies in (True, False):
        with higher.innerloop_ctx(net, opt, device="meta", copy_initial_weights=copies) as (fmodel, diffopt):
            tensors = [*fmodel.parameters(), *fmodel.buffers(), diffopt.state[0][0]["momentum_buffer"]]
            assert all(t.device.type == "meta" for t in tensors)
            assert all(p.requires_grad for p in fmodel.parameters())
            diffopt.step(fmodel(x.to("meta")).sum())
            assert all(p.device.type == "meta" and p.grad_fn is not None for p in fmodel.parameters())
    patch.buffer_sync(net, fmodel, device="cpu")
    assert fmodel[1].running_mean.device.type == "cpu"


def test_recurrent_layers_do_without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no second derivative of them."""
    fmodel, (x, _) = higher.monkeypatch(nn.Sequential(nn.GRU(4, 3))), rows()
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    seen = []
    fmodel[0].check_forward_args = lambda *_: seen.append(torch.backends.cudnn.enabled)
    fmodel(x)
    assert seen == [False] and torch.backends.cudnn.enabled
    assert fmodel[0].flatten_parameters() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("name", ["SGD", "SGD, momentum", "Adam", "NAdam"])
def test_on_a_gpu(name: str) -> None:
    """A model and a rate that stay on the CPU, and a second derivative of recurrent layers."""
    net, (x, _) = nn.GRU(4, 3), rows()
    opt = ALL[name](net.parameters())
    output(net, x).square().sum().backward()
    opt.step()
    found = []
    for device in ("cpu", "cuda"):
        rate = torch.tensor(0.1, requires_grad=True)
        with higher.innerloop_ctx(
            net, opt, device=device, copy_initial_weights=False, override={"lr": [rate]}
        ) as (fmodel, diffopt):
            for _ in range(2):
                diffopt.step(output(fmodel, x.to(device)).square().sum())
            loss = output(fmodel, x.to(device)).square().sum()
            found.append(values(g.cpu() for g in torch.autograd.grad(loss, [*net.parameters(), rate])))
    assert_close(*found, 1e-5)


def test_make_functional_has_no_parameters_yet() -> None:
    net, (x, _) = nn.Sequential(OrderedDict(first=nn.Linear(4, 3), norm=nn.BatchNorm1d(3))), rows()
    fmodel = patch.make_functional(net)
    assert fmodel.fast_params is None and fmodel._fast_params is None
    message = "params: expected tensors for the parameters, which this model has not been given yet"
    for wrong in (lambda: fmodel(x), lambda: fmodel.first(x), lambda: next(fmodel.parameters())):
        with pytest.raises(ValueError, match=message):
            wrong()
    with pytest.raises(ValueError, match=message):
        fmodel.first.weight = torch.zeros(3, 4)
    params = higher.utils.get_func_params(net)
    torch.testing.assert_close(fmodel(x, params=params), net(x))
    assert fmodel.fast_params[0] is params[0]
    torch.testing.assert_close(fmodel(x), net(x))
    given: list[Any] = []
    fmodel = patch.make_functional(net, encapsulator=lambda *pair: given.append(pair))
    assert given == [(fmodel, net)]
    # What code does to start anew.
    del fmodel._fast_params
    fmodel._fast_params = [[]]
    fmodel.track_higher_grads = False
    fmodel.fast_params = params
    torch.testing.assert_close(fmodel.first(x), net.first(x))


def test_wrong_parameters() -> None:
    fmodel = higher.monkeypatch(network())
    with pytest.raises(ValueError, match="params: expected 4 tensors, as the module has, got 3"):
        fmodel.update_params(list(fmodel.parameters())[:3])
    with pytest.raises(TypeError, match="params: expected tensors, got float"):
        fmodel.update_params([1.0] * 4)
    with pytest.raises(TypeError, match="params: expected tensors, got NoneType"):
        fmodel[0].weight = None


class Named(nn.Module):
    """Not a ``Sequential``, with a method besides forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)
        self.cells = [self.body, self.head]
        self.weights = {"head": self.head.weight}
        self.calls = [0]
        self.seen: Tensor | None = None

    def features(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x).tanh()
        return out

    def forward(self, x: Tensor, *, double: bool = False) -> Tensor:
        self.calls[0] += 1
        self.seen = x
        out: Tensor = self.head(self.features(x))
        return 2 * out if double else out


def test_the_copy_is_an_instance_with_its_methods_and_attributes() -> None:
    net, (x, _) = Named(), rows()
    fmodel = higher.monkeypatch(net)
    assert isinstance(fmodel, Named) and isinstance(fmodel, patch._MonkeyPatchBase)
    assert isinstance(fmodel.body, nn.Linear) and "FunctionalNamed" in repr(fmodel)
    fmodel.update_params([p * 2 for p in fmodel.parameters()])
    expected = deepcopy(net)
    with torch.no_grad():
        for p in expected.parameters():
            p.mul_(2)
    assert torch.equal(fmodel.features(x), expected.features(x))
    assert torch.equal(fmodel(x, double=True), expected(x, double=True))
    assert fmodel.calls is net.calls and net.seen is None and fmodel.seen is x
    # Lists and dicts of its own parts are those of the copy.
    assert fmodel.cells[1] is fmodel.head and net.cells[1] is net.head
    assert fmodel.weights["head"] is fmodel.head.weight is fmodel.fast_params[2]
    assert fmodel.training and not fmodel.eval().head.training and net.head.training


def test_submodules_can_be_called_with_the_latest_parameters() -> None:
    net, (x, _) = Named(), rows()
    fmodel = higher.monkeypatch(net)
    other = deepcopy(fmodel)
    other.update_params([p * 0 for p in other.parameters()])
    assert not other(x).any() and torch.equal(fmodel(x), net(x))
    for factor in (1, 2, 3):
        params = [p * factor for p in net.parameters()]
        fmodel.update_params(params)
        torch.testing.assert_close(fmodel.body(x), x @ params[0].T + params[1])
    params = [p * 4 for p in net.parameters()]
    torch.testing.assert_close(fmodel.body(x, params=params), x @ params[0].T + params[1])
    assert fmodel.fast_params[3] is params[3]
    sequential = higher.monkeypatch(network())
    torch.testing.assert_close(sequential[:2](x), sequential[1](sequential[0](x)))


def test_assigning_a_parameter_is_an_update() -> None:
    net, (x, _) = Named(), rows()
    fmodel = higher.monkeypatch(net)
    weight = torch.randn(2, 3, requires_grad=True)
    fmodel.head.weight = weight
    assert fmodel.fast_params[2] is weight and len(fmodel._fast_params) == 2
    fmodel(x).sum().backward()
    assert weight.grad is not None and fmodel.init_fast_params[2] is not weight


class Twice(nn.Module):
    """A parameter under two names and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.second.weight = self.first.weight
        self.again, self.norm_again = self.second, self.norm

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm_again(self.again(self.norm(self.second(self.first(x)))))
        return out


def test_shared_parameters_and_modules_stay_one() -> None:
    net, (x, _) = Twice(), rows()
    opt = optim.SGD(net.parameters(), lr=0.1)
    plain = deepcopy(net)
    with higher.innerloop_ctx(net, opt) as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(fmodel(x).square().mean() + fmodel.first.weight.sum())
        assert len(fmodel.fast_params) == len(list(net.parameters())) == 5
        assert fmodel.first.weight is fmodel.again.weight and fmodel.norm is fmodel.norm_again
    opt = optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        (plain(x).square().mean() + plain.first.weight.sum()).backward()
        opt.step()
    assert_close(values(fmodel.parameters()), values(plain.parameters()), 1e-6)
    assert_close(values(fmodel.buffers()), values(plain.buffers()), 1e-6)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: nn.RNN(4, 3),
    "GRU": lambda: nn.GRU(4, 3, num_layers=2, bidirectional=True),
    "LSTM": lambda: nn.LSTM(4, 3, proj_size=2),
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2)),
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "embedding": lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.GELU()),
    "parametrised": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "lists": lambda: Lists(),
}


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ParameterList([nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))])
        self.two = nn.ParameterDict({"a": nn.Parameter(torch.rand(4)), "b": None})
        self.layers = nn.ModuleList([nn.Linear(4, 2)])
        self.register_module("none", None)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.one[0] + self.one[1] * self.two["a"]
        return sum((layer(x) for layer in self.layers), torch.zeros(()))


def output(module: nn.Module, x: Tensor) -> Tensor:
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        x = module(x[:, None] if isinstance(module, nn.TransformerEncoderLayer) else x)
    return x[0] if isinstance(x, tuple) else x


@pytest.mark.parametrize("name", LAYERS)
def test_layers_adapt_as_torch_adapts_them(double: None, name: str) -> None:
    net, (x, _) = LAYERS[name](), rows()
    plain, opt = deepcopy(net), optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(3):
            diffopt.step(output(fmodel, x).square().sum())
        output(fmodel, x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    opt = optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        output(plain, x).square().sum().backward()
        opt.step()
    assert_close(values(fmodel.parameters()), values(plain.parameters()), 1e-12)
    assert torch.equal(output(net, x), output(deepcopy(net), x)), (
        "the module's own weights serve it as before"
    )


@needs_original
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "lists"])
def test_layers_have_the_gradients_of_the_original(double: None, name: str) -> None:
    net, (x, _) = LAYERS[name](), rows()
    found = []
    for library in (higher, original):
        with library.innerloop_ctx(net, optim.SGD(net.parameters(), lr=0.1), copy_initial_weights=False) as (
            fmodel,
            diffopt,
        ):
            for _ in range(2):
                diffopt.step(output(fmodel, x).square().sum())
            loss = output(fmodel, x).square().sum()
            found.append(values(torch.autograd.grad(loss, list(net.parameters()))))
    assert_close(*found, 1e-12)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["weight", "weight_ih_l0", "weight_hh_l0"])
def test_hooks_run_such_as_those_of_weight_norm(name: str) -> None:
    net, (x, _) = nn.Linear(4, 3) if name == "weight" else nn.LSTM(4, 3), rows()
    nn.utils.weight_norm(net, name)
    plain, flat = deepcopy(net.state_dict()), list(getattr(net, "_flat_weights", []))
    calls: list[nn.Module] = []
    net.register_forward_hook(lambda module, *_: calls.append(module))
    with higher.innerloop_ctx(net, optim.SGD(net.parameters(), lr=0.1)) as (fmodel, diffopt):
        diffopt.step(output(fmodel, x).square().sum())
        moved = [
            not torch.equal(p, q) for p, q in zip(fmodel.fast_params, fmodel.init_fast_params, strict=True)
        ]
    assert all(moved) and calls == [fmodel]
    assert all(torch.equal(value, plain[key]) for key, value in net.state_dict().items())
    assert all(a is b for a, b in zip(getattr(net, "_flat_weights", []), flat, strict=True))
    fmodel.register_forward_hook(lambda *_: None)
    assert len(net._forward_hooks) == 1


def test_methods_that_were_put_on_the_module_are_those_of_the_copy() -> None:
    net, (x, _) = Named(), rows()
    net.forward = net.features  # type: ignore[method-assign]
    fmodel = higher.monkeypatch(net)
    fmodel.update_params([p * 0 for p in fmodel.parameters()])
    assert not fmodel(x).any() and net(x).any()


def test_compiled_modules() -> None:
    net, (x, _) = network(), rows()
    with pytest.raises(
        TypeError, match=r"module: expected one of Python, got one of torch\.jit or torch\.compile"
    ):
        higher.monkeypatch(torch.compile(net))
    net.compile()
    fmodel = higher.monkeypatch(net)
    fmodel.update_params([p * 0 for p in fmodel.parameters()])
    assert not fmodel(x).any()


def test_wrong_calls() -> None:
    net, (x, y) = network(), rows()
    opt = optim.SGD(net.parameters(), lr=0.1)
    fmodel = higher.monkeypatch(net)
    with pytest.raises(TypeError, match=r"module: expected a torch\.nn\.Module, got function"):
        higher.monkeypatch(lambda x: x)
    with pytest.raises(ValueError, match="module: expected one that is not functional yet"):
        higher.monkeypatch(fmodel)
    with pytest.raises(
        ValueError,
        match=r"reference_params: expected all parameters of the optimiser, got none of shape \[6\]",
    ):
        higher.get_diff_optim(opt, [net[0].weight])
    for wrong, error in ((0.1, TypeError), (torch.tensor(0.1), TypeError), ([0.1, 0.2], ValueError)):
        with pytest.raises(error, match=r"override\['lr'\]: expected"):
            higher.get_diff_optim(opt, net.parameters(), override={"lr": wrong})
    diffopt = higher.get_diff_optim(opt, net.parameters())
    with pytest.raises(ValueError, match="params: expected tensors, since the optimiser has no model"):
        diffopt.step(mse_loss(net(x), y))
    with pytest.raises(ValueError, match="params: expected all of reference_params, got 1"):
        diffopt.step(mse_loss(net(x), y), params=[net[0].weight])
    sparse = nn.Embedding(5, 3, sparse=True)
    for make, fits in ((optim.SGD, True), (optim.Adadelta, False)):
        with higher.innerloop_ctx(sparse, make(sparse.parameters(), lr=0.1), track_higher_grads=False) as (
            fmodel,
            diffopt,
        ):
            loss = fmodel(torch.tensor([1, 1])).sum()
            if fits:
                diffopt.step(loss)
                expected = sparse.weight.detach() - 0.1 * torch.tensor([0.0, 2, 0, 0, 0])[:, None]
                torch.testing.assert_close(fmodel.fast_params[0].detach(), expected)
            else:
                with pytest.raises(RuntimeError, match="DifferentiableAdadelta: expected dense gradients"):
                    diffopt.step(loss)


# Scripts.


def run(
    library: Any, script: str, arguments: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> list[float]:
    """What a script prints, run as it stands with ours or with the original."""
    path = str(SCRIPTS / script)
    with monkeypatch.context() as context:
        context.setattr(sys, "argv", [path, *arguments])
        context.setattr(sys, "path", list(sys.path))
        context.setattr(compat._finder, "installed", set())
        for name in [name for name in sys.modules if name.partition(".")[0] == "higher"]:
            context.delitem(sys.modules, name)
        if library is higher:
            main(["--as", "higher", path, *arguments])
            for name in [name for name in sys.modules if name.partition(".")[0] == "higher"]:
                del sys.modules[name]
        else:
            context.setitem(sys.modules, "higher", library)
            for name in ("optim", "patch", "utils"):
                context.setitem(sys.modules, f"higher.{name}", getattr(library, name))
            runpy.run_path(path, run_name="__main__")
    torch.set_default_dtype(torch.float32)
    numbers: list[float] = json.loads(capsys.readouterr().out)
    return numbers


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("script", ["higher_maml.py", "higher_bilevel.py", "higher_hypergradient.py"])
def test_scripts_run_unmodified(script: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = run(higher, script, ["4"], capsys, monkeypatch)
    assert all(value == value for value in ours)
    if script != "higher_maml.py":
        assert ours[3] < ours[0], "the outer loop learns"
    if original is not None:
        assert ours == pytest.approx(run(original, script, ["4"], capsys, monkeypatch), abs=1e-10)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.skipif(
    not (DATA / "images_background.zip").is_file(),
    reason="needs the Omniglot zips in $METAFAST_DATA/omniglot or ../shared/data/omniglot",
)
def test_maml_on_real_omniglot(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = omniglot(DATA, "val", size=14, rotations=False)
    images = data.images.view(-1, 20, 1, 14, 14)[:, :4].float() / 255
    torch.save(images, tmp_path / "images.pt")
    arguments = ["30", str(tmp_path / "images.pt")]
    ours = run(higher, "higher_maml.py", arguments, capsys, monkeypatch)
    assert sum(ours[-20:]) < sum(ours[:20]), "it learns"
    if original is not None:
        theirs = run(original, "higher_maml.py", arguments, capsys, monkeypatch)
        assert ours == pytest.approx(theirs, abs=1e-8)


# The migration page.

NAMES, BLOCKS = page("higher")


def found(name: str) -> bool:
    owner, _, rest = name.partition(".")
    value: Any = {
        "higher": higher,
        "fmodel": patch.FunctionalModule,
        "diffopt": higher.optim.DifferentiableOptimizer,
    }[owner]
    for part in rest.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


@pytest.mark.parametrize(("name", "status", "note"), NAMES)
def test_the_table_is_true(name: str, status: str, note: str) -> None:
    assert status in ("provided", "better", "absent")
    assert found(name) is (status != "absent")
    assert note or status == "provided", "say what is better, or why it is absent"


def test_the_table_is_complete() -> None:
    names = [name for name, _, _ in NAMES]
    assert len(set(names)) == len(names) > 50
    modules = {"higher": higher, **{f"higher.{k}": getattr(higher, k) for k in ("optim", "patch", "utils")}}
    ours = {f"{owner}.{name}" for owner, module in modules.items() for name in module.__all__}
    assert ours <= set(names)


@needs_original
def test_the_table_has_every_public_name_of_the_original() -> None:
    for owner in ("", ".optim", ".patch", ".utils"):
        module = getattr(original, owner[1:]) if owner else original
        public = {f"higher{owner}.{name}" for name in vars(module) if not name.startswith("_")}
        assert public <= {name for name, _, _ in NAMES}
    members = {name for name in vars(original.patch._MonkeyPatchBase) if not name.startswith("_")}
    assert {f"fmodel.{name}" for name in members} <= {name for name, _, _ in NAMES}


@pytest.mark.parametrize(
    "library", [higher, pytest.param(original, marks=needs_original)], ids=["ours", "original"]
)
def test_the_line_that_hands_all_tasks_over_gives_the_same_numbers(double: None, library: Any) -> None:
    one, loop, batch = BLOCKS
    names: dict[str, Any] = {}
    exec(one, names)
    assert names["higher"] is higher
    names["higher"] = library
    drawn = SinusoidSampler(shots=5, queries=6, tasks=3)(0)
    fields = ("support_x", "support_y", "query_x", "query_y")
    episodes = SimpleNamespace(tasks=3, **{name: getattr(drawn, name).double() for name in fields})
    model = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    results = []
    for code in (loop, batch):
        exec(code, names)
        loss = names["meta_loss"](model, episodes)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert_close(*results, 1e-12)
