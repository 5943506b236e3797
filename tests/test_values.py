"""Values, and their first gradients, against the reference: every dtype, vector width, size and layout."""

from __future__ import annotations

import inspect
import itertools
import math
import mmap
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import metafast
from metafast import _library, reference
from metafast.distance import METRICS
from tests import simt
from tests.cases import (
    CASES,
    ODD,
    Case,
    assert_accurate,
    assert_same,
    gradients,
    in_float64,
    outputs,
    runs_cuda_sources,
    shuffled_labels,
)

# torch's own forward-mode formulas use it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_metric = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_equal(case: Case, actual: Tensor, expected: Tensor) -> None:
    """Bitwise, or closely where formulas in plain torch, whose order of summation may vary, are a part of it."""
    if case.kernels_only:
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected)


def results(function: Callable[..., Any], inputs: list[Tensor], C: int) -> tuple[Tensor, ...]:
    """Values, first gradients, and tangents along fixed directions."""
    duals, generator = list(inputs), torch.Generator().manual_seed(2)
    with forward_ad.dual_level():
        for k, t in enumerate(inputs):
            if t.is_floating_point():
                along = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
                duals[k] = forward_ad.make_dual(t.detach(), along)
        along = [forward_ad.unpack_dual(o).tangent for o in outputs(function(*duals, C))]
    return *gradients(function, inputs, C), *along


def check(case: Case, inputs: list[Tensor], C: int) -> None:
    assert_accurate(
        results(case.function, inputs, C), lambda values: results(case.reference, values, C), inputs
    )


@each_case
@pytest.mark.parametrize("dtype", CASES[0].dtypes, ids=lambda d: str(d).removeprefix("torch."))
def test_dtypes(case: Case, dtype: torch.dtype, kernels: torch.device) -> None:
    inputs = case.make((3,), ODD, dtype, kernels)
    check(case, inputs, ODD["C"])
    promoted = case.promotes and dtype in (torch.bfloat16, torch.float16)
    for out in outputs(case.function(*inputs, ODD["C"])):
        assert out.dtype == (torch.float32 if promoted else dtype)


@each_case
def test_every_tail(case: Case, vectors: torch.device) -> None:
    """All row lengths up to two of the widest vectors and a bit; on a GPU, around its vectors and a warp of them."""
    gpu = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 33, 63, 65, 127, 128, 129, 130, 133, 255, 257)
    for d in gpu if runs_cuda_sources(vectors) else range(35):
        sizes = {"n": 1 + d % 6, "m": 1 + d % 5, "d": d, "C": 1 + d % 3}
        sizes["n"] = max(sizes["n"], sizes["C"])
        check(case, case.make((2,), sizes, torch.float32, vectors), sizes["C"])


@each_case
@pytest.mark.parametrize(
    "sizes",
    [
        {"n": 70, "m": 131, "d": 1100, "C": 21},
        {"n": 3, "m": 2, "d": 50021, "C": 2},
        {"n": 1201, "m": 1503, "d": 3, "C": 5},
        {"n": 9, "m": 9, "d": 5, "C": 9},
        {"n": 23, "m": 19, "d": 140, "C": 13},
        {"T": 40, "n": 17, "m": 33, "d": 70, "C": 3},
    ],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
def test_large(case: Case, sizes: dict[str, int], device: torch.device) -> None:
    if case.name == "attention_lstm" and sizes["d"] > 10_000:
        pytest.skip("its weights are matrices of d rows and columns")
    if simt.active():
        # One thread after the other: the large sizes are cut, still to several blocks, slabs and chunks.
        sizes = {k: v if v < 50 else 37 + v // 16 for k, v in sizes.items()}
    check(case, case.make((sizes.get("T", 1),), sizes, torch.float32, device), sizes["C"])


def test_large_results_are_advised_to_lie_on_large_pages() -> None:
    """By Linux's own word, whether it has any or not."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("this system does not tell")

    def advised(tensor: Tensor) -> bool:
        middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
        for line in smaps.read_text().splitlines():
            if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(found.group(1), 16) <= middle < int(found.group(2), 16)
            elif inside and line.startswith("VmFlags:"):
                return "hg" in line.split()
        raise AssertionError("the tensor lies in no mapping")

    x = torch.rand(1, 2048, 2)
    assert advised(metafast.pairwise_distance(x, x))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_many_tasks(case: Case, device: torch.device) -> None:
    """So many that a block of a GPU's kernel takes several slabs of features."""
    sizes = {"n": 3, "m": 2, "d": 300, "C": 2}
    check(case, case.make((260,), sizes, torch.float32, device), sizes["C"])


@each_case
@pytest.mark.parametrize("empty", ["n", "m", "d", "T", "nm", "nmd"])
def test_empty(case: Case, empty: str, device: torch.device) -> None:
    sizes = {k: 0 if k in empty else v for k, v in {"n": 4, "m": 3, "d": 5, "C": 2}.items()}
    inputs = case.make((0 if "T" in empty else 2,), sizes, torch.float64, device)
    assert_same(gradients(case.function, inputs, 2), gradients(case.reference, inputs, 2))


@each_case
def test_one_of_everything(case: Case, device: torch.device) -> None:
    check(case, case.make((1,), {"n": 1, "m": 1, "d": 1, "C": 1}, torch.float32, device), 1)


@each_case
def test_no_classes(case: Case, device: torch.device) -> None:
    inputs = case.make((2,), {"n": 0, "m": 0, "d": 3, "C": 0}, torch.float64, device)
    assert_same(gradients(case.function, inputs, 0), gradients(case.reference, inputs, 0))


@each_case
@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0, 3), (1, 1)], ids=str)
def test_leading_dimensions(case: Case, lead: tuple[int, ...], device: torch.device) -> None:
    check(case, case.make(lead, ODD, torch.float32, device), ODD["C"])


