"""hypothesis throws shapes, strides, dtypes and labels at every operator and compares with the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from metafast import _library
from tests.cases import CASES, Case, Input, assert_accurate, gradients

WIDTHS = [bits for bits in (128, 256, 512) if bits <= _library.vector_bits()]


@st.composite
def layouts(draw: st.DrawFn, dense: Tensor) -> Tensor:
    """The same entries, or some of them repeated by a stride of 0, in another place in memory."""
    repeated = draw(st.integers(-1, dense.dim() - 1)) if draw(st.integers(0, 3)) == 0 else -1
    order = draw(st.permutations(range(dense.dim())))
    steps = [draw(st.integers(1, 3)) for _ in order]
    starts = [draw(st.integers(0, 2)) for _ in order]
    source = dense.narrow(repeated, 0, 1) if repeated >= 0 and dense.shape[repeated] > 0 else dense
    sizes = [start + step * size for size, step, start in zip(source.shape, steps, starts, strict=True)]
    memory = torch.full([sizes[k] for k in order], torch.nan if dense.is_floating_point() else -1).to(dense)
    view = memory.permute([order.index(k) for k in range(dense.dim())])
    window = tuple(
        slice(a, a + step * size, step) for size, step, a in zip(source.shape, steps, starts, strict=True)
    )
    return view[window].copy_(source).expand_as(dense)


@st.composite
def arguments(draw: st.DrawFn, case: Case, device: torch.device) -> tuple[list[Tensor], int]:
    sizes = {"n": draw(st.integers(0, 9)), "m": draw(st.integers(0, 9)), "d": draw(st.integers(0, 40))}
    sizes["C"] = draw(st.integers(0 if sizes["n"] + sizes["m"] == 0 else 1, 6))
    lead = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
    dtype = draw(st.sampled_from(case.dtypes))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))

    def one(spec: Input) -> Tensor:
        # Leading dimensions that broadcast: some dropped from the left, some of size 1.
        kept = lead[draw(st.integers(0, len(lead))) :]
        own = tuple(1 if draw(st.integers(0, 3)) == 0 else size for size in kept)
        dense = spec.make(own, sizes, dtype, device)
        if spec.kind == "labels" and dense.numel():
            numbers = st.lists(st.integers(0, sizes["C"] - 1), min_size=dense.numel(), max_size=dense.numel())
            dense = torch.tensor(draw(numbers), device=device).view(dense.shape)
        return draw(layouts(dense)) if dense.dim() else dense

    return [one(spec) for spec in case.inputs.values()], sizes["C"]


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_values_and_gradients(case: Case, device: torch.device, data: Any) -> None:
    inputs, num_classes = data.draw(arguments(case, device))
    before = _library.vector_bits()
    _library.vector_bits(data.draw(st.sampled_from(WIDTHS)))
    try:
        actual = gradients(case.function, inputs, num_classes)
    finally:
        _library.vector_bits(before)
    assert_accurate(actual, lambda values: gradients(case.reference, values, num_classes), inputs)
