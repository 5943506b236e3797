"""Forward mode for closed forms: numbers that carry their tangent along.

A fused operator's derivative rules may hold no inner call of autograd or torch.func: inside a rule their levels are
suspended. What the rules need beyond the operators themselves is the tangent of a closed form, and that is the closed
form evaluated on :class:`Dual` numbers; every operation in it is one of torch's, differentiable to any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Dual:
    """``value`` with its ``tangent`` (None: zero); closed forms treat it as a tensor."""

    __slots__ = ("tangent", "value")

    def __init__(self, value: Tensor, tangent: Tensor | None = None) -> None:
        self.value = value
        self.tangent = tangent

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def __add__(self, other: Any) -> Dual:
        value, (a, b) = self.value + value_of(other), (self.tangent, tangent_of(other))
        if a is not None and b is not None:
            return Dual(value, a + b)
        only = b if a is None else a
        return Dual(value, None if only is None else only.expand(value.shape))

    __radd__ = __add__

    def __neg__(self) -> Dual:
        return Dual(-self.value, None if self.tangent is None else -self.tangent)

    def __sub__(self, other: Any) -> Dual:
        return self + -other

    def __rsub__(self, other: Any) -> Dual:
        return -self + other

    def __mul__(self, other: Any) -> Dual:
        return _product(torch.mul, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: float) -> Dual:
        return self * (1 / other)

    def __matmul__(self, other: Any) -> Dual:
        return _product(torch.matmul, self, other)

    def __rmatmul__(self, other: Tensor) -> Dual:
        return _product(torch.matmul, other, self)

    @property
    def mT(self) -> Dual:
        return self._linear(lambda x: x.mT)

    def __getitem__(self, index: Any) -> Dual:
        return self._linear(lambda x: x[index])

    def sum(self, dim: Any, keepdim: bool = False) -> Dual:
        return self._linear(lambda x: x.sum(dim, keepdim))

    def unsqueeze(self, dim: int) -> Dual:
        return self._linear(lambda x: x.unsqueeze(dim))

    def reshape(self, shape: Sequence[int]) -> Dual:
        return self._linear(lambda x: x.reshape(shape))

    def expand(self, shape: Sequence[int]) -> Dual:
        return self._linear(lambda x: x.expand(shape))

    def softmax(self, dim: int) -> Dual:
        p = self.value.softmax(dim)
        if self.tangent is None:
            return Dual(p)
        return Dual(p, p * (self.tangent - (p * self.tangent).sum(dim, keepdim=True)))

    def exp(self) -> Dual:
        e = self.value.exp()
        return Dual(e, None if self.tangent is None else e * self.tangent)

    def tanh(self) -> Dual:
        h = self.value.tanh()
        return Dual(h, None if self.tangent is None else (1 - h * h) * self.tangent)

    def relu(self) -> Dual:
        tangent = self.tangent
        return Dual(self.value.relu(), None if tangent is None else torch.where(self.value > 0, tangent, 0.0))

    def rsqrt(self) -> Dual:
        root = self.value.rsqrt()
        return Dual(root, None if self.tangent is None else root * root * root * self.tangent * -0.5)

    def _linear(self, function: Callable[[Tensor], Tensor]) -> Dual:
        return Dual(function(self.value), None if self.tangent is None else function(self.tangent))


def _product(function: Callable[[Any, Any], Tensor], a: Any, b: Any) -> Dual:
    """A product of two, linear in each."""
    x, y, dx, dy = value_of(a), value_of(b), tangent_of(a), tangent_of(b)
    first = None if dx is None else function(dx, y)
    second = None if dy is None else function(x, dy)
    tangent = second if first is None else first if second is None else first + second
    return Dual(function(x, y), tangent)


def inverse(matrix: Any) -> Any:
    """The inverse of a symmetric positive definite matrix, NaN for any other."""
    a = value_of(matrix)
    value = torch.linalg.inv_ex(a)[0] + _nan_unless_positive_definite(a)
    tangent = tangent_of(matrix)
    if not isinstance(matrix, Dual):
        return value
    return Dual(value, None if tangent is None else -(value @ tangent @ value))


def cholesky(matrix: Any) -> Any:
    """The upper factor U of a symmetric positive definite matrix U^T U, NaN for any other."""
    a = value_of(matrix)
    value = torch.linalg.cholesky_ex(a, upper=True)[0] + _nan_unless_positive_definite(a).triu()
    tangent = tangent_of(matrix)
    if not isinstance(matrix, Dual):
        return value
    if tangent is None:
        return Dual(value)
    # dU = P(U^-T dA U^-1) U, with P the upper half and half of the diagonal.
    turned = torch.linalg.solve_triangular(value.mT, tangent, upper=False)
    turned = torch.linalg.solve_triangular(value, turned, upper=True, left=False)
    return Dual(value, upper_half(turned) @ value)


def upper_half(matrix: Tensor) -> Tensor:
    """The entries above the diagonal, and half of those on it."""
    return (matrix.triu() + matrix.triu(1)) / 2


def _nan_unless_positive_definite(a: Tensor) -> Tensor:
    info = torch.linalg.cholesky_ex(a.detach())[1]
    return torch.where(info > 0, torch.nan, 0.0).to(a.dtype)[..., None, None].expand(a.shape)


def linear(function: Callable[[Tensor], Tensor], number: Any) -> Any:
    """A linear ``function`` of a tensor, or of a Dual number."""
    return number._linear(function) if isinstance(number, Dual) else function(number)


def value_of(number: Any) -> Any:
    return number.value if isinstance(number, Dual) else number


def tangent_of(number: Any) -> Tensor | None:
    return number.tangent if isinstance(number, Dual) else None


def constant(number: Any) -> Any:
    """``number`` without its dependence on anything: what a first-order rule takes it for."""
    return Dual(number.value.detach()) if isinstance(number, Dual) else number.detach()


def stack(numbers: Sequence[Any], dim: int) -> Any:
    """``torch.stack`` of tensors, or of Dual numbers."""
    return _joined(torch.stack, numbers, dim)


def concatenate(numbers: Sequence[Any], dim: int) -> Any:
    """``torch.cat`` of tensors, or of Dual numbers."""
    return _joined(torch.cat, numbers, dim)


def _joined(join: Callable[..., Tensor], numbers: Sequence[Any], dim: int) -> Any:
    value = join([value_of(number) for number in numbers], dim)
    if all(isinstance(number, Tensor) for number in numbers):
        return value
    tangents = [tangent_of(number) for number in numbers]
    if all(t is None for t in tangents):
        return Dual(value)
    parts = [
        torch.zeros_like(value_of(x)) if t is None else t for x, t in zip(numbers, tangents, strict=True)
    ]
    return Dual(value, join(parts, dim))
