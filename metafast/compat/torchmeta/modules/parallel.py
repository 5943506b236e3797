"""Several devices."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat.torchmeta.modules.module import MetaModule

__getattr__ = absent(__name__)


class DataParallel(nn.DataParallel[Any], MetaModule):
    """torch's ``DataParallel`` around a ``MetaModule``, whose ``params`` go to every device as a whole.

    Their names are those of the module, or those of this one, which begin with ``module.``. Without a GPU it hands the
    inputs on, as torch's does.
    """

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if not self.device_ids and isinstance(self.module, MetaModule):
            kwargs["params"] = self._own(kwargs.get("params"))
        return super().forward(*inputs, **kwargs)

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Sequence[Any]) -> Any:
        if not isinstance(self.module, MetaModule):
            return super().scatter(inputs, kwargs, device_ids)
        own = self._own(kwargs.pop("params", None))
        if own is None:
            own = OrderedDict(self.module.named_parameters())
        scattered, options = super().scatter(inputs, kwargs, device_ids)
        copies = on_devices(own, device_ids[: len(options)])
        return scattered, tuple(
            dict(option, params=copy) for option, copy in zip(options, copies, strict=True)
        )

    def _own(self, params: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        """The parameters under the names of the module."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self.get_subdict(params, "module")
        return params if found is None else found


def on_devices(params: Mapping[str, Tensor], devices: Sequence[Any]) -> list[OrderedDict[str, Tensor]]:
    """A copy for each device that gradients go back through; without gradients, detached."""
    graph = torch.is_grad_enabled()
    return [
        OrderedDict((name, (value if graph else value.detach()).to(device)) for name, value in params.items())
        for device in devices
    ]
