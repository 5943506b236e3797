"""Data sets from tensors, arrays and tables of features."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from metafast.data.classes import FeatureClasses, ImageClasses

_LARGEST = float(np.finfo(np.float32).max)
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")


def tensors(
    x: Tensor | ArrayLike,
    y: Tensor | ArrayLike,
    names: Sequence[str] | None = None,
    rotations: bool = False,
) -> ImageClasses | FeatureClasses:
    """A data set of labelled rows: images, feature vectors, token numbers.

    Args:
        x: `[N, ...]`, a tensor on any device or an array. uint8 or floating-point rows
            `[N, channels, height, width]` become :class:`ImageClasses`, all others
            :class:`FeatureClasses`, except uint8 rows, which are refused there as images without channels.
        y: `[N]`, their labels in any order: integers, or strings in an array or a list.
        names: a name for each of the labels, which are then `0..len(names)-1`; without it the classes are
            named after their labels.
        rotations: whether images rotated by 90, 180 and 270 degrees are classes of their own.

    Returns:
        The rows sorted by class, in their own order within it, and the classes sorted by label.

    Raises:
        TypeError: labels of another type.
        ValueError: shapes that do not fit together, a label without a name, a name without a row.
    """
    rows = x if isinstance(x, Tensor) else torch.from_numpy(np.array(x))
    if rows.dim() < 2:
        raise ValueError(f"x must have shape [N, ...], got {list(rows.shape)}")
    rows, starts, sizes, found = _grouped(rows, _labels(y), names)
    if rows.dim() == 4 and (rows.dtype == torch.uint8 or rows.is_floating_point()):
        return ImageClasses(rows, starts, sizes, found, rotations)
    if rows.dtype == torch.uint8:
        raise ValueError(
            f"x must have shape [N, channels, height, width] if it is uint8, got {list(rows.shape)}; "
            "add a dimension for the channels, or convert what is no image to another dtype"
        )
    if rotations:
        raise ValueError(f"rotations needs images [N, channels, height, width], got {list(rows.shape)}")
    return FeatureClasses(rows, starts, sizes, found)


def _grouped(
    rows: Tensor, labels: NDArray[Any], names: Sequence[str] | None
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """The rows sorted by label, and the tables of their classes."""
    if labels.shape != rows.shape[:1]:
        raise ValueError(
            f"y must have shape [{len(rows)}], a label for each row of x, got {list(labels.shape)}"
        )
    if not len(rows):
        raise ValueError("x must hold at least one row, got none")
    found, number, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if names is None:
        names = [str(label) for label in found.tolist()]
    elif found.tolist() != list(range(len(names))):
        raise ValueError(
            f"y must hold the labels 0..{len(names) - 1}, one for each of names, got {found[:10].tolist()}"
            f"{' and more' if len(found) > 10 else ''}"
        )
    order = torch.from_numpy(number.argsort(kind="stable")).to(rows.device)
    starts = torch.from_numpy(sizes.cumsum() - sizes)
    return rows.index_select(0, order), starts, torch.from_numpy(sizes), tuple(names)


def _labels(y: Any) -> NDArray[Any]:
    labels = y.cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if labels.dtype.kind not in "iuU":
        raise TypeError(f"y must hold integers or strings, got {labels.dtype}")
    return labels


def feature_table(
    path: str | os.PathLike[str],
    label: str = "label",
    features: Sequence[str] | None = None,
) -> FeatureClasses:
    """A data set of feature vectors from a file, each row with its label.

    Two kinds of files:

    - `.csv` (commas) or `.tsv` (tabs), UTF-8, the first line with the names of the columns: the column
      `label` holds the labels, any text, and the columns `features` (all others if None) numbers.
    - `.npz` of numpy: the array `label`, `[N]` integers or strings, and the array `features[0]`
      ("features" if None), `[N, ...]` numbers.

    Returns:
        float32 rows, sorted by class, in the order of the file within it; the classes are named after their
        labels and sorted, integers by value.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a column or array that is not there, a row of another length, an
            entry that is no finite number; the message names the file and the line.
    """
    path = Path(path)
    readers = {".csv": _read_text, ".tsv": _read_text, ".npz": _read_npz}
    if path.suffix.lower() not in readers:
        raise ValueError(f"path must end in .csv, .tsv or .npz, got {str(path)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"path must be a file, got {str(path)!r}, which is not there")
    rows, labels = readers[path.suffix.lower()](path, label, features)
    try:
        return FeatureClasses(*_grouped(torch.from_numpy(rows), _labels(labels), None))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {str(error).replace('y must', f'{label} must', 1)}") from error


def _read_text(path: Path, label: str, features: Sequence[str] | None) -> tuple[NDArray[Any], NDArray[Any]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        header = next(lines, [])
        columns = [name for name in header if name != label] if features is None else list(features)
        for name in (label, *columns):
            if header.count(name) != 1:
                raise ValueError(
                    f"{path}: the first line must name the column {name!r} once, got {', '.join(header)}"
                )
        if not columns:
            raise ValueError(f"{path}: there must be a column besides {label!r}")
        places = [header.index(name) for name in columns]
        label_place = header.index(label)
        rows: list[list[float]] = []
        labels: list[str] = []
        for line in lines:
            if not line:
                continue
            where = f"{path}, line {lines.line_num}"
            if len(line) != len(header):
                raise ValueError(f"{where}: expected {len(header)} entries, got {len(line)}")
            rows.append([_number(line[at], where, name) for at, name in zip(places, columns, strict=True)])
            labels.append(line[label_place])
    if not rows:
        raise ValueError(f"{path}: there must be at least one row")
    whole = all(_WHOLE.fullmatch(text) for text in labels)
    return np.array(rows, dtype=np.float32), np.array([int(text) for text in labels] if whole else labels)


def _number(text: str, where: str, column: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) <= _LARGEST:
        raise ValueError(f"{where}: column {column!r} must hold finite numbers, got {text!r}")
    return value


def _read_npz(path: Path, label: str, features: Sequence[str] | None) -> tuple[NDArray[Any], NDArray[Any]]:
    name = "features" if features is None else features[0]
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            for wanted in (name, label):
                if wanted not in arrays.files:
                    raise ValueError(f"there must be an array {wanted!r}, got {', '.join(arrays.files)}")
            rows, labels = arrays[name], arrays[label]
    except (BadZipFile, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if rows.dtype.kind not in "fiub" or rows.ndim < 2:
        raise ValueError(f"{path}: {name!r} must be numbers [N, ...], got {rows.dtype} {list(rows.shape)}")
    wrong = ~(abs(rows) <= _LARGEST)
    if wrong.any():
        where = tuple(np.argwhere(wrong)[0].tolist())
        raise ValueError(f"{path}: {name!r} must hold finite numbers, got {rows[where]} at {list(where)}")
    return rows.astype(np.float32), labels
