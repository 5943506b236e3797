"""What the operator suites do not see of the attention LSTM: defaults, sizes, torch's cell, wrong arguments."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import metafast
from metafast import reference
from metafast.attention_lstm import READING, read_with

# The module, not the function of its name.
family = sys.modules["metafast.attention_lstm"]
# A device without kernels, as in test_fallback.py.
BARE = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
D = 5
SUPPORT, QUERY = torch.zeros(2, 4, D), torch.zeros(2, 3, D)
WEIGHTS = torch.zeros(4 * D, 2 * D), torch.zeros(4 * D, D), torch.zeros(4 * D)


def by_torch(cell: nn.LSTMCell, support: Tensor, query: Tensor, steps: int) -> Tensor:
    hidden, state = query, torch.zeros_like(query)
    for _ in range(steps):
        read = (hidden @ support.mT).softmax(-1) @ support
        hidden, state = cell(torch.cat([query, read], -1), (hidden, state))
        hidden = hidden + query
    return hidden


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_the_cell_is_torchs(steps: int, bias: bool, device: torch.device) -> None:
    cell = nn.LSTMCell(2 * D, D, bias=bias).double().to(device)
    support, query = torch.randn(4, D).to(device, torch.float64), torch.randn(3, D).to(device, torch.float64)
    shift = cell.bias_ih + cell.bias_hh if bias else None
    inputs = [v.requires_grad_() for v in (support, query)]
    found = metafast.attention_lstm(support, query, cell.weight_ih, cell.weight_hh, shift, steps)
    wanted = by_torch(cell, support, query, steps)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    of = [*inputs, *cell.parameters()]
    for a, e in zip(
        torch.autograd.grad(found.sin().sum(), of, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(wanted.sin().sum(), of, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("tasks", "n", "m", "d"),
    [(1, 25, 75, 64), (1, 3, 1, 257), (1, 40, 130, 31), (9, 17, 61, 16), (2, 1, 200, 8)],
)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 3e-5), (torch.float64, 1e-13)], ids=["float32", "float64"]
)
def test_against_float64(
    tasks: int, n: int, m: int, d: int, dtype: torch.dtype, bound: float, vectors: torch.device
) -> None:
    """Blocks of query rows, the last of them shorter, and many steps."""
    cell = nn.LSTMCell(2 * d, d)
    weights = cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh
    rows = torch.randn(tasks, n, d) / d**0.5, torch.randn(tasks, m, d)
    narrow = [value.detach().to(vectors, dtype) for value in (*rows, *weights)]
    exact = reference.attention_lstm(*(value.double() for value in narrow), steps=n)
    found = metafast.attention_lstm(*narrow, steps=n)
    assert found.dtype == dtype and (found.double() - exact).abs().max() <= bound


def operands(tasks: int, n: int, m: int, d: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Support, query, both weights, bias and both states."""
    shapes = (tasks, n, d), (tasks, m, d), (4 * d, 2 * d), (4 * d, d), (4 * d,), (tasks, m, d), (tasks, m, d)
    scale = 1 / max(1, d) ** 0.5
    return [torch.randn(shape).mul_(scale).to(device, dtype) for shape in shapes]


