"""What the machine can do at most: a copy of a case's own traffic, and one large sgemm."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.cases import FLOAT_BYTES

#: Side of the square matrices whose product stands for the peak rate of arithmetic.
SGEMM_SIZE = 1024
SGEMM_FLOPS = 2 * SGEMM_SIZE**3


def copy_call(traffic: int, device: torch.device | str = "cpu") -> Callable[[], torch.Tensor]:
    """A copy that reads and writes ``traffic`` bytes together: it meets the caches as the case does."""
    source = torch.zeros(max(traffic // (2 * FLOAT_BYTES), 1), device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def sgemm_call(size: int = SGEMM_SIZE, device: torch.device | str = "cpu") -> Callable[[], torch.Tensor]:
    """One product of two square float32 matrices: ``2 * size**3`` operations."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, size, size, generator=generator).to(device)
    product = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=product)
