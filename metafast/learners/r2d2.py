"""A ridge regression head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.data import Episodes
from metafast.learners._base import EncoderLearner, classified, require_classes
from metafast.learners.outcome import Outcome
from metafast.ridge import ridge_logits


class R2D2(EncoderLearner):
    r"""Ridge regression from the features of a task's support rows to their one-hot labels, in closed form.

    With Z the features and a column of ones, n support rows, and Y the one-hot labels,

    .. math:: W = (Z^\top Z / n + \lambda I)^{-1} Z^\top Y / n, \qquad logits = s \, Z_{query} W + o

    and ``loss = mean cross-entropy``. :math:`\log \lambda`, s and o are trained with the encoder (o as in the source,
    though it cancels in the softmax). All images go through the encoder in one call (see :class:`ProtoNet` for what
    that means for BatchNorm), under autocast if it is on; the head, :func:`metafast.ridge_logits`, computes in
    float32 or float64. Ways and shots may differ from call to call.

    Source: Bertinetto, Henriques, Torr, Vedaldi, "Meta-learning with differentiable closed-form solvers" (2019).

    Args:
        encoder: ``[n, ...] -> [n, d]``.
        regularisation: initial :math:`\lambda`.
        scale: initial s.
        episode_statistics: see :class:`ProtoNet`.

    Raises:
        ValueError: numbers that are not positive and finite; in the call, regression tasks, and features that are not
            ``[T * (n + m), d]``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        regularisation: float = 50.0,
        scale: float = 10.0,
        *,
        episode_statistics: bool = False,
    ) -> None:
        super().__init__(encoder, episode_statistics)
        _check.positive(regularisation, "regularisation")
        _check.positive(scale, "scale")
        self.log_regularisation = nn.Parameter(torch.tensor(math.log(regularisation)))
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.offset = nn.Parameter(torch.tensor(0.0))

    def forward(self, episodes: Episodes) -> Outcome:
        require_classes(episodes)
        support, query = self.embed(episodes)
        with torch.autocast(support.device.type, enabled=False):
            logits = ridge_logits(
                _with_ones(support),
                episodes.support_y,
                _with_ones(query),
                # Z and Y divided by the square root of n.
                self.log_regularisation.exp() * support.shape[1],
                self.scale,
                self.offset,
                num_classes=episodes.ways,
            )
            return classified(logits, episodes.query_y)


def _with_ones(features: Tensor) -> Tensor:
    return torch.cat([features, features.new_ones((*features.shape[:-1], 1))], dim=-1)
