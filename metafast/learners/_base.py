"""What learners share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metafast.data import Episodes
from metafast.learners.outcome import Outcome


class EncoderLearner(nn.Module):
    """A learner that compares or classifies the features of an encoder ``[n, ...] -> [n, d]``.

    With ``episode_statistics`` the encoder gets ``[T, n, ...]`` and gives ``[T, n, d]``, as :class:`metafast.Conv4`
    does: BatchNorm layers that normalise by statistics of the batch take those of each episode then.
    """

    def __init__(self, encoder: nn.Module, episode_statistics: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.episode_statistics = episode_statistics

    def embed(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Features ``(support [T, n, d], query [T, m, d])`` from one call of the encoder."""
        support_x, query_x = episodes.support_x, episodes.query_x
        tasks, rows = support_x.shape[0], support_x.shape[1] + query_x.shape[1]
        images = torch.cat([support_x, query_x], dim=1)
        lead = (tasks, rows) if self.episode_statistics else (tasks * rows,)
        features: Tensor = self.encoder(images if self.episode_statistics else images.flatten(0, 1))
        if features.shape[:-1] != lead:
            wanted = ", ".join(map(str, lead))
            raise ValueError(f"encoder: expected features [{wanted}, d], got {list(features.shape)}")
        if features.dtype in (torch.float16, torch.bfloat16):
            features = features.float()
        support, query = features.reshape(tasks, rows, features.shape[-1]).split(
            [support_x.shape[1], query_x.shape[1]], dim=1
        )
        return support, query


class PretrainedLearner(EncoderLearner):
    """A learner whose encoder is trained to classify the base classes, all at once.

    A batch without support rows (:class:`metafast.data.RowSampler`) is of base classes, and ``head`` gives its logits;
    any other is of episodes, for :meth:`classify`.
    """

    def __init__(
        self, encoder: nn.Module, features: int, head: nn.Module | None, base_classes: int | None
    ) -> None:
        super().__init__(encoder)
        self.features = features
        self.head = head
        self.base_classes = base_classes

    def embed(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        support, query = super().embed(episodes)
        if query.shape[-1] != self.features:
            raise ValueError(f"encoder: expected {self.features} features, got {query.shape[-1]}")
        return support, query

    def forward(self, episodes: Episodes) -> Outcome:
        require_classes(episodes)
        if episodes.support_x.shape[1]:
            return self.classify(episodes)
        if self.head is None:
            raise ValueError(
                "episodes: expected support rows, for there is no head of base classes, got none"
            )
        if episodes.ways != self.base_classes:
            raise ValueError(
                f"episodes: expected the {self.base_classes} base classes of the head, got {episodes.ways}"
            )
        _, rows = self.embed(episodes)
        with torch.autocast(rows.device.type, enabled=False):
            return classified(self.head(rows), episodes.query_y)

    def classify(self, episodes: Episodes) -> Outcome:
        """The outcome on episodes with support rows."""
        raise NotImplementedError


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
