"""Batch normalization."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from metafast.compat import absent
from metafast.compat.torchmeta.modules.module import MetaModule

__getattr__ = absent(__name__)


class _MetaBatchNorm(_BatchNorm, MetaModule):
    """Running statistics are buffers of the module, which every call in training changes, whatever ``params`` are."""

    def forward(self, input: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor:
        self._check_input_dim(input)
        rate = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                rate = 1.0 / float(self.num_batches_tracked)
        weight, bias = (
            (self.weight, self.bias) if params is None else (params.get("weight"), params.get("bias"))
        )
        return batch_norm(
            input,
            self.running_mean,
            self.running_var,
            weight,
            bias,
            self.training or not self.track_running_stats,
            rate,
            self.eps,
        )


class MetaBatchNorm1d(_MetaBatchNorm, nn.BatchNorm1d):
    """torch's ``BatchNorm1d`` with ``forward(input, params=None)``."""


class MetaBatchNorm2d(_MetaBatchNorm, nn.BatchNorm2d):
    """torch's ``BatchNorm2d`` with ``forward(input, params=None)``."""


class MetaBatchNorm3d(_MetaBatchNorm, nn.BatchNorm3d):
    """torch's ``BatchNorm3d`` with ``forward(input, params=None)``."""
