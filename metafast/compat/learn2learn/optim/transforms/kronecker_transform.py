"""Kronecker factors as a transform of gradients."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from metafast.compat.learn2learn.optim.transforms.module_transform import ReshapedTransform


def get_kronecker_dims(param: Tensor) -> tuple[int, int]:
    """The factors' sizes: of a matrix its own, of a vector n and 1, of a convolution's weight inputs and kernel.

    Raises:
        NotImplementedError: another number of dimensions.
    """
    shape = param.shape
    if len(shape) == 1:
        return shape[0], 1
    if len(shape) == 2:
        return shape[0], shape[1]
    if len(shape) == 4:
        return shape[1], shape[2] * shape[3]
    raise NotImplementedError(f"param: expected 1, 2 or 4 dimensions, got shape {list(shape)}")


class KroneckerTransform:
    """A transform for each parameter: the gradient as matrices ``[-1, n, m]`` through two Kronecker factors.

    Args:
        kronecker_cls: makes the module of ``n``, ``m``, ``bias`` and ``psd``, such as ``nn.KroneckerLinear``.
        bias: whether it has one.
        psd: whether its factors are positive semi-definite.
    """

    def __init__(self, kronecker_cls: Callable[..., nn.Module], bias: bool = False, psd: bool = True) -> None:
        self.kronecker_cls = kronecker_cls
        self.bias = bias
        self.psd = psd

    def __call__(self, param: Tensor) -> ReshapedTransform:
        n, m = get_kronecker_dims(param)
        return ReshapedTransform(self.kronecker_cls(n=n, m=m, bias=self.bias, psd=self.psd), (-1, n, m))
