"""Encoders: networks that turn images into feature vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules.batchnorm import _BatchNorm

from metafast import _check
from metafast.conv_block import conv_norm_relu_pool
from metafast.mlp import ACTIVATIONS
from metafast.norm_relu_pool import norm_relu_pool

#: What is done with a layer's batch statistics, mean and unbiased variance.
Update = Callable[[_BatchNorm, Tensor, Tensor], None]


class Block(nn.Sequential):
    """3x3 convolution, BatchNorm, ReLU, 2x2 max-pool: in one operator, or those after the convolution.

    ``pool=False`` leaves the last out.
    """

    def __init__(self, in_channels: int, channels: int, padding: int = 1, pool: bool = True) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel_size=3, padding=padding),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            *([nn.MaxPool2d(2)] if pool else ()),
        )

    def forward(self, images: Tensor) -> Tensor:
        return call_block(self, images)


def call_block(block: Iterable[nn.Module], images: Tensor, update: Update | None = None) -> Tensor:
    """``[..., n, planes, H, W] -> [..., n, C, H // 2, W // 2]``; what stands before n has statistics of its own.

    ``block``: convolution (or any module), BatchNorm, ReLU and, maybe, max-pooling.

    ``update``: gets the layer, mean and unbiased variance in place of :func:`update_running_statistics`.
    """
    convolution, norm, relu, *pool = block
    lead, own = images.shape[:-4], images.flatten(0, -4)
    batch = isinstance(norm, _BatchNorm) and (norm.training or norm.running_mean is None)
    # Another forward of BatchNorm is that of training on several ranks, which know nothing of tasks.
    fits = all(map(_is_plain, (norm, relu, *pool))) and (lead or "forward" not in vars(norm))
    if isinstance(norm, nn.BatchNorm2d) and fits and own.shape[0] > 0:
        updates = norm.training and norm.track_running_stats and norm.running_mean is not None
        # Under a transform of torch.func only torch's own operator may change what it has not been given.
        if not updates or update is not None or peek_interpreter_stack() is None:
            chosen = (update or update_running_statistics) if updates else None
            return _fused(convolution, norm, images, bool(pool), bool(batch), chosen)
    if lead and batch:
        raise ValueError(
            f"images: expected [n, planes, H, W] for {norm} as it is used here, got {list(images.shape)}"
        )
    y: Tensor = relu(norm(convolution(own)))
    for layer in pool:
        y = layer(y)
    return y.reshape(*images.shape[:-3], *y.shape[1:])


def _fused(
    convolution: nn.Module,
    norm: nn.BatchNorm2d,
    images: Tensor,
    pool: bool,
    batch: bool,
    update: Update | None,
) -> Tensor:
    given = (None, None) if batch else (norm.running_mean, norm.running_var)
    if pool and _is_cheap(convolution, images) and norm.affine:
        maps = images
        y, mean, var = conv_norm_relu_pool(
            images, convolution.weight, convolution.bias, norm.weight, norm.bias, *given, eps=norm.eps
        )
    else:
        maps = convolution(images.flatten(0, -4))
        maps = maps.reshape(*images.shape[:-3], *maps.shape[1:])
        y, mean, var = norm_relu_pool(maps, norm.weight, norm.bias, *given, eps=norm.eps, pool=pool)
    if update is not None:
        count = maps.shape[-4] * maps.shape[-2] * maps.shape[-1]
        unbiased = var.detach() * (count / max(count - 1, 1))
        update(norm, *(value.reshape(-1, value.shape[-1]).mean(0) for value in (mean.detach(), unbiased)))
    return y


def is_block(layers: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a plain chain of layers computes what :class:`Block` does."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
    return (
        type(layers) is nn.Sequential
        and not is_hooked(layers)
        and tuple(map(type, layers.children())) == kinds
        and all(map(_is_plain, list(layers.children())[1:]))
    )


#: What the fused operators compute: layers of these types with these attributes.
_PLAIN: dict[type[nn.Module], dict[str, Any]] = {
    nn.Conv2d: {
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "padding_mode": "zeros",
    },
    nn.BatchNorm2d: {},
    nn.ReLU: {},
    nn.MaxPool2d: {
        "kernel_size": 2,
        "stride": 2,
        "padding": 0,
        "dilation": 1,
        "return_indices": False,
        "ceil_mode": False,
    },
}


def is_hooked(layer: nn.Module) -> bool:
    """Whether somebody wants to see the layer's calls, or to change them: by hooks, or a ``forward`` of its own."""
    return "forward" in vars(layer) or any(
        getattr(layer, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
    )


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes what the fused operators do and nobody looks: another may stand in its place."""
    constants = _PLAIN.get(type(layer))
    return (
        constants is not None
        and not is_hooked(layer)
        and all(getattr(layer, name) == value for name, value in constants.items())
    )


def _is_cheap(convolution: nn.Module, images: Tensor) -> TypeGuard[nn.Conv2d]:
    """Whether the convolution costs less to compute again than its output to store, and is torch's own."""
    return (
        isinstance(convolution, nn.Conv2d)
        and _is_plain(convolution)
        and "forward" not in vars(convolution)
        and convolution.in_channels <= 4
        and not images.requires_grad
        and (images.dtype == convolution.weight.dtype or _check.autocasts(images))
    )


@torch.no_grad()
def update_running_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """As BatchNorm does in training mode, with the mean and the unbiased variance of a batch."""
    running = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    move_running_statistics(running, norm.momentum, mean, variance)


@torch.no_grad()
def move_running_statistics(
    running: Sequence[Tensor | None], momentum: float | None, mean: Tensor, variance: Tensor
) -> None:
    """Of ``(running mean, running variance, number of batches)`` in place."""
    *moved, tracked = running
    if tracked is not None:
        tracked.add_(1)
    if momentum is None:
        momentum = 1.0 if tracked is None else 1 / float(tracked)
    for old, value in zip(moved, (mean, variance), strict=True):
        if old is not None:
            old.lerp_(value.to(old.dtype), momentum)


class MLP(nn.Sequential):
    r"""A multilayer perceptron: rows are flattened, linear layers follow, an activation after each but the last.

    Args:
        widths: inputs, hidden layers and outputs, such as ``(1, 40, 40, 1)``.
        activation: ``"relu"`` or ``"tanh"``.
        batch_norm: put a BatchNorm layer before each activation, as the MAML paper's Omniglot network has.
        init_std: standard deviation of the initial weights, a normal distribution cut off at two of them. None: He's
            :math:`\sqrt{2 / in}`. Biases begin at 0. (The MAML paper's code has 0.01 for all its MLPs, from which
            sinusoids train several times as long.)

    Raises:
        TypeError: widths that are no ints.
        ValueError: fewer than two widths, numbers out of range, an unknown activation.
    """

    def __init__(
        self,
        widths: Sequence[int],
        activation: str = "relu",
        *,
        batch_norm: bool = False,
        init_std: float | None = None,
    ) -> None:
        if len(widths) < 2:
            raise ValueError(f"widths: expected those of the inputs and of each layer, got {list(widths)}")
        _check.sizes(**{f"widths[{k}]": width for k, width in enumerate(widths)})
        _check.choice(activation, "activation", ACTIVATIONS)
        if init_std is not None:
            _check.positive(init_std, "init_std")
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            linear = nn.Linear(inputs, outputs)
            std = math.sqrt(2 / inputs) if init_std is None else init_std
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(linear.bias)
            layers += [linear, *([nn.BatchNorm1d(outputs)] if batch_norm else ())]
            layers.append(nn.ReLU() if activation == "relu" else nn.Tanh())
        super().__init__(*layers[: -2 if batch_norm else -1])


class Conv4(nn.Module):
    """Four of [3x3 convolution, BatchNorm, ReLU, 2x2 max-pool], flattened: the backbone of few-shot learning.

    ``images [n, in_channels, H, W] -> features [n, channels * (H // 16) * (W // 16)]``: with the usual 64
    channels 64 features for 28 x 28 images and 1,600 for 84 x 84. Parameters are named as in the common
    reference code (``encoder.0.0.weight`` is the first convolution, ``encoder.0.1.weight`` its BatchNorm).

    Leading dimensions before n are tasks: ``[T, n, in_channels, H, W] -> [T, n, features]``. BatchNorm layers that
    normalise by statistics of the batch take those of each task's n images then, and their running statistics
    follow the mean over the tasks.

    BatchNorm, ReLU and pooling are one operator (:func:`metafast.norm_relu_pool`), and the first block is one with
    its convolution (:func:`metafast.conv_norm_relu_pool`). Where a layer has hooks, or another stands in its place,
    the layers are called one by one. The weights lie in channels-last order in memory, and so do the maps between the
    layers. Images may come in either order.

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
            Block(in_channels, channels),
            Block(channels, channels),
            Block(channels, channels),
            Block(channels, channels),
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
        if images.dim() < 4 or images.shape[-3] != self.in_channels:
            raise ValueError(f"images: expected [..., n, {self.in_channels}, H, W], got {list(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"images: expected a floating point tensor, got {images.dtype}")
        self.features(images.shape[-2], images.shape[-1])
        features: Tensor = self.encoder(images)
        return features.flatten(-3)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, channels={self.channels}"
