"""Almost no inner loop: a body that is shared and a head that adapts."""

from __future__ import annotations

import torch
from torch import nn

from metafast import _check
from metafast.data import Episodes
from metafast.learners._base import EncoderLearner, classified, require_ways
from metafast.learners.outcome import Outcome
from metafast.linear_head import adapted_logits


class ANIL(EncoderLearner):
    r"""MAML whose inner loop changes only the last, linear layer, on features that are computed once.

    With the features ``z`` of the encoder and the head's initial weight and bias, K times on the support rows

    .. math:: (W, b) \leftarrow (W, b) - \alpha \nabla E_{support}(W, b), \qquad logits = Z_{query} W^\top + b

    with E the mean cross-entropy; ``loss = mean cross-entropy`` of the query logits. Encoder, W and b train by the
    exact gradient through the steps, in one call of :func:`metafast.adapted_logits`. All images go through the encoder
    in one call (see :class:`ProtoNet` for what that means for BatchNorm), under autocast if it is on; the head
    computes in float32 or float64. ``steps`` may be changed between calls.

    Source: Raghu, Raghu, Bengio, Vinyals, "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of
    MAML" (2020).

    Args:
        encoder: ``[n, ...] -> [n, features]``.
        features: number of features.
        ways: classes of every episode, the outputs of the head.
        lr: the rate of the steps.
        steps: K, 0 or more.
        learn_lr: make the rate a parameter.
        first_order: take the gradients of the steps for constants.
        episode_statistics: see :class:`ProtoNet`.

    Raises:
        TypeError: sizes that are no ints.
        ValueError: numbers out of range; in the call, episodes of other ways and features of another number.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        ways: int,
        lr: float = 0.1,
        steps: int = 5,
        *,
        learn_lr: bool = False,
        first_order: bool = False,
        episode_statistics: bool = False,
    ) -> None:
        super().__init__(encoder, episode_statistics)
        _check.sizes(features=features, ways=ways)
        _check.positive(lr, "lr")
        _check.count(steps, "steps")
        self.head = nn.Linear(features, ways)
        self.lr = nn.Parameter(torch.tensor(float(lr))) if learn_lr else float(lr)
        self.steps = steps
        self.first_order = first_order

    @property
    def ways(self) -> int:
        """Classes of the episodes."""
        return self.head.out_features

    def forward(self, episodes: Episodes) -> Outcome:
        require_ways(episodes, self.ways)
        support, query = self.embed(episodes)
        if support.shape[2] != self.head.in_features:
            raise ValueError(f"encoder: expected {self.head.in_features} features, got {support.shape[2]}")
        with torch.autocast(support.device.type, enabled=False):
            logits = adapted_logits(
                support,
                episodes.support_y,
                query,
                self.head.weight,
                self.head.bias,
                self.lr,
                self.steps,
                first_order=self.first_order,
            )
            return classified(logits, episodes.query_y)

    def extra_repr(self) -> str:
        learnt = isinstance(self.lr, nn.Parameter)
        rate = float(torch.as_tensor(self.lr).detach())
        return f"lr={rate:g}, steps={self.steps}, learn_lr={learnt}, first_order={self.first_order}"
