"""A module with some of its layers replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class MetaModule(nn.Module):
    """A module whose layers of some types stand within others, such as adapters; it is changed in place.

    Args:
        module: the module.
        substitutions: from a type of layer to what is called with such a layer and gives another in its place, which
            keeps it as its attribute ``module``; subclasses of the type stay.
        freeze_module: let the module's own parameters require no gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        substitutions: Mapping[type[nn.Module], Callable[[Any], nn.Module]],
        freeze_module: bool = True,
    ) -> None:
        super().__init__()
        self.substitutions = substitutions
        self.freeze_module = freeze_module
        own = list(module.parameters())
        self.wrapped_module = self._wrap(module)
        if freeze_module:
            for parameter in own:
                parameter.requires_grad_(False)

    def _wrap(self, module: nn.Module) -> nn.Module:
        for name, child in list(module.named_children()):
            module._modules[name] = self._wrap(child)
        substitute = self.substitutions.get(type(module))
        return module if substitute is None else substitute(module)

    def _unwrap(self, module: nn.Module) -> nn.Module:
        inner = getattr(module, "module", None)
        base = inner if isinstance(inner, nn.Module) else module
        for name, child in list(base.named_children()):
            base._modules[name] = self._unwrap(child)
        return base

    def meta_parameters(self, module: nn.Module | None = None) -> Iterator[Tensor]:
        """Those of the layers that stand in others' places, as their ``meta_parameters()`` gives them."""
        module = self.wrapped_module if module is None else module
        own = getattr(module, "meta_parameters", None)
        if own is not None:
            yield from own()
        for child in module.children():
            yield from self.meta_parameters(child)

    def module(self) -> nn.Module:
        """The module with its own layers again, changed in place."""
        return self._unwrap(self.wrapped_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped_module(*args, **kwargs)
