"""metafast.compat.easyfsl: methods and networks against plain torch, the migration page, scripts as they stand."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize

import metafast
from metafast.compat.easyfsl import methods, modules
from metafast.compat.easyfsl.methods import utils
from metafast.compat.easyfsl.modules.build_from_checkpoint import feat_resnet12_from_checkpoint
from metafast.compat.easyfsl.modules.feat_resnet12 import FEATBasicBlock, FEATResNet12
from metafast.compat.easyfsl.modules.resnet import BasicBlock, Bottleneck
from tests.pages import assert_row_is_true, page
from tests.test_omniglot import DATA, real_data

CLOSE = {torch.float32: 1e-6, torch.float64: 1e-12}
FEATURES = 8
Task = tuple[Tensor, Tensor, Tensor]


def close(found: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    limit = CLOSE[wanted.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)


def task(
    ways: int = 3, shots: tuple[int, ...] = (2, 4, 3), queries: int = 12, dtype: torch.dtype = torch.float64
) -> Task:
    """Support rows in any order, of several numbers for each class, and queries."""
    g = torch.Generator().manual_seed(5)
    labels = torch.arange(ways).repeat_interleave(torch.tensor(shots))
    labels = labels[torch.randperm(len(labels), generator=g)]
    centres = torch.randn(ways, FEATURES, generator=g, dtype=torch.float64)
    support = centres[labels] + torch.randn(len(labels), FEATURES, generator=g, dtype=torch.float64)
    query = centres[torch.arange(queries) % ways]
    query = query + torch.randn(query.shape, generator=g, dtype=torch.float64)
    return support.to(dtype), labels, query.to(dtype)


# The methods, written out.


def means_of(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([x[y == k].mean(0) for k in y.unique()])


def cosines(x: Tensor, c: Tensor) -> Tensor:
    return normalize(x, dim=1) @ normalize(c, dim=1).T


def distances(x: Tensor, c: Tensor) -> Tensor:
    return (x[:, None] - c[None]).square().sum(-1).sqrt()


def mean_entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-12).log()).sum() / len(p)


def descended(c: Tensor, loss: Callable[[Tensor], Tensor], steps: int, rate: float) -> Tensor:
    """Adam with its usual constants."""
    c = c.detach()
    mean, square = torch.zeros_like(c), torch.zeros_like(c)
    for t in range(1, steps + 1):
        c = c.requires_grad_()
        (g,) = torch.autograd.grad(loss(c), [c])
        mean, square = 0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g
        c = (c - rate * (mean / (1 - 0.9**t)) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)).detach()
    return c


def protonet(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return -distances(q, means_of(x, y))


def simple_shot(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return cosines(q, means_of(x, y))


def finetune(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    c = descended(means_of(x, y), lambda c: cross_entropy(2.0 * cosines(x, c), y), 7, 0.01)
    return cosines(q, c)


def transductive_finetuning(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    def loss(c: Tensor) -> Tensor:
        certainty = mean_entropy((-2.0 * distances(q, c)).softmax(1))
        return cross_entropy(-2.0 * distances(x, c), y) + certainty

    return -distances(q, descended(means_of(x, y), loss, 7, 0.01))


def tim(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    def loss(c: Tensor) -> Tensor:
        p = (2.0 * cosines(q, c)).softmax(1)
        marginal = p.mean(0)
        information = -0.7 * (marginal * marginal.log()).sum() - 0.3 * mean_entropy(p)
        return 1.5 * cross_entropy(2.0 * cosines(x, c), y) - information

    return cosines(q, descended(means_of(x, y), loss, 7, 0.01))


def rectified(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    c = means_of(x, y)
    shifted = q + x.mean(0) - q.mean(0)
    rows, labels = torch.cat((x, shifted)), torch.cat((y, cosines(shifted, c).argmax(1)))
    weights = cosines(rows, c).exp()
    return torch.stack(
        [
            (weights[labels == k, k, None] * rows[labels == k]).sum(0) / weights[labels == k, k].sum()
            for k in range(len(c))
        ]
    )


def bd_cspn(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return cosines(q, rectified(x, y, q))


def laplacian_shot(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    a = distances(q, rectified(x, y, q)) ** 2
    w = torch.zeros(len(q), len(q), dtype=q.dtype)
    for i, row in enumerate(distances(q, q)):
        for j in row.argsort()[1:4]:
            w[i, j] = 1
    z, before = (-a).softmax(1), float("inf")
    for step in range(20):
        z = (-a + 0.5 * w @ z).softmax(1)
        bound = float((z * (z + 1e-12).log() + a * z - 0.5 * (w @ z) * z).sum())
        if step > 1 and abs(bound - before) <= 1e-6 * abs(before):
            break
        before = bound
    return z


def transport(cost: Tensor) -> Tensor:
    plan = (-3.0 * cost).exp()
    plan = plan / plan.sum()
    for _ in range(1000):
        rows = plan.sum(1)
        plan = plan / (rows[:, None] + 1e-10)
        plan = plan * (len(cost) // cost.shape[1]) / (plan.sum(0) + 1e-10)
        if (rows - plan.sum(1)).abs().max() < 1e-6:
            break
    return plan


def pt_map(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    x, q = (x.relu() + 1e-6) ** 0.4, (q.relu() + 1e-6) ** 0.4
    c = means_of(x, y)
    rows = torch.cat((x, q))
    for _ in range(4):
        weights = torch.cat((nn.functional.one_hot(y).to(x.dtype), transport(distances(q, c) ** 2)))
        c = c + 0.3 * ((weights.T @ rows) / weights.sum(0)[:, None] - c)
    return transport(distances(q, c) ** 2)


STEPS = {"fine_tuning_steps": 7, "fine_tuning_lr": 0.01, "temperature": 2.0}
METHODS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], dict[str, Any]]] = {
    "PrototypicalNetworks": (protonet, {}),
    "SimpleShot": (simple_shot, {}),
    "Finetune": (finetune, STEPS),
    "TransductiveFinetuning": (transductive_finetuning, STEPS),
    "TIM": (
        tim,
        {
            **STEPS,
            "cross_entropy_weight": 1.5,
            "marginal_entropy_weight": 0.7,
            "conditional_entropy_weight": 0.3,
        },
    ),
    "BDCSPN": (bd_cspn, {}),
    "LaplacianShot": (laplacian_shot, {"inference_steps": 20, "knn": 4, "lambda_regularization": 0.5}),
    "PTMAP": (
        pt_map,
        {
            "fine_tuning_steps": 4,
            "fine_tuning_lr": 0.3,
            "lambda_regularization": 3.0,
            "power_factor": 0.4,
        },
    ),
}
TRANSDUCTIVE = ("TransductiveFinetuning", "TIM", "BDCSPN", "LaplacianShot", "PTMAP")
#: Whose results are probabilities in any case.
PROBABILITIES = ("LaplacianShot", "PTMAP")


def scores(name: str, x: Tensor, y: Tensor, q: Tensor, **options: Any) -> Tensor:
    model = getattr(methods, name)(**METHODS[name][1], **options)
    model.process_support_set(x, y)
    found: Tensor = model(q)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    x, y, q = task()
    wanted = METHODS[name][0](x, y, q)
    close(scores(name, x, y, q), wanted)
    found = scores(name, x.float(), y, q.float())
    # The plan stops where an iteration changes little, which rounding moves.
    close(found, wanted.float(), 1e-4 if name == "PTMAP" else 2e-6)


@pytest.mark.parametrize("name", METHODS)
def test_centring_normalisation_and_probabilities(name: str) -> None:
    x, y, q = task()
    centre = torch.linspace(-0.5, 0.5, FEATURES, dtype=torch.float64)
    for power in (1.0, 2.0):
        placed = [(v - centre) / (v - centre).norm(power, dim=1, keepdim=True) for v in (x, q)]
        wanted = METHODS[name][0](placed[0], y, placed[1])
        found = scores(name, x, y, q, feature_centering=centre, feature_normalization=power)
        close(found, wanted)
    temperature = METHODS[name][1].get("temperature", 1.0)
    wanted = scores(name, x, y, q)
    if name not in PROBABILITIES:
        wanted = (temperature * wanted).softmax(1)
    close(scores(name, x, y, q, use_softmax=True), wanted)
    close(wanted.sum(1), torch.ones(len(q), dtype=torch.float64), 1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_labels_that_are_not_the_first_numbers(name: str) -> None:
    """The columns are the labels in ascending order."""
    x, y, q = task()
    labels = torch.tensor([7, 3, 40])[y]
    wanted = scores(name, x, torch.tensor([1, 0, 2])[y], q)
    close(scores(name, x, labels, q), wanted)
    assert bool(wanted.isfinite().all())
    close(scores(name, x, labels.int(), q), wanted)


@pytest.mark.parametrize("name", METHODS)
def test_what_a_classifier_keeps(name: str) -> None:
    x, y, q = task()
    model = getattr(methods, name)(nn.Linear(FEATURES, FEATURES).double())
    assert model.prototypes.shape == model.support_features.shape == model.support_labels.shape == (0,)
    assert list(model.state_dict()) == ["backbone.weight", "backbone.bias"]
    model.process_support_set(x, y)
    features = model.compute_features(x)
    assert torch.equal(model.support_labels, y)
    close(model.support_features, features)
    close(model.prototypes, means_of(features, y))
    assert model.is_transductive() == (name in TRANSDUCTIVE)
    frozen = name in ("Finetune", "TransductiveFinetuning", "TIM")
    assert model.backbone.weight.requires_grad != frozen
    assert model(q).requires_grad != frozen
    with torch.no_grad():
        model.process_support_set(x, y)
        twin = copy.deepcopy(model)
        close(twin(q), model(q))


@pytest.mark.parametrize("name", METHODS)
def test_a_wrong_backbone(name: str) -> None:
    model = getattr(methods, name)(nn.Identity())
    with pytest.raises(ValueError, match=r"backbone: expected features \[n, d\] from it, got \[2, 3, 4\]"):
        model.process_support_set(torch.rand(2, 3, 4), torch.arange(2))


def test_what_fine_tuning_leaves() -> None:
    """Prototypes stay where they end: a second call goes on, and the support features are as they were."""
    x, y, q = task()
    twice = methods.Finetune(fine_tuning_steps=3, fine_tuning_lr=0.01)
    twice.process_support_set(x, y)
    first = twice(q)
    close(twice.support_features, x)
    second = twice(q)
    assert not torch.equal(first, second)
    c = means_of(x, y)
    for _ in range(2):
        c = descended(c, lambda c: cross_entropy(cosines(x, c), y), 3, 0.01)
    close(second, cosines(q, c))


def test_steps_of_laplacian_shot(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end where the objective stays, from the third on, or at their number."""
    bounds: list[float] = []
    own = methods.LaplacianShot.compute_upper_bound

    def counted(self: Any, *arguments: Any) -> float:
        bounds.append(own(self, *arguments))
        return bounds[-1]

    monkeypatch.setattr(methods.LaplacianShot, "compute_upper_bound", counted)
    distances = torch.rand(4, 3, dtype=torch.float64)
    alone = methods.LaplacianShot().bound_updates(distances, torch.zeros(4, 4, dtype=torch.float64))
    close(alone, (-distances).softmax(1))
    assert len(bounds) == 3
    methods.LaplacianShot(inference_steps=2).bound_updates(distances, torch.ones(4, 4, dtype=torch.float64))
    assert len(bounds) == 5


