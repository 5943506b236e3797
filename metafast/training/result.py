"""The result file: what was run, on what, how long, and what came out."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.optim import Optimizer

from metafast.training.distributed import ranks
from metafast.training.files import write_atomically


def environment(device: torch.device) -> dict[str, object]:
    """Versions, device, processes and threads of each. No names of hosts or users."""
    try:
        version = importlib.metadata.version("metafast")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed"
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    )
    return {
        "metafast": version,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "device_name": name,
        "processes": ranks().count,
        "threads": torch.get_num_threads(),
    }


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: lists for tuples, numbers for 0-d tensors, text for what has no JSON form."""
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return without_absolute_path(str(value))


def optimizer_settings(optimizer: Optimizer) -> dict[str, Any]:
    """Class of the optimiser and its numbers: those of all its parameters, and of each group where they differ.

    The learning rate is the one before any schedule.
    """
    groups = [
        {
            name: plain(group.get("initial_lr", value) if name == "lr" else value)
            for name, value in group.items()
            if name not in ("params", "initial_lr")
        }
        for group in optimizer.param_groups
    ]
    found: dict[str, Any] = {"optimizer": type(optimizer).__name__, **groups[0]}
    if any(group != groups[0] for group in groups):
        found["groups"] = groups
    return found


def without_absolute_path(text: str) -> str:
    """``text``; an absolute path becomes relative to the working directory, or its last part if outside."""
    if not os.path.isabs(text):
        return text
    path, here = Path(text), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def command_line(arguments: Sequence[str]) -> str:
    """The command as typed, absolute paths shortened."""
    shown = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option.startswith("--") and equals:
            shown.append(f"{option}={without_absolute_path(value)}")
        else:
            shown.append(without_absolute_path(argument))
    return shlex.join(["metafast", *shown])


def write_result(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Write the result as JSON, atomically.

    Raises:
        OSError: the file could not be written.
    """
    write_atomically(path, (json.dumps(result, indent=2) + "\n").encode())
