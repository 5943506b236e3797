"""Attention over a set."""

from __future__ import annotations

from torch import Tensor

from metafast.compat import absent
from metafast.learners.feat import SetAttention

__getattr__ = absent(
    __name__, {"ScaledDotProductAttention": "a part of MultiHeadAttention, which computes it itself"}
)


class MultiHeadAttention(SetAttention):
    """FEAT's attention: :class:`metafast.learners.SetAttention`, that also gives what it adds.

    Args:
        n_head: heads.
        d_model: d.
        d_k: features of queries and keys of a head.
        d_v: features of values of a head.
        dropout: on what is added to the queries; on the softmax it is 0.1.
        flag_norm: add it to the queries, and normalise; otherwise it is the result.
    """

    def __init__(
        self, n_head: int, d_model: int, d_k: int, d_v: int, dropout: float = 0.1, flag_norm: bool = True
    ) -> None:
        super().__init__(d_model, n_head, d_k, d_v, dropout)
        self.n_head = n_head
        self.d_k = d_k
        self.d_v = d_v
        self.flag_norm = flag_norm

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``q [b, L, d]``, ``k`` and ``v [b, M, d]`` to the result ``[b, L, d]`` and what it was before dropout."""
        mixed = self.mixed(q, k, v)
        output: Tensor = self.dropout(mixed)
        return (self.layer_norm(q + output) if self.flag_norm else output), mixed