def test_defaults_are_the_originals() -> None:
    values = {
        "Finetune": (200, 1e-4, 1.0),
        "TransductiveFinetuning": (25, 5e-5, 1.0),
        "TIM": (50, 1e-4, 10.0),
    }
    for name, wanted in values.items():
        model = getattr(methods, name)()
        assert (model.fine_tuning_steps, model.fine_tuning_lr, model.temperature) == wanted
    tim = methods.TIM()
    assert (tim.cross_entropy_weight, tim.marginal_entropy_weight, tim.conditional_entropy_weight) == (
        1,
        1,
        0.1,
    )
    plan = methods.PTMAP()
    found = (plan.fine_tuning_steps, plan.fine_tuning_lr, plan.lambda_regularization, plan.power_factor)
    assert found == (10, 0.2, 10.0, 0.5)
    near = methods.LaplacianShot()
    assert (near.inference_steps, near.knn, near.lambda_regularization) == (20, 3, 0.7)


@pytest.mark.parametrize("name", ["PrototypicalNetworks", "SimpleShot", "BDCSPN", "PTMAP"])
def test_gradients_go_to_the_backbone(name: str) -> None:
    x, y, q = task()
    backbone = nn.Linear(FEATURES, FEATURES).double()
    model = getattr(methods, name)(backbone, **METHODS[name][1])
    model.process_support_set(x, y)
    found = torch.autograd.grad(model(q).square().sum(), list(backbone.parameters()))
    wanted = METHODS[name][0](backbone(x), y, backbone(q)).square().sum()
    for one, other in zip(found, torch.autograd.grad(wanted, list(backbone.parameters())), strict=True):
        close(one, other, 1e-9)


