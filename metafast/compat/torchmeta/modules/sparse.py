"""Embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import embedding, embedding_bag

from metafast.compat import absent
from metafast.compat.torchmeta.modules.module import MetaModule

__getattr__ = absent(__name__)


class MetaEmbedding(nn.Embedding, MetaModule):
    """torch's ``Embedding`` with ``forward(input, params=None)``."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        return embedding(
            input,
            self.weight if params is None else params["weight"],
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


class MetaEmbeddingBag(nn.EmbeddingBag, MetaModule):
    """torch's ``EmbeddingBag`` with ``forward(input, offsets=None, per_sample_weights=None, params=None)``."""

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        params: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        return embedding_bag(
            input,
            self.weight if params is None else params["weight"],
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )
