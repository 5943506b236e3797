"""Targets as class numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from metafast.compat import absent
from metafast.compat.torchmeta.transforms.target_transforms import TargetTransform

__getattr__ = absent(__name__)


class Categorical(TargetTransform):
    """Numbers the targets from 0 on as they come; with ``num_classes``, in an order that torch's generator draws first.

    Raises:
        ValueError: in a call, one target more than ``num_classes``.
    """

    def __init__(self, num_classes: int | None = None) -> None:
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forget all targets and the order."""
        self.classes: dict[Any, int] = {}
        self._labels: list[int] | None = None

    @property
    def labels(self) -> list[int] | None:
        """The order; None without ``num_classes``."""
        if self._labels is None and self.num_classes is not None:
            self._labels = torch.randperm(self.num_classes).tolist()
        return self._labels

    def __call__(self, target: Any) -> int:
        number = self.classes.get(target)
        if number is None:
            number = len(self.classes)
            if self.num_classes is not None and self.labels is not None:
                if number >= self.num_classes:
                    raise ValueError(
                        f"num_classes: expected {self.num_classes} different targets, got {target!r} besides "
                        f"{', '.join(map(repr, self.classes))}"
                    )
                number = self.labels[number]
            self.classes[target] = number
        return number

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_classes or ''})"


class FixedCategory:
    """A target together with the class augmentation of its class."""

    def __init__(self, transform: Callable[[Any], Any] | None = None) -> None:
        self.transform = transform

    def __call__(self, index: Any) -> tuple[Any, Any]:
        return index, self.transform

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transform})"