@pytest.mark.parametrize("case", [c for c in CASES if not c.name.startswith("sgd_update")], ids=str)
def test_leading_dimensions_broadcast(case: Case, device: torch.device) -> None:
    leads = itertools.cycle([(3, 1), (2,), (), (3, 2), (1, 3, 1)])
    inputs = [spec.make(next(leads), ODD, torch.float32, device) for spec in case.inputs.values()]
    used = [
        t.shape[: t.dim() - len(s.shape.split())]
        for t, s in zip(inputs, case.inputs.values(), strict=True)
        if s.per_task
    ]
    lead = torch.broadcast_shapes(*used)
    full = [
        t.expand(*lead, *t.shape[t.dim() - len(s.shape.split()) :]).contiguous() if s.per_task else t
        for t, s in zip(inputs, case.inputs.values(), strict=True)
    ]
    actual, expected = outputs(case.function(*inputs, ODD["C"])), outputs(case.function(*full, ODD["C"]))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    check(case, inputs, ODD["C"])


def inside_a_larger_tensor(t: Tensor) -> Tensor:
    larger = torch.full([size + 3 for size in t.shape], torch.nan if t.is_floating_point() else -1).to(t)
    view = larger[tuple(slice(1, 1 + size) for size in t.shape)]
    return view.copy_(t)


