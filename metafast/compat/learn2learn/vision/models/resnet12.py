"""The residual network of TADAM and MetaOptNet."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, max_pool2d, pad

from metafast.compat import absent
from metafast.compat.learn2learn.nn.misc import Flatten

__getattr__ = absent(__name__)

#: Calls over which DropBlock's rate rises to its end.
_RISE = 40_000


class DropBlock(nn.Module):
    """In training, zeros in squares around places at random; what is left is scaled up.

    Ghiasi, Lin and Le, *DropBlock: A regularization method for convolutional networks*, 2018.

    Args:
        block_size: side of a square.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def forward(self, x: Tensor, gamma: float) -> Tensor:
        """``x [n, C, H, W]``; ``gamma``: the chance of a place to be a square's first corner."""
        if not self.training:
            return x
        margin = self.block_size - 1
        *lead, height, width = x.shape
        chance = torch.tensor(gamma).expand(*lead, height - margin, width - margin)
        # Drawn on the CPU, as in the original, for the same stream on every device.
        corners = torch.bernoulli(chance).to(x.device)
        kept = 1 - max_pool2d(pad(corners, (margin,) * 4), self.block_size, stride=1)
        return kept * x * (kept.numel() / kept.sum())


class BasicBlock(nn.Module):
    """Three 3x3 convolutions with BatchNorm beside a shortcut, then max-pooling and dropout.

    Args:
        inplanes: channels before.
        planes: channels after.
        stride: of the pooling.
        downsample: the shortcut; None: the images themselves.
        drop_rate: of the dropout.
        drop_block: :class:`DropBlock`, whose rate rises over 40,000 calls, in place of dropout.
        block_size: of its squares.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        drop_rate: float = 0.0,
        drop_block: bool = False,
        block_size: int = 1,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.LeakyReLU(0.1)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.maxpool = nn.MaxPool2d(stride)
        self.downsample = downsample
        self.stride = stride
        self.drop_rate = drop_rate
        self.num_batches_tracked = 0
        self.drop_block = drop_block
        self.block_size = block_size
        self.DropBlock = DropBlock(block_size)

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked += 1
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x))
        out = self.maxpool(self.relu(out))
        if self.drop_rate > 0 and self.drop_block:
            side = out.shape[2]
            dropped = self.drop_rate * min(self.num_batches_tracked / _RISE, 1.0)
            out = self.DropBlock(
                out, dropped / self.block_size**2 * side**2 / (side - self.block_size + 1) ** 2
            )
        elif self.drop_rate > 0:
            out = dropout(out, self.drop_rate, self.training)
        return out


class ResNet12Backbone(nn.Module):
    """The residual blocks of :class:`ResNet12`, flattened.

    Args:
        avg_pool: mean over squares of 5 x 5, which is all there is of 84 x 84 images.
        wider: 64, 160, 320 and 640 channels, not 64, 128, 256 and 512.
        embedding_dropout: dropout of the features.
        dropblock_dropout: rate of dropout in the first two blocks, and of DropBlock in the others.
        dropblock_size: of its squares.
        channels: of the images.
    """

    def __init__(
        self,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        planes = [channels, *((64, 160, 320, 640) if wider else (64, 128, 256, 512))]
        for k, (before, after) in enumerate(pairwise(planes), start=1):
            shortcut = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after))
            block = BasicBlock(
                before, after, 2, shortcut, dropblock_dropout, k > 2, dropblock_size if k > 2 else 1
            )
            self.add_module(f"layer{k}", nn.Sequential(block))
        self.avgpool = nn.AvgPool2d(5, stride=1) if avg_pool else nn.Identity()
        self.flatten = Flatten()
        self.embedding_dropout = embedding_dropout
        self.keep_avg_pool = avg_pool
        self.dropout = nn.Dropout(embedding_dropout)
        self.dropblock_dropout = dropblock_dropout
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        for k in range(1, 5):
            x = self._modules[f"layer{k}"](x)  # type: ignore[misc]
        y: Tensor = self.dropout(self.flatten(self.avgpool(x)))
        return y


class ResNet12(nn.Module):
    """Four residual blocks and a linear layer; Oreshkin et al., 2018, in the form of Lee et al., 2019.

    Args:
        output_size: classes.
        hidden_size: features of an image: 640 of 84 x 84 with ``avg_pool`` and ``wider``.
        avg_pool, wider, embedding_dropout, dropblock_dropout, dropblock_size, channels: see :class:`ResNet12Backbone`.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 640,
        avg_pool: bool = True,
        wider: bool = True,
        embedding_dropout: float = 0.0,
        dropblock_dropout: float = 0.1,
        dropblock_size: int = 5,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.features = ResNet12Backbone(
            avg_pool, wider, embedding_dropout, dropblock_dropout, dropblock_size, channels
        )
        self.classifier = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x))
        return y
