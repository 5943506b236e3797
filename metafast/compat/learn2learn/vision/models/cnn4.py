"""The networks of the MAML paper."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from metafast.backbones import call_block
from metafast.compat import absent
from metafast.compat.learn2learn.nn.misc import Flatten, Lambda

__getattr__ = absent(__name__)

Layer = TypeVar("Layer", bound=Any)


def truncated_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Fill with a normal distribution cut off at two standard deviations, drawn from NumPy's global generator."""
    low, high = torch.special.ndtr(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    uniform = torch.from_numpy(np.random.uniform(size=tuple(tensor.shape)))
    with torch.no_grad():
        return tensor.copy_(mean + std * torch.special.ndtri(low + uniform * (high - low)))


def fc_init_(module: Layer) -> Layer:
    """A weight of standard deviation 0.01 (:func:`truncated_normal_`) and a bias of 0; the module is returned."""
    if getattr(module, "weight", None) is not None:
        truncated_normal_(module.weight, std=0.01)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    return module


def maml_init_(module: Layer) -> Layer:
    """Glorot's uniform weight and a bias of 0; the module is returned."""
    nn.init.xavier_uniform_(module.weight)
    nn.init.zeros_(module.bias)
    return module


class LinearBlock(nn.Module):
    """Linear layer, BatchNorm by the statistics of the batch, ReLU."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.normalize = nn.BatchNorm1d(output_size, momentum=0.999, eps=1e-3, track_running_stats=False)
        self.linear = fc_init_(nn.Linear(input_size, output_size))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.normalize(self.linear(x)))
        return y


class ConvBlock(nn.Module):
    """3x3 convolution, BatchNorm, ReLU and max-pooling, or a convolution of as large a stride.

    Pooling by 2 is one operator with what stands before it, as in :class:`metafast.Conv4`.

    Args:
        in_channels: of the images.
        out_channels: of the result.
        kernel_size: of the convolution.
        max_pool: whether to pool.
        max_pool_factor: half of the stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        max_pool: bool = True,
        max_pool_factor: float = 1.0,
    ) -> None:
        super().__init__()
        stride = int(2 * max_pool_factor)
        self.max_pool = nn.MaxPool2d(stride) if max_pool else nn.Identity()
        self.normalize = nn.BatchNorm2d(out_channels)
        nn.init.uniform_(self.normalize.weight)
        self.relu = nn.ReLU()
        self.conv = maml_init_(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride=1 if max_pool else stride, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.max_pool, nn.Identity):
            y: Tensor = self.relu(self.normalize(self.conv(x)))
            return y
        return call_block((self.conv, self.normalize, self.relu, self.max_pool), x)


class ConvBase(nn.Sequential):
    """Several :class:`ConvBlock`, one after the other."""

    def __init__(
        self,
        hidden: int = 64,
        channels: int = 1,
        max_pool: bool = False,
        layers: int = 4,
        max_pool_factor: float = 1.0,
    ) -> None:
        planes = [channels] + [hidden] * layers
        super().__init__(
            *(
                ConvBlock(before, after, (3, 3), max_pool=max_pool, max_pool_factor=max_pool_factor)
                for before, after in pairwise(planes)
            )
        )


class OmniglotFC(nn.Module):
    """The MAML paper's fully connected network for Omniglot.

    Args:
        input_size: numbers of an image, which is flattened.
        output_size: classes.
        sizes: of the hidden layers; None: 256, 128, 64 and 64.
    """

    def __init__(self, input_size: int, output_size: int, sizes: Sequence[int] | None = None) -> None:
        super().__init__()
        widths = [input_size, *((256, 128, 64, 64) if sizes is None else sizes)]
        blocks = [LinearBlock(before, after) for before, after in pairwise(widths)]
        self.features = nn.Sequential(Flatten(), nn.Sequential(*blocks))
        self.classifier = fc_init_(nn.Linear(widths[-1], output_size))
        self.input_size = input_size

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x))
        return y


def _as_images(x: Tensor) -> Tensor:
    return x.reshape(-1, 1, 28, 28)


def _spatial_mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


class OmniglotCNN(nn.Module):
    """The MAML paper's convolutional network for Omniglot, 28 x 28.

    Args:
        output_size: classes.
        hidden_size: channels.
        layers: convolutions.
    """

    def __init__(self, output_size: int = 5, hidden_size: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.base = ConvBase(hidden=hidden_size, channels=1, max_pool=False, layers=layers)
        self.features = nn.Sequential(Lambda(_as_images), self.base, Lambda(_spatial_mean), Flatten())
        self.classifier = nn.Linear(hidden_size, output_size)
        nn.init.normal_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x))
        return y


class CNN4Backbone(ConvBase):
    """The convolutions of :class:`CNN4`, flattened.

    Args:
        hidden_size: channels.
        layers: convolutions.
        channels: of the images.
        max_pool: pool, or convolve with a stride.
        max_pool_factor: half of the stride; None: 4 // layers.
    """

    def __init__(
        self,
        hidden_size: int = 64,
        layers: int = 4,
        channels: int = 3,
        max_pool: bool = True,
        max_pool_factor: float | None = None,
    ) -> None:
        factor = 4 // layers if max_pool_factor is None else max_pool_factor
        super().__init__(hidden_size, channels, max_pool, layers, factor)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y.reshape(y.shape[0], -1)


class CNN4(nn.Module):
    """The MAML paper's convolutional network for mini-ImageNet, 84 x 84.

    Args:
        output_size: classes.
        hidden_size: channels.
        layers: convolutions.
        channels: of the images.
        max_pool: pool, or convolve with a stride.
        embedding_size: features of an image; None: 25 for each channel, those of 84 x 84.
    """

    def __init__(
        self,
        output_size: int,
        hidden_size: int = 64,
        layers: int = 4,
        channels: int = 3,
        max_pool: bool = True,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        features = 25 * hidden_size if embedding_size is None else embedding_size
        self.features = CNN4Backbone(hidden_size, layers, channels, max_pool)
        self.classifier = maml_init_(nn.Linear(features, output_size))
        self.hidden_size = hidden_size

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x))
        return y


MiniImagenetCNN = CNN4
