"""Nearest class means of centred and normalised features: SimpleShot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from metafast import _check
from metafast.data import Episodes, RowSampler
from metafast.learners._base import PretrainedLearner
from metafast.learners.outcome import Outcome
from metafast.learners.protonet import METRICS
from metafast.prototype import prototypical_loss


class SimpleShot(PretrainedLearner):
    r"""SimpleShot: the class of the nearest mean of features that were centred and normalised.

    With the encoder f and the mean :math:`\mu` of f over images of the base classes,

    .. math:: z = \frac{f(x) - \mu}{\|f(x) - \mu\|}, \qquad
              logits_k = -\tau \, D(z, \text{mean of } z \text{ over the support rows of class } k)

    and ``loss = mean cross-entropy`` (the source's CL2N; without :math:`\mu` its L2N, without both its UN).
    :math:`\mu` is the buffer ``feature_mean``, zero until :meth:`centre_on` sets it, so that checkpoints carry it.

    The encoder is trained to classify the base classes: for batches without support rows, such as those of
    :class:`metafast.data.RowSampler`, the learner gives the logits of ``head``, a linear layer on f, and their mean
    cross-entropy. :func:`metafast.fit` calls :meth:`before_validation`.

    All images go through the encoder in one call (see :class:`ProtoNet` for what that means for BatchNorm), under
    autocast if it is on; all else is float32 or float64. Ways and shots may differ from call to call.

    Source: Wang, Chao, Weinberger, van der Maaten, "SimpleShot: Revisiting Nearest-Neighbor Classification for
    Few-Shot Learning" (2019).

    Args:
        encoder: ``[n, ...] -> [n, d]``.
        features: d.
        base_classes: number of classes of the head; None: no head, for an encoder that is trained already.
        metric: D: ``"sqeuclidean"``, ``"euclidean"``, ``"cityblock"`` or ``"cosine"``; of unit vectors the first two
            choose the same class.
        temperature: :math:`\tau`, positive.
        normalise: divide by the norm.

    Raises:
        TypeError, ValueError: an unknown metric, numbers that are not positive; in the call, regression tasks, features
            that are not ``[T * (n + m), d]``, and rows of other base classes than those of the head.
    """

    feature_mean: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        base_classes: int | None = None,
        metric: str = "sqeuclidean",
        temperature: float = 1.0,
        *,
        normalise: bool = True,
    ) -> None:
        _check.sizes(features=features)
        head = None
        if base_classes is not None:
            _check.sizes(base_classes=base_classes)
            head = nn.Linear(features, base_classes)
        super().__init__(encoder, features, head, base_classes)
        _check.choice(metric, "metric", METRICS)
        _check.positive(temperature, "temperature")
        self.metric = metric
        self.temperature = float(temperature)
        self.normalise = bool(normalise)
        self.register_buffer("feature_mean", torch.zeros(features))

    @torch.no_grad()
    def centre_on(self, images: Tensor | Iterable[Tensor]) -> Tensor:
        """Set ``feature_mean`` to the mean of the features of images, in evaluation mode, and give it.

        Args:
            images: ``[N, ...]``, or batches of them; they are brought to the device of the mean.

        Raises:
            TypeError: something else than tensors.
            ValueError: no image at all, features that are not ``[N, d]``.
        """
        modes = [(module, module.training) for module in self.modules()]
        total, count = torch.zeros_like(self.feature_mean, dtype=torch.float64), 0
        self.eval()
        try:
            for batch in [images] if isinstance(images, Tensor) else images:
                _check.is_tensor(batch, "images")
                found: Tensor = self.encoder(batch.to(self.feature_mean.device))
                if found.shape != (len(batch), *self.feature_mean.shape):
                    raise ValueError(
                        f"encoder: expected features [{len(batch)}, {len(self.feature_mean)}], got {list(found.shape)}"
                    )
                total += found.double().sum(0)
                count += len(batch)
        finally:
            for module, training in modes:
                module.training = training
        if not count:
            raise ValueError("images: expected at least one, got none")
        self.feature_mean.copy_(total / count)
        return self.feature_mean

    def before_validation(self, train: Any) -> None:
        """Centre on all rows of the base classes, once each, if ``train`` is a :class:`metafast.data.RowSampler`."""
        if isinstance(train, RowSampler):
            self.centre_on(rows.query_x.flatten(0, 1) for rows in train.once())

    def classify(self, episodes: Episodes) -> Outcome:
        support, query = self.embed(episodes)
        with torch.autocast(support.device.type, enabled=False):
            loss, logits = prototypical_loss(
                self._transformed(support),
                episodes.support_y,
                self._transformed(query),
                episodes.query_y,
                episodes.ways,
                self.metric,
                self.temperature,
            )
        return Outcome(loss.mean(), logits)

    def _transformed(self, features: Tensor) -> Tensor:
        centred = features - self.feature_mean
        return normalize(centred, dim=-1) if self.normalise else centred

    def extra_repr(self) -> str:
        return f"metric={self.metric!r}, temperature={self.temperature:.4g}, normalise={self.normalise}"