def test_second_derivatives() -> None:
    """A prototypical network whose encoder is adapted on its own support set, which torch.cdist refuses."""
    x, y, _ = task()
    weight = torch.randn(FEATURES, FEATURES, dtype=torch.float64, requires_grad=True)

    def loss(weight: Tensor) -> Tensor:
        model = methods.PrototypicalNetworks()
        model.process_support_set(x @ weight, y)
        return log_softmax(model(x @ weight), 1)[torch.arange(len(y)), y].sum()

    (slope,) = torch.autograd.grad(loss(weight), [weight], create_graph=True)
    (found,) = torch.autograd.grad(slope.square().sum(), [weight])

    def plain(weight: Tensor) -> Tensor:
        return log_softmax(protonet(x @ weight, y, x @ weight), 1)[torch.arange(len(y)), y].sum()

    (slope,) = torch.autograd.grad(plain(weight), [weight], create_graph=True)
    (wanted,) = torch.autograd.grad(slope.square().sum(), [weight])
    close(found, wanted, 1e-9)


def test_the_abstract_classifier() -> None:
    model = methods.FewShotClassifier()
    with pytest.raises(
        NotImplementedError, match="FewShotClassifier: a few-shot classifier has a method forward"
    ):
        model(torch.rand(2, 3))
    with pytest.raises(NotImplementedError, match="is_transductive"):
        model.is_transductive()
    x, y, q = task()
    model.process_support_set(x, y)
    close(model.l2_distance_to_prototypes(q), protonet(x, y, q))
    close(model.cosine_distance_to_prototypes(q), simple_shot(x, y, q))
    assert model.softmax_if_specified(q, 3.0) is q
    close(methods.FewShotClassifier(use_softmax=True).softmax_if_specified(q, 3.0), (3 * q).softmax(-1))


