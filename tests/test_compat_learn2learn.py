"""metafast.compat.learn2learn: algorithms, utilities, layers and optimisers against plain torch."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib
import importlib.util
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear, mse_loss

import metafast
import metafast.compat.learn2learn as l2l
from metafast.compat.learn2learn.algorithms import (
    GBML,
    MAML,
    BaseLearner,
    MetaSGD,
    maml_update,
    meta_sgd_update,
)
from metafast.compat.learn2learn.nn.protonet import compute_prototypes
from metafast.compat.learn2learn.optim.transforms import (
    KroneckerTransform,
    MetaCurvatureTransform,
    ModuleTransform,
    ReshapedTransform,
    TransformDictionary,
)
from tests.pages import assert_row_is_true, page

Named = dict[str, Tensor]
#: Absolute distance to the oracle.
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", CLOSE, ids=str)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def rows(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, query = torch.randn(2, 9, 4, dtype=dtype)
    y, target = torch.randint(3, (2, 9))
    return x, y, query, target


def close(found: Any, wanted: Any, dtype: torch.dtype = torch.float64) -> None:
    torch.testing.assert_close(found, wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype])


def by_hand(
    net: nn.Module,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    step: Callable[[Named, Named], Named],
    steps: int,
    first_order: bool = False,
) -> Tensor:
    """The query loss after some steps, as torch.func has it."""
    x, y, query, target = data
    values = dict(net.named_parameters())
    for _ in range(steps):
        loss = cross_entropy(functional_call(net, values, (x,)), y)
        slopes = torch.autograd.grad(loss, list(values.values()), create_graph=not first_order)
        values = step(values, dict(zip(values, slopes, strict=True)))
    return cross_entropy(functional_call(net, values, (query,)), target)


def adapted_loss(
    learner: Any, data: tuple[Tensor, Tensor, Tensor, Tensor], steps: int, **options: Any
) -> Tensor:
    x, y, query, target = data
    for _ in range(steps):
        assert learner.adapt(cross_entropy(learner(x), y), **options) is None
    return cross_entropy(learner(query), target)


def gradients(loss: Tensor, parameters: Iterator[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(parameters)))


@DTYPES
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("learnt", [False, True])
def test_maml(dtype: torch.dtype, first_order: bool, learnt: bool) -> None:
    net, data = network(dtype), rows(dtype)
    rate = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    wanted = by_hand(net, data, lambda v, g: {k: v[k] - rate * g[k] for k in v}, 3, first_order)
    maml = MAML(net, lr=rate if learnt else 0.3, first_order=first_order)
    found = adapted_loss(maml.clone(), data, 3)
    close(found, wanted, dtype)
    inputs = [*maml.parameters(), *([rate] if learnt else [])]
    close(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), dtype)


def test_first_order_can_be_chosen_for_a_clone_and_for_a_step() -> None:
    net, data = network(), rows()
    wanted = gradients(
        by_hand(net, data, lambda v, g: {k: v[k] - g[k] for k in v}, 2, True), net.parameters()
    )
    maml = MAML(net, lr=1.0)
    for learner, options in ((maml.clone(first_order=True), {}), (maml.clone(), {"first_order": True})):
        close(gradients(adapted_loss(learner, data, 2, **options), net.parameters()), wanted)


@DTYPES
@pytest.mark.parametrize("first_order", [False, True])
def test_meta_sgd(dtype: torch.dtype, first_order: bool) -> None:
    net, data = network(dtype), rows(dtype)
    learner = MetaSGD(net, lr=0.2, first_order=first_order)
    assert all(torch.equal(rate, torch.full_like(rate, 0.2)) for rate in learner.lrs)
    with torch.no_grad():
        for rate in learner.lrs:
            rate.uniform_(0.1, 0.5)
    rates = dict(zip(dict(net.named_parameters()), learner.lrs, strict=True))
    wanted = by_hand(net, data, lambda v, g: {k: v[k] - rates[k] * g[k] for k in v}, 2, first_order)
    found = adapted_loss(learner.clone(), data, 2)
    close(found, wanted, dtype)
    close(gradients(found, learner.parameters()), gradients(wanted, learner.parameters()), dtype)


def test_a_batch_of_tasks_handed_to_metafast_gives_the_same_numbers() -> None:
    net = network()
    tasks = [rows() for _ in range(4)]
    x, y, query, target = (torch.stack(values) for values in zip(*tasks, strict=True))
    maml = MAML(net, lr=0.3)
    one_by_one = torch.stack([adapted_loss(maml.clone(), data, 2) for data in tasks]).mean()
    at_once = cross_entropy(metafast.inner_loop(net, x, y, 0.3, 2)(query).flatten(0, 1), target.flatten())
    close(at_once, one_by_one)
    close(gradients(at_once, net.parameters()), gradients(one_by_one, net.parameters()))


@pytest.mark.parametrize("kind", [MAML, MetaSGD, GBML])
def test_clones_do_not_change_the_original(kind: Any) -> None:
    net, data = network(), rows()
    before = [p.detach().clone() for p in net.parameters()]
    learner = kind(net, nn.Identity, 0.5) if kind is GBML else kind(net, 0.5)
    clone = learner.clone()
    adapted_loss(clone, data, 2)
    assert type(clone) is kind
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert not any(torch.equal(p, b) for p, b in zip(clone.module.parameters(), before, strict=True))


def frozen() -> tuple[nn.Sequential, tuple[Tensor, Tensor, Tensor, Tensor]]:
    net = network()
    net[0].weight.requires_grad_(False)
    return net, rows()


@pytest.mark.parametrize("kind", [MAML, GBML])
def test_a_failed_adapt_leaves_the_clone_as_it_was(kind: Any) -> None:
    net, data = frozen()
    clone = (kind(net, lambda p: None, 0.5) if kind is GBML else kind(net, 0.5)).clone()
    before = [p.detach().clone() for p in clone.module.parameters()]
    loss = cross_entropy(clone(data[0]), data[1])
    with pytest.raises(RuntimeError, match=r"1 of 4 parameters do not require gradients: allow_nograd=True"):
        clone.adapt(loss)
    after = list(clone.module.parameters())
    assert all(torch.equal(p, b) for p, b in zip(after, before, strict=True))
    clone.adapt(loss, allow_nograd=True)
    assert torch.equal(clone.module[0].weight, before[0])
    assert not any(
        torch.equal(p, b) for p, b in list(zip(clone.module.parameters(), before, strict=True))[1:]
    )
    cross_entropy(clone(data[2]), data[3]).backward()
    assert net[0].weight.grad is None and net[0].bias.grad is not None


@pytest.mark.parametrize("kind", [MAML, GBML])
def test_unused_parameters(kind: Any) -> None:
    net = network()

    def made(**options: Any) -> Any:
        return kind(net, lambda p: None, 0.5, **options) if kind is GBML else kind(net, 0.5, **options)

    clone = made().clone()
    with pytest.raises(RuntimeError, match=r"allow_unused=True"):
        clone.adapt(clone.module[0].weight.square().sum())
    for clone in (made(allow_unused=True).clone(), made().clone(allow_unused=True)):
        clone.adapt(clone.module[0].weight.square().sum())
        close(clone.module[0].weight, torch.zeros(6, 4, dtype=torch.float64))
        assert torch.equal(clone.module[2].weight, net[2].weight)


def test_other_errors_of_autograd_pass_as_they_are() -> None:
    clone = MAML(network(), 0.5, first_order=True).clone()
    loss = sum(p.square().sum() for p in clone.module.parameters())
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        clone.adapt(loss)


def test_allow_unused_follows_allow_nograd() -> None:
    assert MAML(network(), 0.1, allow_nograd=True).allow_unused is True
    assert MAML(network(), 0.1).allow_unused is False
    assert MAML(network(), 0.1, allow_nograd=True, allow_unused=False).allow_unused is False


def test_a_model_without_parameters_to_adapt_stays() -> None:
    net = network().requires_grad_(False)
    clone = MAML(net, 0.1, allow_nograd=True).clone()
    clone.adapt(clone(rows()[0]).sum())
    assert all(torch.equal(p, q) for p, q in zip(clone.parameters(), net.parameters(), strict=True))


def test_running_statistics_are_those_of_the_original() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    clone = MAML(net, 0.1).clone()
    clone(torch.randn(9, 4))
    assert clone.module[1].running_mean is net[1].running_mean
    assert net[1].num_batches_tracked == 1 and net[1].running_mean.abs().sum() > 0


def test_state_dicts_have_the_names_of_the_original() -> None:
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(MAML(network(), 0.1).state_dict()) == [f"module.{name}" for name in names]
    assert list(MetaSGD(network()).state_dict()) == [f"module.{n}" for n in names] + [
        f"lrs.{k}" for k in range(4)
    ]
    gbml = GBML(network(), MetaCurvatureTransform)
    assert list(gbml.state_dict()) == [f"module.{name}" for name in names] + [
        f"compute_update.transforms_modules.{name}"
        for name in ("0.mc_in", "0.mc_out", "1.mc", "2.mc_in", "2.mc_out", "3.mc")
    ]


def test_unknown_attributes_are_those_of_the_module() -> None:
    net = network()
    net.note = "here"
    learner = MAML(net, 0.1)
    assert learner.note == "here" and learner.lr == 0.1 and isinstance(learner, BaseLearner)
    assert MetaSGD(net).note == "here"
    with pytest.raises(AttributeError, match="nowhere"):
        learner.nowhere  # noqa: B018
    with pytest.raises(AttributeError, match="nowhere"):
        BaseLearner().nowhere  # noqa: B018
    again = pickle.loads(pickle.dumps(learner))
    assert again.note == "here" and copy.deepcopy(learner).clone().lr == 0.1


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_modules_adapt(kind: Any) -> None:
    rnn = kind(2, 3).double()
    x = torch.randn(5, 4, 2, dtype=torch.float64)
    weights = dict(rnn.named_parameters())
    loss = functional_call(rnn, weights, (x,))[0].square().mean()
    slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    moved = {k: v - 0.5 * g for (k, v), g in zip(weights.items(), slopes, strict=True)}
    wanted = functional_call(rnn, moved, (x,))[0].square().mean()
    learner = MAML(rnn, 0.5).clone()
    learner.adapt(learner(x)[0].square().mean())
    found = learner(x)[0].square().mean()
    close(found, wanted)
    close(gradients(found, rnn.parameters()), gradients(wanted, rnn.parameters()))


class Shared(nn.Module):
    """One parameter in two places, one module in two places, and a place with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=torch.float64)
        self.second = nn.Linear(3, 3, dtype=torch.float64)
        self.second.weight = self.first.weight
        self.again = nn.Sequential(self.first, nn.Tanh(), self.second)
        self.nothing = None
        self.layers = nn.ModuleList([nn.Identity(), None])  # type: ignore[list-item]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.first(x))
        return out


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
def test_what_is_shared_stays_one(kind: Any) -> None:
    net = Shared()
    x = torch.randn(5, 3, dtype=torch.float64)
    values = dict(net.named_parameters())
    slopes = torch.autograd.grad(net(x).square().sum(), list(values.values()), create_graph=True)
    moved = {k: v - 0.1 * g for (k, v), g in zip(values.items(), slopes, strict=True)}
    # functional_call would leave moved values in a module that is registered twice.
    weight, bias = moved["first.weight"], moved["first.bias"]
    hidden = linear(linear(x, weight, bias), weight, bias).tanh()
    wanted = linear(hidden, weight, moved["second.bias"]).sum()
    learner = kind(net, 0.1)
    clone = learner.clone()
    clone.adapt(clone(x).square().sum())
    inner = clone.module
    assert inner.first.weight is inner.second.weight and inner.again[0] is inner.first
    assert len(list(inner.parameters())) == len(values) == 3
    close(clone(x).sum(), wanted)
    close(gradients(clone(x).sum(), net.parameters()), gradients(wanted, net.parameters()))


