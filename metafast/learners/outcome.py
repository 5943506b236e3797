"""What every learner returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outcome(NamedTuple):
    """Result of a learner on a batch of ``T`` episodes.

    Attributes:
        loss: 0-d, the mean over the tasks of each task's mean loss over its query rows.
        logits: ``[T, m, C]``, scores of the query rows; the predicted class is the largest.
    """

    loss: Tensor
    logits: Tensor
