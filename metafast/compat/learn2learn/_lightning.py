"""PyTorch Lightning, where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def lightning() -> Any:
    """The module ``pytorch_lightning``, or ``lightning.pytorch``.

    Raises:
        ImportError: neither is installed.
    """
    for package, name in (("pytorch_lightning", "pytorch_lightning"), ("lightning", "lightning.pytorch")):
        if importlib.util.find_spec(package) is not None:
            return importlib.import_module(name)
    raise ImportError("learn2learn's Lightning modules need PyTorch Lightning: pip install pytorch-lightning")