def test_one_memo_serves_several_modules() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    memo: dict[Any, Any] = {}
    one, two = l2l.clone_module(first, memo), l2l.clone_module(second, memo)
    assert one.weight is two.weight and one.bias is not two.bias
    assert l2l.clone_module(second).weight is not one.weight


def test_clone_module() -> None:
    net = network()
    net.register_buffer("plain", torch.zeros(2))
    net.register_buffer("learnt", torch.ones(2, requires_grad=True))
    net.register_buffer("empty", None)
    clone = l2l.clone_module(net)
    assert clone.plain is net.plain and clone.empty is None
    (grad,) = torch.autograd.grad(clone.learnt.sum(), net.learnt)
    assert torch.equal(grad, torch.ones(2))
    assert torch.equal(clone[0].weight, net[0].weight) and clone[0].weight is not net[0].weight
    clone.train(False)
    clone.extra = 1
    assert net.training and not hasattr(net, "extra")
    assert l2l.clone_module("no module") == "no module" and l2l.clone_module(None) is None


def test_clones_of_a_compiled_module_are_not_compiled() -> None:
    net, data = network(), rows()
    wanted = by_hand(net, data, lambda v, g: {k: v[k] - 0.3 * g[k] for k in v}, 1)
    learner = MAML(torch.compile(net, backend="eager"), 0.3)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="no second derivative"):
        clone = learner.clone()
    close(adapted_loss(clone, data, 1), wanted)


