"""What a reader has to know of the machine that made a result; needs no build of metafast."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def cpu_model() -> str:
    """The processor's model name and nothing else about the machine."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def output(command: Sequence[str]) -> str:
    """What the command prints, or nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit(root: Path) -> str:
    """The checkout's commit, with a note if files were changed since; nothing without git."""
    git = ["git", "-C", str(root)]
    found = output([*git, "rev-parse", "HEAD"])
    changed = output([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{found} with changes" if found and changed else found


def nvcc() -> Path | None:
    """The compiler that setup.py takes."""
    if home := os.environ.get("CUDA_HOME"):
        found = Path(home, "bin", "nvcc")
        return found if found.exists() else None
    on_path = shutil.which("nvcc")
    return Path(on_path) if on_path else None


def driver() -> str:
    """Version of the NVIDIA driver."""
    if found := output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]):
        return found.splitlines()[0]
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return match[0] if match else ""


def facts(root: Path) -> dict[str, Any]:
    """The first CUDA device, the versions and the processor that feeds it."""
    properties = torch.cuda.get_device_properties(0)
    compiler = nvcc()
    release = re.search(r"V(\d+(\.\d+)+)", output([str(compiler), "--version"]) if compiler else "")
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "devices": torch.cuda.device_count(),
        "driver": driver() or "unknown",
        "cuda": torch.version.cuda,
        "nvcc": release[1] if release else "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_model(),
        "commit": commit(root) or "unknown",
    }
