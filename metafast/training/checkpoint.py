"""Checkpoints of a training run: everything that the next step depends on."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from metafast.training.files import write_atomically

FORMAT = "metafast-checkpoint-1"
_REQUIRED = {"format", "step", "model", "settings"}


class CheckpointError(ValueError):
    """A file that is no checkpoint, a damaged one, or one that does not fit the run that wants it."""


def save_checkpoint(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write ``content`` (tensors and plain Python values; at least step, model and settings) atomically.

    Raises:
        TypeError: a value that :func:`load_checkpoint` could not read back; what was there before is intact.
        OSError: the file could not be written; what was there before is intact.
    """
    write_atomically(path, packed({"format": FORMAT, **content}))


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of :func:`metafast.training.fit`, its tensors on the CPU.

    Only tensors and plain values are unpickled (``weights_only=True``): a foreign file cannot run code.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, or no checkpoint of metafast.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    # Read first, so that an error of the disk is told apart from one of the content.
    file = io.BytesIO(path.read_bytes())
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch.load reports a damaged file by half a dozen exception types, down to the zip reader's.
        found = re.search(r"WeightsUnpickler error: (.*)", str(error))
        reason = found.group(1) if found else (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"checkpoint: {path} is truncated, damaged or not a checkpoint of metafast ({reason[:120]})"
        ) from error
    if not isinstance(content, dict) or not content.keys() >= _REQUIRED or content["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint: {path} holds something else than a checkpoint of metafast ({FORMAT})"
        )
    return content


def packed(content: Mapping[str, Any]) -> bytes:
    """The bytes of a checkpoint, which were read back: a run that could not be resumed should not get far.

    Raises:
        TypeError: a value that is no tensor and no plain one.
    """
    saved = _saved(content)
    try:
        torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        for name, value in content.items():
            try:
                torch.load(io.BytesIO(_saved(value)), map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                found = re.search(r"GLOBAL (\S+)", str(error))
                kind = "an object" if found is None else found.group(1)
                raise TypeError(
                    f"{name}: expected tensors and plain values (numbers, strings, lists, dicts), "
                    f"which a checkpoint can hold, got {kind} among them"
                ) from error
        raise
    return saved


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def random_states() -> dict[str, Any]:
    """States of the global generators of torch (all devices), numpy and Python, as plain values."""
    version, inner, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state(legacy=False)
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": (version, inner, gauss),
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "key": [int(value) for value in numpy_state["state"]["key"]],
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Undo everything drawn since :func:`random_states`."""
    torch.set_rng_state(states["torch"].cpu())
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner), gauss))
    numpy_state = states["numpy"]
    if numpy_state["bit_generator"] == "MT19937":
        numpy.random.set_state(
            {
                "bit_generator": "MT19937",
                "state": {"key": numpy.array(numpy_state["key"], numpy.uint32), "pos": numpy_state["pos"]},
                "has_gauss": numpy_state["has_gauss"],
                "gauss": numpy_state["gauss"],
            }
        )
    if "cuda" in states and torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
