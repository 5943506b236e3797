"""Every torch.func transform and their nestings, against the same transform of the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from tests.cases import CASES, SMALL, Case, assert_same, cotangents, outputs, weighted_sum

# torch's own forward-mode formulas use it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
each_case = pytest.mark.parametrize("case", CASES, ids=str)
C = SMALL["C"]
TINY = {"n": 2, "m": 2, "d": 2, "C": 2}


def scalar(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A nonlinear scalar of all results."""
    return lambda *values: weighted_sum([o.sin() for o in outputs(function(*values))])


def tangents(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(v.cos() for v in values)


def all_of(values: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(values)))


def slope(f: Callable[..., Any], values: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """The squared gradient for every input, as a scalar."""
    gradient = grad(scalar(f), argnums=all_of(values))
    return lambda *v: sum((g.square().sum() for g in gradient(*v)), torch.zeros(()))


def forward_over_reverse(f: Callable[..., Any], values: tuple[Tensor, ...]) -> Any:
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(v.clone().requires_grad_(), t)
            for v, t in zip(values, tangents(values), strict=True)
        ]
        gradients = torch.autograd.grad(scalar(f)(*duals), duals)
        return [tuple(x.detach() for x in forward_ad.unpack_dual(g) if x is not None) for g in gradients]


def forward_mode(f: Callable[..., Any], values: tuple[Tensor, ...]) -> Any:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, t) for v, t in zip(values, tangents(values), strict=True)]
        unpacked = [forward_ad.unpack_dual(o) for o in outputs(f(*duals))]
        return [(u.primal, u.tangent) for u in unpacked]


def forward_mode_of_one(f: Callable[..., Any], values: tuple[Tensor, ...]) -> Any:
    """One input has a tangent, the others none."""
    results = []
    for k in range(len(values)):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(v, v.cos()) if j == k else v for j, v in enumerate(values)]
            unpacked = [forward_ad.unpack_dual(o) for o in outputs(f(*duals))]
            results.append([torch.zeros_like(u.primal) if u.tangent is None else u.tangent for u in unpacked])
    return results