def test_update_module() -> None:
    net = network()
    values = [p.detach().clone() for p in net.parameters()]
    updates = [torch.randn_like(p, requires_grad=True) for p in net.parameters()]
    clone = l2l.clone_module(net)
    assert l2l.update_module(clone, [updates[0], None, *updates[2:]]) is clone
    close(clone[0].weight, values[0] + updates[0])
    assert torch.equal(clone[0].bias, values[1])
    close(clone[2].bias, values[3] + updates[3])
    clone[2].bias.sum().backward()
    assert updates[3].grad is not None and net[2].bias.grad is not None


def test_update_module_takes_the_attributes() -> None:
    clone = l2l.clone_module(network())
    clone.register_buffer("kept", torch.ones(2))
    before = clone[0].bias
    clone[0].bias.update = torch.ones(6, dtype=torch.float64)
    clone.kept.update = torch.ones(2)
    l2l.update_module(clone)
    close(clone[0].bias, before + 1)
    assert torch.equal(clone.kept, 2 * torch.ones(2)) and before.update is None
    after = clone[0].bias
    l2l.update_module(clone)
    assert clone[0].bias is after


@pytest.mark.parametrize("update", [l2l.update_module, lambda m, g: maml_update(m, 0.1, g)])
def test_lists_of_another_length_warn(update: Callable[[nn.Module, Any], Any]) -> None:
    clone = l2l.clone_module(network())
    weight, last = clone[0].weight, clone[2].bias
    with pytest.warns(UserWarning, match=r"expected 4, one for each parameter, got 1"):
        update(clone, [torch.ones(6, 4, dtype=torch.float64)])
    assert clone[0].weight is not weight and clone[2].bias is last


