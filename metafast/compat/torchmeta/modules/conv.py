"""Convolutions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat.torchmeta.modules.module import MetaModule, weight_and_bias

__getattr__ = absent(__name__)


class MetaConv1d(nn.Conv1d, MetaModule):
    """torch's ``Conv1d`` with ``forward(input, params=None)``."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        return self._conv_forward(input, *weight_and_bias(self, params))


class MetaConv2d(nn.Conv2d, MetaModule):
    """torch's ``Conv2d`` with ``forward(input, params=None)``."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        return self._conv_forward(input, *weight_and_bias(self, params))


class MetaConv3d(nn.Conv3d, MetaModule):
    """torch's ``Conv3d`` with ``forward(input, params=None)``."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        return self._conv_forward(input, *weight_and_bias(self, params))
