"""Matching networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.attention_lstm import read_with
from metafast.data import Episodes
from metafast.learners._base import EncoderLearner, classified, require_classes
from metafast.learners.outcome import Outcome
from metafast.matching import matching_log_probs

#: Of the fixed order in which support rows are read.
ORDER_SEED = 0


class MatchingNet(EncoderLearner):
    r"""Matching network: a query's label is that of the support rows which its features point at, by their cosine.

    With features f of the query x and g of the support rows,

    .. math:: p(k | x) = \sum_{i: y_i = k} softmax_i(s \cos(f(x), g(x_i))), \qquad logits = \log p

    and ``loss = mean of -log p``; a class without a support row has the logit -inf. All images go through the encoder
    in one call (see :class:`ProtoNet` for what that means for BatchNorm), under autocast if it is on; all else is
    float32 or float64. Ways and shots may differ from call to call.

    Full context embeddings: an LSTM reads the support features in a fixed random order, forward and backward, and
    :math:`g = h_{forward} + h_{backward} + f`. Another one starts with the query's features and reads with attention:
    :math:`h_t = LSTM([f, r_{t-1}], h_{t-1}) + f, \; r_t = \sum_i softmax_i(h_t \cdot g_i) g_i`; the last h is f.

    Source: Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra, "Matching Networks for One Shot Learning" (2016), which
    has s = 1; cosines lie between -1 and 1, so that their softmax is flat then.

    Args:
        encoder: ``[n, ...] -> [n, d]``.
        scale: s.
        learn_scale: make s a parameter.
        full_context: the number of features d, for full context embeddings; None: without.
        reading_steps: t of the query's LSTM.
        episode_statistics: see :class:`ProtoNet`.

    Raises:
        TypeError, ValueError: numbers that are not positive; in the call, regression tasks, and features that are not
            ``[T * (n + m), d]``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        scale: float = 10.0,
        learn_scale: bool = False,
        *,
        full_context: int | None = None,
        reading_steps: int = 3,
        episode_statistics: bool = False,
    ) -> None:
        super().__init__(encoder, episode_statistics)
        _check.positive(scale, "scale")
        _check.sizes(reading_steps=reading_steps)
        self.scale: Tensor | float = nn.Parameter(torch.tensor(float(scale))) if learn_scale else float(scale)
        self.reading_steps = reading_steps
        self.support_reader: nn.LSTM | None = None
        self.query_reader: nn.LSTMCell | None = None
        if full_context is not None:
            _check.sizes(full_context=full_context)
            self.support_reader = nn.LSTM(full_context, full_context, batch_first=True, bidirectional=True)
            self.query_reader = nn.LSTMCell(2 * full_context, full_context)

    def forward(self, episodes: Episodes) -> Outcome:
        require_classes(episodes)
        support, query = self.embed(episodes)
        with torch.autocast(support.device.type, enabled=False):
            support, query = self._in_context(support, query)
            rows = support, episodes.support_y, query
            return classified(
                matching_log_probs(*rows, self.scale, num_classes=episodes.ways), episodes.query_y
            )

    def _in_context(self, support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        if self.support_reader is None or self.query_reader is None:
            return support, query
        if support.shape[-1] != self.support_reader.input_size:
            raise ValueError(
                f"encoder: expected {self.support_reader.input_size} features, as full_context says, "
                f"got {support.shape[-1]}"
            )
        order = torch.randperm(support.shape[1], generator=torch.Generator().manual_seed(ORDER_SEED))
        order = order.to(support.device)
        read, _ = self.support_reader(support[:, order])
        support = support + sum(read[:, order.argsort()].chunk(2, dim=-1))
        # Before the first step nothing is read.
        rows = query.flatten(0, 1)
        hidden, cell = self.query_reader(torch.cat([rows, torch.zeros_like(rows)], -1))
        states = {"hidden": (hidden + rows).view_as(query), "cell": cell.view_as(query)}
        return support, read_with(self.query_reader, support, query, self.reading_steps - 1, **states)

    def extra_repr(self) -> str:
        return f"scale={float(self.scale):.4g}, full_context={self.support_reader is not None}"
