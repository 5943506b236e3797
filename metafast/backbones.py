"""Encoders: networks that turn images into feature vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules.batchnorm import _BatchNorm

from metafast.norm_relu_pool import norm_relu_pool


class _Block(nn.Sequential):
    """3x3 convolution, BatchNorm, ReLU, 2x2 max-pool: the last three in one operator where they are just these."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )

    def forward(self, images: Tensor) -> Tensor:
        convolution, norm, relu, pool = self
        maps = convolution(images)
        # Another layer in its place, or another forward as in training on several ranks; nothing to take statistics of.
        if type(norm) is not nn.BatchNorm2d or "forward" in vars(norm) or maps.shape[0] == 0:
            return pool(relu(norm(maps)))
        updates = norm.training and norm.track_running_stats and norm.running_mean is not None
        # Under a transform of torch.func only torch's own operator may change what it has not been given.
        if updates and peek_interpreter_stack() is not None:
            return pool(relu(norm(maps)))
        given = (None, None) if norm.training else (norm.running_mean, norm.running_var)
        y, mean, var = norm_relu_pool(maps, norm.weight, norm.bias, *given, eps=norm.eps)
        if updates:
            count = maps.numel() // maps.shape[1]
            update_running_statistics(norm, mean.detach(), var.detach() * (count / max(count - 1, 1)))
        return y


@torch.no_grad()
def update_running_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """As BatchNorm does in training mode, with the mean and the unbiased variance of a batch."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = 1 / float(norm.num_batches_tracked or 1) if norm.momentum is None else norm.momentum
    for running, value in ((norm.running_mean, mean), (norm.running_var, variance)):
        if running is not None:
            running.lerp_(value.to(running.dtype), momentum)


class Conv4(nn.Module):
    """Four of [3x3 convolution, BatchNorm, ReLU, 2x2 max-pool], flattened: the backbone of few-shot learning.

    ``images [n, in_channels, H, W] -> features [n, channels * (H // 16) * (W // 16)]``: with the usual 64
    channels 64 features for 28 x 28 images and 1,600 for 84 x 84. Parameters are named as in the common
    reference code (``encoder.0.0.weight`` is the first convolution, ``encoder.0.1.weight`` its BatchNorm).

    BatchNorm, ReLU and pooling are one operator (:func:`metafast.norm_relu_pool`), so that forward hooks on these
    layers are not called. The weights lie in channels-last order in memory, and so do the maps between the layers.
    Images may come in either order.

    Sources: Vinyals et al., "Matching Networks for One Shot Learning" (2016); Snell et al., "Prototypical
    Networks for Few-shot Learning" (2017).

    Args:
        in_channels: channels of the images, 1 for grey and 3 for colour.
        channels: channels of every convolution, 64 in the papers above.

    Raises:
        ValueError: ``in_channels`` or ``channels`` below 1; images of another rank or number of channels, or
            smaller than 16 x 16.
        TypeError: sizes that are no ints; images that are not floating point.
    """

    def __init__(self, in_channels: int = 1, channels: int = 64) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("channels", channels)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.in_channels = in_channels
        self.channels = channels
        self.encoder = nn.Sequential(
            _Block(in_channels, channels),
            _Block(channels, channels),
            _Block(channels, channels),
            _Block(channels, channels),
        )
        # Channels-last maps make a training step on the CPU a third faster and suit half precision on CUDA.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, height: int, width: int | None = None) -> int:
        """Number of features of an image of ``height x width`` (square if ``width`` is None)."""
        width = height if width is None else width
        if height < 16 or width < 16:
            raise ValueError(f"images: expected at least 16 x 16, got {height} x {width}")
        return self.channels * (height // 16) * (width // 16)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images: expected [n, {self.in_channels}, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images: expected a floating point tensor, got {images.dtype}")
        self.features(images.shape[2], images.shape[3])
        features: Tensor = self.encoder(images)
        return features.flatten(1)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, channels={self.channels}"
