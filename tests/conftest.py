"""A fixed seed and new memory full of NaN for every test; the devices and kernels to ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from metafast import _library

# cuBLAS asks for it in deterministic mode, before the first CUDA call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytest.register_assert_rewrite("tests.cases")


def _vector_bits_or_reason(bits: int) -> str:
    before = _library.vector_bits()
    try:
        _library.vector_bits(bits)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        _library.vector_bits(before)
    return ""


def _cpu(bits: int) -> object:
    reason = _vector_bits_or_reason(bits)
    return pytest.param(("cpu", bits), id=f"cpu{bits}", marks=pytest.mark.skipif(bool(reason), reason=reason))


_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

#: Where the operators run, and the vector width of the CPU kernels (0 leaves it).
DEVICES = (pytest.param(("cpu", 0), id="cpu"), pytest.param(("cuda", 0), id="cuda", marks=_CUDA))
KERNELS = (_cpu(128), _cpu(256), _cpu(512), *DEVICES[1:])


def _run_on(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    name, bits = request.param
    before = _library.vector_bits()
    _library.vector_bits(bits)
    yield torch.device(name)
    _library.vector_bits(before)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    yield from _run_on(request)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device, and on the CPU every vector width."""
    yield from _run_on(request)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nan_memory() -> Iterator[None]:
    """In deterministic mode torch fills new memory with NaN: an operator that leaves a result unwritten shows it."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
