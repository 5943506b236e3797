"""Convolutional blocks and a training step of Conv4, in plain PyTorch and in metafast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast import Conv4, conv_norm_relu_pool, norm_relu_pool

#: Parameters of a block: weight and bias of the convolution, and of BatchNorm.
OF_BLOCK = 4


@dataclass(frozen=True)
class MapSizes:
    """Maps ``[images, channels, size, size]``."""

    images: int = 360
    channels: int = 64
    size: int = 28


def maps(sizes: MapSizes) -> tuple[tuple[Tensor, ...], Tensor]:
    """Maps with weight and bias of BatchNorm, and the gradient that comes in.

    Pixels lie on a grid: of equal ones every implementation takes the first, and none are nearly equal.
    """
    g = torch.Generator().manual_seed(7)
    x = (torch.randn(sizes.images, sizes.channels, sizes.size, sizes.size, generator=g) * 16).round() / 16
    weight, bias = torch.rand(sizes.channels, generator=g) + 0.5, torch.randn(sizes.channels, generator=g)
    half = sizes.size // 2
    upstream = torch.randn(sizes.images, sizes.channels, half, half, generator=g)
    return tuple(t.requires_grad_() for t in (x, weight, bias)), upstream


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.batch_norm(x, None, None, weight, bias, True)), 2)


def fused_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return norm_relu_pool(x, weight, bias)[0]


def images_and_block(sizes: MapSizes) -> tuple[tuple[Tensor, ...], Tensor]:
    """Images of one channel, the parameters of a first block, and the gradient that comes in."""
    g = torch.Generator().manual_seed(8)
    x = torch.rand(sizes.images, 1, sizes.size, sizes.size, generator=g)
    parameters = [torch.randn(sizes.channels, 1, 3, 3, generator=g) / 3]
    parameters += [torch.randn(sizes.channels, generator=g) for _ in range(3)]
    half = sizes.size // 2
    upstream = torch.randn(sizes.images, sizes.channels, half, half, generator=g)
    return (x, *(p.requires_grad_() for p in parameters)), upstream


def plain_block(x: Tensor, kernel: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return plain_norm(F.conv2d(x, kernel, shift, padding=1), weight, bias)


def fused_block(x: Tensor, kernel: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return conv_norm_relu_pool(x, kernel, shift, weight, bias)[0]


def images_and_encoder(sizes: MapSizes) -> tuple[tuple[Tensor, ...], Tensor]:
    """Images of one channel, the parameters of a Conv4, and the gradient of its features."""
    g = torch.Generator().manual_seed(9)
    torch.manual_seed(9)
    encoder = Conv4(1, sizes.channels)
    images = torch.rand(sizes.images, 1, sizes.size, sizes.size, generator=g)
    parameters = tuple(p.detach().requires_grad_() for p in encoder.parameters())
    return (images, *parameters), torch.randn(sizes.images, encoder.features(sizes.size), generator=g)


def plain_encoder(images: Tensor, *parameters: Tensor) -> Tensor:
    for k in range(0, len(parameters), OF_BLOCK):
        images = plain_block(images, *parameters[k : k + OF_BLOCK])
    return images.flatten(1)


@functools.cache
def _encoder(channels: int) -> Conv4:
    return Conv4(1, channels)


def fused_encoder(images: Tensor, *parameters: Tensor) -> Tensor:
    encoder = _encoder(parameters[0].shape[0])
    named = dict(zip((name for name, _ in encoder.named_parameters()), parameters, strict=True))
    features: Tensor = torch.func.functional_call(encoder, named, (images,))
    return features


def of_no_shift(results: Sequence[Tensor]) -> list[Tensor]:
    """Without the gradients of the convolutions' biases, which are 0 but for roundings."""
    first, *gradients = results
    return [first, *(g for k, g in enumerate(gradients) if k % OF_BLOCK != 1)]


def training_step(
    precision: torch.dtype, channels_last: bool
) -> Callable[[Callable[..., Tensor], Any], Callable[[], list[Tensor]]]:
    """Forward, backward and a step of Adam on parameters of its own; gives features and gradients."""

    def prepare(function: Callable[..., Tensor], inputs: Any) -> Callable[[], list[Tensor]]:
        images, *given = (t.detach().clone() for t in inputs.arguments)
        if channels_last:
            images, *given = (
                t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
                for t in (images, *given)
            )
        parameters = [nn.Parameter(p) for p in given]
        optimizer = torch.optim.Adam(parameters, lr=1e-3)

        def call() -> list[Tensor]:
            with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
                features = function(images, *parameters)
            gradients = torch.autograd.grad((features.float() * inputs.upstream).sum(), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            return of_no_shift([features.detach().float(), *gradients])

        return call

    return prepare
