"""A fixed seed and new memory full of NaN for every test; the devices and kernels to ask for.

``METAFAST_SIMT`` chooses the build of the emulated kernels (``tests/simt/build.py``) and makes it an error that it
cannot be built. Under every build but the plain one only the tests of emulated kernels run.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("tests.cases")

from metafast import _library  # noqa: E402  (after the line above)
from tests import simt  # noqa: E402
from tests.cases import Case  # noqa: E402

# cuBLAS asks for it in deterministic mode, before the first CUDA call.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_configure(config: pytest.Config) -> None:
    # A job in a shell's background ignores it, and so would all that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "emulated: runs the kernels of csrc/cuda in the emulator")


def _wanted(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    devices = {
        parameters[name][0] for name in ("device", "kernels", "vectors", "hardware") if name in parameters
    }
    case = parameters.get("case")
    if isinstance(case, Case) and "emulated" in devices and not case.emulated:
        return False
    return simt.kind() == "plain" or item.get_closest_marker("emulated") is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if not _wanted(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if _wanted(item)]


def pytest_collection_finish() -> None:
    # The tests themselves stay: garbage collections need not go through them every time.
    gc.freeze()


def _vector_bits_or_reason(bits: int) -> str:
    before = _library.vector_bits()
    try:
        _library.vector_bits(bits)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        _library.vector_bits(before)
    return ""


def _device(
    id: str, name: str, option: int | str = 0, *marks: pytest.MarkDecorator, lacking: str = ""
) -> Any:
    skip = pytest.mark.skipif(bool(lacking), reason=lacking)
    return pytest.param((name, option), id=id, marks=(*marks, skip))


def _cpu(bits: int) -> Any:
    return _device(f"cpu{bits}", "cpu", bits, lacking=_vector_bits_or_reason(bits))


def _emulated(id: str, order: str) -> Any:
    return _device(id, "emulated", order, pytest.mark.emulated, lacking=simt.unavailable())


_NO_CUDA = "" if torch.cuda.is_available() else "this machine has no CUDA device"
_CUDA = _device("cuda", "cuda", lacking=_NO_CUDA)

#: Name, and the vector width of the CPU kernels (0 leaves it) or the order of the emulated threads.
DEVICES = (_device("cpu", "cpu"), _emulated("emulated", "random"), _CUDA)
WIDTHS = tuple(_cpu(bits) for bits in (128, 256, 512))
KERNELS = (
    *WIDTHS,
    *(_emulated(f"emulated-{order}", order) for order in ("forward", "reverse", "random")),
    _CUDA,
)


def _run_on(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    name, option = request.param
    if name == "emulated":
        with simt.emulated(option):
            yield torch.device("cpu")
        return
    before = _library.vector_bits()
    _library.vector_bits(option)
    yield torch.device(name)
    _library.vector_bits(before)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device; the emulated one holds its tensors on the CPU."""
    yield from _run_on(request)


@pytest.fixture(params=(DEVICES[0], DEVICES[-1]))
def hardware(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The devices that are there, for what depends on them more than on their kernels."""
    yield from _run_on(request)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device, on the CPU every vector width, emulated every order of threads."""
    yield from _run_on(request)


@pytest.fixture(params=(*WIDTHS, *DEVICES[1:]))
def vectors(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device, on the CPU every vector width; one order of threads will do for many sizes and options."""
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
