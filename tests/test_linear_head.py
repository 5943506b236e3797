"""The adapted linear head: both forms of its loop, every option, to second order against the plain loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import metafast
from metafast import reference
from metafast.linear_head import HEAD, HEAD_VJP, LOSSES
from tests import simt
from tests.cases import assert_same, gradients, runs_cuda_sources, shuffled_labels

FLOAT = {"dtype": torch.float64}
#: T, n, m, d, C, K: K chooses the form (the Gram matrix where 4 C (K - 1) > n).
SIZES = {
    "gram": (3, 5, 7, 33, 3, 3),
    "gram-of-many-rows": (2, 37, 2, 3, 4, 4),
    "weights": (2, 19, 3, 10, 2, 2),
    "one-step": (4, 6, 5, 17, 3, 1),
    "no-step": (2, 4, 3, 3, 2, 0),
    "one-row": (1, 1, 1, 1, 1, 2),
    "beyond-shared-memory": (2, 60, 3, 5, 8, 8),
}


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """New tensors are the device's."""
    with device:
        yield


def problem(
    sizes: tuple[int, ...],
    rate: str,
    *,
    soft: bool,
    bias: bool,
    shared: bool,
    dtype: torch.dtype = torch.float64,
) -> list[Any]:
    """support, labels, query, weight, bias, lr and steps; every floating tensor records."""
    T, n, m, d, C, K = sizes
    own = () if shared else (T,)
    weight = torch.randn(*own, C, d, dtype=dtype) / d**0.5
    offsets = torch.randn(*own, C, dtype=dtype) if bias else None
    lr: Any = {
        "number": 0.2,
        "tensor": torch.tensor(0.2, dtype=dtype),
        "step": 0.3 * torch.rand(K, dtype=dtype),
        "class": 0.3 * torch.rand(K, C, dtype=dtype),
        "parameter": 0.3 * torch.rand_like(weight),
    }[rate]
    if rate == "parameter":
        lr = (
            lr.requires_grad_(),
            None if offsets is None else (0.3 * torch.rand_like(offsets)).requires_grad_(),
        )
    labels = torch.rand(T, n, C, dtype=dtype) if soft else shuffled_labels((T, n), C)
    values = [
        torch.randn(T, n, d, dtype=dtype),
        labels,
        torch.randn(T, m, d, dtype=dtype),
        weight,
        offsets,
        lr,
        K,
    ]
    return [v.requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


def leaves(values: list[Any]) -> list[Tensor]:
    flat = itertools.chain.from_iterable(v if isinstance(v, tuple) else (v,) for v in values)
    return [v for v in flat if isinstance(v, Tensor) and v.is_floating_point()]


def to_second_order(
    functions: tuple[Callable[..., Any], Callable[..., Any]], values: list[Any], **options: Any
) -> Any:
    """Results, first and second gradients of logits, weight and bias together."""
    adapt, logits = functions
    support, labels, query, weight, bias, lr, steps = values
    results = [logits(support, labels, query, weight, bias, lr, steps, **options)]
    results += [r for r in adapt(support, labels, weight, bias, lr, steps, **options) if r is not None]
    total = sum((torch.arange(1, r.numel() + 1).cos().view(r.shape) * r.sin()).sum() for r in results)
    inputs = leaves(values)

    def gradients_of(value: Any, **more: Any) -> list[Tensor]:
        found = torch.autograd.grad(value, inputs, allow_unused=True, **more)
        return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]

    first = gradients_of(total, create_graph=True)
    second = gradients_of(
        sum((torch.arange(1, g.numel() + 1).sin().view(g.shape) * g.sin()).sum() for g in first)
    )
    return [[t.detach() for t in group] for group in (results, first, second)]


