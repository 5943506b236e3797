"""Modules one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat.torchmeta.modules.module import MetaModule

__getattr__ = absent(__name__)


class MetaSequential(nn.Sequential, MetaModule):
    """torch's ``Sequential`` with ``forward(input, params=None)``: each ``MetaModule`` in it gets its part of them."""

    def forward(self, input: Any, params: Mapping[str, Tensor] | None = None) -> Any:
        """
        Raises:
            TypeError: something in it is no module.
        """
        for name, module in self._modules.items():
            if isinstance(module, MetaModule):
                input = module(input, params=self.get_subdict(params, name))
            elif isinstance(module, nn.Module):
                input = module(input)
            else:
                raise TypeError(f"{name}: expected a module, got {type(module).__name__}")
        return input
