"""Residual networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metafast.compat import absent

__getattr__ = absent(__name__)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A padded convolution without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut; He, Zhang, Ren and Sun, 2016.

    Args:
        inplanes: channels before.
        planes: channels after.
        stride: of the first convolution.
        downsample: the shortcut; None: the images themselves.
    """

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return y


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 with BatchNorm beside a shortcut; He, Zhang, Ren and Sun, 2016.

    Args:
        inplanes: channels before.
        planes: channels of the 3x3 convolution, a quarter of those after.
        stride: of the 3x3 convolution.
        downsample: the shortcut; None: the images themselves.
    """

    expansion = 4

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = conv1x1(inplanes, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        y = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return y


class ResNet(nn.Module):
    """A residual network for small images: its first convolution is 3x3, and nothing is pooled after it.

    Args:
        block: :class:`BasicBlock`, :class:`Bottleneck`, or torchvision's of these names.
        layers: how many blocks there are in each of four layers.
        planes: channels of each layer; None: 64, 128, 256 and 512.
        use_fc: give the outputs of a last linear layer.
        num_classes: of that layer, which there is in any case.
        use_pooling: give the mean over the places, ``[n, channels]``, not maps.
        big_kernel: a first convolution of 7x7 and stride 2.
        zero_init_residual: begin with blocks that do nothing (Goyal et al., 2017).
    """

    def __init__(
        self,
        block: Any,
        layers: Sequence[int],
        planes: Sequence[int] | None = None,
        use_fc: bool = False,
        num_classes: int = 1000,
        use_pooling: bool = True,
        big_kernel: bool = False,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        widths = (64, 128, 256, 512) if planes is None else planes
        self.inplanes = 64
        kernel, stride = (7, 2) if big_kernel else (3, 1)
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        for k in range(4):
            layer = self._make_layer(block, widths[k], layers[k], stride=2 if k else 1)
            self.add_module(f"layer{k + 1}", layer)
        self.use_pooling = use_pooling
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.use_fc = use_fc
        self.fc = nn.Linear(self.inplanes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, block):
                    last: Any = getattr(module, "bn3", None) or module.bn2
                    nn.init.constant_(last.weight, 0)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        downsample = None
        after = planes * block.expansion
        if stride != 1 or self.inplanes != after:
            downsample = nn.Sequential(conv1x1(self.inplanes, after, stride), nn.BatchNorm2d(after))
        first = block(self.inplanes, planes, stride, downsample)
        self.inplanes = after
        return nn.Sequential(first, *(block(after, planes) for _ in range(1, blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 3, H, W]`` to ``[n, channels]``, ``[n, channels, h, w]`` or ``[n, num_classes]``.

        Raises:
            ValueError: ``use_fc`` without ``use_pooling``.
        """
        if self.use_fc and not self.use_pooling:
            raise ValueError("use_fc: expected use_pooling with it, got maps")
        x = self.relu(self.bn1(self.conv1(x)))
        for k in range(1, 5):
            x = self.get_submodule(f"layer{k}")(x)
        if not self.use_pooling:
            return x
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x) if self.use_fc else x

    def set_use_fc(self, use_fc: bool) -> None:
        """Give the outputs of the last linear layer, or not."""
        self.use_fc = use_fc