def test_the_functions_of_the_steps() -> None:
    net = network()
    grads = [torch.randn_like(p) for p in net.parameters()]
    rates = [torch.rand_like(p) for p in net.parameters()]
    before = [p.detach().clone() for p in net.parameters()]
    clone = maml_update(l2l.clone_module(net), 0.5, [grads[0], None, *grads[2:]])
    close(clone[0].weight, before[0] - 0.5 * grads[0])
    assert torch.equal(clone[0].bias, before[1])
    clone = l2l.clone_module(net)
    clone[2].bias.update = grads[3]
    close(maml_update(clone, 0.5)[2].bias, before[3] + grads[3])
    for given in (True, False):
        clone = l2l.clone_module(net)
        if not given:
            for p, rate, grad in zip(clone.parameters(), rates, grads, strict=True):
                p._lr, p.grad = rate, grad
        meta_sgd_update(clone, *((rates, grads) if given else ()))
        for p, b, rate, grad in zip(clone.parameters(), before, rates, grads, strict=True):
            close(p, b - rate * grad)


def test_a_list_is_no_rate_of_maml() -> None:
    """It would be cut off where it is too short, and leave the other parameters as they are."""
    x, y, *_ = rows()
    clone = MAML(network(), lr=[0.1, 0.2]).clone()
    before = list(clone.parameters())
    with pytest.raises(TypeError):
        clone.adapt(cross_entropy(clone(x), y))
    assert all(a is b for a, b in zip(clone.parameters(), before, strict=True))


@pytest.mark.parametrize("keep", [False, True])
def test_detach_module(keep: bool) -> None:
    net = Shared()
    clone = l2l.clone_module(net)
    clone.register_buffer("learnt", (2 * torch.ones(2, requires_grad=True)))
    l2l.detach_module(clone, keep_requires_grad=keep)
    tensors = [*clone.parameters(), clone.learnt]
    assert all(t.is_leaf and t.requires_grad == keep for t in tensors)
    assert all(p.requires_grad for p in net.parameters())
    l2l.detach_module("no module")


def test_copies_of_tensors_keep_their_graph() -> None:
    x = torch.ones(2, requires_grad=True)
    (copied,) = l2l.clone_parameters([x])
    named = l2l.clone_named_parameters({"x": x})["x"]
    assert copied is not x and named is not x
    close(torch.autograd.grad((copied + 2 * named).sum(), x)[0], torch.full((2,), 3.0), torch.float32)


def test_distributions() -> None:
    mean = torch.zeros(2, requires_grad=True)
    inner = torch.distributions.Normal(mean, torch.ones(2))
    dist = torch.distributions.Independent(inner, 1)
    dist.net = nn.Linear(2, 2)
    clone: Any = l2l.clone_distribution(dist)
    assert clone.base_dist is not inner and clone.base_dist.loc is not mean and clone.net is not dist.net
    x = torch.tensor([1.0, 2.0])
    grad, net_grad = torch.autograd.grad(clone.log_prob(x) + clone.net(x).sum(), [mean, dist.net.weight])
    close(grad, x, torch.float32)
    assert net_grad.shape == (2, 2)
    detached: Any = l2l.detach_distribution(clone)
    assert detached is clone and not clone.base_dist.loc.requires_grad and not clone.net.weight.requires_grad
    close(clone.log_prob(x), dist.log_prob(x).detach(), torch.float32)


