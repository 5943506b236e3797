"""Files of FEAT's authors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from metafast.compat import absent
from metafast.compat.easyfsl.methods.utils import strip_prefix
from metafast.compat.easyfsl.modules.feat_resnet12 import FEATResNet12, feat_resnet12

__getattr__ = absent(__name__)


def feat_resnet12_from_checkpoint(
    checkpoint_path: str | os.PathLike[str], device: torch.device | str, **kwargs: Any
) -> FEATResNet12:
    """:func:`feat_resnet12` with the parameters ``encoder.*`` of a file.

    Args:
        checkpoint_path: a file of a dict with the state dict ``params``, which is not let run code.
        device: where the network is.
        **kwargs: of :class:`FEATResNet12`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: parameters that are not in it.
    """
    model = feat_resnet12(**kwargs)
    load_part(model, read_parameters(checkpoint_path, device), "encoder.")
    return model.to(device)


def read_parameters(path: str | os.PathLike[str], device: torch.device | str) -> Mapping[str, Any]:
    """``params`` of a file."""
    content = torch.load(os.fspath(path), map_location=device, weights_only=True)
    if not isinstance(content, Mapping) or "params" not in content:
        raise ValueError(f"checkpoint_path: expected a file of a dict with params, got {path}")
    parameters: Mapping[str, Any] = content["params"]
    return parameters


def load_part(module: nn.Module, parameters: Mapping[str, Any], prefix: str) -> None:
    """Load the parameters whose names begin so, and leave the others."""
    missing = module.load_state_dict(strip_prefix(parameters, prefix), strict=False).missing_keys
    if missing:
        raise ValueError(f"checkpoint_path: expected all of {prefix}*, got none for {', '.join(missing)}")
