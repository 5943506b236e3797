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

import torch

from metafast.training.files import write_atomically


def environment(device: torch.device) -> dict[str, object]:
    """Versions, device and threads. No names of hosts or users."""
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
        "python": platform.python_version(),
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
    }


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
