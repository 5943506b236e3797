"""The wide residual network WRN-28-10."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from metafast.compat import absent

__getattr__ = absent(__name__)


class WideBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution twice, beside a shortcut.

    Args:
        in_planes: channels before.
        planes: channels after.
        dropout_rate: between the convolutions.
        stride: of the second one.
    """

    def __init__(self, in_planes: int, planes: int, dropout_rate: float, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, padding=1)
        self.dropout = nn.Dropout(dropout_rate)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut.append(nn.Conv2d(in_planes, planes, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.conv1(relu(self.bn1(x))))
        y: Tensor = self.conv2(relu(self.bn2(out))) + self.shortcut(x)
        return y


class WideResNet(nn.Module):
    """A wide residual network for 84 x 84 images, up to its features; Zagoruyko and Komodakis, 2016.

    Args:
        depth: 4 more than a multiple of 6.
        widen_factor: of the channels.
        dropout_rate: between the convolutions of a block.

    Raises:
        ValueError: another depth.
    """

    def __init__(self, depth: int, widen_factor: int, dropout_rate: float) -> None:
        super().__init__()
        if depth % 6 != 4:
            raise ValueError(f"depth: expected 4 more than a multiple of 6, got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        before = 16
        for k, stride in enumerate((1, 2, 2)):
            planes = 16 * 2**k * widen_factor
            layer = nn.Sequential()
            for j in range((depth - 4) // 6):
                layer.append(WideBlock(before, planes, dropout_rate, stride if j == 0 else 1))
                before = planes
            self.add_module(f"layer{k + 1}", layer)
        self.bn1 = nn.BatchNorm2d(before, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        for k in range(1, 4):
            out = self._modules[f"layer{k}"](out)  # type: ignore[misc]
        return avg_pool2d(relu(self.bn1(out)), 21).flatten(1)


class WRN28Backbone(WideResNet):
    """The features of :class:`WRN28`."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(depth=28, widen_factor=10, dropout_rate=dropout)


class WRN28(nn.Module):
    """WRN-28-10 and a linear layer.

    Args:
        output_size: classes.
        hidden_size: features of an image, 640 of 84 x 84.
        dropout: between the convolutions of a block.
    """

    def __init__(self, output_size: int, hidden_size: int = 640, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = WRN28Backbone(dropout)
        self.classifier = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x))
        return y