OURS = (metafast.adapt_linear, metafast.adapted_logits)
PLAIN = (reference.adapt_linear, reference.adapted_logits)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rate", ["number", "tensor", "step", "class", "parameter"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_option(sizes: tuple[int, ...], rate: str, loss: str, first_order: bool) -> None:
    """Second gradients as well; first order included, whose derivatives are those of a loop with detached steps."""
    soft = loss == "mse" or rate in ("step", "parameter")
    for heavy, bias in itertools.product((False, True), repeat=2):
        if (heavy + bias + first_order) % 2:
            continue  # Over both orders and both losses all three meet in what is left, with each rate and size.
        shared = bias != (loss == "mse")
        momentum, decay = (0.9, 0.1) if heavy else (0.0, 0.0)
        values = problem(sizes, rate, soft=soft, bias=bias, shared=shared)
        options = {"loss": loss, "momentum": momentum, "weight_decay": decay, "first_order": first_order}
        assert_same(to_second_order(OURS, values, **options), to_second_order(PLAIN, values, **options))


@pytest.mark.parametrize("sizes", [SIZES["gram"], SIZES["weights"]], ids=["gram", "weights"])
def test_against_torch_optim(sizes: tuple[int, ...]) -> None:
    """The rule is torch.optim.SGD's."""
    support, labels, _, weight, bias, lr, steps = problem(sizes, "number", soft=False, bias=True, shared=True)
    adapted = metafast.adapt_linear(support, labels, weight, bias, lr, steps, momentum=0.9, weight_decay=0.1)
    for task in range(len(support)):
        layer = torch.nn.Linear(*weight.shape[::-1], **FLOAT)
        layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(support[task].detach()), labels[task]).backward()
            optimizer.step()
        assert_same(adapted[0][task].detach(), layer.weight.detach())
        assert_same(adapted[1][task].detach(), layer.bias.detach())


def test_soft_labels_are_those_of_cross_entropy() -> None:
    """Rows of soft labels need not sum to one, as in torch's cross-entropy."""
    support, labels, query, weight, bias, lr, steps = problem(
        SIZES["gram"], "number", soft=True, bias=True, shared=True
    )

    def task(x: Tensor, y: Tensor, q: Tensor, w: Tensor, b: Tensor) -> Tensor:
        for _ in range(steps):
            to_w, to_b = grad(lambda w, b: torch.nn.functional.cross_entropy(x @ w.mT + b, y), (0, 1))(w, b)
            w, b = w - lr * to_w, b - lr * to_b
        return q @ w.mT + b

    expected = vmap(task, (0, 0, 0, None, None))(support, labels, query, weight, bias)
    assert_same(metafast.adapted_logits(support, labels, query, weight, bias, lr, steps), expected, 1e-12)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(("offset", "bound"), [(0.0, 2e-6), (0.5, 2e-5)], ids=["centred", "of positive mean"])
def test_accuracy_of_the_gram_form(offset: float, bound: float) -> None:
    """float32 against float64, relative to the largest entry: a wrong entry of the Gram matrix shows from 1e-4 on."""
    T, n, m, d, C, K = 4, 25, 75, 1600, 5, 5
    values = problem((T, n, m, d, C, K), "step", soft=False, bias=True, shared=True)
    with torch.no_grad():
        for k in (0, 2):
            values[k] /= d**0.5
            values[k] += offset * torch.rand_like(values[k]) / (d**0.5 if offset == 0 else 1)
    floats = [0, 2, 3, 4, 5]

    def run(*inputs: Tensor) -> Tensor:
        given = list(values)
        for k, value in zip(floats, inputs[:-1], strict=True):
            given[k] = value
        return metafast.adapted_logits(*given)

    exact = gradients(run, [values[k] for k in floats], C)
    single = gradients(run, [values[k].float() for k in floats], C)
    for a, e in zip(single, exact, strict=True):
        assert ((a - e).abs().max() / e.abs().max()).item() < bound


@pytest.mark.parametrize("steps", [1, 4], ids=["weights", "gram"])
def test_threads_change_no_bit(steps: int) -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.manual_seed(1)
        values = problem(
            (7, 20, 33, 70, 3, steps), "step", soft=True, bias=True, shared=True, dtype=torch.float32
        )
        torch.set_num_threads(threads)
        out = metafast.adapted_logits(*values, momentum=0.5, weight_decay=0.1)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves(values))])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("gram", [True, False], ids=["gram", "weights"])
