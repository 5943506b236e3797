"""Modules that compute with parameters given in the call."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from metafast.compat import absent

__getattr__ = absent(__name__)


class MetaModule(nn.Module):
    """A module whose ``forward`` takes ``params``, the tensors to compute with in place of its own parameters.

    They are a dictionary by the names of :meth:`meta_named_parameters`, and derivatives of any order go through them.
    Parameters of submodules that are no ``MetaModule`` are not among the names: these compute with their own.
    """

    def meta_named_parameters(
        self, prefix: str = "", recurse: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of this module and, with ``recurse``, of all below that are a ``MetaModule``.

        A parameter that is shared comes once, under its first name.
        """
        seen = set()
        modules: Any = self.named_modules(prefix=prefix) if recurse else [(prefix, self)]
        for path, module in modules:
            if not isinstance(module, MetaModule):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter not in seen:
                    seen.add(parameter)
                    yield f"{path}.{name}" if path else name, parameter

    def meta_parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of :meth:`meta_named_parameters`."""
        for _, parameter in self.meta_named_parameters(recurse=recurse):
            yield parameter

    def get_subdict(
        self, params: Mapping[str, Tensor] | None, key: str | None = None
    ) -> OrderedDict[str, Tensor] | None:
        """The entries of ``params`` below the submodule ``key``, under their names there; all of them for None.

        Returns:
            None where ``params`` is None, and with a warning where it has nothing below ``key``: the submodule computes
            with its own parameters.
        """
        if params is None:
            return None
        if key is None:
            return OrderedDict(params)
        start = f"{key}."
        found = OrderedDict(
            (name[len(start) :], value) for name, value in params.items() if name.startswith(start)
        )
        if found:
            return found
        warnings.warn(
            f"params: nothing in it belongs to the submodule {key!r} of {type(self).__name__}, which computes with its "
            f"own parameters; there are {', '.join(params) or 'none'}",
            stacklevel=2,
        )
        return None


def weight_and_bias(module: Any, params: Mapping[str, Tensor] | None) -> tuple[Any, Any]:
    """The weight and the bias to compute with; a bias that is not in ``params`` is none."""
    if params is None:
        return module.weight, module.bias
    return params["weight"], params.get("bias")
