"""pytest-benchmark over the cases: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.cases import Call, Case, Variant
from benchmarks.ratios import prepare, ready


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")


@pytest.fixture(scope="session", autouse=True)
def conditions() -> None:
    """The threads and the allocator of ``benchmarks.ratios``."""
    prepare()


@pytest.fixture(scope="module")
def checked_call() -> Iterator[Callable[[Case, Variant], Call]]:
    """The variant's call once its result has passed the check; the variants of a case share their inputs."""
    current: dict[str, Any] = {}

    def prepare_call(case: Case, variant: Variant) -> Call:
        if current.get("case") is not case:
            inputs = case.inputs(case.sizes)
            current.update(case=case, inputs=inputs, error_of=case.check(inputs))
        try:
            call, result = ready(variant, current["inputs"])
        except ImportError as error:
            if not variant.peer:
                raise
            pytest.skip(f"{variant.name}: {error}")
        if variant.checked:
            error = current["error_of"](result)
            assert error <= case.tolerance, (
                f"{case.name}, {variant.name}: error {error:.1e} against float64; not timed"
            )
        return call

    yield prepare_call
    current.clear()