def test_groups_of_tasks(gram: bool) -> None:
    """A weight, bias or rate for a group of consecutive tasks: its gradient is the sum over them."""
    T, n, m, d, C, K = 6, 5, 4, 7, 3, 2
    support, query = torch.randn(T, n, d, **FLOAT), torch.randn(T, m, d, **FLOAT)
    labels, upstream = shuffled_labels((T, n), C), torch.randn(T, m, C, **FLOAT)
    weight, bias = torch.randn(3, C, d, **FLOAT), torch.randn(2, C, **FLOAT)
    rates = torch.rand(6, K, 1, 1, **FLOAT) * 0.2

    def run(weight: Tensor, bias: Tensor, rates: Tensor) -> tuple[Tensor, ...]:
        args = (support, labels, query, weight, bias, rates, None, 0.0, K, 0, 0.0, 0.0, False, gram)
        logits, adapted, _, tape = HEAD(*args)
        return logits, *HEAD_VJP(upstream, None, None, *args, adapted, tape)[3:6]

    logits, *grouped = run(weight, bias, rates)
    each = run(weight.repeat_interleave(2, 0), bias.repeat_interleave(3, 0), rates)
    assert_same(logits, each[0], 1e-14)
    for g, e in zip(grouped, each[1:], strict=True):
        assert_same(g, e.reshape(g.shape[0], -1, *g.shape[1:]).sum(1), 1e-13)


@pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("gram", [True, False], ids=["gram", "weights"])
def test_opcheck(gram: bool, recorded: bool) -> None:
    """What is saved for the backward alone has no derivative, and says so."""

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, **FLOAT).requires_grad_(recorded)

    rest = (values(1, 2, 1, 1), None, 0.0, 2, 0, 0.9, 0.1, False, gram)
    args = (
        values(2, 5, 4),
        shuffled_labels((2, 5), 3),
        values(2, 3, 4),
        values(1, 3, 4),
        values(1, 3),
        *rest,
    )
    torch.library.opcheck(HEAD, args)
    *differentiable, tape = HEAD(*args)
    assert all(out.requires_grad == recorded for out in differentiable)
    assert not tape.requires_grad
    torch.library.opcheck(HEAD_VJP, (values(2, 3, 3), None, None, *args, differentiable[1].detach(), tape))


@pytest.mark.usefixtures("on_device")
def test_leading_dimensions_and_views() -> None:
    support, labels = torch.randn(2, 3, 5, 4, **FLOAT), shuffled_labels((3, 5), 2)
    query, weight = torch.randn(4, 6, **FLOAT).mT, torch.randn(2, 1, 2, 4, **FLOAT)
    logits = metafast.adapted_logits(support, labels, query, weight, None, 0.1, 3)
    assert logits.shape == (2, 3, 6, 2)
    adapted, bias = metafast.adapt_linear(support, labels, weight, None, 0.1, 3)
    assert bias is None
    assert adapted.shape == (2, 3, 2, 4)
    for i, j in itertools.product(range(2), range(3)):
        one = metafast.adapted_logits(support[i, j], labels[j], query, weight[i, 0], None, 0.1, 3)
        assert_same(logits[i, j], one, 1e-13)
        assert_same(query @ adapted[i, j].mT, one, 1e-13)


@pytest.mark.emulated
@pytest.mark.skipif(bool(simt.unavailable()), reason=simt.unavailable())
@pytest.mark.parametrize(("name", "fits"), [("gram", True), ("beyond-shared-memory", False)])
def test_working_memory(name: str, fits: bool) -> None:
    """The size that is named for it does leave shared memory, forward and backward."""
    with simt.emulated():
        values = problem(SIZES[name], "number", soft=False, bias=True, shared=True)
        metafast.adapted_logits(*values).sum().backward()
        assert (simt.module().most_dynamic_shared() > 0) == fits


