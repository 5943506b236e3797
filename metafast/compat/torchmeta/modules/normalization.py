"""Layer normalization."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import layer_norm

from metafast.compat import absent
from metafast.compat.torchmeta.modules.module import MetaModule

__getattr__ = absent(__name__)


class MetaLayerNorm(nn.LayerNorm, MetaModule):
    """torch's ``LayerNorm`` with ``forward(input, params=None)``."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        if params is None:
            return super().forward(input)
        return layer_norm(input, self.normalized_shape, params.get("weight"), params.get("bias"), self.eps)
