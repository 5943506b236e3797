"""Networks by their names, and the parts that methods have if nothing else is given."""

from __future__ import annotations

from typing import Any

from torch import nn

from metafast.compat import absent
from metafast.compat.easyfsl.modules.resnet import BasicBlock, Bottleneck, ResNet

__all__ = [
    "default_matching_networks_query_encoder",
    "default_matching_networks_support_encoder",
    "default_relation_module",
    "resnet10",
    "resnet12",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]

__getattr__ = absent(__name__)


def resnet10(**kwargs: Any) -> ResNet:
    """A :class:`ResNet` of 4 blocks of two convolutions; ``kwargs`` are its other arguments."""
    return ResNet(BasicBlock, [1, 1, 1, 1], **kwargs)


def resnet12(**kwargs: Any) -> ResNet:
    """A :class:`ResNet` of 5 blocks of two convolutions, with 640 features; ``kwargs`` are its other arguments."""
    return ResNet(BasicBlock, [1, 1, 2, 1], planes=[64, 160, 320, 640], **kwargs)


def resnet18(**kwargs: Any) -> ResNet:
    """A :class:`ResNet` of 8 blocks of two convolutions; ``kwargs`` are its other arguments."""
    return ResNet(BasicBlock, [2, 2, 2, 2], **kwargs)


def resnet34(**kwargs: Any) -> ResNet:
    """A :class:`ResNet` of 16 blocks of two convolutions; ``kwargs`` are its other arguments."""
    return ResNet(BasicBlock, [3, 4, 6, 3], **kwargs)


def resnet50(**kwargs: Any) -> ResNet:
    """A :class:`ResNet` of 16 blocks of three convolutions; ``kwargs`` are its other arguments."""
    return ResNet(Bottleneck, [3, 4, 6, 3], **kwargs)


def resnet101(**kwargs: Any) -> ResNet:
    """A :class:`ResNet` of 33 blocks of three convolutions; ``kwargs`` are its other arguments."""
    return ResNet(Bottleneck, [3, 4, 23, 3], **kwargs)


def resnet152(**kwargs: Any) -> ResNet:
    """A :class:`ResNet` of 50 blocks of three convolutions; ``kwargs`` are its other arguments."""
    return ResNet(Bottleneck, [3, 8, 36, 3], **kwargs)


def default_matching_networks_support_encoder(feature_dimension: int) -> nn.Module:
    """A bidirectional LSTM: ``[1, n, d]`` to ``[1, n, 2 d]`` and its states."""
    return nn.LSTM(feature_dimension, feature_dimension, batch_first=True, bidirectional=True)


def default_matching_networks_query_encoder(feature_dimension: int) -> nn.Module:
    """An LSTM cell: ``[m, 2 d]`` and a pair of states ``[m, d]`` to such a pair."""
    return nn.LSTMCell(feature_dimension * 2, feature_dimension)


def default_relation_module(feature_dimension: int, inner_channels: int = 8) -> nn.Module:
    """A score between 0 and 1 of stacked maps of any size: ``[pairs, 2 c, h, w] -> [pairs, 1]``.

    Two of [3x3 convolution, BatchNorm, ReLU, max-pooling to 5 x 5 or 1 x 1], and two linear layers. The running
    statistics of BatchNorm are those of the last batch.

    Sung, Yang, Zhang, Xiang, Torr and Hospedales, *Learning to Compare: Relation Network for Few-Shot Learning*, 2018,
    whose pooling is for maps of one size.

    Args:
        feature_dimension: c.
        inner_channels: width between the linear layers.
    """

    def block(inputs: int, padding: int, side: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, feature_dimension, 3, padding=padding),
            nn.BatchNorm2d(feature_dimension, momentum=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d((side, side)),
        )

    return nn.Sequential(
        block(feature_dimension * 2, 1, 5),
        block(feature_dimension, 0, 1),
        nn.Flatten(),
        nn.Linear(feature_dimension, inner_channels),
        nn.ReLU(),
        nn.Linear(inner_channels, 1),
        nn.Sigmoid(),
    )