@pytest.mark.parametrize(
    "sizes", [SIZES["gram"], SIZES["weights"], SIZES["no-step"]], ids=["gram", "weights", "none"]
)
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
@pytest.mark.parametrize("rate", ["number", "class", "parameter"])
def test_bad_label(device: torch.device, rate: str, first_order: bool, sizes: tuple[int, ...]) -> None:
    """An error where labels are read at once; on a GPU the task's results are NaN, and no other's."""
    with device:
        values = problem(sizes, rate, soft=False, bias=True, shared=False)
    good = values[1]
    bad = good.clone()
    bad[1, 2] = sizes[4]

    def run(labels: Tensor) -> list[Tensor]:
        out = metafast.adapted_logits(values[0], labels, *values[2:], first_order=first_order)
        inputs = [v for k, v in enumerate(values[:5]) if k != 1]
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]

    if not runs_cuda_sources(device):
        with pytest.raises(
            ValueError, match=f"labels: expected class numbers from 0 to {sizes[4] - 1}, got {sizes[4]}"
        ):
            run(bad)
        return
    others = [t for t in range(sizes[0]) if t != 1]
    for spoilt, expected in zip(run(bad), run(good), strict=True):
        assert spoilt[1].isnan().all()
        assert torch.equal(spoilt[others], expected[others])