# Matching, relation and FEAT, whose parts are learnt.


def matching(model: methods.MatchingNetworks, x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    states = model.support_features_encoder(x[None])[0][0]
    g = x + states[:, :FEATURES] + states[:, FEATURES:]
    h, c = q, torch.zeros_like(q)
    for _ in range(len(x)):
        read = (h @ g.T).softmax(1) @ g
        h, c = model.query_features_encoding_cell(torch.cat((q, read), 1), (h, c))
        h = h + q
    a = (h @ normalize(g, dim=1).T).softmax(1)
    return torch.stack([a[:, y == k].sum(1) for k in range(int(y.max()) + 1)], 1).add(1e-6).log()


class Cell(nn.LSTMCell):
    """Another class than torch's own, which is called as it is."""


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kind", ["own", "subclass", "hooked", "replaced", "unbiased"])
def test_matching_networks(dtype: torch.dtype, kind: str) -> None:
    x, y, q = task(dtype=dtype)
    cells = {
        "own": lambda: None,
        "subclass": lambda: Cell(2 * FEATURES, FEATURES),
        "hooked": lambda: nn.LSTMCell(2 * FEATURES, FEATURES),
        "replaced": lambda: nn.LSTMCell(2 * FEATURES, FEATURES),
        "unbiased": lambda: nn.LSTMCell(2 * FEATURES, FEATURES, bias=False),
    }
    model = methods.MatchingNetworks(feature_dimension=FEATURES, query_encoder=cells[kind]()).to(dtype)
    calls = []
    if kind == "hooked":
        model.query_features_encoding_cell.register_forward_hook(lambda *_: calls.append(1))
    if kind == "replaced":
        cell = model.query_features_encoding_cell
        forward = cell.forward

        def replaced(*inputs: Any) -> Any:
            calls.append(1)
            return forward(*inputs)

        cell.forward = replaced  # type: ignore[method-assign]
    model.process_support_set(x, y)
    found = model(q)
    assert len(calls) == (len(x) if kind in ("hooked", "replaced") else 0)
    wanted = matching(model, x, y, q)
    close(found, wanted)
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(wanted.square().sum(), parameters),
        strict=True,
    ):
        close(one, other, 100 * CLOSE[dtype] * max(1.0, float(other.abs().max())))
    close(found.exp().sum(1), torch.full((len(q),), 1 + 3e-6, dtype=dtype))
    assert not model.is_transductive()


def test_columns_of_matching_networks() -> None:
    """One for each number up to the largest label, as in the original, where that works."""
    x, y, q = task()
    model = methods.MatchingNetworks(feature_dimension=FEATURES, use_softmax=True).double()
    model.process_support_set(x, 2 * y)
    found = model(q)
    assert found.shape == (len(q), 5)
    close(found, matching(model, x, 2 * y, q).softmax(1))


def test_labels_that_matching_networks_cannot_take() -> None:
    model = methods.MatchingNetworks(feature_dimension=8)
    labels: Any
    for labels, error, message in (
        ([0, 1], TypeError, "support_labels: expected a tensor, got list"),
        (torch.arange(2, dtype=torch.int32), TypeError, "support_labels: expected int64 class numbers"),
        (torch.arange(3), ValueError, r"support_labels: expected shape \[2\], got \[3\]"),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError, r"support_labels: expected shape \[2\]"),
    ):
        with pytest.raises(error, match=message):
            model.process_support_set(torch.rand(2, 8), labels)


def test_matching_networks_of_a_subclass() -> None:
    """The original's part that is written out here is there for a forward like its own."""

    class Own(methods.MatchingNetworks):
        def forward(self, query_images: Tensor) -> Tensor:
            queries = self.encode_query_features(self.compute_features(query_images))
            attention = self.softmax(queries @ normalize(self.contextualized_support_features).T)
            return self.softmax_if_specified((attention @ self.one_hot_support_labels + 1e-6).log())

    x, y, q = task()
    model = Own(feature_dimension=FEATURES).double()
    model.process_support_set(x, y)
    close(model(q), super(Own, model).forward(q))


def test_parts_of_matching_networks_can_be_given() -> None:
    support, query = nn.LSTM(8, 8, batch_first=True, bidirectional=True), nn.LSTMCell(16, 8)
    model = methods.MatchingNetworks(feature_dimension=8, support_encoder=support, query_encoder=query)
    assert model.support_features_encoder is support and model.query_features_encoding_cell is query
    own = methods.MatchingNetworks(feature_dimension=8)
    assert list(own.state_dict()) == list(model.state_dict())
    for features in (torch.rand(2, 3), torch.rand(2, 8, 1)):
        with pytest.raises(ValueError, match="backbone: expected"):
            model.process_support_set(features, torch.arange(2))
    model.process_support_set(torch.rand(2, 8), torch.arange(2))
    with pytest.raises(
        ValueError, match="backbone: expected 8 features from it, as feature_dimension says, got 3"
    ):
        model(torch.rand(2, 3))


