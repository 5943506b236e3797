"""Linear and bilinear layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import bilinear, linear

from metafast.compat import absent
from metafast.compat.torchmeta.modules.module import MetaModule, weight_and_bias

__getattr__ = absent(__name__)


class MetaLinear(nn.Linear, MetaModule):
    """torch's ``Linear`` with ``forward(input, params=None)``."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        return linear(input, *weight_and_bias(self, params))


class MetaBilinear(nn.Bilinear, MetaModule):
    """torch's ``Bilinear`` with ``forward(input1, input2, params=None)``."""

    def forward(self, input1: Tensor, input2: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        return bilinear(input1, input2, *weight_and_bias(self, params))
