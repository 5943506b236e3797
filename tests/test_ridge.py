"""What the operator suites do not see of the ridge head: saved outputs, its matrix, labels and wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import metafast
from metafast import reference
from metafast.ridge import RIDGE, RIDGE_VJP
from tests.cases import assert_same, cotangents, gradients, runs_cuda_sources

T, N, M, D, C = 2, 4, 3, 5, 2
LABELS = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def arguments(soft: bool, learned: bool) -> tuple[Any, ...]:
    labels = rows(T, N, C) if soft else LABELS
    scalars = tuple(torch.rand(T).double() + 0.5 for _ in range(3)) if learned else (None, None, None)
    return rows(T, N, D), labels, rows(T, M, D), *scalars, 0.7, 1.3, 0.2, C


@pytest.mark.parametrize("learned", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "targets"])
class TestOperators:
    """Bare: every output, what is saved for the backward too, has its derivatives."""

    def test_opcheck(self, soft: bool, learned: bool) -> None:
        inputs = arguments(soft, learned)
        torch.library.opcheck(RIDGE, [as_leaf(a) for a in inputs])
        out = RIDGE(*inputs)
        backward = (rows(T, M, C), *inputs[:5], *inputs[6:8], *out[1:])
        torch.library.opcheck(RIDGE_VJP, [as_leaf(a) for a in backward])

    def test_saved_outputs(self, soft: bool, learned: bool) -> None:
        inputs = [as_leaf(a) for a in arguments(soft, learned)]
        places = [k for k, a in enumerate(inputs) if isinstance(a, Tensor) and a.requires_grad]

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            merged = list(inputs)
            for k, value in zip(places, values, strict=True):
                merged[k] = value
            return tuple(RIDGE(*merged))

        leaves = [inputs[k] for k in places]
        assert gradcheck(run, leaves, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(run, leaves, check_fwd_over_rev=True)

    def test_factor_and_solution(self, soft: bool, learned: bool) -> None:
        inputs = arguments(soft, learned)
        _, weight, alpha, factor = RIDGE(*inputs)
        ridge = inputs[3][:, None, None] if learned else inputs[6]
        gram = inputs[0] @ inputs[0].mT + ridge * torch.eye(N).double()
        assert_same(factor.mT @ factor, gram, 1e-12)
        assert torch.equal(factor, factor.triu())
        targets = inputs[1] if soft else reference.one_hot(LABELS, C).double()
        assert_same(gram @ alpha, targets, 1e-12)
        assert_same(weight, alpha.mT @ inputs[0], 1e-12)


def as_leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.is_floating_point())
    return value


@pytest.mark.parametrize(("n", "d"), [(1, 1), (15, 40), (16, 40), (17, 40), (37, 64), (100, 130), (25, 1600)])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 3e-6), (torch.float64, 1e-13)], ids=["float32", "float64"]
)
def test_against_float64(n: int, d: int, dtype: torch.dtype, bound: float, vectors: torch.device) -> None:
    """Every panel and tail of the factorisation; n <= d and unit rows keep the condition small."""
    wide = [rows(3, n, d) / d**0.5, rows(3, n, 5), rows(3, 9, d) / d**0.5, torch.rand(3).double() + 0.5]

    def head(s: Tensor, y: Tensor, q: Tensor, ridge: Tensor, _: int) -> Tensor:
        return metafast.ridge_logits(s, y, q, ridge, 1.5, 0.1)

    def plain(s: Tensor, y: Tensor, q: Tensor, ridge: Tensor, _: int) -> Tensor:
        return reference.ridge_logits(s, y, q, ridge, 1.5, 0.1)

    narrow = [t.to(vectors, dtype) for t in wide]
    exact = gradients(plain, [t.double() for t in narrow], 0)
    for actual, expected in zip(gradients(head, narrow, 0), exact, strict=True):
        assert (actual.double() - expected).abs().max() <= bound * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("tasks", [1, 3, 9])
def test_same_bits_for_any_number_of_threads(tasks: int) -> None:
    """Values and gradients; the operator suites compare closely, for tangents are products of torch's."""
    inputs = [rows(tasks, 37, 515, dtype=torch.float32), rows(tasks, 37, 7, dtype=torch.float32)]
    inputs += [rows(tasks, 150, 515, dtype=torch.float32)]
    before = torch.get_num_threads()

    def run() -> tuple[Tensor, ...]:
        return gradients(lambda s, y, q, _: metafast.ridge_logits(s, y, q, 3.0), inputs, 7)

    try:
        torch.set_num_threads(1)
        expected = run()
        for count in (2, 3, 2):
            torch.set_num_threads(count)
            assert all(torch.equal(a, e) for a, e in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("regularisation", [-100.0, 0.0, torch.nan])
@pytest.mark.parametrize("n", [3, 20])
def test_not_positive_definite(regularisation: float, n: int, device: torch.device) -> None:
    """Two equal rows: the task is NaN in value and gradients, its neighbours are untouched."""
    ones = torch.ones(3, device=device)
    x, q = torch.eye(n, device=device).repeat(3, 1, 1), torch.randn(3, 5, n, device=device)
    x[:, 1] = x[:, 0]
    labels = (torch.arange(n, device=device) % 2).expand(3, n)
    good = gradients(
        lambda s, q, r, _: metafast.ridge_logits(s, labels, q, r, num_classes=2), [x, q, ones], 2
    )
    bad = ones.clone()
    bad[1] = regularisation
    out = gradients(lambda s, q, r, _: metafast.ridge_logits(s, labels, q, r, num_classes=2), [x, q, bad], 2)
    for a, e in zip(out, good, strict=True):
        assert a[1].isnan().all() and torch.equal(a[[0, 2]], e[[0, 2]])


def test_bad_label(device: torch.device) -> None:
    """An error where labels are read at once; on a GPU the task's results are NaN, and no other's."""
    inputs = [rows(*shape).to(device) for shape in ((3, N, D), (3, M, D), (3,), (3,), (3,))]
    good = LABELS[[0, 1, 0]].to(device)
    bad = good.clone()
    bad[1, 2] = -1

    def run(labels: Tensor) -> tuple[Tensor, ...]:
        def head(s: Tensor, q: Tensor, ridge: Tensor, scale: Tensor, offset: Tensor, _: int) -> Tensor:
            return metafast.ridge_logits(s, labels, q, ridge.square() + 1, scale, offset, num_classes=C)

        return gradients(head, inputs, C)

    if not runs_cuda_sources(device):
        with pytest.raises(ValueError, match="labels: expected class numbers from 0 to 1, got -1"):
            run(bad)
        return
    for a, e in zip(run(bad), run(good), strict=True):
        assert a[1].isnan().all() and torch.equal(a[[0, 2]], e[[0, 2]])


def test_primal_form() -> None:
    """More rows than features: still (X^T X + lambda I)^-1 X^T Y."""
    x, y, q = rows(3, 40, 6), rows(3, 40, 4), rows(3, 5, 6)
    weight = torch.linalg.solve(x.mT @ x + 0.3 * torch.eye(6).double(), x.mT @ y)
    assert_same(metafast.ridge_logits(x, y, q, 0.3, 2.0, 0.5), 2 * q @ weight + 0.5, 1e-11)


def test_autocast() -> None:
    x, q = torch.randn(2, 4, 5), torch.randn(2, 3, 5)
    expected = metafast.ridge_logits(x, LABELS, q, 1.0, num_classes=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metafast.ridge_logits(x, LABELS, q, 1.0, num_classes=2), expected)
        mixed = metafast.ridge_logits(x.bfloat16(), LABELS, q, 1.0, num_classes=2)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, metafast.ridge_logits(x.bfloat16().float(), LABELS, q, 1.0, num_classes=2))