def columns_first(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(t: Tensor) -> Tensor:
    larger = torch.full((*t.shape, 2), torch.nan if t.is_floating_point() else -1).to(t)
    return larger[..., 1].copy_(t)


def rows_apart(t: Tensor) -> Tensor:
    larger = torch.full((t.shape[0], 3, *t.shape[1:]), torch.nan if t.is_floating_point() else -1).to(t)
    return larger[:, 1].copy_(t)


def rows_of_whole_vectors(t: Tensor) -> Tensor:
    """Rows that 16-byte loads can read, with what must not be read behind them."""
    width = (t.shape[-1] + 7) // 8 * 8
    larger = torch.full((*t.shape[:-1], width), torch.nan if t.is_floating_point() else -1).to(t)
    return larger[..., : t.shape[-1]].copy_(t)


def one_task(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


def one_row(t: Tensor) -> Tensor:
    return t[:, :1].expand_as(t) if t.dim() > 1 else t[:1].expand_as(t)


def one_number(t: Tensor) -> Tensor:
    return t[..., :1].expand_as(t)


def negative_view(t: Tensor) -> Tensor:
    return torch._neg_view(t) if t.is_floating_point() else t


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    "layout",
    [
        inside_a_larger_tensor,
        columns_first,
        every_second,
        rows_apart,
        rows_of_whole_vectors,
        one_task,
        one_row,
        one_number,
        negative_view,
    ],
)
def test_layouts(
    case: Case, layout: Callable[[Tensor], Tensor], dtype: torch.dtype, vectors: torch.device
) -> None:
    """Any strides and offset give what contiguous inputs give, bitwise where torch's own products take no part."""
    strided = [layout(t) if t.dim() else t for t in case.make((3,), ODD, dtype, vectors)]
    dense = [t.clone(memory_format=torch.contiguous_format) for t in strided]
    # torch itself makes no dual tensor whose elements share memory.
    run = gradients if layout in (one_task, one_row, one_number) else results
    for a, e in zip(run(case.function, strided, 3), run(case.function, dense, 3), strict=True):
        assert_equal(case, a, e)


@each_case
def test_upstream_gradients_of_any_layout(case: Case, device: torch.device) -> None:
    inputs = case.make((3,), ODD, torch.float32, device, requires_grad=True)
    out = outputs(case.function(*inputs, 3))
    floats = [t for t in inputs if t.requires_grad]
    for layout in (
        inside_a_larger_tensor,
        rows_of_whole_vectors,
        columns_first,
        every_second,
        one_task,
        one_number,
        negative_view,
    ):
        strided = [layout(torch.randn_like(o)) for o in out]
        dense = [t.clone(memory_format=torch.contiguous_format) for t in strided]
        actual = torch.autograd.grad(out, floats, strided, retain_graph=True)
        expected = torch.autograd.grad(out, floats, dense, retain_graph=True)
        for a, e in zip(actual, expected, strict=True):
            assert_equal(case, a, e)


@each_case
@pytest.mark.parametrize("tasks", [1, 3, 9])
def test_same_bits_always(
    case: Case, tasks: int, threads: Callable[[int], None], device: torch.device
) -> None:
    """On repetition, for any number of threads, fewer than the tasks or more, and for any order of a GPU's threads."""
    sizes = {"n": 37, "m": 150, "d": 515, "C": 7}
    if simt.active():
        sizes = {"n": 11, "m": 9, "d": 133, "C": 7}
    inputs = case.make((tasks,), sizes, torch.float32, device)
    threads(1)
    expected = results(case.function, inputs, 7)
    for count in (1, 2, 3, 2):
        threads(count)
        if simt.active():
            simt.module().configure("random", seed=count)
        for a, e in zip(results(case.function, inputs, 7), expected, strict=True):
            assert_equal(case, a, e)


@each_case
def test_calls_from_many_python_threads(case: Case, device: torch.device) -> None:
    inputs = [case.make((2,), {"n": 9, "m": 20, "d": 65, "C": 4}, torch.float32, device) for _ in range(8)]
    expected = [gradients(case.function, own, 4) for own in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for actual, wanted in zip(
                pool.map(lambda own: gradients(case.function, own, 4), inputs), expected, strict=True
            ):
                assert all(torch.equal(a, e) for a, e in zip(actual, wanted, strict=True))


@each_case
def test_tasks_do_not_meet(case: Case, device: torch.device) -> None:
    """A task's results are bitwise what it gives alone, though its neighbours are NaN."""
    inputs = case.make((3,), ODD, torch.float32, device)
    alone = [t[1:2] if s.per_task else t for t, s in zip(inputs, case.inputs.values(), strict=True)]
    for t, s in zip(inputs, case.inputs.values(), strict=True):
        if s.differentiable and s.per_task:
            t[0], t[2] = torch.nan, torch.nan
    for a, e in zip(outputs(case.function(*inputs, 3)), outputs(case.function(*alone, 3)), strict=True):
        assert torch.equal(a[1:2], e)
        assert a[0].isnan().all() and a[2].isnan().all()


class TestDistance:
    @each_metric
    @pytest.mark.parametrize("d", [64, 1600])
    @pytest.mark.parametrize("offset", [0.0, 10.0, 100.0, 1000.0])
    def test_close_rows(self, metric: str, d: int, offset: float, kernels: torch.device) -> None:
        """A relative error below 1e-6 against float64, whatever the common offset."""
        x = torch.randn(8, d, device=kernels) + offset
        norm = x.norm(dim=-1, keepdim=True)
        for separation in (1e-3, 1e-2, 0.1, 0.3, 1.0):
            step = torch.randn(8, d, device=kernels)
            y = x + separation * norm * step / step.norm(dim=-1, keepdim=True)
            actual = metafast.pairwise_distance(x[:, None], y[:, None], metric).double()
            exact = reference.pairwise_distance(x[:, None].double(), y[:, None].double(), metric)
            error = ((actual - exact).abs() / exact).max()
            # The rest of x after its share of y, x - (x.y / y.y) y, needs a fused multiply-add to be exact enough.
            fused = metric != "cosine" or _library.vector_bits() > 128 or runs_cuda_sources(kernels)
            assert error < (1e-6 if fused else 3e-5), f"separation {separation}: {error:.1e}"

    @pytest.mark.parametrize("offset", [0.0, 100.0])
    def test_close_rows_gradient(self, offset: float, kernels: torch.device) -> None:
        x = torch.randn(4, 64, device=kernels) + offset
        y = x + 1e-3 * x.norm(dim=-1, keepdim=True) * torch.randn(4, 64, device=kernels) / 8
        for metric in METRICS:
            wide = [t[:, None].double() for t in (x, y)]
            exact = reference.pairwise_distance_vjp(torch.ones_like(wide[0][..., :1]), *wide, metric)
            leaves = [t[:, None].clone().requires_grad_() for t in (x, y)]
            actual = torch.autograd.grad(metafast.pairwise_distance(*leaves, metric).sum(), leaves)
            for a, e in zip(actual, exact, strict=True):
                error = ((a - e).norm(dim=-1) / e.norm(dim=-1)).max()
                # The gradient of cosine is a difference of the rows' shares of each other.
                assert error < (3e-4 if metric == "cosine" else 2e-6), f"{metric}: {error:.1e}"

    @each_metric
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("offset", [0.0, 100.0])
    def test_equal_rows(self, metric: str, dtype: torch.dtype, offset: float, kernels: torch.device) -> None:
        x = (torch.randn(2, 9, 41, dtype=torch.float64) + offset).to(kernels, dtype)
        distance = metafast.pairwise_distance(x, x.clone(), metric)
        assert (distance.diagonal(dim1=-2, dim2=-1) == 0).all()
        if metric != "cosine":
            assert torch.equal(distance, distance.mT)

    @each_metric
    def test_gradient_at_equal_rows(self, metric: str, kernels: torch.device) -> None:
        x = torch.randn(2, 3, 9, device=kernels, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        diagonal = metafast.pairwise_distance(x, y, metric).diagonal(dim1=-2, dim2=-1)
        for gradient in torch.autograd.grad(diagonal.sum(), (x, y)):
            assert gradient.isfinite().all()
            assert gradient.abs().max() < 1e-6

    def test_cosine_of_zero_rows_is_one(self, kernels: torch.device) -> None:
        x, y = torch.zeros(1, 2, 5, device=kernels), torch.randn(1, 3, 5, device=kernels)
        assert (metafast.pairwise_distance(x, y, "cosine") == 1).all()
        assert (metafast.pairwise_distance(x, x, "cosine") == 1).all()

    @each_metric
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("position", [0, 20, 36])
    def test_not_finite(self, metric: str, value: float, position: int, kernels: torch.device) -> None:
        """As the reference, in the pairs of that row and in no other."""
        x, y = torch.randn(1, 5, 37, device=kernels), torch.randn(1, 6, 37, device=kernels)
        clean = metafast.pairwise_distance(x, y, metric)
        x[0, 2, position] = value
        actual = metafast.pairwise_distance(x, y, metric)
        special = torch.nan if math.isnan(value) or metric == "cosine" else torch.inf
        torch.testing.assert_close(actual[0, 2], torch.full_like(actual[0, 2], special), equal_nan=True)
        torch.testing.assert_close(
            reference.pairwise_distance(x, y, metric)[0, 2], actual[0, 2], equal_nan=True
        )
        others = [0, 1, 3, 4]
        assert torch.equal(actual[0, others], clean[0, others])
        swapped = metafast.pairwise_distance(y, x, metric)
        torch.testing.assert_close(swapped, actual.mT, rtol=0, atol=0, equal_nan=True)

    @each_metric
    def test_gradient_at_nan(self, metric: str, kernels: torch.device) -> None:
        """NaN in the entry and in its partners; the other rows of x have the gradient they have alone."""
        x, y = torch.randn(1, 5, 37, device=kernels), torch.randn(1, 6, 37, device=kernels)
        x[0, 2, 20] = torch.nan
        others = [0, 1, 3, 4]
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        to_x, to_y = torch.autograd.grad(metafast.pairwise_distance(*leaves, metric).sum(), leaves)
        assert to_x[0, 2, 20].isnan() and to_y[0, :, 20].isnan().all()
        alone = x[:, others].requires_grad_()
        (expected,) = torch.autograd.grad(metafast.pairwise_distance(alone, y, metric).sum(), alone)
        assert torch.equal(to_x[:, others], expected)

    @each_metric
    def test_gradient_at_infinity(self, metric: str, kernels: torch.device) -> None:
        x = torch.randn(1, 5, 19, dtype=torch.float64, device=kernels)
        y = torch.randn(1, 6, 19, dtype=torch.float64, device=kernels)
        x[0, 2, 4] = torch.inf
        results = []
        for function in (metafast.pairwise_distance, reference.pairwise_distance):
            leaves = [t.clone().requires_grad_() for t in (x, y)]
            results.append(torch.autograd.grad(function(*leaves, metric).sum(), leaves))
        assert_same(*results)

    @pytest.mark.parametrize("ratio", [1.0, 10.0, 1e3, 1e6])
    def test_cosine_of_very_different_norms(self, ratio: float, kernels: torch.device) -> None:
        x, y = torch.randn(1, 20, 64, device=kernels) * ratio, torch.randn(1, 20, 64, device=kernels)
        for inputs in ((x, y), (y, x)):
            wide = in_float64(inputs)
            exact = reference.pairwise_distance(*wide, "cosine")
            leaves = [t.clone().requires_grad_() for t in inputs]
            distance = metafast.pairwise_distance(*leaves, "cosine")
            torch.testing.assert_close(distance.double(), exact, rtol=0, atol=5e-7)
            expected = reference.pairwise_distance_vjp(torch.ones_like(exact), *wide, "cosine")
            for a, e in zip(torch.autograd.grad(distance.sum(), leaves), expected, strict=True):
                assert (a - e).abs().max() < 2e-6 * e.abs().max()

    @each_metric
    def test_large_and_tiny_entries(self, metric: str, kernels: torch.device) -> None:
        """Far from overflow, no scale of the entries harms the accuracy."""
        for scale in (1e-12, 1e-6, 1e6, 1e12):
            x, y = (
                torch.randn(1, 4, 50, device=kernels) * scale,
                torch.randn(1, 5, 50, device=kernels) * scale,
            )
            actual = metafast.pairwise_distance(x, y, metric)
            exact = reference.pairwise_distance(x.double(), y.double(), metric)
            torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)


class TestHalf:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_every_number_is_read_and_written(self, dtype: torch.dtype, vectors: torch.device) -> None:
        """The mean of one row is that row: all 65,536 bit patterns, through whole vectors and through tails."""
        numbers = torch.arange(-(2**15), 2**15, device=vectors).to(torch.int16).view(dtype)
        for width in (64, 4):
            rows = numbers.view(-1, 1, width)
            means = metafast.prototypes(rows, rows.new_zeros(rows.shape[0], 1, dtype=torch.int64), 1)
            torch.testing.assert_close(means, rows, rtol=0, atol=0, equal_nan=True)
            nonzero = rows != 0
            assert torch.equal(
                means.signbit()[nonzero & ~rows.isnan()], rows.signbit()[nonzero & ~rows.isnan()]
            )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_rounding_is_to_nearest_even(self, dtype: torch.dtype, vectors: torch.device) -> None:
        rows = torch.randn(64, 2, 64).to(vectors, dtype)
        means = metafast.prototypes(rows, rows.new_zeros(64, 2, dtype=torch.int64), 1)
        assert torch.equal(means, rows.float().mean(-2, keepdim=True).to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    @pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
    def test_means_are_summed_in_float32(self, dtype: torch.dtype, soft: bool, device: torch.device) -> None:
        """Ten thousand ones: a sum kept in half stops at 2048, or 256."""
        features = torch.ones(1, 10000, 3, dtype=dtype, device=device)
        labels = features[..., :1] if soft else torch.zeros(1, 10000, dtype=torch.int64, device=device)
        assert (metafast.prototypes(features, labels, 1) == 1).all()

    @each_metric
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_distances_are_summed_in_float32(
        self, metric: str, dtype: torch.dtype, kernels: torch.device
    ) -> None:
        x, y = torch.randn(2, 5, 700).to(kernels, dtype), torch.randn(2, 6, 700).to(kernels, dtype)
        actual = metafast.pairwise_distance(x, y, metric)
        assert torch.equal(actual, metafast.pairwise_distance(x.float(), y.float(), metric).to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    @each_metric
    def test_loss_is_that_of_float32(self, metric: str, dtype: torch.dtype, device: torch.device) -> None:
        support, query = torch.randn(2, 6, 20).to(device, dtype), torch.randn(2, 5, 20).to(device, dtype)
        labels = shuffled_labels((2, 6), 3).to(device), shuffled_labels((2, 5), 3).to(device)
        actual = metafast.prototypical_loss(support, labels[0], query, labels[1], 3, metric)
        expected = metafast.prototypical_loss(support.float(), labels[0], query.float(), labels[1], 3, metric)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, e)


class TestPrototypes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_class_without_rows_is_zero(self, dtype: torch.dtype, kernels: torch.device) -> None:
        features = torch.randn(2, 4, 21, device=kernels).to(dtype).requires_grad_()
        labels = torch.tensor([[3, 1, 1, 3], [2, 2, 2, 2]], device=kernels)
        means = metafast.prototypes(features, labels, 5)
        expected = torch.zeros(2, 5, 21, device=kernels)
        wide = features.detach().float()
        expected[0, 3], expected[0, 1] = wide[0, [0, 3]].mean(0), wide[0, 1:3].mean(0)
        expected[1, 2] = wide[1].mean(0)
        torch.testing.assert_close(means, expected.to(dtype))
        assert (means[0, [0, 2, 4]] == 0).all() and (means[1, [0, 1, 3, 4]] == 0).all()
        (gradient,) = torch.autograd.grad(means.sum(), features)
        counts = torch.tensor([[2.0, 2, 2, 2], [4, 4, 4, 4]], device=kernels)
        torch.testing.assert_close(gradient, (1 / counts)[..., None].expand(2, 4, 21).to(dtype))

    def test_weightless_class_is_zero(self, device: torch.device) -> None:
        features = torch.randn(3, 4, device=device, requires_grad=True)
        weights = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0]], device=device, requires_grad=True)
        means = metafast.prototypes(features, weights, 2)
        assert (means[1] == 0).all()
        torch.testing.assert_close(means[0], (features[0] + 2 * features[1] + features[2]) / 4)
        for gradient in torch.autograd.grad(means.sum(), (features, weights)):
            assert gradient.isfinite().all()

    def test_soft_labels_of_ones_are_class_numbers(self, device: torch.device) -> None:
        features = torch.randn(2, 6, 9, dtype=torch.float64, device=device)
        labels = shuffled_labels((2, 6), 4).to(device)
        weights = reference.one_hot(labels, 4).double()
        torch.testing.assert_close(
            metafast.prototypes(features, weights, 4), metafast.prototypes(features, labels, 4)
        )

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_not_finite_stays_in_its_class(self, value: float, kernels: torch.device) -> None:
        features, labels = (
            torch.randn(1, 6, 19, device=kernels),
            torch.tensor([[0, 1, 2, 2, 1, 0]], device=kernels),
        )
        clean = metafast.prototypes(features, labels, 4)
        features[0, 3, 5] = value
        means = metafast.prototypes(features, labels, 4)
        assert torch.equal(means[0, [0, 1, 3]], clean[0, [0, 1, 3]])
        expected = clean[0, 2].index_fill(0, torch.tensor([5], device=kernels), value)
        torch.testing.assert_close(means[0, 2], expected, rtol=0, atol=0, equal_nan=True)


