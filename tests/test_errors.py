"""One wrong call for each check, with its message; a wrong call touches no memory and changes no result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import metafast
from metafast import _library
from metafast.distance import METRICS
from tests.cases import assert_bad_label_spoils_its_task, outputs, runs_cuda_sources

X, Y = torch.zeros(2, 5, 4), torch.zeros(2, 3, 4)
SUPPORT_LABELS = torch.tensor([[0, 1, 2, 2, 0], [1, 0, 2, 1, 0]])
QUERY_LABELS = torch.tensor([[0, 1, 2], [2, 0, 1]])


def with_label(labels: torch.Tensor, value: int) -> torch.Tensor:
    labels = labels.clone()
    labels[1, 2] = value
    return labels


def distance(x: Any = X, y: Any = Y, metric: Any = "sqeuclidean") -> Any:
    return metafast.pairwise_distance(x, y, metric)


def means(features: Any = X, labels: Any = SUPPORT_LABELS, num_classes: Any = 3) -> Any:
    return metafast.prototypes(features, labels, num_classes)


def loss(
    support: Any = X,
    support_labels: Any = SUPPORT_LABELS,
    query: Any = Y,
    query_labels: Any = QUERY_LABELS,
    num_classes: Any = 3,
    **options: Any,
) -> Any:
    return metafast.prototypical_loss(support, support_labels, query, query_labels, num_classes, **options)


def test_the_right_calls_are_right() -> None:
    """Each test below differs from one of these in one argument."""
    assert distance().shape == (2, 5, 3)
    assert means().shape == (2, 3, 4)
    assert [tuple(o.shape) for o in loss()] == [(2,), (2, 3, 3)]


FLOATS = "expected float32, float64, bfloat16 or float16, got"
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "distance x list": (lambda: distance([[1.0]]), TypeError, "x: expected a tensor, got list"),
    "distance y None": (lambda: distance(y=None), TypeError, "y: expected a tensor, got NoneType"),
    "distance x int": (lambda: distance(X.long()), TypeError, f"x: {FLOATS} torch.int64"),
    "distance x complex": (lambda: distance(X + 0j), TypeError, f"x: {FLOATS} torch.complex64"),
    "distance y bool": (lambda: distance(y=Y > 0), TypeError, f"y: {FLOATS} torch.bool"),
    "distance dtypes": (
        lambda: distance(y=Y.double()),
        TypeError,
        "y: expected the dtype of x, torch.float32, got torch.float64",
    ),
    "distance devices": (
        lambda: distance(y=Y.to("meta")),
        ValueError,
        "y: expected the device of x, cpu, got meta",
    ),
    "distance x 1-d": (lambda: distance(X[0, 0]), ValueError, "x: expected shape [..., n, d], got [4]"),
    "distance y 0-d": (lambda: distance(y=Y[0, 0, 0]), ValueError, "y: expected shape [..., m, d], got []"),
    "distance features": (
        lambda: distance(y=Y[..., :3]),
        ValueError,
        "y: expected size 4 in dimension -1, as x has, got shape [2, 3, 3]",
    ),
    "distance tasks": (
        lambda: distance(X[:, None], torch.zeros(3, 7, 3, 4)),
        ValueError,
        "leading dimensions: expected shapes that broadcast, but x has [2, 1], y has [3, 7]",
    ),
    "distance metric": (
        lambda: distance(metric="manhattan"),
        ValueError,
        "metric: expected one of sqeuclidean, euclidean, cityblock, cosine, got 'manhattan'",
    ),
    "distance metric None": (
        lambda: distance(metric=None),
        ValueError,
        "metric: expected one of sqeuclidean, euclidean, cityblock, cosine, got None",
    ),
    "distance metric list": (
        lambda: distance(metric=["cosine"]),
        ValueError,
        "metric: expected one of sqeuclidean, euclidean, cityblock, cosine, got ['cosine']",
    ),
    "cdist x1 list": (lambda: metafast.cdist([1.0], Y), TypeError, "x1: expected a tensor, got list"),
    "cdist x2 list": (lambda: metafast.cdist(X, [1.0]), TypeError, "x2: expected a tensor, got list"),
    "cdist mode": (
        lambda: metafast.cdist(X, Y, compute_mode="fast"),
        ValueError,
        "compute_mode: expected one of",
    ),
    "cdist mode of other p": (
        lambda: metafast.cdist(X, Y, 3.0, compute_mode=None),
        ValueError,
        "compute_mode: expected one of",
    ),
    "means features": (lambda: means(None), TypeError, "features: expected a tensor, got NoneType"),
    "means features int": (lambda: means(X.int()), TypeError, f"features: {FLOATS} torch.int32"),
    "means features 1-d": (
        lambda: means(X[0, 0]),
        ValueError,
        "features: expected shape [..., n, d], got [4]",
    ),
    "means labels list": (lambda: means(labels=[0, 1]), TypeError, "labels: expected a tensor, got list"),
    "means labels int32": (
        lambda: means(labels=SUPPORT_LABELS.int()),
        TypeError,
        "labels: expected int64 class numbers, got torch.int32",
    ),
    "means labels bool": (
        lambda: means(labels=SUPPORT_LABELS > 0),
        TypeError,
        "labels: expected int64 class numbers, got torch.bool",
    ),
    "means labels 0-d": (
        lambda: means(labels=torch.tensor(1)),
        ValueError,
        "labels: expected shape [..., rows], got a scalar",
    ),
    "means labels rows": (
        lambda: means(labels=QUERY_LABELS),
        ValueError,
        "labels: expected size 5 in dimension -1, as features has, got shape [2, 3]",
    ),
    "means labels device": (
        lambda: means(labels=SUPPORT_LABELS.to("meta")),
        ValueError,
        "labels: expected the device of features, cpu, got meta",
    ),
    "means tasks": (
        lambda: means(labels=SUPPORT_LABELS[[0, 0, 0]]),
        ValueError,
        "leading dimensions: expected shapes that broadcast, but features has [2], labels has [3]",
    ),
    "means weights dtype": (
        lambda: means(labels=torch.ones(2, 5, 3).double()),
        TypeError,
        "labels: expected the dtype of features, torch.float32, got torch.float64",
    ),
    "means weights 1-d": (
        lambda: means(X[0], torch.ones(5)),
        ValueError,
        "labels: expected shape [..., n] of int64 or [..., n, C] of weights, got [5]",
    ),
    "means weights rows": (
        lambda: means(labels=torch.ones(2, 4, 3)),
        ValueError,
        "labels: expected size 5 in dimension -2, as features has, got shape [2, 4, 3]",
    ),
    "means weights classes": (
        lambda: means(labels=torch.ones(2, 5, 2)),
        ValueError,
        "labels: expected 3 weights a row, got shape [2, 5, 2]",
    ),
    "means weights tasks": (
        lambda: means(labels=torch.ones(3, 5, 3)),
        ValueError,
        "leading dimensions: expected shapes that broadcast, but features has [2], labels has [3]",
    ),
    "means classes bool": (
        lambda: means(num_classes=True),
        TypeError,
        "num_classes: expected an int, got bool",
    ),
    "means classes float": (
        lambda: means(num_classes=3.0),
        TypeError,
        "num_classes: expected an int, got float",
    ),
    "means classes negative": (
        lambda: means(num_classes=-1),
        ValueError,
        "num_classes: expected a number of classes, got -1",
    ),
    "means label too large": (
        lambda: means(labels=with_label(SUPPORT_LABELS, 3)),
        ValueError,
        "labels: expected class numbers from 0 to 2, got 3",
    ),
    "means label negative": (
        lambda: means(labels=with_label(SUPPORT_LABELS, -1)),
        ValueError,
        "labels: expected class numbers from 0 to 2, got -1",
    ),
    "means label of no class": (
        lambda: means(num_classes=0),
        ValueError,
        "labels: expected class numbers from 0 to -1, got 0",
    ),
    "loss support": (lambda: loss("support"), TypeError, "support: expected a tensor, got str"),
    "loss support int": (lambda: loss(X.long()), TypeError, f"support: {FLOATS} torch.int64"),
    "loss support 1-d": (lambda: loss(X[0, 0]), ValueError, "support: expected shape [..., n, d], got [4]"),
    "loss query": (lambda: loss(query=1.0), TypeError, "query: expected a tensor, got float"),
    "loss query int": (lambda: loss(query=Y.long()), TypeError, f"query: {FLOATS} torch.int64"),
    "loss query 1-d": (lambda: loss(query=Y[0, 0]), ValueError, "query: expected shape [..., m, d], got [4]"),
    "loss query dtype": (
        lambda: loss(query=Y.half()),
        TypeError,
        "query: expected the dtype of support, torch.float32, got torch.float16",
    ),
    "loss query device": (
        lambda: loss(query=Y.to("meta")),
        ValueError,
        "query: expected the device of support, cpu, got meta",
    ),
    "loss features": (
        lambda: loss(query=Y[..., :2]),
        ValueError,
        "query: expected size 4 in dimension -1, as support has, got shape [2, 3, 2]",
    ),
    "loss support labels": (lambda: loss(X, [0]), TypeError, "support_labels: expected a tensor, got list"),
    "loss support labels float": (
        lambda: loss(X, SUPPORT_LABELS.float()),
        TypeError,
        "support_labels: expected int64 class numbers, got torch.float32",
    ),
    "loss support labels 0-d": (
        lambda: loss(X, torch.tensor(0)),
        ValueError,
        "support_labels: expected shape [..., rows], got a scalar",
    ),
    "loss support labels rows": (
        lambda: loss(X, QUERY_LABELS),
        ValueError,
        "support_labels: expected size 5 in dimension -1, as support has, got shape [2, 3]",
    ),
    "loss support labels device": (
        lambda: loss(X, SUPPORT_LABELS.to("meta")),
        ValueError,
        "support_labels: expected the device of support, cpu, got meta",
    ),
    "loss query labels": (
        lambda: loss(query_labels=0),
        TypeError,
        "query_labels: expected a tensor, got int",
    ),
    "loss query labels int32": (
        lambda: loss(query_labels=QUERY_LABELS.int()),
        TypeError,
        "query_labels: expected int64 class numbers, got torch.int32",
    ),
    "loss query labels 0-d": (
        lambda: loss(query_labels=torch.tensor(0)),
        ValueError,
        "query_labels: expected shape [..., rows], got a scalar",
    ),
    "loss query labels rows": (
        lambda: loss(query_labels=SUPPORT_LABELS),
        ValueError,
        "query_labels: expected size 3 in dimension -1, as query has, got shape [2, 5]",
    ),
    "loss query labels device": (
        lambda: loss(query_labels=QUERY_LABELS.to("meta")),
        ValueError,
        "query_labels: expected the device of support, cpu, got meta",
    ),
    "loss classes bool": (
        lambda: loss(num_classes=False),
        TypeError,
        "num_classes: expected an int, got bool",
    ),
    "loss classes tensor": (
        lambda: loss(num_classes=torch.tensor(3)),
        TypeError,
        "num_classes: expected an int, got Tensor",
    ),
    "loss classes negative": (
        lambda: loss(num_classes=-3),
        ValueError,
        "num_classes: expected a number of classes, got -3",
    ),
    "loss metric": (
        lambda: loss(metric="l2"),
        ValueError,
        "metric: expected one of sqeuclidean, euclidean, cityblock, cosine, got 'l2'",
    ),
    "temperature str": (
        lambda: loss(temperature="2"),
        TypeError,
        "temperature: expected a number or a floating tensor, got str",
    ),
    "temperature None": (
        lambda: loss(temperature=None),
        TypeError,
        "temperature: expected a number or a floating tensor, got NoneType",
    ),
    "temperature bool": (
        lambda: loss(temperature=True),
        TypeError,
        "temperature: expected a number or a floating tensor, got bool",
    ),
    "temperature complex": (
        lambda: loss(temperature=1j),
        TypeError,
        "temperature: expected a number or a floating tensor, got complex",
    ),
    "temperature int tensor": (
        lambda: loss(temperature=torch.tensor(2)),
        TypeError,
        "temperature: expected a number or a floating tensor, got torch.int64",
    ),
    "temperature device": (
        lambda: loss(temperature=torch.ones(2, device="meta")),
        ValueError,
        "temperature: expected the device of support, cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_public_function(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=re.escape(message)):
        call()


@pytest.mark.parametrize("metric", METRICS)
class TestEveryMetricOfTheLoss:
    """The checks behind the first ones hold for every metric in the same words."""

    def test_tasks(self, metric: str) -> None:
        message = (
            "leading dimensions: expected shapes that broadcast, but support has [2], support_labels has [2], "
            "query has [2], query_labels has [2], temperature has [3]"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            loss(metric=metric, temperature=torch.ones(3))
        message = "but support has [2], support_labels has [2], query has [3], query_labels has [2]"
        with pytest.raises(ValueError, match=re.escape(message)):
            loss(query=Y[[0, 1, 1]], metric=metric)


class TestBadLabels:
    """The CPU kernels raise. On a GPU nothing is read back: the results of the task are NaN, those of others right."""

    LABELS = (3, -1, 2**40, -(2**40), 2**63 - 1, -(2**63))

    @pytest.mark.parametrize("label", LABELS)
    def test_prototypes(self, label: int, device: torch.device) -> None:
        features = torch.randn(3, 4, 5, device=device)
        labels = torch.tensor([[0, 1, 2, 0]], device=device).repeat(3, 1)
        if not runs_cuda_sources(device):
            message = f"labels: expected class numbers from 0 to 2, got {label}"
            with pytest.raises(ValueError, match=re.escape(message)):
                metafast.prototypes(features, with_label(labels, label), 3)
        else:
            assert_bad_label_spoils_its_task(
                lambda labels, x: metafast.prototypes(x, labels, 3), [features], labels, label
            )

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("which", ["support", "query"])
    @pytest.mark.parametrize("label", LABELS)
    def test_loss(self, metric: str, which: str, label: int, device: torch.device) -> None:
        floats = [t.to(device) for t in (torch.randn(3, 4, 5), torch.randn(3, 3, 5), torch.rand(3) + 0.5)]
        labels = {
            "support": torch.tensor([[0, 1, 2, 0]], device=device).repeat(3, 1),
            "query": torch.tensor([[2, 1, 0]], device=device).repeat(3, 1),
        }

        def run(chosen: torch.Tensor, s: torch.Tensor, q: torch.Tensor, tau: torch.Tensor) -> Any:
            own = {**labels, which: chosen}
            return metafast.prototypical_loss(s, own["support"], q, own["query"], 3, metric, tau)

        if not runs_cuda_sources(device):
            message = f"{which}_labels: expected class numbers from 0 to 2, got {label}"
            with pytest.raises(ValueError, match=re.escape(message)):
                run(with_label(labels[which], label), *floats)
        else:
            assert_bad_label_spoils_its_task(run, floats, labels[which], label)

    @pytest.mark.parametrize("function", [means, loss])
    def test_under_autograd(self, function: Callable[..., Any]) -> None:
        """Nothing is left behind by a call that failed while recording."""
        x = torch.ones(2, 5, 4, requires_grad=True)
        with pytest.raises(ValueError, match="class numbers from 0 to 1, got 2"):
            function(x, num_classes=2)
        assert torch.autograd.grad(outputs(function(x))[0].sum(), x)[0].isfinite().all()

    @pytest.mark.parametrize("function", [means, loss])
    def test_under_transforms(self, function: Callable[..., Any]) -> None:
        def scalar(x: torch.Tensor) -> torch.Tensor:
            return outputs(function(x, num_classes=2))[0].sum()

        with pytest.raises(ValueError, match="class numbers from 0 to 1, got 2"):
            torch.func.grad(scalar)(X)
        with pytest.raises(ValueError, match="class numbers from 0 to 1, got 2"):
            torch.vmap(scalar)(X.expand(2, *X.shape))


def test_float64_beside_float32_under_autocast() -> None:
    """Autocast leaves float64 alone, so the dtypes still differ."""
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="y: expected the dtype of x"):
            distance(y=Y.double())
        with pytest.raises(TypeError, match="query: expected the dtype of support"):
            loss(query=Y.double())


def test_meta_tensors_give_shapes() -> None:
    """No check needs data, or an autocast that the device lacks."""
    x, y = X.to("meta"), Y.to("meta")
    labels = SUPPORT_LABELS.to("meta"), QUERY_LABELS.to("meta")
    for metric in METRICS:
        assert distance(x, y, metric).shape == (2, 5, 3)
        out = loss(x, labels[0], y, labels[1], metric=metric)
        assert [tuple(o.shape) for o in out] == [(2,), (2, 3, 3)]
        assert all(o.device.type == "meta" for o in out)
    assert means(x, labels[0]).shape == (2, 3, 4)
    assert means(x, torch.ones(2, 5, 3, device="meta")).shape == (2, 3, 4)


class Operators:
    """``torch.ops.metafast`` with every tensor moved to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.metafast, name)
        return lambda *args: op(*(a.to(self.device) if isinstance(a, torch.Tensor) else a for a in args))