#: Name -> transform of a function of ``values``, all without a mapped dimension.
TRANSFORMS: dict[str, Callable[[Callable[..., Any], tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, v: grad(scalar(f), argnums=all_of(v))(*v),
    "vjp": lambda f, v: vjp(lambda *x: outputs(f(*x)), *v)[1](cotangents(f(*v))),
    "jvp": lambda f, v: jvp(f, v, tangents(v)),
    "jacrev": lambda f, v: jacrev(f, argnums=all_of(v))(*v),
    "jacfwd": lambda f, v: jacfwd(f, argnums=all_of(v))(*v),
    "jacrev-chunks": lambda f, v: jacrev(f, argnums=all_of(v), chunk_size=2)(*v),
    "hessian": lambda f, v: hessian(scalar(f), argnums=all_of(v))(*v),
    "jacrev(jacrev)": lambda f, v: jacrev(jacrev(scalar(f)))(*v),
    "jacfwd(jacfwd)": lambda f, v: jacfwd(jacfwd(scalar(f)))(*v),
    "jacrev(jacfwd)": lambda f, v: jacrev(jacfwd(f, argnums=all_of(v)))(*v),
    "grad(grad)": lambda f, v: grad(slope(f, v), argnums=all_of(v))(*v),
    "grad(grad(grad))": lambda f, v: grad(slope(slope(f, v), v), argnums=all_of(v))(*v),
    "jvp(grad)": lambda f, v: jvp(grad(scalar(f), argnums=all_of(v)), v, tangents(v)),
    "grad(jvp)": lambda f, v: grad(
        lambda *x: weighted_sum([o.sin() for o in outputs(jvp(f, x, tangents(v))[1])]), argnums=all_of(v)
    )(*v),
    "jvp(jvp)": lambda f, v: jvp(lambda *x: jvp(f, x, tangents(v))[1], v, tangents(v)),
    "jvp(jvp(grad))": lambda f, v: jvp(
        lambda *x: jvp(grad(scalar(f), argnums=all_of(v)), x, tangents(v))[1], v, tangents(v)
    ),
    "vjp(vjp)": lambda f, v: vjp(lambda *x: vjp(scalar(f), *x)[1](torch.ones_like(v[0].sum())), *v)[1](
        tangents(v)
    ),
    "autograd(grad)": lambda f, v: outer_autograd(slope(f, v), v),
    "autograd(jvp)": lambda f, v: outer_autograd(
        lambda *x: weighted_sum([o.sin() for o in outputs(jvp(f, x, tangents(x))[1])]), v
    ),
    "forward mode": forward_mode,
    "forward mode of one input": forward_mode_of_one,
    "forward mode over autograd": forward_over_reverse,
}


def outer_autograd(f: Callable[..., Tensor], values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [v.clone().requires_grad_() for v in values]
    return torch.autograd.grad(f(*leaves), leaves)


@each_case
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(case: Case, name: str, hardware: torch.device) -> None:
    inputs = case.make((2,), TINY, device=hardware)
    values = tuple(t.clone() for t in case.floats(inputs))
    actual = TRANSFORMS[name](case.closed(case.function, inputs, C), values)
    assert_same(actual, TRANSFORMS[name](case.closed(case.reference, inputs, C), values), 1e-8)


#: Name -> transform of a scalar function, to be mapped.
MAPPED: dict[str, Callable[[Callable[..., Any], tuple[int, ...]], Callable[..., Any]]] = {
    "value": lambda f, k: f,
    "grad": lambda f, k: grad(scalar(f), argnums=k),
    "grad(grad)": lambda f, k: grad(lambda *v: grad(scalar(f), argnums=k[0])(*v).sin().sum(), argnums=k),
    "jacrev": lambda f, k: jacrev(f, argnums=k),
    "jacfwd": lambda f, k: jacfwd(f, argnums=k),
    "jvp": lambda f, k: lambda *v: jvp(
        lambda *x: f(*merge(v, k, x)), tuple(v[j] for j in k), tuple(v[j].cos() for j in k)
    ),
}


def merge(values: tuple[Tensor, ...], index: tuple[int, ...], replaced: tuple[Tensor, ...]) -> list[Tensor]:
    merged = list(values)
    for k, value in zip(index, replaced, strict=True):
        merged[k] = value
    return merged


@each_case
@pytest.mark.parametrize("name", MAPPED)
def test_vmap_over_everything(case: Case, name: str, hardware: torch.device) -> None:
    """All inputs mapped, labels too, each along another dimension."""
    inputs = [
        replace(s, per_task=True).make((3, 2) if s.per_task else (3,), TINY, device=hardware)
        for s in case.inputs.values()
    ]
    dims = tuple(k % t.dim() for k, t in enumerate(inputs))
    inputs = [t.movedim(0, d) for t, d in zip(inputs, dims, strict=True)]
    for out_dims in (0, -1) if name == "value" else (0,):
        actual, expected = (
            vmap(MAPPED[name](lambda *v, f=f: f(*v, C), case.differentiable), dims, out_dims)(*inputs)
            for f in (case.function, case.reference)
        )
        assert_same(actual, expected, 1e-8)


@each_case
@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
@pytest.mark.parametrize("name", ["value", "grad", "grad(grad)", "jvp"])
def test_vmap_over_some(case: Case, name: str, lead: tuple[int, ...], device: torch.device) -> None:
    """Every set of mapped inputs, the others shared: with and without a task dimension below the mapped one."""
    index = range(len(case.inputs))
    plain, mapped = case.make(lead, TINY, device=device), case.make((3, *lead), TINY, device=device)
    sets = [s for size in range(1, len(index)) for s in itertools.combinations(index, size)]
    for chosen in sets if name == "value" else [s for s in sets if len(s) in (1, len(index) - 1)]:
        if not all(list(case.inputs.values())[k].per_task for k in chosen):
            continue
        inputs = [mapped[k] if k in chosen else plain[k] for k in index]
        dims = tuple(0 if k in chosen else None for k in index)
        actual, expected = (
            vmap(MAPPED[name](lambda *v, f=f: f(*v, C), case.differentiable), dims)(*inputs)
            for f in (case.function, case.reference)
        )
        assert_same(actual, expected, 1e-8)


@each_case
@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
def test_vmap_of_zero_and_of_one(
    case: Case, size: int, lead: tuple[int, ...], hardware: torch.device
) -> None:
    inputs = case.make((size, *lead), SMALL, device=hardware)
    dims = tuple(0 if s.per_task else None for s in case.inputs.values())
    actual, expected = (
        vmap(lambda *v, f=f: f(*v, C), dims)(*inputs) for f in (case.function, case.reference)
    )
    assert_same(actual, expected)


@each_case
def test_nested_vmap(case: Case, device: torch.device) -> None:
    """The outer level maps the first input and the inner one the others, and both map everything."""
    specs = list(case.inputs.values())
    for inner, outer in (
        ([k > 0 for k in range(len(specs))], [k == 0 for k in range(len(specs))]),
        ([True] * len(specs), [True] * len(specs)),
        ([True] * len(specs), [k == 0 for k in range(len(specs))]),
    ):
        inner = [i and s.per_task for i, s in zip(inner, specs, strict=True)]
        if not any(inner):
            continue
        inputs = [
            s.make((*((3,) if o else ()), *((2,) if i else ()), 2), SMALL, device=device)
            for s, i, o in zip(specs, inner, outer, strict=True)
        ]
        dims = [
            tuple(0 if mapped and s.per_task else None for mapped, s in zip(level, specs, strict=True))
            for level in (inner, outer)
        ]
        actual, expected = (
            vmap(vmap(lambda *v, f=f: f(*v, C), dims[0]), dims[1])(*inputs)
            for f in (case.function, case.reference)
        )
        assert_same(actual, expected)


@each_case
def test_grad_of_vmap(case: Case, device: torch.device) -> None:
    inputs = case.make((3, 2), TINY, device=device)
    dims = tuple(0 if s.per_task else None for s in case.inputs.values())

    def total(f: Callable[..., Any]) -> Callable[..., Tensor]:
        return scalar(vmap(lambda *v: f(*v, C), dims))

    for transform in (
        lambda f: grad(f, argnums=case.differentiable),
        lambda f: grad(lambda *v: grad(f)(*v).sin().sum(), argnums=case.differentiable),
        lambda f: lambda *v: jvp(
            lambda *x: grad(f)(*merge(v, case.differentiable, x)), case.floats(v), tangents(case.floats(v))
        ),
    ):
        assert_same(transform(total(case.function))(*inputs), transform(total(case.reference))(*inputs), 1e-8)


@each_case
def test_backward_through_vmap_of_grad(case: Case, device: torch.device) -> None:
    """Plain autograd outside, vmap(grad) inside."""
    dims = tuple(0 if s.per_task else None for s in case.inputs.values())
    inputs = case.make((3, 2), TINY, device=device, requires_grad=True)
    results = []
    for f in (case.function, case.reference):
        inner = vmap(grad(scalar(lambda *v, f=f: f(*v, C)), argnums=case.differentiable), dims)(*inputs)
        results.append(torch.autograd.grad(weighted_sum([g.sin() for g in inner]), case.floats(inputs)))
    assert_same(*results, 1e-8)


@pytest.mark.parametrize("case", [c for c in CASES if c.name.startswith("prototypical_loss")], ids=str)
@pytest.mark.parametrize("first_order", [False, True])
def test_maml(case: Case, first_order: bool, device: torch.device) -> None:
    """vmap over tasks of an inner gradient step; the outer gradient for shared weights, the rate and the data."""
    sizes = {"n": 4, "m": 3, "d": 5, "C": 2}
    inputs = case.make((3,), sizes, device=device)
    weight, rate = (
        torch.randn(5, 4, dtype=torch.float64, device=device),
        torch.tensor(0.1, dtype=torch.float64),
    )
    dims = tuple(0 if s.per_task else None for s in case.inputs.values())

    def outer(function: Callable[..., Any]) -> Callable[..., Tensor]:
        def loss(
            weight: Tensor, support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor, *tau: Tensor
        ) -> Tensor:
            value, logits = function(support @ weight, labels, query @ weight, query_labels, *tau, C)
            return value + 0.01 * logits.square().mean()

        def task(
            weight: Tensor, rate: Tensor, support: Tensor, labels: Tensor, query: Tensor, *rest: Tensor
        ) -> Tensor:
            inner = grad(loss)(weight, support, labels, support.flip(0), labels.flip(0), *rest[1:])
            adapted = weight - rate * (inner.detach() if first_order else inner)
            return loss(adapted, support, labels, query, *rest)

        return lambda weight, rate, *rest: vmap(task, (None, None, *dims))(weight, rate, *rest).mean()

    argnums = (0, 1, *(2 + k for k in case.differentiable))
    actual, expected = (
        grad(outer(f), argnums=argnums)(weight, rate.to(device), *inputs)
        for f in (case.function, case.reference)
    )
    assert_same(actual, expected)
    tangent = weight.cos()
    actual, expected = (
        jvp(grad(lambda w, f=f: outer(f)(w, rate.to(device), *inputs)), (weight,), (tangent,))
        for f in (case.function, case.reference)
    )
    assert_same(actual, expected, 1e-8)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@each_case
def test_linearize(case: Case, hardware: torch.device) -> None:
    inputs = case.make((2,), TINY, device=hardware)
    values = case.floats(inputs)
    results = []
    for f in (case.function, case.reference):
        out, push = torch.func.linearize(case.closed(f, inputs, C), *values)
        results.append((*outputs(out), *outputs(push(*tangents(values)))))
    assert_same(*results)


@each_case
def test_functionalize(case: Case, hardware: torch.device) -> None:
    inputs = case.make((2,), TINY, device=hardware)
    values = case.floats(inputs)
    actual = torch.func.functionalize(grad(scalar(case.closed(case.function, inputs, C))))(*values)
    assert_same(actual, grad(scalar(case.closed(case.reference, inputs, C)))(*values))
