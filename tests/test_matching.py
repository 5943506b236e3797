"""What the operator suites do not see of matching networks: labels, empty classes, lengths, wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import metafast
from metafast import reference
from metafast.matching import MATCHING, MATCHING_VJP
from tests.cases import assert_same, gradients, runs_cuda_sources

T, N, M, D, C = 2, 4, 3, 5, 2
LABELS = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("n", "m", "d"), [(1, 1, 1), (25, 75, 64), (100, 300, 64), (5, 130, 33), (25, 63, 1600)]
)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 1e-14)], ids=["float32", "float64"]
)
def test_against_float64(
    n: int, m: int, d: int, dtype: torch.dtype, bound: float, vectors: torch.device
) -> None:
    """Blocks of query rows and their tails."""
    labels = (torch.arange(n) % 5).expand(3, n)
    narrow = [value.to(vectors, dtype) for value in (rows(3, n, d), rows(3, m, d), torch.full((3,), 10.0))]
    labels = labels.to(vectors)

    def attention(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda s, q, scale, _: function(s, labels, q, scale, num_classes=5).clamp(min=-1e3)

    exact = gradients(attention(reference.matching_log_probs), [value.double() for value in narrow], 5)
    actual = gradients(attention(metafast.matching_log_probs), narrow, 5)
    for a, e in zip(actual, exact, strict=True):
        assert (a.double() - e).abs().max() <= 10 * bound * max(1.0, e.abs().max().item())


def test_bad_label(device: torch.device) -> None:
    """An error where labels are read at once; on a GPU the task's results are NaN, and no other's."""
    inputs = [rows(*shape).to(device) for shape in ((3, N, D), (3, M, D), (3,))]
    good = LABELS[[0, 1, 0]].to(device)
    for number in (-1, C):
        bad = good.clone()
        bad[1, 2] = number

        def run(labels: Tensor) -> tuple[Tensor, ...]:
            def attention(s: Tensor, q: Tensor, scale: Tensor, _: int) -> Tensor:
                return metafast.matching_log_probs(s, labels, q, scale, num_classes=C)

            return gradients(attention, inputs, C)

        if not runs_cuda_sources(device):
            with pytest.raises(ValueError, match=f"labels: expected class numbers from 0 to 1, got {number}"):
                run(bad)
            continue
        for a, e in zip(run(bad), run(good), strict=True):
            assert a[1].isnan().all() and torch.equal(a[[0, 2]], e[[0, 2]])


def test_a_class_without_rows(device: torch.device) -> None:
    """Its logarithm is -inf, and what comes back to it reaches the sum of all alone."""
    labels = torch.tensor([[0, 2, 2, 0]], device=device)
    s, q = (rows(1, n, D).to(device).requires_grad_() for n in (N, M))
    found = metafast.matching_log_probs(s, labels, q, 3.0, num_classes=4)
    assert (found[..., [1, 3]] == -torch.inf).all() and found[..., [0, 2]].isfinite().all()
    assert_same([found.exp().sum(-1)], [torch.ones(1, M, dtype=torch.float64, device=device)], 1e-12)
    scores = 3 * torch.nn.functional.cosine_similarity(q.unsqueeze(2), s.unsqueeze(1), dim=-1)
    upstream = torch.tensor([2.0, -3.0, 5.0, 7.0], dtype=torch.float64, device=device).expand_as(found)
    own = [scores[..., labels[0] == c].logsumexp(-1) for c in (0, 2)]
    plain = 2 * own[0] + 5 * own[1] - upstream[0, 0].sum() * scores.logsumexp(-1)
    actual = torch.autograd.grad(found, (s, q), upstream)
    assert_same(actual, torch.autograd.grad(plain.sum(), (s, q)), 1e-12)


def test_without_support_rows(device: torch.device) -> None:
    s, q = torch.zeros(1, 0, D, device=device), torch.ones(1, M, D, device=device)
    labels = torch.zeros(1, 0, dtype=torch.int64, device=device)
    assert metafast.matching_log_probs(s, labels, q, num_classes=C).isnan().all()


@pytest.mark.parametrize("scale", [1000.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_scales(scale: float, dtype: torch.dtype, device: torch.device) -> None:
    """Nothing overflows, and no class vanishes."""
    inputs = [value.to(device, dtype) for value in (rows(T, N, D), rows(T, M, D))]
    labels = LABELS.to(device)

    def attention(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda s, q, _: function(s, labels, q, scale, num_classes=C)

    found = gradients(attention(metafast.matching_log_probs), inputs, C)
    exact = gradients(attention(reference.matching_log_probs), [value.double() for value in inputs], C)
    assert found[0].isfinite().all() and found[0].min() < -100
    for a, e in zip(found, exact, strict=True):
        near = 1e-3 if dtype == torch.float32 else 1e-11
        assert (a - e).abs().max() <= near * max(1.0, float(e.abs().max()))


@pytest.mark.parametrize("eps", [1e-8, 2.0, 100.0])
def test_short_rows(eps: float, device: torch.device) -> None:
    """Rows of zeros, and those whose lengths eps stands for: to any order."""
    labels = LABELS.to(device)

    def function(s: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        return metafast.matching_log_probs(s, labels, q, scale, num_classes=C, eps=eps)

    def plain(s: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        return reference.matching_log_probs(s, labels, q, scale, num_classes=C, eps=eps)

    inputs = [value.to(device).requires_grad_() for value in (rows(T, N, D), rows(T, M, D), rows(T))]
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)
    with torch.no_grad():
        inputs[0][0, 1] = 0.0
        inputs[1][1, 2] = 0.0
    found = torch.autograd.grad(function(*inputs).exp().sum(), inputs, create_graph=True)
    wanted = torch.autograd.grad(plain(*inputs).exp().sum(), inputs, create_graph=True)
    assert_same(found, wanted, 1e-6 if eps < 1 else 1e-12)
    assert all(value.isfinite().all() for value in found)


def test_autocast() -> None:
    x, q = torch.randn(2, 4, 5), torch.randn(2, 3, 5)
    expected = metafast.matching_log_probs(x, LABELS, q, num_classes=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metafast.matching_log_probs(x, LABELS, q, num_classes=2), expected)
        mixed = metafast.matching_log_probs(x.bfloat16(), LABELS, q, num_classes=2)
    assert mixed.dtype == torch.float32


X, Q = torch.zeros(2, 4, 5), torch.zeros(2, 3, 5)


def attention(
    support: Any = X, labels: Any = LABELS, query: Any = Q, scale: Any = 1.0, **options: Any
) -> Tensor:
    return metafast.matching_log_probs(support, labels, query, scale, **{"num_classes": 2, **options})


FLOATS = "expected float32, float64, bfloat16 or float16, got"
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "support list": (lambda: attention([[1.0]]), TypeError, "support: expected a tensor, got list"),
    "query int": (lambda: attention(query=Q.long()), TypeError, f"query: {FLOATS} torch.int64"),
    "query 1-d": (lambda: attention(query=Q[0, 0]), ValueError, "query: expected shape [..., m, d], got [5]"),
    "query dtype": (
        lambda: attention(query=Q.double()),
        TypeError,
        "query: expected the dtype of support, torch.float32, got torch.float64",
    ),
    "features": (lambda: attention(query=Q[..., :4]), ValueError, "query: expected size 5 in dimension -1"),
    "labels": (lambda: attention(labels=LABELS.int()), TypeError, "labels: expected int64 class numbers"),
    "labels rows": (lambda: attention(labels=LABELS[:, :3]), ValueError, "labels: expected size 4"),
    "tasks": (lambda: attention(query=torch.zeros(3, 3, 5)), ValueError, "leading dimensions: "),
    "scale": (lambda: attention(scale="1"), TypeError, "scale: expected a number or a floating tensor"),
    "classes": (lambda: attention(num_classes=-1), ValueError, "num_classes: expected a number of classes"),
    "eps": (lambda: attention(eps=-1.0), ValueError, "eps: expected a number that is not negative, got -1.0"),
    "eps kind": (lambda: attention(eps="1"), TypeError, "eps: expected a number, got str"),
    "bare rank": (
        lambda: MATCHING(X, LABELS, Q[0], None, 1.0, 0.0, 2),
        RuntimeError,
        "query: expected shape [T, m, d]",
    ),
    "bare scale": (
        lambda: MATCHING(X, LABELS, Q, torch.ones(3), 1.0, 0.0, 2),
        RuntimeError,
        "scale: expected shape [2]",
    ),
    "bare grad": (
        lambda: MATCHING_VJP(Q[0], X, LABELS, Q, None, 1.0, 0.0, Q, Q[..., 0], X[..., :3]),
        RuntimeError,
        "grad: expected shape [T, m, C]",
    ),
    "bare saved": (
        lambda: MATCHING_VJP(Q, X, LABELS, Q, None, 1.0, 0.0, Q, Q[..., 0], X),
        RuntimeError,
        "cosines: expected shape [2, 4, 3]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