def test_one_hot_targets_are_class_numbers() -> None:
    x, q = rows(T, N, D), rows(T, M, D)
    hot = reference.one_hot(LABELS, C).double()
    assert torch.equal(
        metafast.ridge_logits(x, LABELS, q, 0.5, num_classes=C), metafast.ridge_logits(x, hot, q, 0.5)
    )


X, Q = torch.zeros(2, 4, 5), torch.zeros(2, 3, 5)


def head(
    support: Any = X, labels: Any = LABELS, query: Any = Q, regularisation: Any = 1.0, **options: Any
) -> Tensor:
    return metafast.ridge_logits(support, labels, query, regularisation, **{"num_classes": 2, **options})


FLOATS = "expected float32, float64, bfloat16 or float16, got"
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "support list": (lambda: head([[1.0]]), TypeError, "support: expected a tensor, got list"),
    "support int": (lambda: head(X.long()), TypeError, f"support: {FLOATS} torch.int64"),
    "query 1-d": (lambda: head(query=Q[0, 0]), ValueError, "query: expected shape [..., m, d], got [5]"),
    "query dtype": (
        lambda: head(query=Q.double()),
        TypeError,
        "query: expected the dtype of support, torch.float32, got torch.float64",
    ),
    "query features": (
        lambda: head(query=Q[..., :4]),
        ValueError,
        "query: expected size 5 in dimension -1, as support has, got shape [2, 3, 4]",
    ),
    "labels list": (lambda: head(labels=[0]), TypeError, "labels: expected a tensor, got list"),
    "labels int32": (
        lambda: head(labels=LABELS.int()),
        TypeError,
        "labels: expected int64 class numbers, got torch.int32",
    ),
    "labels rows": (
        lambda: head(labels=LABELS[:, :3]),
        ValueError,
        "labels: expected size 4 in dimension -1, as support has, got shape [2, 3]",
    ),
    "labels device": (
        lambda: head(labels=LABELS.to("meta")),
        ValueError,
        "labels: expected the device of support, cpu, got meta",
    ),
    "labels beyond": (
        lambda: head(labels=LABELS + 1),
        ValueError,
        "labels: expected class numbers from 0 to 1, got 2",
    ),
    "labels negative": (
        lambda: head(labels=-LABELS),
        ValueError,
        "labels: expected class numbers from 0 to 1, got -1",
    ),
    "targets dtype": (
        lambda: head(labels=torch.ones(2, 4, 2).double()),
        TypeError,
        "labels: expected the dtype of support, torch.float32, got torch.float64",
    ),
    "targets rows": (
        lambda: head(labels=torch.ones(2, 3, 2)),
        ValueError,
        "labels: expected size 4 in dimension -2, as support has, got shape [2, 3, 2]",
    ),
    "targets width": (
        lambda: head(labels=torch.ones(2, 4, 3)),
        ValueError,
        "labels: expected 2 targets a row, got shape [2, 4, 3]",
    ),
    "no classes": (
        lambda: head(num_classes=None),
        ValueError,
        "num_classes: expected with int64 labels, got None",
    ),
    "classes float": (lambda: head(num_classes=2.0), TypeError, "num_classes: expected an int, got float"),
    "regularisation 0": (
        lambda: head(regularisation=0),
        ValueError,
        "regularisation: expected a positive number, got 0",
    ),
    "regularisation nan": (
        lambda: head(regularisation=float("nan")),
        ValueError,
        "regularisation: expected a positive number, got nan",
    ),
    "regularisation int tensor": (
        lambda: head(regularisation=torch.tensor(1)),
        TypeError,
        "regularisation: expected a number or a floating tensor, got torch.int64",
    ),
    "scale text": (
        lambda: head(scale="1"),
        TypeError,
        "scale: expected a number or a floating tensor, got str",
    ),
    "offset device": (
        lambda: head(offset=torch.ones((), device="meta")),
        ValueError,
        "offset: expected the device of support, cpu, got meta",
    ),
    "tasks": (
        lambda: head(scale=torch.ones(3)),
        ValueError,
        "leading dimensions: expected shapes that broadcast, but support has [2], labels has [2], query has [2], "
        "regularisation has [], scale has [3], offset has []",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, kind, text = WRONG[name]
    assert head().shape == (2, 3, 2)
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text


def test_upstream_of_saved_outputs_alone() -> None:
    """The gradient of the weight without one of the logits."""
    x, q = rows(T, N, D).requires_grad_(), rows(T, M, D)
    weight = RIDGE(x, LABELS, q, None, None, None, 0.7, 1.0, 0.0, C)[1]
    hot = reference.one_hot(LABELS, C).double()
    plain = hot.mT @ torch.linalg.inv(x @ x.mT + 0.7 * torch.eye(N).double()) @ x
    (upstream,) = cotangents(plain)
    assert_same(torch.autograd.grad(weight, x, upstream), torch.autograd.grad(plain, x, upstream), 1e-12)
