"""Checks that the public functions share; each message names the argument, what came and what was wanted."""

from __future__ import annotations

import math
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
    floating(value, name)
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
    elif not is_number(value):
        raise TypeError(f"{name}: expected a number or a floating tensor, got {type(value).__name__}")


def floating(value: Any, name: str) -> None:
    """A floating tensor of any shape."""
    is_tensor(value, name)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def number(value: Any, name: str) -> None:
    if not is_number(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def choice(value: Any, name: str, choices: tuple[str, ...]) -> int:
    """The place of ``value`` among the ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(choices)}, got {value!r}")
    return choices.index(value)


def count(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected 0 or more, got {value}")


def layers(weights: Any, biases: Any, inputs: Tensor, inputs_name: str) -> None:
    """Lists of weights ``[..., out, in]`` and biases ``[..., out]`` that take the inputs from layer to layer."""
    for value, name in ((weights, "weights"), (biases, "biases")):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name}: expected a list of tensors, got {type(value).__name__}")
    if not weights:
        raise ValueError("weights: expected at least one layer, got none")
    if len(biases) != len(weights):
        raise ValueError(f"biases: expected {len(weights)}, one for each of weights, got {len(biases)}")
    width = inputs.shape[-1]
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        features(weight, f"weights[{k}]", "[..., out, in]")
        same_kind(weight, f"weights[{k}]", inputs, inputs_name)
        if weight.shape[-1] != width:
            before = f"weights[{k - 1}]" if k else inputs_name
            raise ValueError(
                f"weights[{k}]: expected shape [..., out, {width}] after {before}, got {list(weight.shape)}"
            )
        width = weight.shape[-2]
        is_tensor(bias, f"biases[{k}]")
        same_kind(bias, f"biases[{k}]", inputs, inputs_name)
        if bias.dim() < 1 or bias.shape[-1] != width:
            raise ValueError(f"biases[{k}]: expected shape [..., {width}], got {list(bias.shape)}")


def step_rates(value: Any, name: str, steps: int, like: Tensor) -> Tensor:
    """A rate ``[]`` or ``[steps]``, as a vector."""
    _rate(value, name, like)
    if value.dim() == 0:
        return value.reshape(1)
    if value.dim() != 1 or value.shape[0] != steps:
        raise ValueError(f"{name}: expected shape [] or [{steps}], got {list(value.shape)}")
    return value


def rate_like(value: Any, name: str, shape: torch.Size, like: Tensor) -> None:
    _rate(value, name, like)
    if value.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def _rate(value: Any, name: str, like: Tensor) -> None:
    floating(value, name)
    same_device(value, name, like, "inputs")


def positive(value: Any, name: str) -> None:
    number(value, name)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a positive finite number, got {value}")


def sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
