"""Prototypical networks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.data import Episodes
from metafast.learners._base import EncoderLearner
from metafast.learners.outcome import Outcome
from metafast.prototype import prototypical_loss

METRICS = ("sqeuclidean", "euclidean", "cityblock", "cosine")


class ProtoNet(EncoderLearner):
    """Prototypical network: the class of the nearest mean of embedded support images.

    With the encoder ``f`` and the prototypes ``c_k = mean of f(x) over the support images of class k``,

    ``logits[t, i, k] = -temperature * distance(f(query_i), c_k)``, ``loss = mean cross-entropy``.

    Support and query images of all tasks go through the encoder in one call of ``T * (n + m)`` images. So
    BatchNorm layers of the encoder normalise by the statistics of that whole batch in training mode, and by
    the running statistics in evaluation mode (:func:`metafast.training.evaluate` can switch to those of each
    episode); with ``episode_statistics`` by those of each episode in training mode too. The encoder may run under
    autocast; distances and loss are always float32 or float64.

    Source: Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning" (2017).

    Args:
        encoder: ``[n, ...] -> [n, d]``.
        metric: ``"sqeuclidean"`` (the paper's), ``"euclidean"``, ``"cityblock"`` or ``"cosine"``.
        temperature: positive factor of the distances; cosine distances need one of about 10 to train well.
        learn_temperature: make the temperature a parameter (``log_temperature``, so that it stays positive).
        episode_statistics: hand the encoder ``[T, n + m, ...]``, for ``[T, n + m, d]``, as :class:`metafast.Conv4`
            takes them, so that BatchNorm layers that use statistics of the batch use those of each episode.

    Raises:
        ValueError: an unknown metric or a temperature that is not positive and finite; in the call, features
            that are not ``[T * (n + m), d]``, or ``[T, n + m, d]``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        metric: str = "sqeuclidean",
        temperature: float = 1.0,
        learn_temperature: bool = False,
        *,
        episode_statistics: bool = False,
    ) -> None:
        super().__init__(encoder, episode_statistics)
        if metric not in METRICS:
            raise ValueError(f"metric: expected {', '.join(METRICS[:-1])} or {METRICS[-1]}, got {metric!r}")
        _check.positive(temperature, "temperature")
        self.metric = metric
        self._temperature = float(temperature)
        self.log_temperature = (
            nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None
        )

    @property
    def temperature(self) -> float | Tensor:
        """The factor of the distances: a float, or a 0-d tensor with a gradient where it is learnt."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, episodes: Episodes) -> Outcome:
        support, query = self.embed(episodes)
        with torch.autocast(support.device.type, enabled=False):
            loss, logits = prototypical_loss(
                support,
                episodes.support_y,
                query,
                episodes.query_y,
                episodes.ways,
                self.metric,
                self.temperature,
            )
        return Outcome(loss.mean(), logits)

    def extra_repr(self) -> str:
        learnt = ", learn_temperature=True" if self.log_temperature is not None else ""
        return f"metric={self.metric!r}, temperature={self._temperature}{learnt}"
