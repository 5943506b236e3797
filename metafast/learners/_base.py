"""What learners share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metafast.data import Episodes
from metafast.learners.outcome import Outcome


class EncoderLearner(nn.Module):
    """A learner that compares or classifies the features of an encoder ``[n, ...] -> [n, d]``."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def embed(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Features ``(support [T, n, d], query [T, m, d])`` from one call of the encoder."""
        support_x, query_x = episodes.support_x, episodes.query_x
        tasks, rows = support_x.shape[0], support_x.shape[1] + query_x.shape[1]
        images = torch.cat([support_x, query_x], dim=1).flatten(0, 1)
        features: Tensor = self.encoder(images)
        if features.dim() != 2 or features.shape[0] != tasks * rows:
            raise ValueError(f"encoder: expected features [{tasks * rows}, d], got {list(features.shape)}")
        if features.dtype in (torch.float16, torch.bfloat16):
            features = features.float()
        support, query = features.reshape(tasks, rows, features.shape[1]).split(
            [support_x.shape[1], query_x.shape[1]], dim=1
        )
        return support, query


def classified(logits: Tensor, labels: Tensor) -> Outcome:
    """The outcome of ``logits [T, m, C]`` for ``labels [T, m]``: their mean cross-entropy."""
    return Outcome(cross_entropy(logits.flatten(0, 1), labels.flatten()), logits)


def require_classes(episodes: Episodes) -> None:
    if episodes.regression:
        raise ValueError("episodes: expected classes, got regression tasks")


def require_ways(episodes: Episodes, ways: int) -> None:
    """A head has one output for each class of an episode."""
    require_classes(episodes)
    if episodes.ways != ways:
        raise ValueError(f"episodes: expected {ways} ways, the outputs of the head, got {episodes.ways}")


def require_positive(value: float, name: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a positive finite number, got {value}")


def require_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