@pytest.mark.parametrize("dtype", CLOSE)
def test_relation_networks(dtype: torch.dtype) -> None:
    model = methods.RelationNetworks(feature_dimension=4).to(dtype)
    x, q = torch.randn(6, 4, 7, 6, dtype=dtype), torch.randn(5, 4, 7, 6, dtype=dtype)
    y = torch.tensor([2, 0, 1, 0, 2, 2])
    twin = copy.deepcopy(model)
    model.process_support_set(x, y)
    found = model(q)
    pairs = [torch.cat((c, row)) for row in q for c in means_of(x, y)]
    close(found, twin.relation_module(torch.stack(pairs)).reshape(5, 3))
    close(model.prototypes, means_of(x, y))
    other = methods.RelationNetworks(feature_dimension=4, relation_module=nn.Flatten(), use_softmax=True)
    assert isinstance(other.relation_module, nn.Flatten) and not other.is_transductive()
    again = copy.deepcopy(twin)
    again.process_support_set(x, 5 * y + 1)
    close(again(q), found)
    for features in (torch.rand(2, 4), torch.rand(2, 3, 5, 5)):
        with pytest.raises(ValueError, match=r"backbone: expected features \[n, 4, height, width\] from it"):
            model.process_support_set(features, torch.arange(2))
        with pytest.raises(ValueError, match="backbone: expected features"):
            model(features)


@pytest.mark.parametrize("dtype", CLOSE)
def test_feat(dtype: torch.dtype) -> None:
    x, y, q = task(dtype=dtype)
    attention = modules.MultiHeadAttention(2, FEATURES, 6, 5).to(dtype).eval()
    model = methods.FEAT(attention_module=attention)
    model.process_support_set(x, y)
    c = means_of(x, y)
    heads = []
    for k in range(2):
        query, key = (layer.weight[6 * k : 6 * k + 6] for layer in (attention.w_qs, attention.w_ks))
        weights = (c @ query.T @ (c @ key.T).T / 6**0.5).softmax(1)
        heads.append(weights @ c @ attention.w_vs.weight[5 * k : 5 * k + 5].T)
    mixed = attention.fc(torch.cat(heads, 1))
    adapted = attention.layer_norm(c + mixed)
    close(model.prototypes, adapted)
    close(model(q), -distances(q, adapted))
    found, before = attention(c[None], c[None], c[None])
    close(found[0], adapted)
    close(before[0], mixed)
    attention.flag_norm = False
    close(attention(c[None], c[None], c[None])[0][0], mixed)
    assert not model.is_transductive()


def test_dropout_of_attention() -> None:
    attention = modules.MultiHeadAttention(1, 8, 8, 8, dropout=0.3, flag_norm=False)
    assert (attention.dropout.p, attention.attention_dropout.p) == (0.3, 0.1)
    assert modules.MultiHeadAttention(1, 8, 8, 8).dropout.p == 0.1
    rows = [torch.rand(1, 5, 8)] * 3
    dropped, before = attention(*rows)
    assert bool((dropped == 0).any()) and not bool((before == 0).any())


# Helpers.


def test_class_means() -> None:
    maps, labels = torch.randn(5, 2, 3, dtype=torch.float64), torch.tensor([9, -1, 9, 9, -1])
    wanted = torch.stack([maps[[1, 4]].mean(0), maps[[0, 2, 3]].mean(0)])
    close(utils.compute_prototypes(maps, labels), wanted)
    close(utils.compute_prototypes(maps, labels.float()), wanted)
    close(utils.compute_prototypes(maps, torch.tensor([1, 0, 1, 1, 0], dtype=torch.int32)), wanted)
    close(utils.compute_prototypes(maps[:, 0, 0], labels), wanted[:, 0, 0])
    with pytest.raises(ValueError, match=r"support_labels: expected shape \[n\], got \[5, 1\]"):
        utils.compute_prototypes(maps, labels[:, None])
    with pytest.raises(ValueError, match="support_labels: expected size 5"):
        utils.compute_prototypes(maps, labels[:4])
    with pytest.raises(ValueError, match="support_features: expected shape"):
        utils.compute_prototypes(maps.sum(), labels)
    with pytest.raises(TypeError, match="support_features: expected a tensor, got list"):
        utils.compute_prototypes(maps.tolist(), labels)
    with pytest.raises(TypeError, match="support_labels: expected a tensor, got list"):
        utils.compute_prototypes(maps, [0, 1])  # type: ignore[arg-type]