def test_half_types_and_autocast_give_float32() -> None:
    values = problem(SIZES["gram"], "number", soft=False, bias=True, shared=True, dtype=torch.float32)
    expected = metafast.adapted_logits(*values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(metafast.adapted_logits(*values), expected)
    halves = [v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
    back = [v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for v in halves]
    assert torch.equal(metafast.adapted_logits(*halves), metafast.adapted_logits(*back))


class TestErrors:
    X, Y, Q = torch.zeros(2, 5, 4), torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 3, 4)
    W, B = torch.zeros(3, 4), torch.zeros(3)

    @pytest.mark.parametrize(
        ("changed", "error", "message"),
        [
            ({"support": [1.0]}, TypeError, "support: expected a tensor, got list"),
            ({"support": X.long()}, TypeError, "support: expected float32, float64, bfloat16 or float16"),
            ({"support": X[0, 0]}, ValueError, r"support: expected shape [..., n, d], got [4]"),
            (
                {"query": Q.double()},
                TypeError,
                "query: expected the dtype of support, torch.float32, got torch.float64",
            ),
            ({"query": Q[..., 1:]}, ValueError, "query: expected size 4 in dimension -1, as support has"),
            (
                {"query": torch.zeros(3, 3, 4)},
                ValueError,
                "leading dimensions: expected shapes that broadcast",
            ),
            ({"weight": W.mT}, ValueError, "weight: expected size 4 in dimension -1, as support has"),
            ({"weight": W.half()}, TypeError, "weight: expected the dtype of support"),
            ({"weight": W.to("meta")}, ValueError, "weight: expected the device of support, cpu, got meta"),
            ({"bias": B[:2]}, ValueError, "bias: expected shape [3] or [..., 3], got [2]"),
            ({"bias": 0.0}, TypeError, "bias: expected a tensor, got float"),
            ({"labels": Y.int()}, TypeError, "labels: expected int64 class numbers, got torch.int32"),
            ({"labels": Y[:, :4]}, ValueError, "labels: expected size 5 in dimension -1, as support has"),
            ({"labels": X}, ValueError, "labels: expected 3 values a row, got shape [2, 5, 4]"),
            (
                {"loss": "mse"},
                TypeError,
                "labels: expected targets [..., n, C] for the loss 'mse', got torch.int64",
            ),
            ({"loss": "hinge"}, ValueError, "loss: expected cross_entropy or mse, got 'hinge'"),
            ({"lr": "0.1"}, TypeError, "lr: expected a number, got str"),
            ({"lr": torch.ones(3)}, ValueError, "lr: expected 2 rates, one for each step, got shape [3]"),
            ({"lr": torch.ones(2, 2)}, ValueError, "lr: expected 3 rates a step, got shape [2, 2]"),
            ({"lr": torch.ones(2, 3, 1)}, ValueError, "lr: expected shape [], [K] or [K, C], got [2, 3, 1]"),
            ({"lr": torch.ones(2).long()}, TypeError, "lr: expected float32, float64"),
            ({"lr": (W,)}, ValueError, "lr: expected a pair of rates, like the weight and the bias, got 1"),
            ({"lr": (B, B)}, ValueError, "lr[0]: expected the shape of weight, [3, 4], got [3]"),
            ({"lr": (W, W)}, ValueError, "lr[1]: expected the shape of bias, [3], got [3, 4]"),
            ({"lr": (W, B), "bias": None}, ValueError, "lr[1]: expected None, since bias is None"),
            ({"steps": -1}, ValueError, "steps: expected 0 or more, got -1"),
            ({"steps": 1.0}, TypeError, "steps: expected an int, got float"),
            ({"momentum": None}, TypeError, "momentum: expected a number, got NoneType"),
            ({"weight_decay": torch.ones(1)}, TypeError, "weight_decay: expected a number, got Tensor"),
        ],
        ids=str,
    )
    def test_message(self, changed: dict[str, Any], error: type[Exception], message: str) -> None:
        arguments: dict[str, Any] = {
            "support": self.X, "labels": self.Y, "query": self.Q, "weight": self.W, "bias": self.B,
            "lr": 0.1, "steps": 2,
        }  # fmt: skip
        assert metafast.adapted_logits(**arguments).shape == (2, 3, 3)
        with pytest.raises(error) as raised:
            metafast.adapted_logits(**{**arguments, **changed})
        assert message in str(raised.value)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({0: torch.zeros(2, 5)}, "support: expected shape [T, n, d], got [2, 5]"),
            ({1: torch.zeros(2, 5, 2)}, "labels: expected shape [2, 5, 3], got [2, 5, 2]"),
            ({2: torch.zeros(2, 3, 5)}, "query: expected shape [2, 3, 4], got [2, 3, 5]"),
            (
                {3: torch.zeros(3, 3, 4)},
                "weight: expected a first size that divides 2 tasks, got shape [3, 3, 4]",
            ),
            ({4: torch.zeros(1, 4)}, "bias: expected shape [1, 3], got [1, 4]"),
            (
                {5: torch.zeros(1, 3, 1, 1)},
                "rates: expected a size of 1 or that of the steps, classes and features",
            ),
            ({5: torch.zeros(1, 1, 1, 4)}, "bias_rates: expected them beside rates of features"),
            ({6: torch.zeros(1, 1, 2)}, "bias_rates: expected a size of 1 or that of the steps, classes"),
            ({6: torch.zeros(1, 1, 3)}, "gram: expected rates of steps and classes alone"),
            ({8: -1}, "steps: expected a number of steps, got -1"),
            ({9: 2}, "loss: expected 0 or 1, got 2"),
            ({9: 1}, "labels: expected targets [T, n, C] for the squared error"),
        ],
        ids=str,
    )
    def test_message_of_the_operator(self, changed: dict[int, Any], message: str) -> None:
        args: list[Any] = [
            self.X, self.Y, self.Q, self.W[None], self.B[None], None, None, 0.1, 2, 0, 0.0, 0.0, False, True,
        ]  # fmt: skip
        _, adapted, _, tape = HEAD(*args)
        upstream = torch.zeros(2, 3, 3)
        HEAD_VJP(upstream, None, None, *args, adapted, tape)
        with pytest.raises(RuntimeError) as raised:
            HEAD_VJP(upstream[:, :2], None, None, *args, adapted, tape)
        assert "grad_logits: expected shape [2, 3, 3], got [2, 2, 3]" in str(raised.value)
        for k, value in changed.items():
            args[k] = value
        for call in (lambda: HEAD(*args), lambda: HEAD_VJP(upstream, None, None, *args, adapted, tape)):
            with pytest.raises(RuntimeError) as raised:
                call()
            assert message in str(raised.value)
