"""Checks that the public functions share; each message names the argument, what came and what was wanted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")


def features(value: Any, name: str, shape: str) -> None:
    """A floating tensor of at least two dimensions, described by ``shape``."""
    is_tensor(value, name)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")
    if value.dim() < 2:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")


def autocasts(value: Tensor) -> bool:
    """Does autocast turn this tensor into float32?"""
    kind = value.device.type
    available = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return available and value.dtype != torch.float64


def without_autocast(value: Tensor) -> AbstractContextManager[Any]:
    """For plain matrix products that must keep float32's accuracy."""
    kind = value.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def same_kind(value: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """The two tensors have one device, and one dtype after autocast."""
    if value.dtype != other.dtype and not (autocasts(value) and autocasts(other)):
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}")
    same_device(value, name, other, other_name)


def same_device(value: Tensor, name: str, other: Tensor, other_name: str) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def same_size(value: Tensor, dim: int, name: str, other: Tensor, other_dim: int, other_name: str) -> None:
    if value.shape[dim] != other.shape[other_dim]:
        raise ValueError(
            f"{name}: expected size {other.shape[other_dim]} in dimension {dim}, as {other_name} has, "
            f"got shape {list(value.shape)}"
        )


def broadcast_tasks(*named: tuple[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The common leading dimensions of several tensors."""
    try:
        return tuple(torch.broadcast_shapes(*(shape for _, shape in named)))
    except RuntimeError:
        text = ", ".join(f"{name} has {list(shape)}" for name, shape in named)
        raise ValueError(f"leading dimensions: expected shapes that broadcast, but {text}") from None


def class_count(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"num_classes: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"num_classes: expected a number of classes, got {value}")


def class_labels(value: Any, name: str) -> None:
    is_tensor(value, name)
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64 class numbers, got {value.dtype}")
    if value.dim() < 1:
        raise ValueError(f"{name}: expected shape [..., rows], got a scalar")


def scalar(value: Any, name: str, like: Tensor, like_name: str) -> None:
    """A number, or a floating tensor on the device of ``like``."""
    if isinstance(value, Tensor):
        if value.dtype not in FLOATING:
            raise TypeError(f"{name}: expected a number or a floating tensor, got {value.dtype}")
        same_device(value, name, like, like_name)
    elif isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number or a floating tensor, got {type(value).__name__}")


def floating(value: Any, name: str) -> None:
    """A floating tensor of any shape."""
    is_tensor(value, name)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")


def number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def count(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected 0 or more, got {value}")
