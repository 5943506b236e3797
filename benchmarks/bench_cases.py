"""Times every variant of every case by itself; ``python -m benchmarks.ratios`` compares them."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.cases import CASES, Case, Variant


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, variant, id=f"{case.name}: {variant.name}")
        for case in CASES
        for variant in case.variants
    ],
)
def test_time(case: Case, variant: Variant, checked_call: Any, benchmark: Any) -> None:
    call = checked_call(case, variant)
    benchmark.group = case.title
    benchmark.extra_info.update(sizes=vars(case.sizes), traffic=case.traffic, flops=case.flops)
    benchmark(call)
