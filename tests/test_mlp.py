"""Inner loops of an MLP: every kind of rate, activation and loss against the reference, and what generic tests miss."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import metafast
from metafast import mlp, reference
from tests import simt
from tests.cases import assert_bad_label_spoils_its_task, assert_same, cotangents, runs_cuda_sources

DOUBLE = {"dtype": torch.float64}
T, N, M, K = 3, 5, 4, 3
#: Widths that fill vectors, that do not, and that are one number; one layer and many.
NETS = ((1, 40, 40, 1), (4, 6, 5, 3), (19, 2), (2, 17, 33, 16, 5))


@pytest.fixture(autouse=True)
def _tensors_there(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors of a test lie where it runs."""
    names = {"device", "hardware", "kernels"} & set(request.fixturenames)
    with contextlib.ExitStack() as stack:
        for device in (request.getfixturevalue(name) for name in names):
            if device.type != "cpu":
                stack.enter_context(device)
        yield


def net(
    widths: Sequence[int], lead: Sequence[int] = (), scale: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    pairs = list(itertools.pairwise(widths))
    return (
        [(scale * torch.randn(*lead, o, i, **DOUBLE) / i**0.5).requires_grad_() for i, o in pairs],
        [(0.3 * torch.randn(*lead, o, **DOUBLE)).requires_grad_() for _, o in pairs],
    )


def data(widths: Sequence[int], loss: str = "mse", lead: Sequence[int] = (T,)) -> list[Tensor]:
    inputs, query = torch.randn(*lead, N, widths[0], **DOUBLE), torch.randn(*lead, M, widths[0], **DOUBLE)
    targets = (torch.randn if loss == "mse" else torch.rand)(*lead, N, widths[-1], **DOUBLE)
    return [t.requires_grad_() for t in (inputs, targets, query)]


def some(*shape: int) -> Tensor:
    return (0.2 * torch.rand(shape, **DOUBLE) + 0.01).requires_grad_()


RATES: dict[str, Callable[[list[Tensor], list[Tensor]], Any]] = {
    "number": lambda w, b: 0.1,
    "integer": lambda w, b: 1,
    "scalar": lambda w, b: some(),
    "steps": lambda w, b: some(K),
    "layers": lambda w, b: [some() for _ in w],
    "layers and steps": lambda w, b: tuple(some(K) for _ in w),
    "mixed layers": lambda w, b: [some(K) if k == 0 else 0.1 for k in range(len(w))],
    "parameters": lambda w, b: ([some(*p.shape[-2:]) for p in w], [some(*p.shape[-1:]) for p in b]),
}


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested lists."""
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors(v)]
    return [value] if isinstance(value, Tensor) else []


def assert_equal_derivatives(functions: Sequence[Callable[[], Any]], leaves: Sequence[Tensor]) -> None:
    """Values, gradients and second gradients of the two, or zeros where a leaf has no part."""
    results = []
    for function in functions:
        out = tensors(function())
        nothing = 0 * sum((t.sum() for t in leaves), torch.zeros(()))
        first = torch.autograd.grad(
            [*out, nothing], leaves, [*cotangents(tuple(out)), torch.ones_like(nothing)], create_graph=True
        )
        total = sum((g.sin().sum() for g in first), nothing)
        results.append((out, first, torch.autograd.grad(total, leaves)))
    assert_same(*results)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize(
    ("d", "lead"), [(4, ()), (4, (T,)), (40, ())], ids=["shared", "per task", "shared, many inputs"]
)
@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("loss", mlp.LOSSES)
@pytest.mark.parametrize("activation", mlp.ACTIVATIONS)
def test_rates(
    d: int,
    activation: str,
    loss: str,
    rates: str,
    lead: tuple[int, ...],
    first_order: bool,
    device: torch.device,
) -> None:
    """With few inputs by the explicit weight of the first layer, with many on products of rows."""
    widths = (d, *NETS[1][1:])
    inputs, targets, query = data(widths, loss)
    weights, biases = net(widths, lead)
    lr = RATES[rates](weights, biases)
    options = {"activation": activation, "loss": loss, "first_order": first_order}
    leaves = tensors([inputs, targets, weights, biases, lr])
    assert_equal_derivatives(
        [
            lambda m=m: m.adapt_mlp(inputs, targets, weights, biases, lr, K, **options)
            for m in (metafast, reference)
        ],
        leaves,
    )
    assert_equal_derivatives(
        [
            lambda m=m: m.adapted_mlp(inputs, targets, query, weights, biases, lr, K, **options)
            for m in (metafast, reference)
        ],
        [*leaves, query],
    )


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("widths", NETS, ids=str)
def test_widths(widths: tuple[int, ...], steps: int, vectors: torch.device) -> None:
    """Every vector width: all gradients of every parameter."""
    inputs, targets, query = data(widths)
    weights, biases = net(widths)
    options = {"activation": "tanh"}
    assert_equal_derivatives(
        [
            lambda m=m: m.adapted_mlp(inputs, targets, query, weights, biases, 0.1, steps, **options)
            for m in (metafast, reference)
        ],
        [inputs, targets, query, *weights, *biases],
    )


#: Widths, support rows, query rows and steps with products of rows; no step, no row, no input, no output.
FACTORED = (
    ((30, 7, 5, 3), 5, 7, 3),
    ((19, 18), 17, 3, 4),
    ((530, 33, 2), 3, 20, 2),
    ((1, 1), 1, 1, 1),
    ((9, 5, 2), 4, 0, 2),
    ((9, 5, 2), 0, 4, 2),
    ((9, 5, 2), 3, 2, 0),
    ((0, 5, 2), 3, 2, 2),
)


@pytest.mark.parametrize("with_query", [True, False])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("groups", [0, 1, 2, 6])
@pytest.mark.parametrize("shape", FACTORED, ids=str)
def test_products_of_rows_are_the_explicit_weight(
    shape: tuple[tuple[int, ...], int, int, int],
    groups: int,
    first_order: bool,
    with_query: bool,
    vectors: torch.device,
) -> None:
    """All results of both operators; groups: of parameters and rates, of which 0 is none."""
    widths, n, m, steps = shape
    lead = (groups,) if groups else ()
    inputs, query = (torch.randn(6, rows, widths[0], **DOUBLE) / (1 + widths[0]) ** 0.5 for rows in (n, m))
    targets = torch.rand(6, n, widths[-1], **DOUBLE)
    weights, biases = ([t.detach() for t in ts] for ts in net([max(w, 1) for w in widths], lead))
    weights[0] = weights[0][..., : widths[0]]
    rates = [some(*lead, k % 2 * steps or 1).detach() for k in range(len(weights))]
    results = []
    for factored in (True, False):
        arguments = (inputs, targets, query if with_query else None, weights, biases, rates, 0.0, steps)
        options = (1, int(groups > 1), first_order, factored)
        outputs, parameters, tape = mlp.LOOP(*arguments, *options)
        upstream = (outputs.cos(), None) if with_query else (None, parameters.cos())
        found = [outputs, parameters]
        for up in (upstream, (None, None)):
            for wanted in (True, False):
                found += mlp.LOOP_VJP(*up, *arguments, *options, tape, wanted)
        results.append(found)
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        if expected.numel():
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("widths", "rows", "queries", "steps", "expected"),
    [
        ((784, 256, 128, 64, 64, 5), 5, 75, 1, True),
        ((784, 256, 128, 64, 64, 5), 25, 75, 5, True),
        ((784, 256, 128, 64, 64, 5), 5, 75, 0, False),
        ((1, 40, 40, 1), 10, 10, 1, False),
        ((1, 40, 40, 1), 10, 10, 10, False),
    ],
)
def test_where_products_of_rows_pay(
    widths: tuple[int, ...], rows: int, queries: int, steps: int, expected: bool
) -> None:
    """On a net for pictures, not on one for a curve, and never where each parameter has its own rate."""
    inputs, query = torch.empty(2, rows, widths[0]), torch.empty(2, queries, widths[0])
    weights = net(widths)[0]
    assert mlp._pays_factored(inputs, query, weights, [], steps) == expected
    assert not mlp._pays_factored(inputs, query, weights, [*weights, *weights], steps)


@pytest.mark.parametrize("lead", [(), (2, 3), (1,), (0,)], ids=str)
def test_leading_dimensions(lead: tuple[int, ...], device: torch.device) -> None:
    """Of the data, of the parameters, and of both."""
    for of_data, of_weights, of_biases in (
        (lead, (), ()),
        ((), lead, ()),
        ((), (), lead),
        (lead, lead, lead),
    ):
        inputs, targets, query = data(NETS[1], lead=of_data)
        weights, biases = net(NETS[1], of_weights)[0], net(NETS[1], of_biases)[1]
        arguments = (weights, biases, 0.1, 2)
        expected = reference.adapt_mlp(inputs, targets, *arguments)
        assert_same(metafast.adapt_mlp(inputs, targets, *arguments), expected)
        assert_equal_derivatives(
            [lambda m=m: m.adapted_mlp(inputs, targets, query, *arguments) for m in (metafast, reference)],  # noqa: B023
            [inputs, targets, query, *weights, *biases],
        )


@pytest.mark.parametrize("rates", ["scalar", "steps", "layers", "parameters"])
def test_vmap_over_parameters_and_rates(rates: str, device: torch.device) -> None:
    """Two networks with rates of their own on the same three tasks: groups of tasks inside the operator."""
    inputs, targets, query = (t.detach() for t in data(NETS[1]))
    nets = [net(NETS[1]) for _ in range(2)]
    lrs = [RATES[rates](*n) for n in nets]
    stacked = [
        torch.stack(ts).detach()
        for ts in zip(*(tensors([*n, r]) for n, r in zip(nets, lrs, strict=True)), strict=True)
    ]

    def one(module: Any) -> Callable[..., Tensor]:
        def of(*flat: Tensor) -> Tensor:
            weights, biases, lr = list(flat[:3]), list(flat[3:6]), list(flat[6:])
            rate = {"layers": lr, "parameters": (lr[:3], lr[3:])}.get(rates, lr[0])
            return (
                module.adapted_mlp(inputs, targets, query, weights, biases, rate, K, activation="tanh")
                .sin()
                .sum()
            )

        return of

    every = tuple(range(len(stacked)))
    for transform in (
        lambda f: f,
        lambda f: torch.func.grad(f, argnums=every),
        lambda f: torch.func.jacfwd(f, argnums=every),
        lambda f: torch.func.grad(lambda *v: torch.func.grad(f)(*v).sin().sum(), argnums=every),
    ):
        actual, expected = (torch.vmap(transform(one(m)))(*stacked) for m in (metafast, reference))
        assert_same(actual, expected)


def test_groups_of_the_operator(device: torch.device) -> None:
    """Six tasks, two networks and three groups of rates: gradients are sums over the tasks that each serves."""
    inputs, targets, query = data(NETS[1], lead=(6,))
    weights, biases = net(NETS[1], (2,))
    rates = [some(3, 2)]

    def run(weights: Any, biases: Any, rates: Any) -> Tensor:
        return mlp.LOOP(inputs, targets, query, weights, biases, rates, 0.0, 2, 1, 0, False, False)[0]

    leaves = [*weights, *biases, *rates]
    actual = run(weights, biases, rates)
    full = [t.repeat_interleave(3, 0) for t in (*weights, *biases)]
    expected = run(full[:3], full[3:], [rates[0].repeat_interleave(2, 0)])
    results = [
        torch.autograd.grad(o, leaves, o.detach().cos(), create_graph=True) for o in (actual, expected)
    ]
    assert_same(actual, expected)
    assert_same(*results)
    assert_same(*(torch.autograd.grad(sum(g.square().sum() for g in r), leaves) for r in results))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("d", [3, 150])
@pytest.mark.parametrize("rates", ["number", "steps", "parameters"])
def test_same_bits_for_any_number_of_threads(
    rates: str, d: int, threads: Callable[[int], None], kernels: torch.device
) -> None:
    widths = (d, 40, 29, 2)
    inputs, targets, query = (t.detach().float() for t in data(widths, lead=(9,)))
    weights, biases = net(widths)
    lr = RATES[rates](weights, biases)
    leaves = tensors([weights, biases, lr])
    runs = []
    for count in (1, 2, 3, 2):
        threads(count)
        single = [t.detach().float().requires_grad_() for t in leaves]
        own = single[6:]
        rate = (own[:3], own[3:]) if rates == "parameters" else own[0] if own else lr
        out = metafast.adapted_mlp(inputs, targets, query, single[:3], single[3:6], rate, K)
        runs.append([out, *torch.autograd.grad(out, single, out.detach().cos())])
    for run in runs[1:]:
        assert all(torch.equal(a, e) for a, e in zip(run, runs[0], strict=True))


def test_float32_stays_close_to_float64(kernels: torch.device) -> None:
    widths = (1, 40, 40, 1)
    inputs, targets, query = data(widths)
    weights, biases = net(widths)
    results = []
    for dtype in (torch.float32, torch.float64):
        own = [t.detach().to(dtype).requires_grad_() for t in (*weights, *biases)]
        x, y, q = (t.detach().to(dtype) for t in (inputs, targets, query))
        out = metafast.adapted_mlp(x, y, q, own[:3], own[3:], 0.01, 5, activation="tanh")
        results.append([out, *torch.autograd.grad(out.square().mean(), own)])
    for single, double in zip(*results, strict=True):
        assert single.dtype == torch.float32
        assert (single - double).abs().max() <= 3e-6 * double.abs().max()


def test_tanh_of_every_size(vectors: torch.device) -> None:
    """The vectorised tanh against torch's, relative to its value, infinities and NaN included."""
    x = torch.cat([torch.logspace(-30, 2, 4001), torch.tensor([0.0, torch.inf, torch.nan])])
    x = torch.cat([x, -x])
    one, zero = [torch.ones(1, 1), torch.ones(1, 1)], [torch.zeros(1), torch.zeros(1)]
    actual = metafast.adapted_mlp(x[:, None], x[:, None], x[:, None], one, zero, 0.1, 0, activation="tanh")[
        :, 0
    ]
    exact = x.double().tanh()
    torch.testing.assert_close(actual.double(), exact, rtol=3e-7, atol=0, equal_nan=True)


def test_class_numbers_are_probabilities_of_one(device: torch.device) -> None:
    inputs, _, query = data(NETS[1])
    weights, biases = net(NETS[1])
    labels = torch.tensor([[0, 1, 2, 2, 1]]).repeat(T, 1)
    results = []
    for targets in (labels, torch.nn.functional.one_hot(labels, 3).double()):
        out = metafast.adapted_mlp(inputs, targets, query, weights, biases, 0.5, K, loss="cross_entropy")
        results.append((out, torch.autograd.grad(out.sin().sum(), [inputs, *weights, *biases])))
    assert_same(*results)


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_bad_label(label: int, device: torch.device) -> None:
    x = torch.randn(3, 4, 2)
    weights, biases = [torch.randn(5, 2), torch.randn(3, 5)], [torch.zeros(5), torch.zeros(3)]
    labels = torch.tensor([[0, 1, 2, 0]]).repeat(3, 1)

    def run(labels: Tensor, x: Tensor) -> Tensor:
        return metafast.adapted_mlp(x, labels, x, weights, biases, 0.1, 2, loss="cross_entropy")

    if runs_cuda_sources(device):
        assert_bad_label_spoils_its_task(run, [x], labels, label)
        return
    labels[1, 2] = label
    with pytest.raises(ValueError, match=f"targets: expected class numbers from 0 to 2, got {label}"):
        run(labels, x)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("with_query", [False, True])
def test_bad_label_spoils_every_result(
    with_query: bool, first_order: bool, steps: int, device: torch.device
) -> None:
    """Of both operators, where each task has its own parameters and rates; the other tasks keep their bits."""
    inputs, _, query = (t.detach() for t in data(NETS[1]))
    weights, biases = ([t.detach() for t in ts] for ts in net(NETS[1], (T,)))
    rates = [torch.rand_like(t) for t in (*weights, *biases)]

    def run(labels: Tensor) -> list[Tensor]:
        arguments = (inputs, labels, query if with_query else None, weights, biases, rates)
        options = (0.0, steps, 0, 0, first_order, False)
        outputs, parameters, tape = mlp.LOOP(*arguments, *options)
        upstream = (outputs.cos(), None) if with_query else (None, parameters.cos())
        found = [outputs, parameters, *mlp.LOOP_VJP(*upstream, *arguments, *options, tape, True)]
        return [t for t in found if t.dim() > 1]

    labels = torch.tensor([[0, 1, 2, 2, 1]]).repeat(T, 1)
    wanted = run(labels)
    labels[1, 2] = 3
    if not runs_cuda_sources(device):
        with pytest.raises(RuntimeError, match="got 3"):
            run(labels)
        return
    actual = run(labels)
    assert len(actual) == 2 + 1 + with_query + 4 * len(weights)
    for a, w in zip(actual, wanted, strict=True):
        assert a[1].isnan().all() and torch.equal(a[[0, 2]], w[[0, 2]]) and not w.isnan().any()


def test_net_in_global_memory(kernels: torch.device) -> None:
    """Parameters beyond what shared memory holds, and more query rows than are worked on at a time."""
    widths = (3, 90, 80, 2)
    inputs, targets = data(widths)[:2]
    query = torch.randn(T, 37, 3, **DOUBLE).requires_grad_()
    weights, biases = net(widths)
    lr = ([some(*w.shape) for w in weights], [some(*b.shape) for b in biases])
    results = []
    for module in (metafast, reference):
        out = module.adapted_mlp(inputs, targets, query, weights, biases, lr, 2, activation="tanh")
        leaves = [inputs, targets, query, *weights, *biases, *tensors(lr)]
        results.append((out, torch.autograd.grad(out, leaves, out.detach().cos())))
    assert_same(*results)
    if simt.active():
        assert simt.module().most_dynamic_shared() == 0


@pytest.mark.emulated
@pytest.mark.skipif(bool(simt.unavailable()), reason=simt.unavailable())
class TestEmulated:
    def gradients(self, order: str, lead: tuple[int, ...] = (25,), rows: int = 10) -> list[Tensor]:
        torch.manual_seed(0)
        weights, biases = ([t.detach().float().requires_grad_() for t in ts] for ts in net(NETS[0]))
        inputs, targets, query = (torch.randn(*lead, rows, 1) for _ in range(3))
        rate = torch.full((2,), 0.01, requires_grad=True)
        with simt.emulated(order):
            out = metafast.adapted_mlp(inputs, targets, query, weights, biases, rate, 2)
            return [out, *torch.autograd.grad(out, [*weights, *biases, rate], out.detach().cos())]

    def test_same_bits_in_every_order_of_threads(self) -> None:
        first, *others = (self.gradients(order) for order in ("forward", "reverse", "random"))
        for other in others:
            assert all(torch.equal(a, e) for a, e in zip(other, first, strict=True))

    def test_sinusoid_net_fits_into_shared_memory(self) -> None:
        """In both directions: the backward's is the larger."""
        self.gradients("forward", (2,))
        assert 32 * 1024 < simt.module().most_dynamic_shared() <= 46 * 1024

    def test_most_layers(self) -> None:
        x = torch.ones(1, 1, 1)

        def run(layers: int) -> Tensor:
            return metafast.adapted_mlp(
                x, x, x, [torch.ones(1, 1)] * layers, [torch.ones(1)] * layers, 0.1, 1
            )

        with simt.emulated():
            run(20)
            with pytest.raises(ValueError, match="weights: expected at most 20 layers on a GPU, got 21"):
                run(21)
        assert run(21).shape == (1, 1, 1)


def test_under_autocast(hardware: torch.device) -> None:
    inputs, targets, query = (t.detach().float() for t in data(NETS[1]))
    weights, biases = ([t.detach().float() for t in ts] for ts in net(NETS[1]))
    expected = metafast.adapted_mlp(inputs, targets, query, weights, biases, 0.1, 2)
    with torch.autocast(hardware.type, torch.bfloat16):
        actual = metafast.adapted_mlp(inputs, targets, query @ torch.eye(4), weights, biases, 0.1, 2)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("rates", ["number", "steps", "parameters"])
@pytest.mark.parametrize("with_query", [False, True])
def test_opcheck(with_query: bool, rates: str, hardware: torch.device) -> None:
    inputs, targets, query = data(NETS[1])
    weights, biases = net(NETS[1])
    lr = RATES[rates](weights, biases)
    rate = (lr, []) if rates == "number" else (0.0, tensors(lr))
    arguments = (
        inputs,
        targets,
        query if with_query else None,
        weights,
        biases,
        rate[1],
        rate[0],
        K,
        1,
        0,
        False,
        rates == "steps",
    )
    tests = ("test_schema", "test_faketensor", *(("test_aot_dispatch_dynamic",) if rates == "steps" else ()))
    torch.library.opcheck(mlp.LOOP, arguments, test_utils=tests)
    found = mlp.LOOP(*arguments)
    assert found[1 - with_query].requires_grad, "the parameters record"
    assert not found[2].requires_grad, "the tape is for the backward alone"
    outputs, parameters, tape = (t.detach() for t in found)
    upstream = (outputs.cos(), None) if with_query else (None, parameters.cos())
    for needed in (False, True):
        torch.library.opcheck(mlp.LOOP_VJP, (*upstream, *arguments, tape, needed), test_utils=tests)


X, Y, Q = torch.zeros(2, 4, 3), torch.zeros(2, 4, 2), torch.zeros(2, 5, 3)
W, B = [torch.zeros(6, 3), torch.zeros(2, 6)], [torch.zeros(6), torch.zeros(2)]


def run(**changed: Any) -> Any:
    given = {"inputs": X, "targets": Y, "query": Q, "weights": W, "biases": B, "lr": 0.1, "steps": 2}
    return metafast.adapted_mlp(**(given | changed))


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "inputs": ({"inputs": None}, TypeError, "inputs: expected a tensor, got NoneType"),
    "inputs 1-d": ({"inputs": X[0, 0]}, ValueError, "inputs: expected shape [..., n, in], got [3]"),
    "targets rows": (
        {"targets": Y[:, :3]},
        ValueError,
        "targets: expected size 4 in dimension -2, as inputs has, got shape [2, 3, 2]",
    ),
    "targets width": (
        {"targets": X},
        ValueError,
        "targets: expected size 2 in dimension -1, as the last of weights has, got shape [2, 4, 3]",
    ),
    "targets of integers for mse": (
        {"targets": Y[..., 0].long()},
        TypeError,
        "targets: expected float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "targets dtype": (
        {"targets": Y.double()},
        TypeError,
        "targets: expected the dtype of inputs, torch.float32, got torch.float64",
    ),
    "targets int32": (
        {"targets": Y[..., 0].int(), "loss": "cross_entropy"},
        TypeError,
        "targets: expected int64 class numbers, got torch.int32",
    ),
    "query width": (
        {"query": Q[..., :2]},
        ValueError,
        "query: expected size 3 in dimension -1, as inputs has, got shape [2, 5, 2]",
    ),
    "tasks": (
        {"query": torch.zeros(3, 5, 3)},
        ValueError,
        "leading dimensions: expected shapes that broadcast, but inputs has [2], targets has [2], query has [3]",
    ),
    "weights": ({"weights": W[0]}, TypeError, "weights: expected a list of tensors, got Tensor"),
    "no weights": (
        {"weights": [], "biases": []},
        ValueError,
        "weights: expected at least one layer, got none",
    ),
    "weights width": (
        {"weights": [W[0], W[0]]},
        ValueError,
        "weights[1]: expected shape [..., out, 6] after weights[0], got [6, 3]",
    ),
    "weights width of the first": (
        {"weights": [W[1], W[0]]},
        ValueError,
        "weights[0]: expected shape [..., out, 3] after inputs, got [2, 6]",
    ),
    "weights dtype": (
        {"weights": [W[0].double(), W[1]]},
        TypeError,
        "weights[0]: expected the dtype of inputs, torch.float32, got torch.float64",
    ),
    "biases": ({"biases": B[:1]}, ValueError, "biases: expected 2, one for each of weights, got 1"),
    "biases width": (
        {"biases": [B[0], B[0]]},
        ValueError,
        "biases[1]: expected shape [..., 2], got [6]",
    ),
    "lr": (
        {"lr": "0.1"},
        TypeError,
        "lr: expected a number, a tensor [] or [steps], a list with one of these",
    ),
    "lr bool": ({"lr": True}, TypeError, "lr: expected a number"),
    "lr integers": (
        {"lr": torch.tensor(1)},
        TypeError,
        "lr: expected float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "lr steps": ({"lr": torch.ones(3)}, ValueError, "lr: expected shape [] or [2], got [3]"),
    "lr layers": ({"lr": [0.1, 0.1, 0.1]}, ValueError, "got 3 entries for 2 layers"),
    "lr layer": ({"lr": [0.1, torch.ones(2, 2)]}, ValueError, "lr[1]: expected shape [] or [2], got [2, 2]"),
    "lr layer kind": ({"lr": [0.1, None]}, TypeError, "lr[1]: expected a tensor, got NoneType"),
    "lr pair": (
        {"lr": (W, B[:1])},
        ValueError,
        "lr: expected 2 rates for weights and for biases, got 2 and 1",
    ),
    "lr parameter": (
        {"lr": (W, [B[0], B[0]])},
        ValueError,
        "lr[1][1]: expected shape [2], got [6]",
    ),
    "steps": ({"steps": -1}, ValueError, "steps: expected 0 or more, got -1"),
    "steps float": ({"steps": 1.0}, TypeError, "steps: expected an int, got float"),
    "activation": ({"activation": "gelu"}, ValueError, "activation: expected relu or tanh, got 'gelu'"),
    "loss": ({"loss": "mae"}, ValueError, "loss: expected cross_entropy or mse, got 'mae'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    changed, kind, message = ERRORS[name]
    assert run().shape == (2, 5, 2)
    with pytest.raises(kind) as caught:
        run(**changed)
    assert message in str(caught.value)