def test_helpers() -> None:
    z = torch.randn(6, 4, dtype=torch.float64)
    close(utils.entropy(z), mean_entropy(z.softmax(1)))
    for p in (1, 2, 3):
        order = torch.cdist(z, z, p, "donot_use_mm_for_euclid_dist").argsort(1)
        assert torch.equal(utils.k_nearest_neighbours(z, 4, p), order[:, 1:4])
    for k in (0, 7):
        with pytest.raises(
            ValueError, match=f"k: expected a number from 1 to 6, the rows of features, got {k}"
        ):
            utils.k_nearest_neighbours(z, k)
    close(utils.power_transform(z, 0.3), (z.clamp(min=0) + 1e-6) ** 0.3)
    values = OrderedDict([("a.b", 1), ("c", 2), ("xa.b", 3), ("a.a.", 4)])
    stripped = utils.strip_prefix(values, "a.")
    assert isinstance(stripped, OrderedDict) and list(stripped.items()) == [
        ("b", 1),
        ("c", 2),
        ("xa.b", 3),
        ("a.", 4),
    ]
    assert list(values) == ["a.b", "c", "xa.b", "a.a."]


def test_neighbours_of_many_close_points() -> None:
    """torch.cdist takes differences of squares from 26 rows on, by which a point is not nearest to itself."""
    rows = 1000 + 1e-3 * torch.randn(60, 16)
    wanted = torch.cdist(rows.double(), rows.double()).argsort(1)[:, 1:3]
    found = utils.k_nearest_neighbours(rows, 3)
    assert not bool((found == torch.arange(60)[:, None]).any())
    assert float((found == wanted).float().mean()) > 0.95


# Networks.


def residual(x: Tensor, block: nn.Module) -> Tensor:
    y = torch.relu(block.bn1(block.conv1(x)))  # type: ignore[operator]
    y = block.bn2(block.conv2(y))  # type: ignore[operator]
    if isinstance(block, Bottleneck):
        y = block.bn3(block.conv3(torch.relu(y)))
    return torch.relu(y + (x if block.downsample is None else block.downsample(x)))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "blocks", "kind", "features", "parameters"),
    [
        ("resnet10", (1, 1, 1, 1), BasicBlock, 512, 5411112),
        ("resnet12", (1, 1, 2, 1), BasicBlock, 640, 10068840),
        ("resnet18", (2, 2, 2, 2), BasicBlock, 512, 11681832),
        ("resnet34", (3, 4, 6, 3), BasicBlock, 512, 21789992),
        ("resnet50", (3, 4, 6, 3), Bottleneck, 2048, 25549352),
        ("resnet101", (3, 4, 23, 3), Bottleneck, 2048, 44541480),
        ("resnet152", (3, 8, 36, 3), Bottleneck, 2048, 60185128),
    ],
)
def test_residual_networks(
    name: str, blocks: tuple[int, ...], kind: type[nn.Module], features: int, parameters: int
) -> None:
    with torch.device("meta"):
        net = getattr(modules, name)()
    assert sum(p.numel() for p in net.parameters()) == parameters
    layers = [net.get_submodule(f"layer{k}") for k in range(1, 5)]
    assert [len(layer) for layer in layers] == list(blocks)
    assert all(type(block) is kind for layer in layers for block in layer)
    assert net.fc.in_features == features and net.fc.out_features == 1000 and not net.use_fc
    assert [layer[0].stride for layer in layers] == [1, 2, 2, 2]


@pytest.mark.parametrize("name", ["resnet12", "resnet50"])
def test_what_a_residual_network_computes(name: str) -> None:
    torch.manual_seed(1)
    net = getattr(modules, name)(num_classes=4).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    wanted = torch.relu(net.bn1(net.conv1(x)))
    for k in range(1, 5):
        for block in net.get_submodule(f"layer{k}"):
            wanted = residual(wanted, block)
    net.use_pooling = False
    close(net(x), wanted)
    with pytest.raises(ValueError, match="use_fc: expected use_pooling with it, got maps"):
        net.set_use_fc(True)
        net(x)
    net.use_pooling = True
    close(net(x), net.fc(wanted.mean((2, 3))))
    net.set_use_fc(False)
    close(net(x), wanted.mean((2, 3)))


