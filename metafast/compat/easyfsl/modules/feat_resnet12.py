"""FEAT's residual network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat.learn2learn.vision.models.resnet12 import BasicBlock

__getattr__ = absent(__name__)


class FEATBasicBlock(BasicBlock):
    """Three 3x3 convolutions with BatchNorm beside a shortcut, LeakyReLU, max-pooling.

    Args:
        inplanes: channels before.
        planes: channels after.
        stride: of the pooling.
        downsample: the shortcut; None: the images themselves.
    """

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__(inplanes, planes, stride, downsample)


class FEATResNet12(nn.Module):
    """Four blocks of 64, 160, 320 and 640 channels, and the mean over the places: ``[n, 3, H, W] -> [n, 640]``.

    Args:
        block: called with the channels before and after, the stride and the shortcut.
    """

    def __init__(self, block: Any = FEATBasicBlock) -> None:
        super().__init__()
        self.inplanes = 3
        planes = (64, 160, 320, 640)
        self.layer_dims = [width * block.expansion for width in planes for _ in range(4)]
        for k, width in enumerate(planes, start=1):
            after = width * block.expansion
            shortcut = nn.Sequential(nn.Conv2d(self.inplanes, after, 1, bias=False), nn.BatchNorm2d(after))
            self.add_module(f"layer{k}", nn.Sequential(block(self.inplanes, width, 2, shortcut)))
            self.inplanes = after
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        for k in range(1, 5):
            x = self.get_submodule(f"layer{k}")(x)
        return x.mean((-2, -1))


def feat_resnet12(**kwargs: Any) -> FEATResNet12:
    """The residual network of Ye et al., 2020: 12 convolutions in four blocks, pooled from the first on.

    Args:
        **kwargs: of :class:`FEATResNet12`.
    """
    return FEATResNet12(FEATBasicBlock, **kwargs)
