"""metafast.compat.torchmeta: modules, gradient steps and losses against plain torch; the migration page."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, one_hot

import metafast.compat.torchmeta as tm
from metafast.compat.torchmeta import modules, utils
from metafast.compat.torchmeta.modules import parallel
from metafast.compat.torchmeta.utils import gradient_update_parameters, metrics
from tests.pages import assert_row_is_true, page

Named = dict[str, Tensor]
#: Absolute and relative distance to the oracle.
CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", CLOSE, ids=str)


def close(found: Any, wanted: Any, dtype: torch.dtype = torch.float64) -> None:
    torch.testing.assert_close(found, wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype])


# Modules: what torch's own module of the same arguments gives with the parameters in its place.

Layer = tuple[Callable[[], Any], Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]
X = torch.float64
LAYERS: dict[str, Layer] = {
    "linear": (
        lambda: modules.MetaLinear(4, 3),
        lambda: nn.Linear(4, 3),
        lambda: (torch.randn(5, 4, dtype=X),),
    ),
    "linear, no bias": (
        lambda: modules.MetaLinear(4, 3, bias=False),
        lambda: nn.Linear(4, 3, bias=False),
        lambda: (torch.randn(5, 4, dtype=X),),
    ),
    "bilinear": (
        lambda: modules.MetaBilinear(4, 2, 3),
        lambda: nn.Bilinear(4, 2, 3),
        lambda: (torch.randn(5, 4, dtype=X), torch.randn(5, 2, dtype=X)),
    ),
    "conv1d": (
        lambda: modules.MetaConv1d(2, 3, 3, padding=1, padding_mode="circular"),
        lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"),
        lambda: (torch.randn(3, 2, 7, dtype=X),),
    ),
    "conv2d": (
        lambda: modules.MetaConv2d(2, 4, 3, stride=2, groups=2, dilation=2),
        lambda: nn.Conv2d(2, 4, 3, stride=2, groups=2, dilation=2),
        lambda: (torch.randn(3, 2, 8, 8, dtype=X),),
    ),
    "conv3d": (
        lambda: modules.MetaConv3d(2, 3, 2),
        lambda: nn.Conv3d(2, 3, 2),
        lambda: (torch.randn(2, 2, 3, 3, 3, dtype=X),),
    ),
    "batch norm 1d": (
        lambda: modules.MetaBatchNorm1d(4, momentum=None),
        lambda: nn.BatchNorm1d(4, momentum=None),
        lambda: (torch.randn(6, 4, dtype=X),),
    ),
    "batch norm 2d": (
        lambda: modules.MetaBatchNorm2d(2, momentum=0.3, eps=1e-3),
        lambda: nn.BatchNorm2d(2, momentum=0.3, eps=1e-3),
        lambda: (torch.randn(3, 2, 4, 4, dtype=X),),
    ),
    "batch norm 2d, no statistics": (
        lambda: modules.MetaBatchNorm2d(2, track_running_stats=False),
        lambda: nn.BatchNorm2d(2, track_running_stats=False),
        lambda: (torch.randn(3, 2, 4, 4, dtype=X),),
    ),
    "batch norm 3d": (
        lambda: modules.MetaBatchNorm3d(2),
        lambda: nn.BatchNorm3d(2),
        lambda: (torch.randn(2, 2, 3, 3, 3, dtype=X),),
    ),
    "layer norm": (
        lambda: modules.MetaLayerNorm([2, 4], eps=1e-3),
        lambda: nn.LayerNorm([2, 4], eps=1e-3),
        lambda: (torch.randn(5, 2, 4, dtype=X),),
    ),
    "embedding": (
        lambda: modules.MetaEmbedding(6, 3, padding_idx=0),
        lambda: nn.Embedding(6, 3, padding_idx=0),
        lambda: (torch.randint(6, (3, 4)),),
    ),
    "embedding bag": (
        lambda: modules.MetaEmbeddingBag(6, 3, mode="max", padding_idx=1),
        lambda: nn.EmbeddingBag(6, 3, mode="max", padding_idx=1),
        lambda: (torch.randint(6, (9,)), torch.tensor([0, 4])),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, training: bool) -> None:
    make, plain, inputs = LAYERS[name]
    torch.manual_seed(1)
    ours = make().to(X).train(training)
    torch.manual_seed(1)
    theirs = plain().to(X).train(training)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    data = inputs()
    for given in (False, True):
        values = {
            key: (value.detach() * 2 + 0.1).requires_grad_() for key, value in theirs.named_parameters()
        }
        if given:
            found, wanted = ours(*data, params=values), functional_call(theirs, values, data)
            slopes = [
                torch.autograd.grad(out.square().sum(), list(values.values())) for out in (found, wanted)
            ]
        else:
            found, wanted = ours(*data), theirs(*data)
            slopes = [
                torch.autograd.grad(out.square().sum(), list(net.parameters()))
                for out, net in ((found, ours), (wanted, theirs))
            ]
        close(found, wanted)
        close(*slopes)
        close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "add_bias_kv": True},
        {"kdim": 3, "vdim": 5},
        {"add_zero_attn": True},
        {"batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention(options: dict[str, Any], need_weights: bool) -> None:
    torch.manual_seed(1)
    ours = modules.MetaMultiheadAttention(4, 2, **options).double()
    assert isinstance(ours.out_proj, modules.MetaLinear)
    theirs = nn.MultiheadAttention(4, 2, **options).double()
    theirs.load_state_dict(ours.state_dict())
    query = torch.randn(3, 2, 4, dtype=X)
    key = torch.randn(3, 2, options.get("kdim", 4), dtype=X)
    value = torch.randn(3, 2, options.get("vdim", 4), dtype=X)
    plain = {"need_weights": need_weights}
    close(ours(query, key, value, **plain), theirs(query, key, value, **plain))
    params = {name: (p.detach() * 2 + 0.1).requires_grad_() for name, p in ours.meta_named_parameters()}
    found = ours(query, key, value, params=params, **plain)
    close(found, functional_call(theirs, params, (query, key, value), plain))
    # The fused attention has no second derivative.
    slopes = torch.autograd.grad(found[0].square().sum(), list(params.values()), create_graph=True)
    second = torch.autograd.grad(sum(slope.square().sum() for slope in slopes), list(params.values()))
    assert all(bool(slope.isfinite().all()) for slope in second)


def test_attention_without_bias_by_position_has_none() -> None:
    assert modules.MetaMultiheadAttention(4, 2, 0.0, False).out_proj.bias is None


def test_a_bias_that_is_not_given_is_none() -> None:
    layer, x = modules.MetaLinear(2, 2), torch.randn(3, 2)
    close(layer(x, params={"weight": layer.weight}), x @ layer.weight.t(), torch.float32)
    with pytest.raises(KeyError, match="weight"):
        layer(x, params={"bias": layer.bias})


class Net(modules.MetaModule):
    """Parts that are meta and parts that are not; one parameter is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = modules.MetaSequential(
            modules.MetaConv2d(1, 2, 3), modules.MetaBatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)
        )
        self.head = modules.MetaLinear(4, 3)
        self.again = self.head
        self.scale = nn.Parameter(torch.ones(()))
        self.register_parameter("frozen", None)

    def forward(self, x: Tensor, params: Any = None) -> Tensor:
        x = self.body(x, params=self.get_subdict(params, "body"))
        scale = self.scale if params is None else params["scale"]
        return scale * self.head(x, params=self.get_subdict(params, "head"))


