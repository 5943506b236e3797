"""What the learners share."""

from __future__ import annotations

from typing import Any

from torch import nn


class BaseLearner(nn.Module):
    """A module around ``module``, to which unknown attributes and calls go.

    Args:
        module: the module; None: to be set later.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, attr: str) -> Any:
        try:
            return super().__getattr__(attr)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get("module")
            if inner is None:
                raise
            return getattr(inner, attr)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self.module is not None
        return self.module(*args, **kwargs)
