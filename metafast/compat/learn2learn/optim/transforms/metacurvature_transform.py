"""Meta-Curvature."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MetaCurvatureTransform(nn.Module):
    r"""A gradient times a learnt matrix along each of its dimensions, which begin as the identity.

    A vector times a vector; a matrix :math:`M_{in}\, G\, M_{out}`; the weight of a convolution the same, with a third
    matrix :math:`M_f` along its kernel. Park and Oliva, *Meta-Curvature*, 2019.

    Args:
        param: the parameter.
        lr: factor of the result.

    Raises:
        NotImplementedError: other than 1, 2 or 4 dimensions.
    """

    def __init__(self, param: Tensor, lr: float = 1.0) -> None:
        super().__init__()
        self.lr = lr
        self.dim = param.dim()
        if self.dim not in (1, 2, 4):
            raise NotImplementedError(f"param: expected 1, 2 or 4 dimensions, got shape {list(param.shape)}")
        if self.dim == 1:
            self.mc = nn.Parameter(param.new_ones(param.shape))
            return
        self.mc_in = _identity(param.shape[0], param)
        self.mc_out = _identity(param.shape[1], param)
        if self.dim == 4:
            self.mc_f = _identity(param.shape[2] * param.shape[3], param)

    def forward(self, grad: Tensor) -> Tensor:
        if self.dim == 1:
            return self.lr * (self.mc * grad)
        if self.dim == 2:
            return self.lr * (self.mc_in @ grad @ self.mc_out)
        # [in, out, kernel] -> [kernel, in, out], where both matrices of a layer are one product each.
        maps = (self.mc_in @ grad.flatten(2).permute(2, 0, 1) @ self.mc_out).permute(1, 2, 0)
        return self.lr * (maps @ self.mc_f.t()).reshape(grad.shape)


def _identity(size: int, like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.eye(size, dtype=like.dtype, device=like.device))
