"""What the original has and this module has not: names that say so, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metafast import compat


def absent(module: str, reasons: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """A module's ``__getattr__``: an ImportError for the names that have a reason, and what others say of the rest.

    It is no AttributeError, whose text ``from module import name`` would replace by one of its own.

    Args:
        module: the ``__name__`` of the module.
        reasons: why a name of the original is not provided.
    """
    known, others = dict(reasons or {}), compat.absent(module)
    original = module.removeprefix("metafast.compat.")

    def __getattr__(name: str) -> Any:
        if name in known:
            raise ImportError(f"{original}.{name} of learn2learn 0.2.0 is not provided: {known[name]}")
        return others(name)

    return __getattr__