class TestLoss:
    @each_metric
    def test_no_query_rows(self, metric: str, device: torch.device) -> None:
        support = torch.randn(2, 3, 4, device=device, requires_grad=True)
        labels = torch.tensor([[0, 1, 1], [1, 0, 0]], device=device)
        query = torch.empty(2, 0, 4, device=device, requires_grad=True)
        loss, logits = metafast.prototypical_loss(support, labels, query, labels[:, :0], 2, metric)
        assert loss.shape == (2,) and loss.isnan().all()
        assert logits.shape == (2, 0, 2)
        to_support, to_query = torch.autograd.grad(loss.sum(), (support, query))
        assert (to_support == 0).all() and to_query.shape == query.shape

    @each_metric
    @pytest.mark.parametrize("which", ["others", "own", "all"])
    @pytest.mark.parametrize("output", ["loss", "logits", "both"])
    def test_class_without_support(self, metric: str, which: str, output: str, kernels: torch.device) -> None:
        """Its logit is -inf; gradients are those of the reference, also where the loss is infinite."""
        rows = 0 if which == "all" else 4
        support_labels = torch.tensor([[2, 0, 2, 0], [0, 2, 2, 2]], device=kernels)[:, :rows]
        query_labels = torch.tensor([[0, 2, 2], [2, 0, 2]], device=kernels)
        if which != "others":
            query_labels[0, 1] = 1
        support = torch.randn(2, rows, 6, dtype=torch.float64, device=kernels)
        query = torch.randn(2, 3, 6, dtype=torch.float64, device=kernels)
        tau = torch.tensor([0.5, 1.5], dtype=torch.float64, device=kernels)
        results = []
        for function in (metafast.prototypical_loss, reference.prototypical_loss):
            leaves = [t.clone().requires_grad_() for t in (support, query, tau)]
            loss, logits = function(leaves[0], support_labels, leaves[1], query_labels, 3, metric, leaves[2])
            upstream = torch.tensor([1.0, 2.0], dtype=torch.float64, device=kernels)
            chosen = {"loss": [loss], "logits": [logits], "both": [loss, logits]}[output]
            weights = {"loss": [upstream], "logits": [logits.detach().nan_to_num(neginf=0).cos()]}
            weights["both"] = weights["loss"] + weights["logits"]
            results.append((loss, logits, *torch.autograd.grad(chosen, leaves, weights[output])))
        for a, e in zip(*results, strict=True):
            assert_same(a.detach(), e.detach())
        assert (results[0][1][..., 1] == -torch.inf).all()
        if which == "own":
            assert results[0][0][0] == torch.inf and results[0][0][1].isfinite()

    @each_metric
    @pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-3, 100.0])
    def test_any_temperature(self, metric: str, temperature: float, kernels: torch.device) -> None:
        support, query = torch.randn(2, 4, 13, device=kernels), torch.randn(2, 5, 13, device=kernels)
        labels = (
            torch.tensor([[0, 1, 2, 2], [1, 0, 2, 0]], device=kernels),
            shuffled_labels((2, 5), 3).to(kernels),
        )
        args = (support, labels[0], query, labels[1], 3, metric, temperature)
        exact = reference.prototypical_loss(*in_float64(args[:4]), *args[4:])  # type: ignore[arg-type]
        for a, e in zip(metafast.prototypical_loss(*args), exact, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=2e-6, atol=2e-6 * max(1.0, abs(temperature)))

    @pytest.mark.parametrize("spread", [1e-4, 1.0, 30.0, 1e4])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    def test_exponentials(self, spread: float, dtype: torch.dtype, kernels: torch.device) -> None:
        """Logits that differ by anything from 1e-4 to far past the range of exp: the gradient is softmax - one-hot."""
        support, query = (
            torch.zeros(1, 40, 1, dtype=dtype, device=kernels),
            torch.zeros(1, 40, 1, dtype=dtype, device=kernels),
        )
        support[0, :, 0] = torch.linspace(0, 1, 40, dtype=dtype, device=kernels) * math.sqrt(spread)
        labels = torch.arange(40, device=kernels)[None]
        args = (support, labels, query, labels, 40)
        loss, logits = metafast.prototypical_loss(*args)
        exact = -logits.double().log_softmax(-1).diagonal(dim1=-2, dim2=-1).mean(-1)
        torch.testing.assert_close(
            loss.double(), exact, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0
        )
        query.requires_grad_()
        support.requires_grad_()
        # The class means are the support rows, so d loss / d support_c = -2 sum_i (s_c - q_i) (p_ic - [i = c]) / m.
        loss, _ = metafast.prototypical_loss(support, labels, query, labels, 40)
        (gradient,) = torch.autograd.grad(loss.sum(), support)
        weight = (logits.double().softmax(-1) - torch.eye(40, dtype=torch.float64, device=kernels)) / 40
        step = (support - query.mT).detach().double()
        expected = -2 * (weight[0].T * step[0]).sum(-1)
        torch.testing.assert_close(
            gradient[0, :, 0].double(),
            expected,
            rtol=3e-6 if dtype == torch.float32 else 1e-12,
            atol=(3e-7 if dtype == torch.float32 else 1e-14) * math.sqrt(spread),
        )

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    @pytest.mark.parametrize("where", ["support", "query", "temperature"])
    @each_metric
    def test_not_finite(self, metric: str, where: str, value: float, kernels: torch.device) -> None:
        """The logits and the loss of that task are the reference's, which has no number to hide behind."""
        inputs = {
            "support": torch.randn(2, 4, 19, device=kernels),
            "query": torch.randn(2, 3, 19, device=kernels),
            "temperature": torch.ones(2, device=kernels),
        }
        labels = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]], device=kernels)
        inputs[where].view(2, -1)[0, -1] = value
        arguments = (
            inputs["support"],
            labels,
            inputs["query"],
            labels[:, :3],
            2,
            metric,
            inputs["temperature"],
        )
        loss, logits = metafast.prototypical_loss(*arguments)
        assert not loss[0].isfinite() and loss[1].isfinite()
        assert logits[1].isfinite().all()
        distance = reference.pairwise_distance(
            inputs["query"], metafast.prototypes(inputs["support"], labels, 2), metric
        )
        expected = reference.distance_loss(distance, labels, labels[:, :3], inputs["temperature"])
        for a, e in zip((loss, logits), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5, equal_nan=True)

    def test_many_query_rows(self, device: torch.device) -> None:
        """The mean over the rows of a long query set stays accurate."""
        support, query = torch.randn(1, 4, 2, device=device), torch.randn(1, 100_000, 2, device=device)
        labels = (
            torch.tensor([[0, 1, 1, 0]], device=device),
            torch.zeros(1, 100_000, dtype=torch.int64, device=device),
        )
        loss, _ = metafast.prototypical_loss(support, labels[0], query, labels[1], 2)
        exact, _ = reference.prototypical_loss(support.double(), labels[0], query.double(), labels[1], 2)
        torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)