def test_weights_of_a_residual_network_under_a_seed() -> None:
    """The draws of torch's layers in their order, then those of all convolutions in theirs."""
    torch.manual_seed(2)
    net = modules.ResNet(Bottleneck, [1, 1, 1, 1], planes=[4, 8, 8, 8], num_classes=3, big_kernel=True)
    assert net.conv1.kernel_size == (7, 7) and net.conv1.stride == (2, 2) and net.conv1.padding == (1, 1)
    torch.manual_seed(2)
    before, shapes = 64, [(64, 3, 7)]
    for width in (4, 8, 8, 8):
        shapes += [(4 * width, before, 1), (width, before, 1), (width, width, 3), (4 * width, width, 1)]
        before = 4 * width
    for out, inputs, kernel in shapes:
        nn.Conv2d(inputs, out, kernel, bias=False)
    last = nn.Linear(32, 3)
    assert torch.equal(net.fc.weight, last.weight) and torch.equal(net.fc.bias, last.bias)
    state = net.state_dict()
    order = ["conv1.weight"]
    for k in range(1, 5):
        order += [f"layer{k}.0.{part}.weight" for part in ("conv1", "conv2", "conv3", "downsample.0")]
    assert [name for name, value in state.items() if value.dim() == 4] == order
    for name in order:
        weight = torch.empty_like(state[name])
        assert torch.equal(state[name], nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu"))
    quiet = modules.ResNet(Bottleneck, [1, 1, 1, 1], planes=[4, 8, 8, 8], zero_init_residual=True)
    zeros = [
        name
        for name, value in quiet.state_dict().items()
        if name.endswith("weight") and not bool(value.any())
    ]
    assert zeros == [f"layer{k}.0.bn3.weight" for k in range(1, 5)]
    quiet = modules.resnet10(zero_init_residual=True)
    zeros = [
        name
        for name, value in quiet.state_dict().items()
        if name.endswith("weight") and not bool(value.any())
    ]
    assert zeros == [f"layer{k}.0.bn2.weight" for k in range(1, 5)]


def test_feats_residual_network() -> None:
    torch.manual_seed(3)
    net = modules.feat_resnet12()
    assert type(net) is FEATResNet12 and sum(p.numel() for p in net.parameters()) == 12424320
    names = [f"conv{k}.weight" for k in range(1, 4)] + ["downsample.0.weight"]
    for k, width in enumerate((64, 160, 320, 640), start=1):
        block = net.get_submodule(f"layer{k}.0")
        assert type(block) is FEATBasicBlock and block.conv3.out_channels == width
        assert {f"layer{k}.0.{name}" for name in names} <= set(net.state_dict())
    torch.manual_seed(3)
    before = 3
    for width in (64, 160, 320, 640):
        nn.Conv2d(before, width, 1, bias=False)
        for inputs in (before, width, width):
            nn.Conv2d(inputs, width, 3, bias=False)
        before = width
    weight = nn.init.kaiming_normal_(torch.empty(64, 3, 3, 3), mode="fan_out", nonlinearity="leaky_relu")
    assert torch.equal(net.get_parameter("layer1.0.conv1.weight"), weight)
    x = torch.randn(2, 3, 32, 32)
    wanted = x
    for k in range(1, 5):
        block = net.get_submodule(f"layer{k}.0")
        y = wanted
        for i in range(1, 4):
            y = getattr(block, f"bn{i}")(getattr(block, f"conv{i}")(y))
            if i < 3:
                y = nn.functional.leaky_relu(y, 0.1)
        y = nn.functional.leaky_relu(y + block.downsample(wanted), 0.1)  # type: ignore[operator]
        wanted = nn.functional.max_pool2d(y, 2)
    close(net(x), wanted.mean((2, 3)))
    assert net(x).shape == (2, 640)
    assert net.layer_dims == [64] * 4 + [160] * 4 + [320] * 4 + [640] * 4


def test_weights_of_attention_under_a_seed() -> None:
    torch.manual_seed(4)
    found = modules.MultiHeadAttention(2, 8, 6, 5).state_dict()
    torch.manual_seed(4)
    layers = [nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False), nn.Linear(8, 10, bias=False)]
    for layer, width in zip(layers, (6, 6, 5), strict=True):
        nn.init.normal_(layer.weight, 0, (2 / (8 + width)) ** 0.5)
    last = nn.Linear(10, 8)
    nn.init.xavier_normal_(last.weight)
    wanted = [
        *zip(("w_qs.weight", "w_ks.weight", "w_vs.weight"), (layer.weight for layer in layers), strict=True),
        ("layer_norm.weight", torch.ones(8)),
        ("layer_norm.bias", torch.zeros(8)),
        ("fc.weight", last.weight),
        ("fc.bias", last.bias),
    ]
    assert list(found) == [name for name, _ in wanted]
    for name, value in wanted:
        assert torch.equal(found[name], value)