LOSS, LOGITS, MEANS = torch.zeros(2), torch.zeros(2, 3, 3), torch.zeros(2, 3, 4)


def loss_op(
    ops: Operators, support: Any = X, labels: Any = SUPPORT_LABELS, query: Any = Y, **changed: Any
) -> Any:
    rest = {
        "query_labels": QUERY_LABELS,
        "temperature": None,
        "scale": 1.0,
        "num_classes": 3,
        "metric": 0,
        **changed,
    }
    return ops.prototypical_loss(support, labels, query, *rest.values())


def loss_vjp(ops: Operators, **changed: Any) -> Any:
    arguments = {
        "grad_loss": LOSS,
        "grad_logits": LOGITS,
        "grad_prototypes": MEANS,
        "support": X,
        "support_labels": SUPPORT_LABELS,
        "query": Y,
        "query_labels": QUERY_LABELS,
        "temperature": None,
        "scale": 1.0,
        "logits": LOGITS,
        "prototypes": MEANS,
        "metric": 0,
        **changed,
    }
    return ops.prototypical_loss_vjp(*arguments.values())


DIRECT: dict[str, tuple[Callable[[Operators], Any], str]] = {
    "x 2-d": (lambda ops: ops.pairwise_distance(X[0], Y[0], 0), "x: expected shape [T, n, d], got [5, 4]"),
    "y 2-d": (lambda ops: ops.pairwise_distance(X, Y[0], 0), "y: expected shape [T, m, d], got [3, 4]"),
    "y tasks": (lambda ops: ops.pairwise_distance(X, Y[:1], 0), "y: expected shape [2, 3, 4], got [1, 3, 4]"),
    "y features": (
        lambda ops: ops.pairwise_distance(X, Y[..., 1:], 0),
        "y: expected shape [2, 3, 4], got [2, 3, 3]",
    ),
    "y dtype": (lambda ops: ops.pairwise_distance(X, Y.double(), 0), "y: expected Float, got Double"),
    "x int": (
        lambda ops: ops.pairwise_distance(X.int(), Y.int(), 0),
        "x: expected float32, float64, bfloat16 or float16",
    ),
    "metric high": (lambda ops: ops.pairwise_distance(X, Y, 4), "metric: expected 0 to 3, got 4"),
    "metric low": (lambda ops: ops.pairwise_distance(X, Y, -1), "metric: expected 0 to 3, got -1"),
    "vjp grad": (
        lambda ops: ops.pairwise_distance_vjp(LOGITS, X, Y, 0),
        "grad: expected shape [2, 5, 3], got [2, 3, 3]",
    ),
    "vjp grad dtype": (
        lambda ops: ops.pairwise_distance_vjp(torch.zeros(2, 5, 3).half(), X, Y, 0),
        "grad: expected Float, got Half",
    ),
    "vjp metric": (
        lambda ops: ops.pairwise_distance_vjp(torch.zeros(2, 5, 3), X, Y, 9),
        "metric: expected 0 to 3, got 9",
    ),
    "jvp tangent of x": (
        lambda ops: ops.pairwise_distance_jvp(X, Y, Y, Y, 0),
        "tangent_x: expected shape [2, 5, 4], got [2, 3, 4]",
    ),
    "jvp tangent of y": (
        lambda ops: ops.pairwise_distance_jvp(X, Y, X, X, 0),
        "tangent_y: expected shape [2, 3, 4], got [2, 5, 4]",
    ),
    "jvp tangent dtype": (
        lambda ops: ops.pairwise_distance_jvp(X, Y, X, Y.double(), 0),
        "tangent_y: expected Float, got Double",
    ),
    "jvp metric": (lambda ops: ops.pairwise_distance_jvp(X, Y, X, Y, 4), "metric: expected 0 to 3, got 4"),
    "features 2-d": (
        lambda ops: ops.prototypes(X[0], SUPPORT_LABELS[0], 3),
        "features: expected shape [T, rows, d], got [5, 4]",
    ),
    "features int": (
        lambda ops: ops.prototypes(X.int(), SUPPORT_LABELS, 3),
        "features: expected float32, float64, bfloat16 or float16",
    ),
    "labels 1-d": (
        lambda ops: ops.prototypes(X, SUPPORT_LABELS[0], 3),
        "labels: expected shape [T, rows], got [5]",
    ),
    "labels rows": (
        lambda ops: ops.prototypes(X, QUERY_LABELS, 3),
        "labels: expected shape [2, 5], got [2, 3]",
    ),
    "labels dtype": (
        lambda ops: ops.prototypes(X, SUPPORT_LABELS.int(), 3),
        "labels: expected Long, got Int",
    ),
    "classes": (
        lambda ops: ops.prototypes(X, SUPPORT_LABELS, -2),
        "num_classes: expected a number of classes, got -2",
    ),
    "means vjp grad": (
        lambda ops: ops.prototypes_vjp(MEANS[0], SUPPORT_LABELS),
        "grad: expected shape [T, C, d], got [3, 4]",
    ),
    "means vjp labels": (
        lambda ops: ops.prototypes_vjp(MEANS, SUPPORT_LABELS[0]),
        "labels: expected shape [T, rows], got [5]",
    ),
    "means vjp tasks": (
        lambda ops: ops.prototypes_vjp(MEANS, SUPPORT_LABELS[:1]),
        "labels: expected shape [2, 5], got [1, 5]",
    ),
    "loss half": (lambda ops: loss_op(ops, X.half(), query=Y.half()), "query: expected float32 or float64"),
    "loss support": (lambda ops: loss_op(ops, X[0]), "support: expected shape [T, rows, d], got [5, 4]"),
    "loss query": (lambda ops: loss_op(ops, query=Y[0]), "query: expected shape [T, rows, d], got [3, 4]"),
    "loss query features": (
        lambda ops: loss_op(ops, query=Y[..., :2]),
        "query: expected shape [2, 3, 4], got [2, 3, 2]",
    ),
    "loss query dtype": (lambda ops: loss_op(ops, query=Y.double()), "query: expected Float, got Double"),
    "loss support labels": (
        lambda ops: loss_op(ops, labels=QUERY_LABELS),
        "support_labels: expected shape [2, 5], got [2, 3]",
    ),
    "loss query labels": (
        lambda ops: loss_op(ops, query_labels=SUPPORT_LABELS),
        "query_labels: expected shape [2, 3], got [2, 5]",
    ),
    "loss query labels dtype": (
        lambda ops: loss_op(ops, query_labels=QUERY_LABELS.short()),
        "query_labels: expected Long, got Short",
    ),
    "loss temperature": (
        lambda ops: loss_op(ops, temperature=torch.ones(3)),
        "temperature: expected shape [2], got [3]",
    ),
    "loss temperature 0-d": (
        lambda ops: loss_op(ops, temperature=torch.ones(())),
        "temperature: expected shape [2], got []",
    ),
    "loss temperature dtype": (
        lambda ops: loss_op(ops, temperature=torch.ones(2).double()),
        "temperature: expected Float, got Double",
    ),
    "loss classes": (
        lambda ops: loss_op(ops, num_classes=-2),
        "num_classes: expected a number of classes, got -2",
    ),
    "loss metric": (lambda ops: loss_op(ops, metric=4), "metric: expected 0 to 3, got 4"),
    "loss vjp logits 2-d": (
        lambda ops: loss_vjp(ops, logits=LOGITS[0]),
        "logits: expected shape [T, m, C], got [3, 3]",
    ),
    "loss vjp logits rows": (
        lambda ops: loss_vjp(ops, logits=LOGITS[:, :2]),
        "logits: expected shape [2, 3, 3], got [2, 2, 3]",
    ),
    "loss vjp logits dtype": (
        lambda ops: loss_vjp(ops, logits=LOGITS.double()),
        "logits: expected Float, got Double",
    ),
    "loss vjp prototypes": (
        lambda ops: loss_vjp(ops, prototypes=MEANS[:, :2]),
        "prototypes: expected shape [2, 3, 4], got [2, 2, 4]",
    ),
    "loss vjp grad of loss": (
        lambda ops: loss_vjp(ops, grad_loss=LOSS[:1]),
        "grad_loss: expected shape [2], got [1]",
    ),
    "loss vjp grad of loss dtype": (
        lambda ops: loss_vjp(ops, grad_loss=LOSS.double()),
        "grad_loss: expected Float, got Double",
    ),
    "loss vjp grad of logits": (
        lambda ops: loss_vjp(ops, grad_logits=LOGITS[..., :2]),
        "grad_logits: expected shape [2, 3, 3], got [2, 3, 2]",
    ),
    "loss vjp grad of prototypes": (
        lambda ops: loss_vjp(ops, grad_prototypes=MEANS[:1]),
        "grad_prototypes: expected shape [2, 3, 4], got [1, 3, 4]",
    ),
    "loss vjp temperature": (
        lambda ops: loss_vjp(ops, temperature=torch.ones(1)),
        "temperature: expected shape [2], got [1]",
    ),
    "loss vjp metric": (lambda ops: loss_vjp(ops, metric=-1), "metric: expected 0 to 3, got -1"),
    "vector width": (
        lambda ops: _library.vector_bits(64),
        "vector_bits: expected 0, 128, 256 or 512, got 64",
    ),
}