class TestAutocast:
    @each_metric
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_distances_are_float32(self, metric: str, dtype: torch.dtype, device: torch.device) -> None:
        x = torch.randn(2, 5, 9, device=device).to(dtype).requires_grad_()
        y = torch.randn(2, 4, 9, device=device).to(dtype).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            distance = metafast.pairwise_distance(x, y, metric)
        assert distance.dtype == torch.float32
        assert torch.equal(distance, metafast.pairwise_distance(x.float(), y.float(), metric))
        gradients = torch.autograd.grad(distance.sum(), (x, y))
        wide = [t.detach().float().requires_grad_() for t in (x, y)]
        expected = torch.autograd.grad(metafast.pairwise_distance(*wide, metric).sum(), wide)
        for a, e in zip(gradients, expected, strict=True):
            assert torch.equal(a, e.to(dtype))

    @each_metric
    @pytest.mark.parametrize(
        "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
    )
    def test_mixed_inputs(
        self, metric: str, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
    ) -> None:
        x, y = (
            torch.randn(1, 5, 9, device=device).to(dtypes[0]),
            torch.randn(1, 4, 9, device=device).to(dtypes[1]),
        )
        labels = torch.tensor([[0, 1, 1, 0, 1]], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            distance = metafast.pairwise_distance(x, y, metric)
            loss, logits = metafast.prototypical_loss(x, labels, y, labels[:, :4], 2, metric)
        assert torch.equal(distance, metafast.pairwise_distance(x.float(), y.float(), metric))
        expected = metafast.prototypical_loss(x.float(), labels, y.float(), labels[:, :4], 2, metric)
        assert loss.dtype == logits.dtype == torch.float32
        assert torch.equal(loss, expected[0]) and torch.equal(logits, expected[1])

    @each_metric
    def test_float64_stays(self, metric: str, device: torch.device) -> None:
        x, y = torch.randn(1, 5, 9, device=device).double(), torch.randn(1, 4, 9, device=device).double()
        labels = torch.tensor([[0, 1, 1, 0, 1]], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            distance = metafast.pairwise_distance(x, y, metric)
            loss, _ = metafast.prototypical_loss(x, labels, y, labels[:, :4], 2, metric)
        assert torch.equal(distance, metafast.pairwise_distance(x, y, metric))
        assert torch.equal(loss, metafast.prototypical_loss(x, labels, y, labels[:, :4], 2, metric)[0])

    @each_metric
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_losses_are_float32(self, metric: str, dtype: torch.dtype, device: torch.device) -> None:
        support = torch.randn(2, 5, 9, device=device).to(dtype).requires_grad_()
        query = torch.randn(2, 4, 9, device=device).to(dtype).requires_grad_()
        labels = shuffled_labels((2, 5), 3).to(device), shuffled_labels((2, 4), 3).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss, logits = metafast.prototypical_loss(support, labels[0], query, labels[1], 3, metric)
        expected = metafast.prototypical_loss(support.float(), labels[0], query.float(), labels[1], 3, metric)
        for a, e in zip((loss, logits), expected, strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, e)
        for gradient in torch.autograd.grad(loss.sum(), (support, query)):
            assert gradient.dtype == dtype

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
    def test_prototypes_keep_their_dtype(self, dtype: torch.dtype, soft: bool, device: torch.device) -> None:
        features = torch.randn(2, 6, 9, device=device).to(dtype).requires_grad_()
        labels = (
            torch.rand(2, 6, 3, device=device).to(dtype) if soft else shuffled_labels((2, 6), 3).to(device)
        )
        with torch.autocast(device.type, torch.bfloat16):
            means = metafast.prototypes(features, labels, 3)
        assert means.dtype == dtype
        torch.testing.assert_close(means, metafast.prototypes(features, labels, 3))
        (gradient,) = torch.autograd.grad(means.sum(), features)
        assert gradient.dtype == dtype

    @pytest.mark.parametrize("case", [c for c in CASES if c.kernels_only], ids=str)
    def test_derivatives_inside_the_region(self, case: Case, device: torch.device) -> None:
        """Orders one and two by torch.func keep float32's accuracy."""
        inputs = case.make((2,), {"n": 4, "m": 3, "d": 8, "C": 2}, torch.float32, device)

        def second(function: Callable[..., Any], tensors: list[Tensor]) -> Tensor:
            of = case.closed(function, tensors, 2)

            def value(*values: Tensor) -> Tensor:
                return sum((o.square().sum() for o in outputs(of(*values))), torch.zeros(()))

            def slope(*values: Tensor) -> Tensor:
                return torch.func.grad(value)(*values).square().sum()

            return torch.func.grad(slope)(*case.floats(tensors))

        with torch.autocast(device.type, torch.bfloat16):
            actual = second(case.function, inputs)
        exact = second(case.reference, in_float64(inputs))
        assert (actual - exact).abs().max() <= 2e-5 * exact.abs().max()


class TestCdist:
    def test_signature_is_torchs(self) -> None:
        ours = inspect.signature(metafast.cdist).parameters
        theirs = inspect.signature(torch.functional.cdist).parameters
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
        assert [p.kind for p in ours.values()] == [p.kind for p in theirs.values()]

    @pytest.mark.parametrize("p", [0, 0.5, 1, 1.0, 2, 2.0, 3.0, math.inf])
    @pytest.mark.parametrize(
        "mode",
        ["use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"],
    )
    def test_results_are_torchs(self, p: float, mode: str, device: torch.device) -> None:
        x, y = (torch.randn(2, rows, 7, dtype=torch.float64, device=device) for rows in (30, 28))
        leaves = [t.requires_grad_() for t in (x, y)]
        actual, expected = metafast.cdist(x, y, p, mode), torch.cdist(x, y, p, mode)
        assert_same(actual.detach(), expected.detach())
        if p > 0:
            assert_same(
                torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
            )

    @pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
    @pytest.mark.parametrize(
        "shapes",
        [
            ((3, 4), (5, 4)),
            ((2, 1, 3, 4), (6, 5, 4)),
            ((0, 4), (5, 4)),
            ((2, 3, 0), (2, 5, 0)),
            ((0, 3, 4), (0, 5, 4)),
        ],
        ids=str,
    )
    def test_shapes_are_torchs(
        self, p: float, shapes: tuple[tuple[int, ...], tuple[int, ...]], device: torch.device
    ) -> None:
        x, y = (torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes)
        assert_same(metafast.cdist(x, y, p=p), torch.cdist(x, y, p=p))

    @pytest.mark.parametrize("p", [1.0, 2.0])
    def test_gradient_at_equal_rows_is_torchs(self, p: float, device: torch.device) -> None:
        x = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        expected = torch.autograd.grad(torch.cdist(x, y, p).sum(), (x, y))
        assert_same(torch.autograd.grad(metafast.cdist(x, y, p).sum(), (x, y)), expected)


class TestLargeIndex:
    """Strides beyond 32 bits; on the CPU the storage is reserved address space, of which only the rows are touched."""

    ELEMENTS = 2**32 + 2**20

    @pytest.fixture
    def storage(self, device: torch.device) -> Tensor:
        if device.type == "cuda":
            return torch.zeros(self.ELEMENTS, dtype=torch.bfloat16, device=device)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        return torch.frombuffer(mmap.mmap(-1, 2 * self.ELEMENTS, flags=flags), dtype=torch.bfloat16)

    @pytest.mark.parametrize(
        "strides",
        [(2**32, 64, 1), (64, 2**31 + 64, 1), (2**31 + 2**30, 2**29, 1), (512, 64, 2**29)],
        ids=["tasks", "rows", "both", "features"],
    )
    @pytest.mark.parametrize("case", [c for c in CASES if torch.bfloat16 in c.dtypes], ids=str)
    def test_strides(
        self, case: Case, strides: tuple[int, int, int], storage: Tensor, device: torch.device
    ) -> None:
        sizes = {"n": 2, "m": 2, "d": 9, "C": 2}
        dense = case.make((2,), sizes, torch.bfloat16, device)

        def far(t: Tensor, offset: int) -> Tensor:
            if not t.is_floating_point() or t.dim() != 3:
                return t
            view = storage.as_strided(t.shape, strides, offset)
            return view.copy_(t)

        inputs = [far(t, 2**10 * k) for k, t in enumerate(dense)]
        for a, e in zip(gradients(case.function, inputs, 2), gradients(case.function, dense, 2), strict=True):
            assert_equal(case, a, e)
