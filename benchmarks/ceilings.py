"""What the machine can do at most: a copy of a case's own traffic, and one large sgemm."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.cases import FLOAT_BYTES

#: Side of the square matrices whose product stands for the peak rate of arithmetic.
SGEMM_SIZE = 1024
SGEMM_FLOPS = 2 * SGEMM_SIZE**3


def copy_call(traffic: int) -> Callable[[], torch.Tensor]:
    """A copy that reads and writes ``traffic`` bytes together: it meets the caches as the case does."""
    source = torch.zeros(max(traffic // (2 * FLOAT_BYTES), 1))
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def sgemm_call() -> Callable[[], torch.Tensor]:
    """One product of two square float32 matrices: ``SGEMM_FLOPS`` operations."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, SGEMM_SIZE, SGEMM_SIZE, generator=generator)
    product = torch.empty(SGEMM_SIZE, SGEMM_SIZE)
    return lambda: torch.mm(a, b, out=product)
