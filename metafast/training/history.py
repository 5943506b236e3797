"""The record of a training run: one row per step, kept in memory and appended to a CSV file."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from metafast.training.checkpoint import CheckpointError
from metafast.training.files import named_errors, write_atomically


@dataclass(frozen=True)
class Row:
    """One training step. ``step`` counts from 1; accuracies are fractions; NaN means not measured.

    Attributes:
        loss, accuracy: mean over the query images of the step's episodes, before its update. No accuracy in
            regression.
        learning_rate: of the first parameter group, used by this step's update.
        seconds: wall time of training and validation so far, resumed runs added up.
        validation_accuracy, validation_interval, validation_loss: after this step's update. In regression there is no
            accuracy, the loss is the mean squared error, and the interval is that of the loss.
    """

    step: int
    loss: float
    accuracy: float
    learning_rate: float
    seconds: float
    validation_accuracy: float = math.nan
    validation_interval: float = math.nan
    validation_loss: float = math.nan


COLUMNS = tuple(column.name for column in fields(Row))


@dataclass
class History:
    """Result of :func:`metafast.training.fit`.

    Attributes:
        rows: every step since the first, those before a resume included.
        best_step: the step whose weights the learner holds now.
        best_accuracy: validation accuracy of that step, None without validation and in regression.
        stopped_early: whether training ended because validation got no better, before its last step.
        result: what was run, on what, how long and what came out, as plain values (see ``result.json`` in
            :func:`metafast.training.fit`).
    """

    rows: list[Row] = field(default_factory=list)
    best_step: int = 0
    best_accuracy: float | None = None
    stopped_early: bool = False
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Time spent in training."""
        return self.rows[-1].seconds if self.rows else 0.0

    @property
    def validations(self) -> list[Row]:
        """The rows that hold a validation."""
        return [row for row in self.rows if not math.isnan(row.validation_loss)]

    @property
    def best_validation(self) -> Row | None:
        """The row of ``best_step``, None without validation."""
        # Rows are those of the steps 1, 2, 3 ...
        row = self.rows[self.best_step - 1] if 0 < self.best_step <= len(self.rows) else None
        return None if row is None or math.isnan(row.validation_loss) else row

    @property
    def validations_since_best(self) -> int:
        """How many validations in a row were no better than the best one."""
        return sum(row.step > self.best_step for row in self.validations)


class HistoryFile:
    """``metrics.csv``; without a path nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._taken = 0
        self._pending: list[Row] = []

    def restart(self, rows: list[Row]) -> None:
        """Replace the file by ``rows``: none for a new run, those up to the checkpoint for a resumed one."""
        self._taken = len(rows)
        if self.path is not None:
            lines = [",".join(COLUMNS), *(_line(row) for row in rows)]
            write_atomically(self.path, ("\n".join(lines) + "\n").encode())

    def take_new(self, rows: list[Row]) -> list[Row]:
        """The rows that were not taken before; they wait for the next flush."""
        new = rows[self._taken :]
        self._taken = len(rows)
        self._pending += new
        return new

    def flush(self) -> list[Row]:
        """Append what is pending and sync it to the disk; gives those rows."""
        rows, self._pending = self._pending, []
        if self.path is None:
            return rows
        with named_errors(self.path), open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write("".join(_line(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
        return rows


def read_history(path: Path, last_step: int) -> list[Row]:
    """Rows of steps 1 to ``last_step``; later rows, and a last row cut short by a kill, are left out.

    Raises:
        CheckpointError: the file does not hold those steps.
    """
    rows: list[Row] = []
    if path.is_file():
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            if tuple(next(reader, [])) != COLUMNS:
                raise CheckpointError(f"resume: {path}: expected the columns {', '.join(COLUMNS)}")
            for values in reader:
                if len(rows) == last_step:
                    break
                try:
                    numbers = [math.nan if value == "" else float(value) for value in values[1:]]
                    rows.append(Row(int(values[0]), *numbers))
                except (ValueError, TypeError, IndexError):
                    break
    if [row.step for row in rows] != list(range(1, last_step + 1)):
        raise CheckpointError(f"resume: {path}: expected the steps 1 to {last_step}, found {len(rows)} rows")
    return rows


def _line(row: Row) -> str:
    values = (getattr(row, column) for column in COLUMNS)
    return ",".join("" if isinstance(value, float) and math.isnan(value) else repr(value) for value in values)
