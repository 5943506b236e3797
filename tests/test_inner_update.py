"""What the operator suites do not see of ``sgd_update``: containers, shared parameters, the graph, wrong arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from metafast import reference, sgd_update
from metafast.inner_update import UPDATE, UPDATE_VJP
from tests.cases import assert_same


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_containers(kind: Any) -> None:
    """The container of the parameters comes back; None leaves its parameter; the gradients' order does not matter."""
    params, grads = [rows(2, 3), rows(4), rows(2)], [rows(2, 3), None, rows(2)]
    rates = [0.5, 0.1, rows(2)]

    def wrap(values: list[Any]) -> Any:
        return dict(zip("abc", values, strict=True)) if kind is dict else kind(values)

    given = dict(reversed(wrap(grads).items())) if kind is dict else wrap(grads)
    for lr, each in (
        (0.3, [0.3] * 3),
        (torch.tensor(0.3, dtype=torch.float64), [0.3] * 3),
        (wrap(rates), rates),
    ):
        out = sgd_update(wrap(params), given, lr)
        assert type(out) is kind
        values = list(out.values()) if kind is dict else list(out)
        assert values[1] is params[1]
        for k in (0, 2):
            assert_same(values[k], params[k] - each[k] * grads[k], 1e-15)
    assert sgd_update(wrap(params), wrap([None] * 3), 0.1) == wrap(params)
    assert sgd_update(kind(), kind(), 0.1) == kind()


def test_gradients_that_lie_transposed_are_summed_as_others() -> None:
    """As those of the weights of all tasks come from a product; rows and columns alike."""
    for shape, tasks in (((4, 3), (5,)), ((3, 3), (5, 2)), ((2, 1, 3), (4,)), ((1, 3), (2,))):
        param = rows(*shape).requires_grad_()
        out = sgd_update([param], [rows(*tasks, *shape)], 0.1)[0]
        upstream = rows(*tasks, *shape).mT.contiguous().mT
        (found,) = torch.autograd.grad(out, [param], upstream)
        assert_same(found, upstream.contiguous().sum_to_size(shape), 1e-15)


def test_the_fake_results_lie_as_the_real_ones() -> None:
    """Inductor takes their word for it."""
    shapes = ((2, 3, 4), (3, 2, 1, 1), (2, 3, 2, 2))
    values = [torch.rand(shape).mT for shape in shapes[:1]] + [torch.rand(shape) for shape in shapes[1:]]
    values = [v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for v in values]
    rates = [torch.rand(v.shape) for v in values]
    real = UPDATE(values, [v.clone() for v in values], rates, 0.0)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(v) for v in values]
        fake = UPDATE(fakes, [v.clone() for v in fakes], [mode.from_tensor(r) for r in rates], 0.0)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride()) == (b.shape, b.stride())


def test_one_node_and_an_aliased_gradient() -> None:
    params, grads = ([rows(3, 2).requires_grad_(), rows(4).requires_grad_()] for _ in range(2))
    out = sgd_update(params, grads, 0.1)
    assert out[0].grad_fn is out[1].grad_fn
    upstream = [rows(3, 2), rows(4)]
    found = torch.autograd.grad(out, params, upstream)
    assert [f.data_ptr() for f in found] == [u.data_ptr() for u in upstream]


def test_unused_outputs_have_no_gradient() -> None:
    params, grads, rates = ([rows(3).requires_grad_() for _ in range(2)] for _ in range(3))
    out = sgd_update(params, grads, rates)
    found = torch.autograd.grad(out[1].sum(), [*params, *grads, *rates], allow_unused=True)
    assert [f is None for f in found] == [True, False] * 3


def test_shared_parameters_become_every_tasks_own() -> None:
    """Gradients, or rates, with leading dimensions that the parameters have not."""
    inputs = [rows(2, 3), rows(3), rows(5, 2, 3), rows(5, 3), rows(3), rows(5, 1)]

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda a, b, c, d, e, f: tuple(function([a, b], [c, d], [e, f]))

    leaves = [t.requires_grad_() for t in inputs]
    actual, expected = run(sgd_update)(*leaves), run(reference.sgd_update)(*leaves)
    assert_same(actual, expected, 1e-15)
    upstream = [o.detach().cos() for o in expected]
    assert_same(
        torch.autograd.grad(actual, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), 1e-14
    )
    assert gradcheck(run(sgd_update), leaves, check_forward_ad=True, check_batched_grad=True)