DIRECT_LABELS: dict[str, tuple[Callable[[Operators], Any], str]] = {
    "label": (
        lambda ops: ops.prototypes(X, SUPPORT_LABELS, 2),
        "labels: expected class numbers from 0 to 1, got 2",
    ),
    "means vjp label": (
        lambda ops: ops.prototypes_vjp(MEANS[:, :2], SUPPORT_LABELS),
        "labels: expected class numbers from 0 to 1, got 2",
    ),
    "loss support label": (
        lambda ops: loss_op(ops, labels=with_label(SUPPORT_LABELS, 7)),
        "support_labels: expected class numbers from 0 to 2, got 7",
    ),
    "loss query label": (
        lambda ops: loss_op(ops, query_labels=with_label(QUERY_LABELS, -7)),
        "query_labels: expected class numbers from 0 to 2, got -7",
    ),
    "loss vjp query label": (
        lambda ops: loss_vjp(ops, query_labels=with_label(QUERY_LABELS, 3)),
        "query_labels: expected class numbers from 0 to 2, got 3",
    ),
}


@pytest.mark.parametrize("name", DIRECT)
def test_direct_call(name: str, device: torch.device) -> None:
    """The operators themselves check again, as the last line before memory is read."""
    call, message = DIRECT[name]
    with pytest.raises(RuntimeError, match=re.escape(f"metafast: {message}")):
        call(Operators(device))


@pytest.mark.parametrize("name", DIRECT_LABELS)
def test_direct_call_with_bad_label(name: str, device: torch.device) -> None:
    call, message = DIRECT_LABELS[name]
    if not runs_cuda_sources(device):
        with pytest.raises(RuntimeError, match=re.escape(f"metafast: {message}")):
            call(Operators(device))
    else:
        for out in outputs(call(Operators(device)))[:2]:
            assert out[1].isnan().all()


def test_the_right_direct_calls_are_right(device: torch.device) -> None:
    ops = Operators(device)
    assert ops.pairwise_distance_vjp(torch.zeros(2, 5, 3), X, Y, 0)[0].shape == X.shape
    assert ops.pairwise_distance_jvp(X, Y, X, Y, 0).shape == (2, 5, 3)
    assert ops.prototypes_vjp(MEANS, SUPPORT_LABELS).shape == X.shape
    assert loss_op(ops)[2].shape == MEANS.shape
    assert loss_vjp(ops)[0].shape == X.shape


def test_other_runtime_errors_stay_what_they_are() -> None:
    """Only the kernels' own complaints become ValueError."""

    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        _library.call(out_of_memory)  # type: ignore[arg-type]
