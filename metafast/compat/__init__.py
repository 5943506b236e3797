"""Drop-in modules: metafast under the names and with the manners of other libraries.

``import metafast.compat.higher as higher`` in code that can be edited; :func:`install`, or ``python -m metafast.compat
--as higher script.py``, for code that cannot.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

#: Each is the package of that name in this one, whose submodules are those of the original's that there are.
LIBRARIES = ("higher", "learn2learn")

__all__ = ["LIBRARIES", "install"]

_HERE = f"{__name__}."


def install(*libraries: str) -> None:
    """From now on ``import higher`` imports :mod:`metafast.compat.higher`, also where the original is installed.

    Nothing of the original is imported or changed. Names that ours does not have raise an ImportError or an
    AttributeError, which says where to find them in the original.

    Args:
        libraries: names out of ``LIBRARIES``.

    Raises:
        ValueError: an unknown name, or none.
        RuntimeError: the original is imported already.
    """
    if not libraries:
        raise ValueError(f"libraries: expected one or more of {', '.join(LIBRARIES)}, got none")
    for name in libraries:
        if name not in LIBRARIES:
            raise ValueError(f"libraries: expected names out of {', '.join(LIBRARIES)}, got {name!r}")
    for name in libraries:
        known = sys.modules.get(name)
        if known is not None and known is not sys.modules.get(_HERE + name):
            raise RuntimeError(
                f"{name} is imported already, from {getattr(known, '__file__', None) or 'an unknown place'}; "
                "call install before anything imports it"
            )
    _finder.installed.update(libraries)


def absent(module: str, reasons: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """The ``__getattr__`` of a drop-in module: it names what is missing, and the place of that in the original.

    Args:
        module: the ``__name__`` of the drop-in module.
        reasons: why a name of the original is not provided. These raise an ImportError, since ``from module import
            name`` would replace the text of an AttributeError by its own.
    """

    def __getattr__(name: str) -> Any:
        if reasons and name in reasons:
            raise ImportError(
                f"{module.removeprefix(_HERE)}.{name} is not provided: {reasons[name]}", name=name
            )
        if name == "__path__":
            # With one, `from module import name` asks _Finder for what the module has not.
            return []
        raise AttributeError(_reason(f"{module}.{name}"), name=name, obj=sys.modules.get(module))

    return __getattr__


def _reason(ours: str) -> str:
    """What to say of a dotted name below this package that there is not."""
    original = ours.removeprefix(_HERE)
    library, _, _ = original.partition(".")
    parent, _, name = original.rpartition(".")
    return (
        f"{original}: not provided by {_HERE}{library}; look for {name!r} in {parent} of the original "
        f"(docs/migration/{library}.md lists what there is, and why not the rest)"
    )


class _Finder(MetaPathFinder):
    """Finds the modules of installed libraries in ours, and refuses modules below ours that there are not."""

    def __init__(self) -> None:
        self.installed: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in self.installed:
            return ModuleSpec(fullname, _Alias(), is_package=True)
        library, inside, _ = fullname.removeprefix(_HERE).partition(".")
        if not (fullname.startswith(_HERE) and inside and library in LIBRARIES):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None:
            # No ModuleNotFoundError, in whose place `from package import name` raises one that says less.
            raise ImportError(_reason(fullname), name=fullname)
        return spec


class _Alias(Loader):
    """Loads a module of an original as the module of ours, so that there is one of it under both names."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(_HERE + spec.name)
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own


_finder = _Finder()
sys.meta_path.insert(0, _finder)