def test_names_of_parameters() -> None:
    net = Net()
    body = ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]
    assert [name for name, _ in net.meta_named_parameters()] == ["scale", *body, "head.weight", "head.bias"]
    assert [name for name, _ in net.meta_named_parameters("net", recurse=False)] == ["net.scale"]
    assert [p.shape for p in net.meta_parameters()] == [p.shape for _, p in net.meta_named_parameters()]
    assert len(list(net.meta_parameters(recurse=False))) == 1
    wrapped = nn.Sequential(net)
    assert not hasattr(wrapped, "meta_parameters")
    assert [name for name, _ in modules.MetaSequential(nn.Linear(2, 2)).meta_named_parameters()] == []


def test_a_shared_parameter_comes_once() -> None:
    net = modules.MetaSequential(modules.MetaLinear(2, 2), modules.MetaLinear(2, 2))
    net[1].weight = net[0].weight
    assert [name for name, _ in net.meta_named_parameters()] == ["0.weight", "0.bias", "1.bias"]


def test_cumulative_running_statistics() -> None:
    net = modules.MetaBatchNorm1d(2, momentum=None)
    batches = torch.randn(3, 8, 2)
    for batch in batches:
        net(batch, params={"weight": torch.ones(2), "bias": torch.zeros(2)})
    close(net.running_mean, batches.mean((0, 1)), torch.float32)
    assert net.num_batches_tracked == 3


def test_parts_of_params() -> None:
    net, one = Net(), torch.zeros(())
    params = {"body.0.weight": one, "body2.0.weight": one + 1, "head.weight": one + 2}
    assert net.get_subdict(None, "body") is None
    found = net.get_subdict(params, "body")
    assert found == {"0.weight": one} and isinstance(found, OrderedDict)
    assert net.get_subdict(params, "body.0") == {"weight": one}
    assert net.get_subdict(params) == params
    with pytest.warns(
        UserWarning, match=r"params: nothing .* submodule 'again' of Net.*there are body\.0\.weight"
    ):
        assert net.get_subdict(params, "again") is None


def test_a_sequence_of_modules() -> None:
    net, x = Net().double().eval(), torch.randn(2, 1, 4, 4, dtype=X)
    params = {name: p * 1.5 for name, p in net.meta_named_parameters()}
    close(net(x, params=params), functional_call(net, params, (x,)))
    # The linear layer in the body is no MetaModule, and computes with its own.
    params["body.4.weight"] = torch.zeros(4, 8, dtype=X)
    assert not torch.equal(net.body(x, net.get_subdict(params, "body")), torch.zeros(2, 4, dtype=X))
    broken = modules.MetaSequential(modules.MetaLinear(2, 2))
    broken._modules["0"] = "no module"  # type: ignore[assignment]
    with pytest.raises(TypeError, match="0: expected a module, got str"):
        broken(torch.zeros(1, 2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_running_statistics_that_are_turned_off_later(training: bool, given: bool) -> None:
    net, x = modules.MetaBatchNorm1d(2), torch.randn(8, 2, dtype=X)
    net.to(X).train(training).track_running_stats = False
    found = net(x, params=OrderedDict(net.named_parameters()) if given else None)
    close(found, (x - x.mean(0)) / (x.var(0, correction=0) + net.eps).sqrt(), X)
    assert net.num_batches_tracked == 0
    close(net.running_mean, 0.1 * x.mean(0), X)


def test_running_statistics_belong_to_the_module() -> None:
    net, x = modules.MetaBatchNorm1d(2), torch.randn(8, 2)
    params = {name: p * 2 for name, p in net.named_parameters()}
    before = net.running_mean.clone()
    net(x, params=params)
    assert net.num_batches_tracked == 1 and not torch.equal(net.running_mean, before)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        net(torch.zeros(1, 2, 3, 4), params=params)


def test_data_parallel() -> None:
    net = modules.MetaLinear(3, 2)
    wrapped, x = modules.DataParallel(net), torch.randn(4, 3)
    assert [name for name, _ in wrapped.meta_named_parameters()] == ["module.weight", "module.bias"]
    params = gradient_update_parameters(wrapped, wrapped(x).square().mean())
    wanted = functional_call(net, {name.removeprefix("module."): p for name, p in params.items()}, (x,))
    wrapped.device_ids = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(wrapped(x, params=params), wanted, torch.float32)
        close(wrapped(x, params={n[7:]: p for n, p in params.items()}), wanted, torch.float32)
        close(wrapped(x), net(x), torch.float32)
    plain = modules.DataParallel(nn.Linear(3, 2))
    plain.device_ids = []
    assert plain(x).shape == (4, 2)


def test_parameters_on_several_devices() -> None:
    value = torch.ones(2, requires_grad=True)
    one, two = parallel.on_devices({"w": value * 2}, ["cpu", "cpu"])
    close(torch.autograd.grad((one["w"] + two["w"]).sum(), value)[0], torch.full((2,), 4.0), torch.float32)
    assert parallel.on_devices({"w": value}, ["meta"])[0]["w"].device.type == "meta"
    with torch.no_grad():
        assert not parallel.on_devices({"w": value}, ["cpu"])[0]["w"].requires_grad


# Steps of gradient descent.


def network(dtype: torch.dtype) -> Any:
    return modules.MetaSequential(modules.MetaLinear(4, 6), nn.Tanh(), modules.MetaLinear(6, 3)).to(dtype)


@DTYPES
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("rate", ["number", "tensor", "dict"])
def test_maml(dtype: torch.dtype, first_order: bool, rate: str) -> None:
    net, x = network(dtype), torch.randn(2, 9, 4, dtype=dtype)
    y = torch.randint(3, (2, 9))
    step: Any = 0.3
    learnt: list[Tensor] = []
    if rate == "tensor":
        step = torch.tensor(0.3, dtype=dtype, requires_grad=True)
        learnt = [step]
    if rate == "dict":
        step = {name: torch.rand_like(p).requires_grad_() for name, p in net.named_parameters()}
        step["0.bias"] = 0.2
        learnt = [value for value in step.values() if isinstance(value, Tensor)]
    results = []
    for by_hand in (False, True):
        params: Any = None
        for _ in range(3):
            loss = cross_entropy(net(x[0], params=params), y[0])
            if not by_hand:
                params = gradient_update_parameters(
                    net, loss, params=params, step_size=step, first_order=first_order
                )
                assert isinstance(params, OrderedDict)
                continue
            params = dict(net.named_parameters()) if params is None else params
            slopes = torch.autograd.grad(loss, list(params.values()), create_graph=not first_order)
            params = {
                name: p - (step[name] if rate == "dict" else step) * slope
                for (name, p), slope in zip(params.items(), slopes, strict=True)
            }
        outer = cross_entropy(net(x[1], params=params), y[1])
        results.append([outer, *torch.autograd.grad(outer, [*net.parameters(), *learnt])])
    close(*results, dtype)


def test_the_step_size_is_a_half_unless_given() -> None:
    net = modules.MetaLinear(2, 1, bias=False)
    x = torch.tensor([[1.0, 3.0]])
    found = gradient_update_parameters(net, net(x).sum())
    close(found["weight"], net.weight - 0.5 * x, torch.float32)


def test_wrong_steps() -> None:
    net = modules.MetaLinear(2, 1)
    with pytest.raises(ValueError, match=r"model: expected a torchmeta.modules.MetaModule, got .*\.Linear"):
        gradient_update_parameters(nn.Linear(2, 1), torch.zeros(()))  # type: ignore[arg-type]
    loss = net(torch.ones(1, 2)).sum()
    with pytest.raises(ValueError, match="step_size: expected one for each parameter, got none for bias"):
        gradient_update_parameters(net, loss, step_size={"weight": 0.1})
    with pytest.raises(RuntimeError, match="not have been used"):
        gradient_update_parameters(Net(), Net().scale * 1.0)


# Prototypes and matching.


def rows(dtype: torch.dtype, ways: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    support = torch.randn(3, 10, 6, dtype=dtype, requires_grad=True)
    query = torch.randn(3, 7, 6, dtype=dtype, requires_grad=True)
    return support, torch.randint(ways, (3, 10)), query, torch.randint(ways, (3, 7))


def twice(loss: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The loss, its gradients, and the gradients of a function of these."""
    first = torch.autograd.grad(loss.sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(slope.sin().sum() for slope in first), inputs)
    return [loss, *first, *second]


def test_counts() -> None:
    targets = torch.tensor([[0, 2, 2], [1, 1, 1]])
    found = utils.get_num_samples(targets, 4)
    assert found.dtype == torch.int64 and found.tolist() == [[1, 0, 2, 0], [0, 3, 0, 0]]
    assert utils.get_num_samples(targets, 4, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(TypeError, match=r"targets: expected int64 class numbers, got torch\.float32"):
        utils.get_num_samples(targets.float(), 4)


@DTYPES
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.1}], ids=str
)
def test_prototypes(dtype: torch.dtype, options: dict[str, Any]) -> None:
    support, labels, query, answers = rows(dtype)
    # Class 4 has no row, and its prototype is 0.
    members = one_hot(labels, 5).to(dtype)
    means = members.mT @ support / members.sum(1).clamp(min=1).unsqueeze(-1)
    found = utils.get_prototypes(support, labels, 5)
    close(found, means, dtype)
    assert not found[:, 4].any()
    distances = (means.unsqueeze(2) - query.unsqueeze(1)).square().sum(-1)
    wanted = cross_entropy(-distances, answers, **options)
    loss = utils.prototypical_loss(found, query, answers, **options)
    apart = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(
        twice(loss, (support, query)), twice(wanted, (support, query)), rtol=apart, atol=apart
    )


def test_prototypes_of_other_kinds() -> None:
    support, labels, query, answers = rows(X)
    means = utils.get_prototypes(support, labels, 4)
    for count in (torch.tensor(4), np.int64(4)):
        assert torch.equal(utils.get_prototypes(support, labels, count), means)  # type: ignore[arg-type]
    # As torch's own operators do it, of two dtypes the larger.
    mixed = utils.prototypical_loss(means.float(), query, answers)
    close(mixed, utils.prototypical_loss(means.float().to(X), query, answers), X)
    with pytest.raises(TypeError, match=r"targets: expected int64 class numbers, got torch\.float64"):
        utils.get_prototypes(support, torch.rand(3, 10, 4, dtype=X), 4)
    with pytest.raises(TypeError, match="embeddings: expected float32, float64"):
        utils.get_prototypes(support.long(), labels, 4)
    with pytest.raises(ValueError, match="targets: expected size 10 in dimension -1, as embeddings has"):
        utils.get_prototypes(support, labels[:, :3], 4)
    with pytest.raises(ValueError, match="targets: expected class numbers from 0 to 1, got"):
        utils.get_prototypes(support, labels, 2)
    with pytest.raises(TypeError, match="num_classes: expected an int, got float"):
        utils.get_prototypes(support, labels, 4.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="embeddings: expected size 6 in dimension -1, as prototypes has"):
        utils.prototypical_loss(means, query[..., :5], answers)
    with pytest.raises(TypeError, match="prototypes: expected a tensor, got list"):
        utils.prototypical_loss([], query, answers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"leading dimensions: .*prototypes has \[3\], embeddings has \[2\]"):
        utils.prototypical_loss(means, query[:2], answers)


def test_targets_of_prototypes() -> None:
    """-100 is ignored and others that are of no class are refused, as by torch; shares of classes are taken too."""
    support, labels, query, answers = rows(X)
    means = utils.get_prototypes(support, labels, 5)

    def plain(means: Tensor, query: Tensor, targets: Tensor) -> Tensor:
        distances = (means.unsqueeze(2) - query.unsqueeze(1)).square().sum(-1)
        return cross_entropy(-distances, targets)

    ignored = answers.clone()
    ignored[1, :3] = -100
    shares = torch.rand(3, 5, query.shape[1], dtype=X).softmax(1)
    for targets in (ignored, shares, torch.full_like(answers, -100)):
        found = utils.prototypical_loss(means, query, targets)
        torch.testing.assert_close(found, plain(means, query, targets), equal_nan=True)
    for number in (5, -1):
        with pytest.raises(IndexError, match="out of bounds"):
            utils.prototypical_loss(means, query, torch.full_like(answers, number))
    compiled = torch.compile(utils.prototypical_loss, backend="aot_eager", fullgraph=True)
    for targets in (answers, ignored):
        own = means.detach(), query.detach(), targets
        torch.testing.assert_close(compiled(*own), plain(*own))
    with pytest.raises(ValueError, match="batch_size"):
        utils.prototypical_loss(means, query[:1], answers[:1])
    with pytest.raises((RuntimeError, ValueError)):
        utils.prototypical_loss(means, query, answers[:, :2])
    assert utils.prototypical_loss(means, query[:, :0], answers[:, :0]).isnan()
    for dtype in (torch.float16, torch.bfloat16):
        narrow = means.to(dtype), query.to(dtype)
        found = utils.prototypical_loss(*narrow, answers)
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), plain(*(v.double() for v in narrow), answers), rtol=1e-2, atol=1e-2
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert utils.prototypical_loss(means.bfloat16(), query.bfloat16(), answers).dtype == torch.float32


def similarity(x: Tensor, y: Tensor, eps: float) -> Tensor:
    lengths = x.square().sum(-1).unsqueeze(2) * y.square().sum(-1).unsqueeze(1)
    return x @ y.mT * lengths.clamp(min=eps**2).rsqrt()


def log_shares(support: Tensor, labels: Tensor, query: Tensor, ways: int, eps: float) -> Tensor:
    scores = similarity(support, query, eps)
    others = one_hot(labels, ways).mT.unsqueeze(-1) == 0
    of_class = scores.unsqueeze(1).masked_fill(others, -torch.inf).logsumexp(2)
    return of_class - scores.logsumexp(1, keepdim=True)


@DTYPES
@pytest.mark.parametrize("eps", [1e-8, 3.0, 100.0])
def test_matching(dtype: torch.dtype, eps: float) -> None:
    support, labels, query, answers = rows(dtype)
    # Every class has a row, but for the last.
    labels[:, :4] = torch.arange(4)
    apart = 1e-12 if dtype == torch.float64 else 5e-6
    found = utils.pairwise_cosine_similarity(support, query, eps)
    wanted = similarity(support, query, eps)
    torch.testing.assert_close(
        twice(found.exp(), (support, query)),
        twice(wanted.exp(), (support, query)),
        rtol=apart,
        atol=20 * apart,
    )
    shares = utils.matching_log_probas(support, labels, query, 5, eps)
    assert shares.shape == (3, 5, 7) and bool((shares[:, 4] == -torch.inf).all())
    torch.testing.assert_close(shares, log_shares(support, labels, query, 5, eps), rtol=apart, atol=apart)
    torch.testing.assert_close(
        utils.matching_probas(support, labels, query, 5, eps).sum(1), torch.ones(3, 7, dtype=dtype)
    )
    each = utils.matching_loss(support, labels, query, answers, 5, eps, reduction="none")
    assert torch.equal(each, -shares.gather(1, answers.unsqueeze(1)).squeeze(1))
    for options in ({}, {"reduction": "sum", "weight": torch.arange(1, 6).to(dtype)}):
        loss = utils.matching_loss(support, labels, query, answers, 5, eps, **options)
        # Of the classes that there are: the infinities of another have no derivative in the formula's parts.
        plain = log_shares(support, labels, query, 4, eps)
        weight = options.get("weight", torch.ones(5, dtype=dtype))[answers]
        own = -plain.gather(1, answers.unsqueeze(1)).squeeze(1) * weight
        total = own.sum() if options else own.mean()
        torch.testing.assert_close(
            twice(loss, (support, query)), twice(total, (support, query)), rtol=apart, atol=20 * apart
        )


def test_matching_under_torch_func() -> None:
    support, labels, query, answers = (value.detach() for value in rows(X))
    labels[:, :4] = torch.arange(4)

    def loss(x: Tensor, y: Tensor, q: Tensor, a: Tensor) -> Tensor:
        return utils.matching_loss(x[None], y[None], q[None], a[None], 4)

    slopes = torch.func.vmap(torch.func.grad(loss))(support, labels, query, answers)
    for task in range(3):
        close(slopes[task], torch.func.grad(loss)(support[task], labels[task], query[task], answers[task]))


def test_rows_of_length_0_are_like_no_row() -> None:
    x = torch.zeros(1, 2, 3, dtype=X, requires_grad=True)
    y = torch.ones(1, 2, 3, dtype=X, requires_grad=True)
    found = utils.pairwise_cosine_similarity(x, y, eps=0.5)
    slope_x, slope_y = torch.autograd.grad(found.sum(), (x, y))
    close(slope_x, torch.full((1, 2, 3), 2 / 0.5, dtype=X))
    assert not found.any() and not slope_y.any()


def test_wrong_rows() -> None:
    support, labels, query, answers = rows(X)
    with pytest.raises(ValueError, match=r"embeddings2: expected size 6 in dimension -1"):
        utils.pairwise_cosine_similarity(support, query[..., :5])
    with pytest.raises(
        TypeError, match=r"embeddings2: expected the dtype of embeddings1, torch.float64, got"
    ):
        utils.pairwise_cosine_similarity(support, query.float())
    with pytest.raises(
        ValueError, match=r"leading dimensions: .*embeddings1 has \[3\], embeddings2 has \[2\]"
    ):
        utils.pairwise_cosine_similarity(support, query[:2])
    with pytest.raises(TypeError, match="targets: expected int64 class numbers"):
        utils.matching_loss(support, labels.int(), query, answers, 4)
    with pytest.raises(ValueError, match="targets: expected size 10"):
        utils.matching_loss(support, labels[:, :3], query, answers, 4)
    with pytest.raises(ValueError, match="expected class numbers from 0 to 3, got "):
        utils.matching_loss(support, labels + 9, query, answers, 4)
    with pytest.raises(ValueError, match=r"test_targets: expected shape \[3, 7\], got \[7, 3\]"):
        utils.matching_loss(support, labels, query, answers.mT, 4)
    with pytest.raises(ValueError, match="test_embeddings: expected"):
        utils.matching_loss(support, labels, query[0, 0], answers, 4)


# Ridge regression.


@DTYPES
@pytest.mark.parametrize("size", [2, 30])
@pytest.mark.parametrize("woodbury", [None, True, False])
@pytest.mark.parametrize(("scale", "bias"), [(True, True), (False, True), (True, False)])
def test_ridge_regression(
    dtype: torch.dtype, size: int, woodbury: bool | None, scale: bool, bias: bool
) -> None:
    x = torch.randn(8, size, dtype=dtype, requires_grad=True)
    strength = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    labels = torch.arange(8) % 3
    found = utils.ridge_regression(x, labels, strength, 4, use_woodbury=woodbury, scale=scale, bias=bias)
    assert found._fields == ("weight", "bias") and (found.bias is None) == (not bias)
    exact = x.detach().double().requires_grad_()
    columns = torch.cat([exact.new_ones(8, 1), exact], 1) if bias else exact
    factor = 8 if scale else 1
    gram = columns.t() @ columns / factor + strength.double() * torch.eye(columns.shape[1], dtype=X)
    weights = torch.linalg.inv(gram) @ columns.t() @ one_hot(labels, 4).double() / factor
    apart = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.weight.double(), weights[int(bias) :].t(), rtol=apart, atol=apart)
    if found.bias is not None:
        torch.testing.assert_close(found.bias.double(), weights[0], rtol=apart, atol=apart)
    slopes = [
        [slope.double() for slope in torch.autograd.grad(w.square().sum(), (rows, strength))]
        for w, rows in ((found.weight, x), (weights[int(bias) :], exact))
    ]
    torch.testing.assert_close(*slopes, rtol=20 * apart, atol=20 * apart)


def test_ridge_regression_chooses_the_smaller_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    solve = torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda a, b: (sizes.append(len(a)), solve(a, b))[1])
    for n, d, bias in ((5, 4, True), (5, 4, False), (6, 4, True)):
        utils.ridge_regression(torch.randn(n, d), torch.randn(n, 2), 0.5, bias=bias)
    assert sizes == [5, 4, 5]


def test_ridge_regression_of_numbers_and_of_wrong_ones() -> None:
    x, y = torch.randn(6, 3, dtype=X), torch.randn(6, 2, dtype=X)
    found = utils.ridge_regression(x, y, 0.5, bias=False, scale=False)
    close(found.weight, (torch.linalg.inv(x.t() @ x + 0.5 * torch.eye(3, dtype=X)) @ x.t() @ y).t())
    with pytest.warns(UserWarning, match="num_classes: not given"):
        assert utils.ridge_regression(x, torch.tensor([0, 1, 2, 0, 1, 2]), 0.5).weight.shape == (3, 3)
    with pytest.raises(ValueError, match=r"targets: expected shape \[N, C\] of floating targets, got \[6\]"):
        utils.ridge_regression(x, y[:, 0], 0.5)
    with pytest.raises(
        ValueError, match=r"embeddings: expected shape \[N, D\], those of one task, got \[1, 6, 3\]"
    ):
        utils.ridge_regression(x[None], y, 0.5)
    with pytest.raises(ValueError, match="targets: expected size 6"):
        utils.ridge_regression(x, y[:4], 0.5)


# How hard an episode is.


def test_hardness(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
    monkeypatch.setattr(metrics, "_network", lambda: network)
    images, queries = torch.randn(2, 6, 3, 30, 31), torch.randn(2, 4, 3, 20, 30)
    labels, answers = torch.arange(6).remainder(3).expand(2, 6), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]])
    found = utils.hardness_metric({"support": (images, labels), "query": (queries, answers)}, 3)
    network.eval()

    def outputs(x: Tensor) -> Tensor:
        framed = torch.zeros(*x.shape[:3], 224, 224)
        top, left = (224 - x.shape[3]) // 2, (224 - x.shape[4]) // 2
        framed[..., top : top + x.shape[3], left : left + x.shape[4]] = x
        return torch.stack([network(task) for task in framed])

    with torch.no_grad():
        means = torch.stack([outputs(images).relu()[:, labels[0] == c].mean(1) for c in range(3)], 1)
        unit = means / means.norm(dim=2, keepdim=True)
        tests = outputs(queries)
        p = (unit @ (tests / tests.norm(dim=2, keepdim=True)).mT).softmax(1).gather(1, answers[:, None])[:, 0]
        torch.testing.assert_close(found, torch.log((1 - p) / p).mean(1))
    with pytest.raises(ValueError, match="batch: expected the key 'train' or 'support', got 'test'"):
        utils.hardness_metric({"test": (queries, answers)}, 3)
    with pytest.raises(ValueError, match=r"train: expected colour images .* got \[2, 6, 1, 30, 31\]"):
        utils.hardness_metric({"train": (images[:, :, :1], labels), "test": (queries, answers)}, 3)


def test_hardness_downloads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="hardness_metric needs torchvision"):
        metrics._network()
    stand_in: Any = types.ModuleType("torchvision.models")
    stand_in.resnet152 = lambda weights: nn.Linear(2, 3)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", stand_in)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"resnet152-b121ed2d\.pth"):
        metrics._network()
    (tmp_path / "checkpoints").mkdir()
    weights = nn.Linear(2, 3).state_dict()
    torch.save(weights, tmp_path / "checkpoints" / "resnet152-b121ed2d.pth")
    assert torch.equal(metrics._network().state_dict()["weight"], weights["weight"])


# The migration page.

NAMES, BLOCKS = page("torchmeta")
MODULES = (
    "",
    ".modules",
    ".utils",
    ".utils.data",
    ".transforms",
    ".toy",
    ".toy.helpers",
    ".datasets",
    ".datasets.helpers",
)


@pytest.mark.parametrize(("name", "status", "note"), NAMES)
def test_the_table_is_true(name: str, status: str, note: str) -> None:
    assert_row_is_true(name, status, note)


def test_the_table_has_every_public_name() -> None:
    names = [name for name, _, _ in NAMES]
    assert len(set(names)) == len(names) > 70
    for module in MODULES:
        ours = importlib.import_module(f"metafast.compat.torchmeta{module}")
        assert ours.__doc__ and len(set(ours.__all__)) == len(ours.__all__)
        for name in ours.__all__:
            value = getattr(ours, name)
            assert f"torchmeta{module}.{name}" in names or isinstance(value, types.ModuleType), name
            assert value.__doc__, name


def test_the_line_that_hands_all_tasks_over_gives_the_same_numbers() -> None:
    one, loop, batch = BLOCKS
    names: dict[str, Any] = {}
    exec(one, names)
    assert names["torchmeta"] is tm
    net = network(X)
    x, y = torch.randn(2, 3, 8, 4, dtype=X), torch.randint(3, (2, 3, 8))
    results = []
    for code in (loop, batch):
        exec(code, names)
        loss = names["meta_loss"](net, x[0], y[0], x[1], y[1])
        results.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    close(*results)
