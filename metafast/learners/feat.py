"""Embedding adaptation by a set-to-set function: FEAT."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metafast import _check
from metafast.data import Episodes
from metafast.distance import pairwise_distance
from metafast.learners._base import EncoderLearner, classified, require_classes
from metafast.learners.outcome import Outcome
from metafast.learners.protonet import METRICS
from metafast.prototype import prototypes


class SetAttention(nn.Module):
    r"""Multi-head attention over a set, with residual and layer norm: ``[..., L, d] -> [..., L, d]``.

    .. math:: y = LayerNorm(q + W [h_1 \ldots h_H] + b), \qquad
              h_i = softmax(q Q_i^\top (k K_i^\top)^\top / \sqrt{d_k}) \, v V_i^\top

    with dropout on the softmax and on what is added to q. It does not depend on the order of the set. Differentiable to
    any order. The parameters are called ``w_qs``, ``w_ks``, ``w_vs`` (without bias), ``fc`` and ``layer_norm`` and have
    the initial values of the source's code, whose state dicts it loads.

    Source: Vaswani et al., "Attention Is All You Need" (2017), as Ye, Hu, Zhan, Sha, "Few-Shot Learning via Embedding
    Adaptation with Set-to-Set Functions" (2020) has it.

    Args:
        features: d.
        heads: H.
        key_features: :math:`d_k` of a head; None: d.
        value_features: of a head; None: d.
        dropout: on what is added to q.
        attention_dropout: on the softmax.

    Raises:
        TypeError, ValueError: sizes that are no positive ints, dropouts outside 0 to below 1; in the call, rows of
            another number of features.
    """

    def __init__(
        self,
        features: int,
        heads: int = 1,
        key_features: int | None = None,
        value_features: int | None = None,
        dropout: float = 0.5,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        keys = features if key_features is None else key_features
        values = features if value_features is None else value_features
        _check.sizes(features=features, heads=heads, key_features=keys, value_features=values)
        for name, value in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            _check.number(value, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number from 0 to below 1, got {value}")
        self.features, self.heads = features, heads
        self.w_qs = nn.Linear(features, heads * keys, bias=False)
        self.w_ks = nn.Linear(features, heads * keys, bias=False)
        self.w_vs = nn.Linear(features, heads * values, bias=False)
        for layer, own in ((self.w_qs, keys), (self.w_ks, keys), (self.w_vs, values)):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / (features + own)))
        # After those draws, for the source's weights from one seed.
        self.layer_norm = nn.LayerNorm(features)
        self.fc = nn.Linear(heads * values, features)
        self.dropout, self.attention_dropout = nn.Dropout(dropout), nn.Dropout(attention_dropout)
        nn.init.xavier_normal_(self.fc.weight)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The adapted rows.

        Args:
            queries: q ``[..., L, d]``.
            keys: k ``[..., M, d]``; None: q.
            values: v ``[..., M, d]``; None: k.
            mask: bool, broadcast to ``[..., L, M]``: which rows of k each row of q sees; None: all.
        """
        added: Tensor = self.dropout(self.mixed(queries, keys, values, mask))
        adapted: Tensor = self.layer_norm(queries + added)
        return adapted

    def mixed(
        self,
        queries: Tensor,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What is added to the rows, before its dropout; the arguments are those of the call."""
        keys = queries if keys is None else keys
        values = keys if values is None else values
        for name, rows in (("queries", queries), ("keys", keys), ("values", values)):
            _check.features(rows, name, "[..., rows, d]")
            if rows.shape[-1] != self.features:
                raise ValueError(f"{name}: expected {self.features} features, got {list(rows.shape)}")
        q, k, v = (
            self._of_heads(self.w_qs(queries)),
            self._of_heads(self.w_ks(keys)),
            self._of_heads(self.w_vs(values)),
        )
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(-3), -torch.inf)
        # Not torch's fused attention: it has no second derivative.
        mixed = self.attention_dropout(scores.softmax(-1)) @ v
        added: Tensor = self.fc(mixed.transpose(-3, -2).flatten(-2))
        return added

    def _of_heads(self, rows: Tensor) -> Tensor:
        """``[..., L, H d'] -> [..., H, L, d']``"""
        return rows.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class FEAT(EncoderLearner):
    r"""Few-shot embedding adaptation with a transformer: prototypes that know of each other.

    With the encoder f, the prototypes :math:`c_k` (means of f over the support rows of class k) and the set-to-set
    function A,

    .. math:: logits_k = -\tau \, D(f(x), \hat c_k), \qquad (\hat c_1 \ldots \hat c_C) = A(c_1 \ldots c_C)

    and the loss is the mean cross-entropy; in training mode plus ``balance`` times the contrastive one: A adapts all
    rows of a class, support and query, among each other, and the rows as they were are classified by the means of that:

    .. math:: \text{mean cross-entropy of } -\tau' D(f(x), \bar c_k), \qquad
              \bar c_k = \text{mean of } A(f(x_i): y_i = k)

    All images go through the encoder in one call (see :class:`ProtoNet` for what that means for BatchNorm), under
    autocast if it is on; all else is float32 or float64. Ways and shots may differ from call to call. A class without a
    support row has the logit -inf, and the others do not see it. The source trains an encoder first to classify the
    base classes, as :class:`Baseline` does.

    Source: Ye, Hu, Zhan, Sha, "Few-Shot Learning via Embedding Adaptation with Set-to-Set Functions" (2020). Its code
    divides by temperatures: 64 and 16 for four convolutions on one shot, the inverses of which are the defaults here.

    Args:
        encoder: ``[n, ...] -> [n, d]``.
        attention: A, such as :class:`SetAttention`: called as ``attention(rows [T, L, d], mask=[T, L or 1, L])``, where
            the mask says which rows each row sees.
        metric: D: ``"sqeuclidean"`` (the paper's), ``"euclidean"``, ``"cityblock"`` or ``"cosine"``.
        temperature: :math:`\tau`, positive.
        balance: weight of the contrastive loss, not negative.
        contrastive_temperature: :math:`\tau'`, positive.
        episode_statistics: see :class:`ProtoNet`.

    Raises:
        TypeError: an attention that is no module, numbers that are none.
        ValueError: an unknown metric, numbers out of range; in the call, regression tasks, and features that are not
            ``[T * (n + m), d]``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        attention: nn.Module,
        metric: str = "sqeuclidean",
        temperature: float = 1 / 64,
        *,
        balance: float = 1.0,
        contrastive_temperature: float = 1 / 16,
        episode_statistics: bool = False,
    ) -> None:
        super().__init__(encoder, episode_statistics)
        if not isinstance(attention, nn.Module):
            raise TypeError(f"attention: expected a torch.nn.Module, got {type(attention).__name__}")
        _check.choice(metric, "metric", METRICS)
        _check.positive(temperature, "temperature")
        _check.positive(contrastive_temperature, "contrastive_temperature")
        _check.number(balance, "balance")
        if not 0 <= balance < math.inf:
            raise ValueError(f"balance: expected a finite number that is not negative, got {balance}")
        self.attention = attention
        self.metric = metric
        self.temperature = float(temperature)
        self.balance = float(balance)
        self.contrastive_temperature = float(contrastive_temperature)

    def forward(self, episodes: Episodes) -> Outcome:
        require_classes(episodes)
        support, query = self.embed(episodes)
        with torch.autocast(support.device.type, enabled=False):
            classes = torch.arange(episodes.ways, device=support.device)
            there = (episodes.support_y.unsqueeze(-1) == classes).any(1, keepdim=True)
            means = prototypes(support, episodes.support_y, episodes.ways)
            adapted = self.attention(means, mask=there)
            logits = -self.temperature * pairwise_distance(query, adapted, self.metric)
            loss, logits = classified(logits.masked_fill(~there, -torch.inf), episodes.query_y)
            if self.training and self.balance:
                loss = loss + self.balance * self._contrastive_loss(support, query, episodes)
            return Outcome(loss, logits)

    def _contrastive_loss(self, support: Tensor, query: Tensor, episodes: Episodes) -> Tensor:
        rows = torch.cat([support, query], dim=1)
        labels = torch.cat([episodes.support_y, episodes.query_y], dim=1)
        # Rows that see their own class alone are the classes' sets, whatever their sizes.
        adapted = self.attention(rows, mask=labels.unsqueeze(-1) == labels.unsqueeze(-2))
        centres = prototypes(adapted, labels, episodes.ways)
        logits = -self.contrastive_temperature * pairwise_distance(rows, centres, self.metric)
        return cross_entropy(logits.flatten(0, 1), labels.flatten())

    def extra_repr(self) -> str:
        return (
            f"metric={self.metric!r}, temperature={self.temperature:.4g}, balance={self.balance:.4g}, "
            f"contrastive_temperature={self.contrastive_temperature:.4g}"
        )