def both(inputs: list[Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """What the operator gives, since nothing is recorded, and the plain formula in float64."""
    found, exact = (
        function(*values[:5], steps, hidden=values[5], cell=values[6])
        for function, values in (
            (metafast.attention_lstm, inputs),
            (reference.attention_lstm, [value.double() for value in inputs]),
        )
    )
    assert found.shape == exact.shape
    return found, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_tail(dtype: torch.dtype, vectors: torch.device) -> None:
    """All numbers of features up to two of the widest vectors, and none of everything."""
    bound = 2e-6 if dtype == torch.float32 else 1e-14
    sizes = [(1 + d % 3, 1 + d % 19, 1 + d % 7, d) for d in range(36)]
    sizes += [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (1, 33, 61, 5)]
    for tasks, n, m, d in sizes:
        for steps in (0, 1, 3):
            found, exact = both(operands(tasks, n, m, d, vectors, dtype), steps)
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("tasks", [1, 9])
def test_same_bits_for_any_threads_and_layout(tasks: int, vectors: torch.device) -> None:
    inputs = operands(tasks, 21, 131, 37, vectors, torch.float32)
    before, expected = torch.get_num_threads(), both(inputs, 4)[0]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(both(inputs, 4)[0], expected)
    finally:
        torch.set_num_threads(before)
    strided = [value.transpose(0, -1).contiguous().transpose(0, -1) for value in inputs]
    larger = [value.new_full((*value.shape, 2), torch.nan) for value in inputs]
    every_second = [into[..., 1].copy_(value) for into, value in zip(larger, inputs, strict=True)]
    for values in (strided, every_second):
        assert not values[0].is_contiguous() and torch.equal(both(values, 4)[0], expected)


def test_the_operator_itself_refuses_to_be_recorded() -> None:
    """It has no derivative; without one it may be mapped and traced."""
    values = [SUPPORT, QUERY, WEIGHT, WEIGHTS[2], QUERY, QUERY]
    for k, value in enumerate(values):
        recorded = [*values[:k], value.clone().requires_grad_(), *values[k + 1 :]]
        with pytest.raises(RuntimeError, match="has no derivative"):
            READING(*recorded, 2)
        with torch.no_grad():
            assert not READING(*recorded, 2).requires_grad
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no derivative"):
            READING(*values[:k], forward_ad.make_dual(value, value), *values[k + 1 :], 2)
    with pytest.raises(RuntimeError, match="has no derivative"):
        torch.func.grad(lambda query: READING(SUPPORT, query, *values[2:], 2).sum())(QUERY)
    torch.library.opcheck(READING, (*values, 2), test_utils=("test_schema", "test_faketensor"))


def test_a_nan_stays_in_its_row(vectors: torch.device) -> None:
    """In scores, gates and states; a query row reads without the others."""
    cell = nn.LSTMCell(2 * D, D).to(vectors)
    weights = cell.weight_ih.detach(), cell.weight_hh.detach(), None
    support, query = torch.randn(4, D).to(vectors), torch.randn(9, D).to(vectors)
    expected = metafast.attention_lstm(support, query, *weights, 3)
    query[2, 1] = torch.nan
    found = metafast.attention_lstm(support, query, *weights, 3)
    assert found[2].isnan().all()
    others = [k for k in range(9) if k != 2]
    assert torch.equal(found[others], expected[others])


def test_large_numbers(vectors: torch.device) -> None:
    """Gates far from 0 are 0 or 1, scores far apart choose one row."""
    query, support = torch.full((2, D), 1e4).to(vectors), torch.randn(3, D).to(vectors) * 1e4
    weights = torch.randn(4 * D, 2 * D).to(vectors), torch.randn(4 * D, D).to(vectors), None
    found = metafast.attention_lstm(support, query, *weights, 4)
    torch.testing.assert_close(found, reference.attention_lstm(support, query, *weights, 4))
    assert found.isfinite().all()


def test_autocast() -> None:
    support, query = torch.randn(2, 4, D), torch.randn(2, 3, D)
    weights = [torch.randn_like(weight) for weight in WEIGHTS]
    expected = metafast.attention_lstm(support, query, *weights, 3)
    leaf = query.clone().requires_grad_()
    slope = torch.autograd.grad(metafast.attention_lstm(support, leaf, *weights, 3).sum(), leaf)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metafast.attention_lstm(support, query, *weights, 3), expected)
        mixed = metafast.attention_lstm(support.bfloat16(), query, *weights, 3)
        out = metafast.attention_lstm(support, leaf, *weights, 3).sum()
        states = support, query, torch.cat(weights[:2], 1).T, weights[2], query, torch.zeros_like(query), 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            plain = READING.redispatch(BARE, *states)
    torch.testing.assert_close(plain, expected)
    torch.testing.assert_close(torch.autograd.grad(out, leaf)[0], slope)
    assert mixed.dtype == torch.float32


def test_where_the_operator_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is recorded, and rows are not wide; the numbers are the same."""
    called = []

    def operator(*args: Any) -> Tensor:
        called.append(args)
        return READING(*args)

    operator.redispatch = READING.redispatch  # type: ignore[attr-defined]
    monkeypatch.setattr(family, "READING", operator)
    leaf = QUERY.clone().requires_grad_()
    read()
    with torch.no_grad():
        read(query=leaf)
    with torch.inference_mode():
        read()
    assert len(called) == 3
    assert read(query=leaf).requires_grad
    torch.func.vmap(lambda query: read(query=query))(QUERY[None])
    torch.func.jvp(lambda query: read(query=query), (QUERY,), (QUERY,))
    d = family.WIDEST + 1
    wide = [torch.zeros(shape) for shape in ((1, d), (1, d), (4 * d, 2 * d), (4 * d, d))]
    metafast.attention_lstm(*wide, None, 1)
    assert len(called) == 3


def test_other_readers() -> None:
    """A module of another kind, or with hooks, is called for each step."""
    calls = []
    cell = nn.LSTMCell(2 * D, D).double()
    support, query = torch.randn(2, 4, D, dtype=torch.float64), torch.randn(2, 3, D, dtype=torch.float64)
    wanted = read_with(cell, support, query, 3)
    torch.testing.assert_close(wanted[1], by_torch(cell, support[1], query[1], 3), rtol=1e-12, atol=1e-12)
    cell.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(read_with(cell, support, query, 3), wanted, rtol=1e-12, atol=1e-12)
    assert len(calls) == 3


def read(**other: Any) -> Tensor:
    names = ("support", "query", "weight_ih", "weight_hh", "bias")
    given = dict(zip(names, (SUPPORT, QUERY, *WEIGHTS), strict=True))
    return metafast.attention_lstm(**{**given, "steps": 2, **other})


FLOATS = "expected float32, float64, bfloat16 or float16, got"
WEIGHT = torch.zeros(3 * D, 4 * D)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "support list": (lambda: read(support=[[1.0]]), TypeError, "support: expected a tensor, got list"),
    "query int": (lambda: read(query=QUERY.long()), TypeError, f"query: {FLOATS} torch.int64"),
    "query 1-d": (lambda: read(query=QUERY[0, 0]), ValueError, "query: expected shape [..., m, d], got [5]"),
    "query dtype": (lambda: read(query=QUERY.double()), TypeError, "query: expected the dtype of support"),
    "features": (lambda: read(query=QUERY[..., :4]), ValueError, "query: expected size 5 in dimension -1"),
    "tasks": (lambda: read(query=torch.zeros(3, 3, 5)), ValueError, "leading dimensions: "),
    "weight": (
        lambda: read(weight_ih=WEIGHTS[1]),
        ValueError,
        "weight_ih: expected shape [20, 10], got [20, 5]",
    ),
    "weight of states": (
        lambda: read(weight_hh=WEIGHTS[0]),
        ValueError,
        "weight_hh: expected shape [20, 5], got [20, 10]",
    ),
    "weight dtype": (
        lambda: read(weight_hh=WEIGHTS[1].double()),
        TypeError,
        "weight_hh: expected the dtype of support",
    ),
    "no weight": (lambda: read(weight_hh=None), TypeError, "weight_hh: expected a tensor, got NoneType"),
    "bias": (lambda: read(bias=WEIGHTS[2][:5]), ValueError, "bias: expected shape [20], got [5]"),
    "hidden": (lambda: read(hidden=SUPPORT), ValueError, "hidden: expected size 3 in dimension -2"),
    "cell": (lambda: read(cell=QUERY[..., :2]), ValueError, "cell: expected size 5 in dimension -1"),
    "cell list": (lambda: read(cell=[0.0]), TypeError, "cell: expected a tensor, got list"),
    "steps": (lambda: read(steps=-1), ValueError, "steps: expected 0 or more, got -1"),
    "half a step": (lambda: read(steps=0.5), TypeError, "steps: expected an int, got float"),
    "bare rank": (
        lambda: READING(SUPPORT[0], QUERY, WEIGHT, WEIGHTS[2], QUERY, QUERY, 1),
        RuntimeError,
        "support: expected shape [T, n, d]",
    ),
    "bare weight": (
        lambda: READING(SUPPORT, QUERY, WEIGHT[1:], WEIGHTS[2], QUERY, QUERY, 1),
        RuntimeError,
        "weight: expected shape [15, 20]",
    ),
    "bare bias": (
        lambda: READING(SUPPORT, QUERY, WEIGHT, WEIGHTS[2][1:], QUERY, QUERY, 1),
        RuntimeError,
        "bias: expected shape [20]",
    ),
    "bare cell": (
        lambda: READING(SUPPORT, QUERY, WEIGHT, WEIGHTS[2], QUERY, SUPPORT, 1),
        RuntimeError,
        "cell: expected shape [2, 3, 5]",
    ),
    "bare steps": (
        lambda: READING(SUPPORT, QUERY, WEIGHT, WEIGHTS[2], QUERY, QUERY, -1),
        RuntimeError,
        "steps: expected 0 or more, got -1",
    ),
    "bare dtype": (
        lambda: READING(*(t.half() for t in (SUPPORT, QUERY, WEIGHT, WEIGHTS[2], QUERY, QUERY)), 1),
        RuntimeError,
        "query: expected float32 or float64",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