# A rate may have any shape that broadcasts: its gradient sums over what it has not.
SHAPES = {
    "elements": [(4, 3, 5), (3, 5)],
    "rows": [(4, 3, 5), (4, 3, 1)],
    "tasks": [(4, 3, 5), (4, 1, 1)],
    "middle": [(4, 3, 5), (4, 1, 5)],
    "apart": [(4, 3, 5), (3, 1)],
    "number": [(4, 3, 5), ()],
    "whole": [(4, 3, 5), (4, 3, 5)],
    "ones": [(1, 1, 1), (1,)],
    "ones among": [(1, 3, 1, 5), (5,)],
    "no task": [(0, 3), (3,)],
    "no element": [(4, 0), (0,)],
    "no row": [(3, 0), (3, 1)],
    "many tasks": [(150, 7), (7,)],
    "long rows": [(3, 40000), (3, 1)],
    "long columns": [(5, 40000), (40000,)],
}


@pytest.mark.parametrize("grad", ["whole", "shared"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rates_of_any_shape(shape: str, grad: str) -> None:
    """Values and gradients of first and second order are those of plain torch."""
    own, of_rate = SHAPES[shape]
    values = [rows(*own), rows(*(own if grad == "whole" else own[1:])), rows(*of_rate)]
    found = []
    for function in (sgd_update, reference.sgd_update):
        leaves = [v.clone().requires_grad_() for v in values]
        param, slope, rate = leaves
        (out,) = function([param], [slope], [rate])
        upstream = (torch.arange(out.numel()).double().view(out.shape) + 1).cos().requires_grad_()
        first = torch.autograd.grad(out, leaves, upstream, create_graph=True)
        weighted = sum((g * (g.detach() + k).sin()).sum() for k, g in enumerate(first))
        second = torch.autograd.grad(weighted, [*leaves, upstream], allow_unused=True, materialize_grads=True)
        found.append([out, *first, *second])
    assert_same(*found, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1])
def test_results_that_go_past_the_caches(dtype: torch.dtype, offset: int) -> None:
    """Large results, whose rows begin at whole lines and within one."""
    shapes = [(7, 300_001), (33, 4096), (5,)]
    params, slopes = ([torch.randn(s, dtype=dtype) for s in shapes] for _ in range(2))
    rates = [torch.rand(s[-1] + offset, dtype=dtype)[offset:].requires_grad_() for s in shapes]
    grads = [g.requires_grad_() for g in slopes]
    out = sgd_update(params, grads, rates)
    found = torch.autograd.grad(out, [*grads, *rates], params)
    for k, (p, g, r) in enumerate(zip(params, grads, rates, strict=True)):
        torch.testing.assert_close(out[k], p - r * g)
        torch.testing.assert_close(found[k], -r * p)
        expected = -(p.double() * g.double()).sum_to_size(r.shape).to(dtype)
        torch.testing.assert_close(found[len(shapes) + k], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [32767, 32768, 40000])
def test_the_rates_gradient_does_not_depend_on_the_threads(size: int) -> None:
    """Sums of any length, padded or not, with the same bits for every number of threads."""
    params, grads = torch.zeros(size), torch.randn(size)
    upstream = torch.randn(size)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rate = torch.tensor(0.1, requires_grad=True)
            found.append(torch.autograd.grad(sgd_update([params], [grads], rate), rate, [upstream])[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    exact = -(grads.double() * upstream.double()).sum()
    torch.testing.assert_close(found[0].double(), exact, rtol=0, atol=1e-6 * size**0.5)


def test_one_infinite_gradient_for_all_columns() -> None:
    """Each rate's gradient is infinite, not NaN, also where large results are stored line by line."""
    upstream, slopes = torch.ones(2201, 1051), torch.ones(2201, 1)
    slopes[7] = math.inf
    scaled, found = UPDATE_VJP([upstream], [slopes], [torch.full((1051,), 0.5)], True)
    assert torch.equal(scaled, torch.full_like(scaled, -0.5))
    assert torch.equal(found, torch.full((1051,), -math.inf))


def test_unrolled_steps() -> None:
    """Three steps of a quadratic: the gradients for start and rates are those of plain autograd."""

    def outer(function: Callable[..., Any]) -> tuple[Tensor, ...]:
        start, rates = (
            torch.ones(3).double().requires_grad_(),
            torch.full((3,), 0.1).double().requires_grad_(),
        )
        theta = start
        for k in range(3):
            (slope,) = torch.autograd.grad((theta**4).sum(), theta, create_graph=True)
            (theta,) = function([theta], [slope], [rates[k]])
        return torch.autograd.grad(theta.sin().sum(), (start, rates))

    assert_same(outer(sgd_update), outer(reference.sgd_update), 1e-14)


@pytest.mark.parametrize("rates", ["number", "shared", "elements"])
def test_opcheck(rates: str) -> None:
    params, grads = [rows(3, 2), rows(4)], [rows(3, 2), rows(4)]
    each = {"number": [], "shared": [rows(), rows()], "elements": [rows(3, 2), rows(4)]}[rates]
    for values in (params, grads, each):
        for k, value in enumerate(values):
            values[k] = value.requires_grad_()
    torch.library.opcheck(UPDATE, (params, grads, each, 0.3))


X = torch.zeros(2, 3)
FLOATS = "expected float32, float64, bfloat16 or float16, got"
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "params": (
        lambda: sgd_update(X, [X], 0.1),
        TypeError,
        "params: expected a list, a tuple or a dict, got Tensor",
    ),
    "param": (lambda: sgd_update([1.0], [X], 0.1), TypeError, "params[0]: expected a tensor, got float"),
    "param int": (lambda: sgd_update([X.long()], [X], 0.1), TypeError, f"params[0]: {FLOATS} torch.int64"),
    "grads": (
        lambda: sgd_update([X], X, 0.1),
        TypeError,
        "grads: expected a list or a tuple, as params is, got Tensor",
    ),
    "grads count": (
        lambda: sgd_update([X], [X, X], 0.1),
        ValueError,
        "grads: expected 1 entries, as params has, got 2",
    ),
    "grads list": (
        lambda: sgd_update({"a": X}, [X], 0.1),
        TypeError,
        "grads: expected a dict, as params is, got list",
    ),
    "grads keys": (
        lambda: sgd_update({"a": X}, {"b": X}, 0.1),
        ValueError,
        "grads: expected the keys of params, ['a'], got ['b']",
    ),
    "grad": (
        lambda: sgd_update({"a": X}, {"a": 1}, 0.1),
        TypeError,
        "grads['a']: expected a tensor, got int",
    ),
    "grad dtype": (
        lambda: sgd_update([X], [X.double()], 0.1),
        TypeError,
        "grads[0]: expected the dtype of params[0], torch.float32, got torch.float64",
    ),
    "grad shape": (
        lambda: sgd_update([X], [X.T], 0.1),
        ValueError,
        "grads[0]: expected a shape that broadcasts, but params[0] has [2, 3], grads[0] has [3, 2]",
    ),
    "grad device": (
        lambda: sgd_update([X], [X.to("meta")], 0.1),
        ValueError,
        "grads[0]: expected the device of params[0], cpu, got meta",
    ),
    "lr text": (
        lambda: sgd_update([X], [X], "1"),
        TypeError,
        "lr: expected a number or a floating tensor, got str",
    ),
    "lr bool": (
        lambda: sgd_update([X], [X], True),
        TypeError,
        "lr: expected a number or a floating tensor, got bool",
    ),
    "lr int tensor": (
        lambda: sgd_update([X], [X], torch.tensor(1)),
        TypeError,
        "lr: expected a number or a floating tensor, got torch.int64",
    ),
    "lr 1-d": (
        lambda: sgd_update([X], [X], torch.ones(3)),
        ValueError,
        "lr: expected a 0-d tensor, or an entry for each parameter, got [3]",
    ),
    "lr count": (
        lambda: sgd_update([X], [X], [0.1, 0.1]),
        ValueError,
        "lr: expected 1 entries, as params has, got 2",
    ),
    "lr entry": (
        lambda: sgd_update([X], [X], [None]),
        TypeError,
        "lr[0]: expected a number or a floating tensor, got NoneType",
    ),
    "lr shape": (
        lambda: sgd_update({"a": X}, {"a": X}, {"a": torch.ones(2)}),
        ValueError,
        "lr['a']: expected a shape that broadcasts, but the parameter has [2, 3], its gradient has [2, 3], "
        "lr['a'] has [2]",
    ),
    "lr device": (
        lambda: sgd_update([X], [X], torch.ones((), device="meta")),
        ValueError,
        "lr: expected the device of its parameter, cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, kind, text = WRONG[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text
