"""The rows of a training run for TensorBoard, where it is installed (``pip install metafast[train]``)."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metafast.training.files import named_errors
from metafast.training.history import Row

_CURVES = {
    "loss": "training/loss",
    "accuracy": "training/accuracy",
    "learning_rate": "training/learning_rate",
    "validation_accuracy": "validation/accuracy",
    "validation_interval": "validation/interval_95",
    "validation_loss": "validation/loss",
}


class EventFiles:
    """The folder of TensorBoard's files; without a folder, or without TensorBoard, nothing is written.

    Args:
        folder: where they go.
        step: the step that the run begins after; TensorBoard shows no events of other runs from there on.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self._folder = folder if importlib.util.find_spec("tensorboard") is not None else None
        self._step = step
        self._writer: Any = None

    def write(self, rows: Iterable[Row]) -> None:
        """Add what the rows hold, and hand it to the disk.

        Raises:
            OSError: naming the folder.
        """
        if self._folder is None:
            return
        with named_errors(self._folder):
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._folder), purge_step=self._step + 1)
            for row in rows:
                for column, curve in _CURVES.items():
                    value = getattr(row, column)
                    if not math.isnan(value):
                        self._writer.add_scalar(curve, value, row.step)
            self._writer.flush()

    def close(self) -> None:
        """Close the files."""
        if self._writer is not None:
            # What did not get to the disk was reported when it was written.
            with contextlib.suppress(OSError):
                self._writer.close()