def test_default_parts() -> None:
    torch.manual_seed(5)
    found = modules.default_relation_module(3, inner_channels=6)
    torch.manual_seed(5)
    wanted = [nn.Conv2d(6, 3, 3), nn.Conv2d(3, 3, 3), nn.Linear(3, 6), nn.Linear(6, 1)]
    for name, layer in zip(("0.0", "1.0", "3", "5"), wanted, strict=True):
        for kind in ("weight", "bias"):
            assert torch.equal(found.get_parameter(f"{name}.{kind}"), getattr(layer, kind))
    x = torch.randn(4, 6, 9, 8)
    y = nn.functional.adaptive_max_pool2d(torch.relu(found[0][1](found[0][0](x))), 5)
    y = torch.relu(found[1][1](found[1][0](y))).amax((2, 3))
    close(found(x), torch.sigmoid(found[5](torch.relu(found[3](y)))))
    assert found[0][0].padding == (1, 1) and found[1][0].padding == (0, 0)
    assert found[0][1].momentum == found[1][1].momentum == 1
    torch.manual_seed(6)
    support, query = (
        modules.default_matching_networks_support_encoder(4),
        modules.default_matching_networks_query_encoder(4),
    )
    torch.manual_seed(6)
    lstm, cell = nn.LSTM(4, 4, batch_first=True, bidirectional=True), nn.LSTMCell(8, 4)
    for one, other in ((support, lstm), (query, cell)):
        assert list(one.state_dict()) == list(other.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_files_of_feats_authors(tmp_path: Path) -> None:
    torch.manual_seed(7)
    net, attention = modules.feat_resnet12(), modules.MultiHeadAttention(1, 640, 640, 640)
    state = {f"encoder.{name}": value for name, value in net.state_dict().items()}
    state |= {f"slf_attn.{name}": value for name, value in attention.state_dict().items()}
    file = tmp_path / "feat.pth"
    torch.save({"params": state | {"another.weight": torch.ones(2)}}, file)
    model = methods.FEAT.from_resnet12_checkpoint(file, use_softmax=True)
    assert model.use_softmax and isinstance(model.backbone, FEATResNet12)
    for one, other in ((model.backbone, net), (model.attention_module, attention)):
        assert all(
            torch.equal(a, b)
            for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )
    assert isinstance(methods.FEAT.from_resnet12_checkpoint(file, use_backbone=False).backbone, nn.Identity)
    alone = feat_resnet12_from_checkpoint(file, "cpu")
    assert torch.equal(
        alone.get_parameter("layer4.0.conv3.weight"), net.get_parameter("layer4.0.conv3.weight")
    )
    for lacking in ("encoder.layer2.0.bn2.weight", "slf_attn.fc.bias"):
        torch.save({"params": {name: value for name, value in state.items() if name != lacking}}, file)
        part, _, name = lacking.partition(".")
        wanted = rf"checkpoint_path: expected all of {part}\.\*, got none for {re.escape(name)}"
        with pytest.raises(ValueError, match=wanted):
            methods.FEAT.from_resnet12_checkpoint(file)
    torch.save(state, file)
    with pytest.raises(ValueError, match="checkpoint_path: expected a file of a dict with params"):
        methods.FEAT.from_resnet12_checkpoint(file)


# The migration page.

ROOT = Path(metafast.__file__).parents[1]
NAMES, BLOCKS = page("easyfsl")
MODULES = (".datasets", ".methods", ".modules", ".samplers")


@pytest.mark.parametrize(("name", "status", "note"), NAMES)
def test_the_table_is_true(name: str, status: str, note: str) -> None:
    assert_row_is_true(name, status, note)


def test_the_table_has_every_public_name() -> None:
    names = [name for name, _, _ in NAMES]
    assert len(set(names)) == len(names) > 40
    for module in MODULES:
        ours = importlib.import_module(f"metafast.compat.easyfsl{module}")
        for name in ours.__all__:
            if not isinstance(getattr(ours, name), types.ModuleType):
                assert f"easyfsl{module}.{name}" in names
    for module in (".utils", ".methods.utils"):
        ours = importlib.import_module(f"metafast.compat.easyfsl{module}")
        for name, value in vars(ours).items():
            if getattr(value, "__module__", "") == ours.__name__ and not name.startswith("_"):
                assert f"easyfsl{module}.{name}" in names


def test_all_tasks_at_once_are_the_same_numbers() -> None:
    one, loop, batch = BLOCKS
    names: dict[str, Any] = {}
    exec(one, names)
    assert names["easyfsl"] is importlib.import_module("metafast.compat.easyfsl")
    x, y, q = task(queries=12)
    tasks = [torch.stack([value, value]) for value in (x, y, q, torch.arange(12) % 3)]
    tasks[0] = tasks[0] * torch.tensor([1.0, 2.0]).view(2, 1, 1)
    losses = []
    for code in (loop, batch):
        exec(code, names)
        losses.append(names["loss_of"](nn.Identity(), *tasks, 3))
    close(*losses)


# Scripts in the style of the library's documentation, on real data.


def run(script: str, *arguments: str) -> Any:
    """What a script that imports easyfsl prints, run as it stands."""
    path = Path(__file__).parent / "scripts" / script
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "metafast.compat", "--as", "easyfsl", str(path), *arguments],
        cwd=ROOT,
        # Networks this small gain nothing from threads, which wait for each other on a busy machine.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def omniglot(tmp_path: Path) -> Path:
    found = metafast.data.omniglot(DATA, "val", size=28, rotations=False)
    images = found.images.float().reshape(-1, 20, *found.images.shape[1:]) / 255
    path = tmp_path / "images.pt"
    torch.save({"train": images[:100], "test": images[100:]}, path)
    return path


@real_data
def test_episodic_training_runs_unmodified(omniglot: Path) -> None:
    before, after, losses = run("easyfsl_episodic.py", str(omniglot), "60")
    assert sum(losses[40:]) < sum(losses[:20])
    assert after > before and after > 0.55


@real_data
def test_classical_training_and_all_methods_run_unmodified(omniglot: Path) -> None:
    losses, accuracies = run("easyfsl_classical.py", str(omniglot), "100")
    assert sum(losses[80:]) < sum(losses[:20])
    # Chance is 0.2.
    assert len(accuracies) == 8 and all(0.35 < accuracy <= 1 for accuracy in accuracies.values()), accuracies