def test_magic_box() -> None:
    x = torch.tensor([0.3, -2.0], requires_grad=True)
    box = l2l.magic_box(x)
    assert torch.equal(box, torch.ones(2)) and l2l.magic_box(7) == 7
    first = torch.autograd.grad(box.sum(), x, create_graph=True)[0]
    assert torch.equal(first, torch.ones(2))
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], torch.ones(2))


def test_accuracy() -> None:
    preds = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    found = l2l.accuracy(preds, torch.tensor([1, 0, 0]))
    assert found.dtype == torch.float32
    close(found, torch.tensor(2 / 3), torch.float32)


def test_flatten_config() -> None:
    @dataclasses.dataclass
    class Inner:
        lr: float = 0.1

    @dataclasses.dataclass
    class Outer:
        inner: Inner
        ways: int = 5

    assert l2l.flatten_config(Outer(Inner())) == {"inner.lr": 0.1, "ways": 5}
    args = argparse.Namespace(seed=1, options={"a": {"b": 2}})
    assert l2l.flatten_config(args) == {"seed": 1, "options.a.b": 2}
    assert l2l.flatten_config({"x": Inner()}, prefix="top") == {"top.x.lr": 0.1}


class Factors(nn.Module):
    """A gradient times a learnt vector."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.linspace(0.5, 1.5, size, dtype=torch.float64))

    def forward(self, grad: Tensor) -> Tensor:
        return self.factors * grad


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapts", [False, True])
def test_gbml(first_order: bool, adapts: bool) -> None:
    net, data = network(), rows()
    gbml = GBML(net, ModuleTransform(Factors), lr=0.4, adapt_transform=adapts, first_order=first_order)
    x, y, query, target = data
    values = list(net.parameters())
    factors = [t.transform.factors for t in gbml.compute_update.transforms_modules]
    names = [name for name, _ in net.named_parameters()]

    def outputs(x: Tensor) -> Tensor:
        out: Tensor = functional_call(net, dict(zip(names, values, strict=True)), (x,))
        return out

    for step in range(3):
        loss = cross_entropy(outputs(x), y)
        if adapts and step:
            slopes = torch.autograd.grad(loss, factors, create_graph=not first_order, retain_graph=True)
            factors = [f - 0.4 * g for f, g in zip(factors, slopes, strict=True)]
        slopes = torch.autograd.grad(loss, values, create_graph=adapts or not first_order)
        values = [
            v - 0.4 * (f * g.flatten()).reshape(v.shape)
            for v, f, g in zip(values, factors, slopes, strict=True)
        ]
    wanted = cross_entropy(outputs(query), target)
    found = adapted_loss(gbml.clone(), data, 3)
    close(found, wanted)
    close(gradients(found, gbml.parameters()), gradients(wanted, gbml.parameters()))


def test_gbml_arguments() -> None:
    with pytest.raises(TypeError, match="kwargs: expected compute_update or nothing, got allow_unsued"):
        GBML(network(), nn.Identity, allow_unsued=True)
    gbml = GBML(network(), lambda p: None, lr=0.1).clone(
        adapt_transform=True, allow_nograd=True, first_order=True
    )
    assert (gbml.adapt_transform, gbml.allow_nograd, gbml.first_order, gbml.lr) == (True, True, True, 0.1)


def test_parameter_update() -> None:
    net, (x, y, *_) = network(), rows()
    update = l2l.optim.ParameterUpdate(
        net.parameters(),
        TransformDictionary({net[0]: MetaCurvatureTransform, net[2].bias: lambda p: nn.Tanh()}),
    )
    assert update.transforms_indices == [0, 1, None, 2]
    with torch.no_grad():
        update.transforms_modules[1].mc.fill_(3.0)
    loss = cross_entropy(net(x), y)
    slopes = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    found = update(loss, net.parameters(), retain_graph=True)
    for f, wanted in zip(found, (slopes[0], 3 * slopes[1], slopes[2], slopes[3].tanh()), strict=True):
        close(f, wanted)
    net[0].weight.requires_grad_(False)
    assert update(cross_entropy(net(x), y), net.parameters(), allow_nograd=True)[0] is None
    with pytest.raises(ValueError, match=r"transform: expected a torch.nn.Module or None, got int"):
        l2l.optim.ParameterUpdate(net.parameters(), lambda p: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="dictionary: expected modules or parameters as keys, got str"):
        TransformDictionary({"weight": nn.Identity})


def test_differentiable_sgd() -> None:
    net = l2l.clone_module(network())
    before = [p.clone() for p in net.parameters()]
    grads = [torch.ones_like(p) for p in before]
    assert l2l.optim.DifferentiableSGD(0.5)(net, [None, *grads[1:]]) is None
    assert torch.equal(net[0].weight, before[0])
    close(net[2].bias, before[3] - 0.5)
    plain = network()
    plain(rows()[0]).sum().backward()
    wanted = plain[2].bias.detach() - 0.5 * plain[2].bias.grad
    l2l.optim.DifferentiableSGD(0.5)(plain)
    close(plain[2].bias, wanted)


def test_learnable_optimizer() -> None:
    """Two steps of hyper-gradient descent against the same written out."""
    x, y = torch.randn(5, 1, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    line = nn.Linear(1, 1, dtype=torch.float64)
    w, b = line.weight.detach().clone().requires_grad_(), line.bias.detach().clone().requires_grad_()
    optimizer = l2l.optim.LearnableOptimizer(line, ModuleTransform(Factors), lr=0.1)
    factors = [t.transform.factors for t in optimizer.transforms]
    assert sum(p.numel() for p in optimizer.parameters()) == 2
    first = torch.autograd.grad(mse_loss(x @ w + b, y), [w, b])
    w1, b1 = (p.detach() - 0.1 * f * g for p, f, g in zip((w, b), factors, first, strict=True))
    second = mse_loss(x @ w1 + b1, y)
    hyper = torch.autograd.grad(second, factors, retain_graph=True)
    slopes = torch.autograd.grad(second, [w1, b1])
    w2, b2 = (p.detach() - 0.1 * f * g for p, f, g in zip((w1, b1), factors, slopes, strict=True))

    optimizer.zero_grad()
    mse_loss(line(x), y).backward()
    optimizer.step()
    close([line.weight, line.bias], [w1, b1])
    loss = mse_loss(line(x), y)
    optimizer.zero_grad()
    loss.backward()
    close([f.grad for f in factors], list(hyper))
    assert optimizer.step(lambda: 7) == 7
    close([line.weight, line.bias], [w2, b2])
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        l2l.optim.LearnableOptimizer([], nn.Identity)  # type: ignore[arg-type]


def test_learnable_optimizer_leaves_what_has_no_gradient() -> None:
    net = network()
    optimizer = l2l.optim.LearnableOptimizer(net, lambda p: None, lr=1.0)
    bias, weight = net[2].bias, net[0].weight.detach().clone()
    net[0].weight.square().sum().backward()
    optimizer.step()
    close(net[0].weight, -weight)
    assert net[2].bias is bias
    net[0].weight.grad = torch.ones_like(weight)
    optimizer.zero_grad()
    assert torch.equal(net[0].weight.grad, torch.zeros_like(weight))


def test_meta_curvature() -> None:
    for shape in ((5,), (3, 4), (4, 3, 2, 5)):
        grad = torch.randn(shape, dtype=torch.float64)
        transform = MetaCurvatureTransform(grad, lr=0.5)
        close(transform(grad), 0.5 * grad)
        with torch.no_grad():
            for p in transform.parameters():
                p.normal_()
        if len(shape) == 1:
            wanted = transform.mc * grad
        elif len(shape) == 2:
            wanted = torch.einsum("ai,ij,jb->ab", transform.mc_in, grad, transform.mc_out)
        else:
            maps = torch.einsum(
                "ai,ijf,jb,cf->abc", transform.mc_in, grad.flatten(2), transform.mc_out, transform.mc_f
            )
            wanted = maps.reshape(shape)
        close(transform(grad), 0.5 * wanted)
    with pytest.raises(NotImplementedError, match=r"got shape \[2, 2, 2\]"):
        MetaCurvatureTransform(torch.zeros(2, 2, 2))


def test_kronecker_transform() -> None:
    transform = KroneckerTransform(l2l.nn.KroneckerLinear)
    for shape, factors in (((5,), (5, 1)), ((3, 4), (3, 4)), ((6, 3, 2, 5), (3, 10))):
        made = transform(torch.zeros(shape))
        assert isinstance(made, ReshapedTransform)
        linear = made.transform
        assert (*linear.left.shape, *linear.right.shape) == (factors[0],) * 2 + (factors[1],) * 2
        assert linear.bias is None and linear.psd
        grad = torch.randn(shape)
        close(made(grad), grad, torch.float32)
    with pytest.raises(
        NotImplementedError, match=r"param: expected 1, 2 or 4 dimensions, got shape \[1, 1, 1\]"
    ):
        transform(torch.zeros(1, 1, 1))


@pytest.mark.parametrize("psd", [False, True])
def test_kronecker_linear(psd: bool) -> None:
    layer = l2l.nn.KroneckerLinear(3, 4, psd=psd).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    left = layer.left.t() @ layer.left if psd else layer.left
    right = layer.right.t() @ layer.right if psd else layer.right
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    close(layer(x), torch.stack([left @ value @ right + layer.bias for value in x]))
    vector = torch.randn(12, dtype=torch.float64)
    close(
        layer(vector),
        torch.kron(right.t().contiguous(), left.contiguous()) @ vector + layer.bias.t().flatten(),
    )
    for wrong in (torch.zeros(4, 3), torch.zeros(11)):
        with pytest.raises(ValueError, match=r"x: expected shape \[..., 3, 4\] or \[12\]"):
            layer(wrong.double())
    assert l2l.nn.KroneckerLinear(2, 2, bias=False).bias is None
    product = l2l.nn.kronecker_addmm(left, right, x[0], layer.bias, alpha=2.0, beta=3.0)
    close(product, 2 * left @ x[0] @ right + 3 * layer.bias)


def test_kronecker_cells() -> None:
    x, h, c = torch.randn(3, 2, 3)
    rnn, lstm = l2l.nn.KroneckerRNN(2, 3), l2l.nn.KroneckerLSTM(2, 3)
    with torch.no_grad():
        for p in (*rnn.parameters(), *lstm.parameters()):
            p.normal_()
    out, hidden = rnn(x, h)
    close(hidden, (rnn.W_h(x) + rnn.U_h(h)).tanh(), torch.float32)
    close(out, rnn.W_y(hidden), torch.float32)
    i, f, o = (
        (lstm.get_submodule(f"W_i{g}")(x) + lstm.get_submodule(f"W_h{g}")(h)).sigmoid()
        for g in ("i", "f", "o")
    )
    state = f * c + i * (lstm.W_ig(x) + lstm.W_hg(h)).tanh()
    close(lstm(x, (h, c)), (o * state.tanh(), (o * state.tanh(), state)), torch.float32)
    names = [name for name, _ in lstm.named_children()]
    assert names == ["W_ii", "W_hi", "W_if", "W_hf", "W_ig", "W_hg", "W_io", "W_ho", "sigma", "tanh"]


@DTYPES
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_prototypical_classifier(dtype: torch.dtype, normalize: bool, distance: str) -> None:
    support, query = torch.randn(11, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    labels = torch.tensor([7, 3, 3, 7, 20, 7, 7, 3, 20, 20, 7])
    for x in (support, query):
        x.requires_grad_()
    means = torch.stack([support[labels == k].mean(0) for k in (3, 7, 20)])
    compared = query
    if normalize or distance == "cosine":
        means = means / (means.norm(dim=1, keepdim=True) + 1e-8)
        compared = query / (query.norm(dim=1, keepdim=True) + 1e-8)
    squares = (compared[:, None] - means[None]).square().sum(-1)
    wanted = compared @ means.t() if distance == "cosine" else -squares
    classifier = l2l.nn.PrototypicalClassifier(support, labels, distance, normalize)
    assert classifier.normalize == (normalize or distance == "cosine")
    found = classifier(query)
    close(classifier.prototypes, means, dtype)
    close(found, wanted, dtype)
    weights = torch.randn_like(wanted)
    close(
        torch.autograd.grad((found * weights).sum(), [support, query]),
        torch.autograd.grad((wanted * weights).sum(), [support, query]),
        dtype,
    )
    again = l2l.nn.PrototypicalClassifier(distance=distance, normalize=normalize)
    assert again.fit_(support, labels) is again.prototypes
    assert torch.equal(again(query), found)


def test_prototypical_classifier_functions() -> None:
    kind = l2l.nn.PrototypicalClassifier
    means, queries = torch.randn(3, 4), torch.randn(5, 4)
    assert kind.euclidean_distance(means, queries).shape == (5, 3)
    close(kind.euclidean_distance(means, queries), torch.cdist(queries, means).square(), torch.float32)
    close(kind.cosine_distance(means, queries), -queries @ means.t(), torch.float32)
    close(kind.normalize(means), means / means.norm(dim=1, keepdim=True), torch.float32)
    assert torch.equal(kind.normalize(torch.zeros(1, 2)), torch.zeros(1, 2))
    close(kind.normalize(means, epsilon=1.0), means / (means.norm(dim=1, keepdim=True) + 1), torch.float32)
    own = kind(means, torch.tensor([0, 1, 2]), distance=lambda p, q: q[:, :1] - p[:, 0])
    close(own(queries), means[:, 0] - queries[:, :1], torch.float32)
    maps = torch.randn(4, 2, 3, 3)
    close(
        compute_prototypes(maps, torch.tensor([1, 0, 1, 1])),
        torch.stack([maps[1], maps[[0, 2, 3]].mean(0)]),
        torch.float32,
    )
    with pytest.raises(
        ValueError, match="distance: expected euclidean, cosine or a function, got 'manhattan'"
    ):
        kind(distance="manhattan")
    with pytest.raises(AssertionError, match="fit_"):
        kind()(queries)


def test_small_modules() -> None:
    x = torch.randn(3, 2, 4)
    assert torch.equal(l2l.nn.Lambda(lambda a, b: a * b)(x, b=2), 2 * x)
    assert torch.equal(l2l.nn.Flatten()(x.transpose(1, 2)), x.transpose(1, 2).reshape(3, 8))
    for shape, size in ((None, (1,)), (4, (4,)), ([2, 4], (2, 4))):
        scale = l2l.nn.Scale(shape, alpha=0.5)  # type: ignore[arg-type]
        assert scale.alpha.shape == size and isinstance(scale.alpha, nn.Parameter)
        assert torch.equal(scale(x), 0.5 * x)
    net = network()
    assert l2l.nn.freeze(net) is net and not any(p.requires_grad for p in net.parameters())
    assert l2l.nn.unfreeze(net) is net and all(p.requires_grad for p in net.parameters())


class Adapter(nn.Module):
    """A layer with a learnt bias behind it."""

    def __init__(self, module: nn.Linear) -> None:
        super().__init__()
        self.module = module
        self.offset = nn.Parameter(torch.ones_like(module.bias))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x) + self.offset
        return out

    def meta_parameters(self) -> Iterator[Tensor]:
        yield self.offset


def test_meta_module() -> None:
    net, x = network(), torch.randn(5, 4, dtype=torch.float64)
    first, last = net[0], net[2]
    wanted = last(torch.tanh(first(x) + 1)) + 1
    meta = l2l.nn.MetaModule(net, {nn.Linear: Adapter})
    close(meta(x), wanted)
    offsets = list(meta.meta_parameters())
    assert [p.shape for p in offsets] == [(6,), (3,)] and all(p.requires_grad for p in offsets)
    assert not first.weight.requires_grad
    base = meta.module()
    assert base is net and base[0] is first and base[2] is last
    assert l2l.nn.MetaModule(network(), {}, freeze_module=False).wrapped_module[0].weight.requires_grad


def test_parameter_transform() -> None:
    layer = nn.Linear(3, 2)
    wrapped = l2l.nn.ParameterTransform(layer, lambda p: l2l.nn.Scale(p.shape, alpha=2.0))
    x = torch.randn(4, 3)
    close(wrapped(x), 2 * layer(x), torch.float32)
    wrapped(x).sum().backward()
    assert len(list(wrapped.meta_parameters())) == 2
    assert all(p.grad is not None for p in wrapped.parameters()) and isinstance(layer.weight, nn.Parameter)
    with pytest.raises(
        ValueError, match=r"module: expected a layer without submodules, got the parameter 0.weight"
    ):
        l2l.nn.ParameterTransform(network(), lambda p: nn.Identity())


# The migration page.

NAMES, BLOCKS = page("learn2learn")
MODULES = (
    "",
    ".algorithms",
    ".data",
    ".nn",
    ".optim.transforms",
    ".optim",
    ".vision.benchmarks",
    ".vision.datasets",
    ".vision.models",
)


@pytest.mark.parametrize(("name", "status", "note"), NAMES)
def test_the_table_is_true(name: str, status: str, note: str) -> None:
    assert_row_is_true(name, status, note)


def test_the_table_has_every_public_name() -> None:
    names = [name for name, _, _ in NAMES]
    assert len(set(names)) == len(names) > 80
    for module in MODULES:
        ours = importlib.import_module(f"metafast.compat.learn2learn{module}")
        for name in ours.__all__:
            value = getattr(ours, name)
            written = f"learn2learn{module}.{name}"
            known = written in names or written.replace("optim.", "optim.transforms.") in names
            assert known or isinstance(value, types.ModuleType) or name == "BenchmarkTasksets", written


def test_the_line_that_hands_all_tasks_over_gives_the_same_numbers() -> None:
    one, loop, batch = BLOCKS
    names: dict[str, Any] = {}
    exec(one, names)
    assert names["l2l"] is l2l
    x, y, query, target = (torch.stack(values) for values in zip(*(rows() for _ in range(3)), strict=True))
    results = []
    net = network()
    for code in (loop, batch):
        exec(code, names)
        loss = names["meta_loss"](net, x, y, query, target)
        results.append([loss, *gradients(loss, net.parameters())])
    close(*results)
