"""The operators as torch's compilers see them: opcheck, torch.compile of first and second order, export."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import metafast
from metafast import prototype
from metafast.distance import DISTANCE, DISTANCE_JVP, DISTANCE_VJP, METRICS
from tests.cases import (
    CASES,
    Case,
    assert_same,
    check_operator,
    cotangents,
    outputs,
    shuffled_labels,
    weighted_sum,
)

each_case = pytest.mark.parametrize("case", CASES, ids=str)
SIZES = {"n": 6, "m": 5, "d": 7, "C": 3}
T, N, M, D, C = 2, 6, 5, 7, 3


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(
    function: Callable[..., Any], backend: str = "aot_eager", dynamic: bool | None = None
) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)


class TestOpcheck:
    """See ``check_operator``."""

    @pytest.fixture(autouse=True)
    def _device(self, hardware: torch.device) -> None:
        self.device = hardware

    def features(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=self.device)

    def labels(self, *shape: int) -> Tensor:
        return shuffled_labels(shape, C).to(self.device)

    def temperature(self, learned: bool) -> Tensor | None:
        return torch.rand(T, dtype=torch.float64, device=self.device) + 0.5 if learned else None

    @pytest.mark.parametrize("metric", range(len(METRICS)))
    def test_distance(self, metric: int) -> None:
        x, y = self.features(T, N, D), self.features(T, M, D)
        check_operator(DISTANCE, x, y, metric)
        check_operator(DISTANCE_VJP, self.features(T, N, M), x, y, metric)
        check_operator(DISTANCE_JVP, x, y, x.cos(), y.cos(), metric)

    def test_means(self) -> None:
        labels = self.labels(T, N)
        check_operator(prototype.MEANS, self.features(T, N, D), labels, C)
        check_operator(prototype.MEANS_VJP, self.features(T, C, D), labels)

    @pytest.mark.parametrize("temperature", [False, True], ids=["number", "tensor"])
    @pytest.mark.parametrize("metric", range(len(METRICS)))
    def test_loss(self, metric: int, temperature: bool) -> None:
        support, query = self.features(T, N, D), self.features(T, M, D)
        labels = self.labels(T, N), self.labels(T, M)
        tau = self.temperature(temperature)
        check_operator(prototype.LOSS, support, labels[0], query, labels[1], tau, 0.7, C, metric)

    @pytest.mark.parametrize("given", ["loss", "logits", "prototypes", "all"])
    @pytest.mark.parametrize("temperature", [False, True], ids=["number", "tensor"])
    def test_loss_vjp(self, given: str, temperature: bool) -> None:
        """Its logits and prototypes are those of its other arguments."""
        support, query = self.features(T, N, D), self.features(T, M, D)
        labels = self.labels(T, N), self.labels(T, M)
        tau = self.temperature(temperature)
        names = ("loss", "logits", "prototypes")
        for metric in range(len(METRICS)) if given == "all" else (0,):
            out = prototype.LOSS(support, labels[0], query, labels[1], tau, 0.7, C, metric)
            upstream = [
                g if given in (name, "all") else None for name, g in zip(names, cotangents(out), strict=True)
            ]
            rest = (support, labels[0], query, labels[1], tau, 0.7, out[1], out[2], metric)
            check_operator(prototype.LOSS_VJP, *upstream, *rest)

    def test_empty(self) -> None:
        x, y = self.features(T, 0, D), self.features(T, M, D)
        check_operator(DISTANCE, x, y, 0)
        check_operator(DISTANCE_VJP, self.features(T, 0, M), x, y, 0)
        check_operator(prototype.MEANS, x, torch.zeros(T, 0, dtype=torch.int64, device=self.device), C)

    def test_strided(self) -> None:
        x, y = self.features(D, N, T).permute(2, 1, 0), self.features(1, M, D).expand(T, M, D)
        for metric in range(len(METRICS)):
            torch.library.opcheck(DISTANCE, (x, y, metric))
            torch.library.opcheck(DISTANCE_VJP, (self.features(M, N, T).permute(2, 1, 0), x, y, metric))
            torch.library.opcheck(DISTANCE_JVP, (x, y, x.cos(), y.cos(), metric))
        labels = self.labels(N, T).T
        torch.library.opcheck(prototype.MEANS, (x, labels, C))
        torch.library.opcheck(prototype.LOSS, (x, labels, y, self.labels(T, M), None, 1.0, C, 0))


def rows(n: int, device: torch.device) -> Tensor:
    return torch.randn(T, n, D, dtype=torch.float64, device=device)


def classes(n: int, device: torch.device) -> Tensor:
    return shuffled_labels((T, n), C).to(device)


@each_case
def test_first_order(case: Case, hardware: torch.device) -> None:
    """Forward and backward of a compiled function, and its forward without gradients."""
    inputs = case.make((T,), SIZES, device=hardware)

    def run(function: Callable[..., Any]) -> tuple[Any, Any, Any]:
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        out = outputs(function(*leaves, C))
        gradients = torch.autograd.grad(out, case.floats(leaves), cotangents(out))
        with torch.no_grad():
            again = outputs(function(*leaves, C))
        return out, gradients, again

    assert_same(run(compiled(case.function)), run(case.function))


def test_metric_and_temperature_are_arguments(hardware: torch.device) -> None:
    """Numbers and strings that change between calls."""
    support, query = rows(N, hardware), rows(M, hardware)
    labels = classes(N, hardware), classes(M, hardware)

    def head(metric: str, temperature: float) -> Any:
        return metafast.prototypical_loss(support, labels[0], query, labels[1], C, metric, temperature)

    fast = compiled(head)
    for metric in ("sqeuclidean", "cosine"):
        for temperature in (1.0, 0.5, 2.5, 3):
            assert_same(fast(metric, temperature), head(metric, temperature))


SECOND_ORDER = [c for c in CASES if c.name != "cdist-2"]


@pytest.mark.parametrize("case", SECOND_ORDER, ids=str)
def test_second_order(case: Case, hardware: torch.device) -> None:
    """torch.func.grad in the compiled region, backward through it outside."""
    inputs = case.make((T,), SIZES, device=hardware)

    def inner(*values: Tensor) -> tuple[Tensor, ...]:
        def scalar(*v: Tensor) -> Tensor:
            return sum((o.sin().sum() for o in outputs(case.function(*v, C))), torch.zeros(()))

        return grad(scalar, argnums=case.differentiable)(*values)

    def run(function: Callable[..., Any]) -> tuple[Any, Any]:
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        gradients = function(*leaves)
        return gradients, torch.autograd.grad(weighted_sum([g.sin() for g in gradients]), case.floats(leaves))

    assert_same(run(compiled(inner)), run(inner))


def maml(
    weight: Tensor,
    rate: Tensor,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    query_labels: Tensor,
    metric: str,
) -> Tensor:
    """One second-order MAML step of a linear embedding on every task."""

    def loss(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
        value, logits = metafast.prototypical_loss(support_of(x) @ weight, y, x @ weight, y, C, metric)
        return value + 1e-3 * logits.square().mean()

    def support_of(x: Tensor) -> Tensor:
        return x + 0.1 * x.flip(-1)

    def task(x: Tensor, y: Tensor, q: Tensor, qy: Tensor) -> Tensor:
        adapted = weight - rate * grad(loss)(weight, x, y)
        value, _ = metafast.prototypical_loss(x @ adapted, y, q @ adapted, qy, C, metric)
        return value + 1e-3 * metafast.pairwise_distance(x @ adapted, q @ adapted, "cosine").sum()

    return vmap(task)(support, labels, query, query_labels).mean()


def maml_inputs(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    weight, rate = torch.randn(D, 4, dtype=dtype), torch.tensor(0.1, dtype=dtype)
    support, query = torch.randn(3, N, D, dtype=dtype), torch.randn(3, M, D, dtype=dtype)
    labels = shuffled_labels((3, N), C), shuffled_labels((3, M), C)
    return tuple(t.to(device) for t in (weight, rate, support, labels[0], query, labels[1]))


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_maml_step(metric: str, hardware: torch.device) -> None:
    """vmap(grad) inside and grad around it, the whole step compiled."""

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda *values: maml(*values, metric), argnums=(0, 1, 2, 4))(*inputs)

    inputs = maml_inputs(torch.float64, hardware)
    assert_same(compiled(step)(*inputs), step(*inputs))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_maml_step_in_inductor(hardware: torch.device) -> None:
    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda *values: maml(*values, "sqeuclidean"), argnums=(0, 1))(*inputs)

    inputs = maml_inputs(torch.float32, hardware)
    assert_same(compiled(step, "inductor")(*inputs), step(*inputs), 1e-5)


@each_case
def test_dynamic_shapes(case: Case, hardware: torch.device) -> None:
    """One graph for all sizes, first all different: nothing is compiled for the second and third."""
    fast = compiled(case.function, dynamic=True)
    limit = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    graphs = []
    for n, m, d, tasks in ((6, 5, 7, 4), (9, 4, 12, 3), (7, 11, 5, 2)):
        sizes = {"n": n, "m": m, "d": d, "C": C}
        inputs = case.make((tasks,), sizes, device=hardware, requires_grad=True)
        results = []
        for function in (fast, case.function):
            out = outputs(function(*inputs, C))
            results.append((out, torch.autograd.grad(out, case.floats(inputs), cotangents(out))))
        assert_same(*results)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - limit)
    assert graphs == [1, 1, 1]


class Head(torch.nn.Module):
    """Uses every public operator."""

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric
        self.temperature = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(
        self, support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor
    ) -> tuple[Tensor, ...]:
        loss, logits = metafast.prototypical_loss(
            support, labels, query, query_labels, C, self.metric, self.temperature
        )
        means = metafast.prototypes(support, labels, C)
        soft = metafast.prototypes(query, logits.softmax(-1), C)
        return (
            loss,
            logits,
            metafast.pairwise_distance(query, means, self.metric),
            metafast.cdist(means, soft, 1.0),
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_export(metric: str, strict: bool, hardware: torch.device) -> None:
    support = rows(N, hardware)
    inputs = support, classes(N, hardware), rows(M, hardware), classes(M, hardware)
    head = Head(metric).to(hardware)
    names = {"support": {1: "n"}, "labels": {1: "n"}, "query": {1: "m"}, "query_labels": {1: "m"}}
    dims = {k: {d: torch.export.Dim(name, min=2) for d, name in v.items()} for k, v in names.items()}
    program = torch.export.export(head, inputs, dynamic_shapes=dims, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {
        f"metafast.{name}.default" for name in ("prototypical_loss", "prototypes", "pairwise_distance")
    } <= targets
    assert_same(program.module()(*inputs), head(*inputs))
    more = torch.cat([support, support.flip(1)], 1), torch.cat([inputs[1], inputs[1].flip(1)], 1), *inputs[2:]
    assert_same(program.module()(*more), head(*more))


@pytest.mark.parametrize("metric", METRICS)
def test_autocast_in_a_graph(metric: str, hardware: torch.device) -> None:
    x, y = rows(N, hardware).float(), rows(M, hardware).float()
    labels = classes(N, hardware), classes(M, hardware)

    def head(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(hardware.type, torch.bfloat16):
            weight = torch.eye(D, device=hardware)
            return (
                metafast.pairwise_distance(x @ weight, y @ weight, metric),
                *metafast.prototypical_loss(x @ weight, labels[0], y @ weight, labels[1], C, metric),
            )

    for actual, expected in zip(compiled(head)(x, y), head(x, y), strict=True):
        assert actual.dtype == expected.dtype == torch.float32
        assert torch.equal(actual, expected)


def test_nothing_breaks_the_graph(hardware: torch.device) -> None:
    """A whole training step of the head in one graph, with the checks of the public functions in it."""
    head = Head("euclidean").to(hardware)
    inputs = rows(N, hardware), classes(N, hardware), rows(M, hardware), classes(M, hardware)
    explained = torch._dynamo.explain(head)(*inputs)
    assert explained.graph_count == 1 and explained.graph_break_count == 0
