"""Loads the compiled operators and attaches what each of them needs in Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    import metafast._C  # noqa: F401  (registers torch.ops.metafast)
except ImportError as error:
    raise ImportError(
        f"metafast's compiled operators could not be loaded ({error}). Build them with "
        "'pip install --no-build-isolation .' or, in a source checkout, "
        "'python setup.py build_ext --inplace'; torch 2.11 or later is needed."
    ) from error

_HALVES = (torch.bfloat16, torch.float16)

LIBRARY = torch.library.Library("metafast", "FRAGMENT")


def operator(name: str) -> torch._ops.OpOverload:
    """The operator ``metafast::name``."""
    return getattr(torch.ops.metafast, name).default


def keep_pages() -> bool:
    """Make the process's C allocator keep the memory it has freed.

    glibc returns large blocks to the system at each ``free``, so that a training step on the CPU writes to fresh
    pages every time, which doubles its cost for convolutional networks. True where the setting took effect
    (glibc).
    """
    return operator("keep_pages")()


def vector_bits(bits: int = 0) -> int:
    """Width of the CPU kernels' vectors (512, 256 or 128); a nonzero argument chooses a narrower one."""
    return operator("vector_bits")(bits)


def fallback(op: torch._ops.OpOverload, function: Callable[..., Any], wide: Sequence[int] = ()) -> None:
    """Run ``function`` (plain PyTorch) where ``op`` has no kernel for the device, with one warning per operator.

    With arguments in a half type it computes in float32, in which the results at the positions ``wide`` remain.
    """
    warned = False

    def kernel(*args: Any) -> Any:
        nonlocal warned
        if not warned:
            warned = True
            device = next(a.device for a in args if isinstance(a, Tensor))
            warnings.warn(
                f"{op}: no kernel for device {device.type!r} in this build of metafast; plain PyTorch runs "
                "instead. 'metafast doctor' lists the kernels.",
                stacklevel=2,
            )
        half = next((a.dtype for a in args if isinstance(a, Tensor) and a.dtype in _HALVES), None)
        if half is None:
            return function(*args)
        out = function(*(a.float() if isinstance(a, Tensor) and a.dtype in _HALVES else a for a in args))
        if isinstance(out, Tensor):
            return out.to(half)
        return tuple(o if k in wide else o.to(half) for k, o in enumerate(out))

    LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")


def call(op: torch._ops.OpOverload, *args: Any) -> Any:
    """``op(*args)``, with the kernel's complaint about a value of an argument as a ValueError."""
    try:
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch.compiler.is_compiling():
            return op(*args)
        # Nothing is recorded, and to find that out below would take half as long as a small kernel.
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    except RuntimeError as error:
        text = str(error)
        if text.startswith("metafast: "):
            raise ValueError(text.removeprefix("metafast: ").partition("\n")[0]) from None
        raise
