"""Transforms one after the other: torchvision's ``Compose`` where a program has it, and our own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

Transform = Callable[[Any], Any]


class Compose:
    """``transforms`` one after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.transforms))})"


def is_compose(transform: Any) -> bool:
    """Is it a ``Compose``, ours or torchvision's?"""
    if isinstance(transform, Compose):
        return True
    # Whoever has made one has imported it.
    theirs = sys.modules.get("torchvision.transforms")
    return theirs is not None and isinstance(transform, theirs.Compose)


def chained(first: Transform | None, then: Transform | None) -> Transform | None:
    """Both of them, where there are two."""
    if first is None or then is None:
        return then if first is None else first
    return Compose([first, then])


def flattened(transform: Transform | None) -> list[Transform]:
    """The parts of a transform, those of nested ``Compose`` one by one."""
    if transform is None:
        return []
    if is_compose(transform):
        return [part for each in transform.transforms for part in flattened(each)]  # type: ignore[attr-defined]
    return [transform]


def wrap_transform(transform: Any, fn: Callable[[Any], Any], transform_type: type | None = None) -> Any:
    """``transform`` with ``fn`` of each part that is a ``transform_type`` in its place; None: of the whole."""
    if transform_type is None or isinstance(transform, transform_type):
        return fn(transform)
    if is_compose(transform):
        return Compose([wrap_transform(part, fn, transform_type) for part in transform.transforms])
    return transform
