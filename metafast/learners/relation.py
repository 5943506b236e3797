"""Relation networks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, mse_loss, one_hot

from metafast import _check
from metafast.backbones import Block, call_block
from metafast.data import Episodes
from metafast.learners._base import classified, require_classes
from metafast.learners.outcome import Outcome

LOSSES = ("mse", "cross_entropy")


def _initialise(module: nn.Module) -> None:
    """Normal weights, of convolutions by He's rule for their outputs, as the source's code has them."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=math.sqrt(2 / (module.weight[0, 0].numel() * module.out_channels)))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.ones_(module.bias)


class RelationEncoder(nn.Sequential):
    """The encoder of relation networks, whose features are maps: ``[n, in_channels, H, W] -> [n, channels, h, w]``.

    Four of [3x3 convolution, BatchNorm, ReLU]: two without padding, each followed by a 2x2 max-pool, then two with.
    28 x 28 images become 5 x 5 maps, 84 x 84 ones 19 x 19.

    Args:
        in_channels: channels of the images.
        channels: of the maps.

    Raises:
        TypeError, ValueError: sizes that are no positive ints.
    """

    def __init__(self, in_channels: int = 1, channels: int = 64) -> None:
        _check.sizes(in_channels=in_channels, channels=channels)
        super().__init__(
            Block(in_channels, channels, padding=0),
            Block(channels, channels, padding=0),
            Block(channels, channels, pool=False),
            Block(channels, channels, pool=False),
        )
        self.channels = channels
        self.apply(_initialise)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @staticmethod
    def side(size: int) -> int:
        """Height of the maps of images of ``size x size``.

        Raises:
            ValueError: images smaller than 22 x 22, whose maps are too small for :class:`RelationHead`.
        """
        if size < 22:
            raise ValueError(f"images: expected at least 22 x 22, got {size} x {size}")
        return ((size - 2) // 2 - 2) // 2


class RelationHead(nn.Module):
    """How much two maps have to do with each other: ``([.., c, h, w], [.., c, h, w]) -> [..]``, before a sigmoid.

    Two of [3x3 convolution, BatchNorm, ReLU, 2x2 max-pool] over the channels of both, then two linear layers with a
    ReLU between. The convolutions are padded where the maps are too small for ones that are not, as Omniglot's are.

    Args:
        side: h = w.
        channels: c, and those of the convolutions.
        hidden: width of the first linear layer.

    Raises:
        TypeError, ValueError: sizes that are no positive ints; maps smaller than 4 x 4.
    """

    def __init__(self, side: int, channels: int = 64, hidden: int = 8) -> None:
        super().__init__()
        _check.sizes(side=side, channels=channels, hidden=hidden)
        if side < 4:
            raise ValueError(f"side: expected at least 4, got {side}")
        padding = 0 if ((side - 2) // 2 - 2) // 2 >= 1 else 1
        for _ in range(2):
            side = (side - 2 + 2 * padding) // 2
        self.convolution = nn.Conv2d(2 * channels, channels, 3, padding=padding)
        self.first = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2))
        self.second = Block(channels, channels, padding)
        self.score = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * side**2, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        self.apply(_initialise)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, classes: Tensor, queries: Tensor) -> Tensor:
        """Of all pairs of a task: ``classes [T, C, c, h, w]``, ``queries [T, m, c, h, w]`` ``-> [T, m, C]``."""
        # The convolution of two stacked maps is the sum of each one's: C + m of them in place of C m.
        of_class, of_query = self.convolution.weight.chunk(2, dim=1)
        padding: Any = self.convolution.padding
        left = conv2d(classes.flatten(0, 1), of_class, self.convolution.bias, padding=padding)
        right = conv2d(queries.flatten(0, 1), of_query, padding=padding)
        pairs = right.unflatten(0, queries.shape[:2]).unsqueeze(2) + left.unflatten(
            0, classes.shape[:2]
        ).unsqueeze(1)
        maps = call_block((nn.Identity(), *self.first), pairs.flatten(0, 2))
        scores: Tensor = self.score(self.second(maps))
        return scores.view(pairs.shape[:3])


class RelationNet(nn.Module):
    r"""Relation network: a learnt measure of how much a query has to do with each class.

    With maps f of the encoder and the head h, :math:`logits_k = h(\sum_{i: y_i = k} f(x_i), f(x))`, and the loss is the
    mean over queries and classes of :math:`(\sigma(logits_k) - [y = k])^2`, or the cross-entropy.

    All images go through the encoder in one call (see :class:`ProtoNet` for what that means for BatchNorm), and all
    pairs of all tasks through the head. Both run under autocast if it is on. Ways and shots may differ from call to
    call.

    Source: Sung, Yang, Zhang, Xiang, Torr, Hospedales, "Learning to Compare: Relation Network for Few-Shot Learning"
    (2018); ``"cross_entropy"``: Chen et al., "A Closer Look at Few-shot Classification" (2019).

    Args:
        encoder: ``[n, ...] -> [n, c, h, w]``, such as :class:`RelationEncoder`.
        head: such as :class:`RelationHead`.
        loss: ``"mse"`` or ``"cross_entropy"``.

    Raises:
        TypeError: an encoder or a head that is no module.
        ValueError: an unknown loss; in the call, regression tasks, and features that are no maps.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, loss: str = "mse") -> None:
        super().__init__()
        for name, module in (("encoder", encoder), ("head", head)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected a torch.nn.Module, got {type(module).__name__}")
        _check.choice(loss, "loss", LOSSES)
        self.encoder = encoder
        self.head = head
        self.loss = loss

    def forward(self, episodes: Episodes) -> Outcome:
        require_classes(episodes)
        images = torch.cat([episodes.support_x, episodes.query_x], dim=1)
        tasks, rows = images.shape[:2]
        maps: Tensor = self.encoder(images.flatten(0, 1))
        if maps.dim() != 4 or maps.shape[0] != tasks * rows:
            raise ValueError(f"encoder: expected maps [{tasks * rows}, c, h, w], got {list(maps.shape)}")
        support, query = maps.unflatten(0, (tasks, rows)).split(
            [episodes.support_x.shape[1], episodes.query_x.shape[1]], dim=1
        )
        members = one_hot(episodes.support_y, episodes.ways).to(support.dtype)
        classes = (members.mT @ support.flatten(2)).unflatten(2, support.shape[2:])
        logits = self.head(classes, query)
        with torch.autocast(images.device.type, enabled=False):
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            if self.loss == "cross_entropy":
                return classified(logits, episodes.query_y)
            targets = one_hot(episodes.query_y, episodes.ways).to(logits.dtype)
            return Outcome(mse_loss(logits.sigmoid(), targets), logits)

    def extra_repr(self) -> str:
        return f"loss={self.loss!r}"
