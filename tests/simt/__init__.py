"""The emulated device: CPU tensors on which metafast's operators run the kernels of csrc/cuda."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import metafast  # noqa: F401  (defines the operators)

#: Operators without a kernel on any GPU.
CPU_ONLY = {"vector_bits", "keep_pages", "build_info"}
#: torch's own kernels do its work.
WITHOUT_CUDA = {"sgd_update", "sgd_update_vjp", "attention_lstm"}

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_SCHEMAS = torch.library.Library("metafast_simt", "DEF")
_depth = 0


def kind() -> str:
    """The build to use: METAFAST_SIMT, one of ``build.KINDS``."""
    return os.environ.get("METAFAST_SIMT", "plain")


def unavailable() -> str:
    """Why there is no emulated device on this machine, or nothing; asked for by METAFAST_SIMT, it has to be there."""
    from tests.simt import build

    return "" if "METAFAST_SIMT" in os.environ else build.missing()


def active() -> bool:
    """Whether the operators run the emulated kernels at the moment."""
    return _depth > 0


@functools.cache
def _schemas() -> dict[str, str]:
    """Operator -> schema, copied to the namespace of the emulated kernels."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace == "metafast" and name not in CPU_ONLY | WITHOUT_CUDA:
            found[name] = str(schema).removeprefix("metafast::")
    for schema in found.values():
        _SCHEMAS.define(schema)
    return found


@functools.cache
def module() -> ModuleType:
    """The emulator's Python module: ``configure``, ``launches``, ``run`` and the functions of csrc/math."""
    from tests.simt import build

    names = _schemas()
    loaded = build.load(kind())
    lacking = [
        name
        for name in names
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"metafast_simt::{name}", "CPU")
    ]
    if lacking:
        raise RuntimeError(f"csrc/cuda has no kernel for {', '.join(lacking)}")
    return loaded


def _kernel(name: str) -> Callable[..., Any]:
    operator, launches = getattr(torch.ops.metafast_simt, name).default, module().launches

    def kernel(*args: Any) -> Any:
        before = launches()
        out = operator.redispatch(_CPU, *args)
        empty = any(isinstance(a, Tensor) and a.numel() == 0 for a in args)
        assert empty or launches() > before, f"metafast_simt::{name} launched no kernel"
        return out

    return kernel


@contextlib.contextmanager
def emulated(order: str = "random", seed: int = 1) -> Iterator[None]:
    """Every operator of metafast runs its CUDA kernels on CPU tensors, threads in that order, until the end.

    ``order`` is ``"forward"``, ``"reverse"`` or ``"random"``. Autograd, vmap, torch.func and torch.compile take part as
    ever: only the kernels for the dispatch key CPU are others.
    """
    global _depth
    module().configure(order, seed)
    with torch.library._scoped_library("metafast", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name in _schemas():
                library.impl(name, _kernel(name), "CPU")
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
