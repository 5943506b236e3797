"""What the original has and this module has not: names that say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def absent(module: str, reasons: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__``: an ImportError for the names that learn2learn 0.2.0 has there, with the reason.

    It is no AttributeError, whose text ``from module import name`` would replace by one of its own.
    """

    def getattribute(name: str) -> Any:
        if name in reasons:
            raise ImportError(f"{module}.{name} of learn2learn 0.2.0 is not provided: {reasons[name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattribute
