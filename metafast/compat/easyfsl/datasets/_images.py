"""Image files."""

from __future__ import annotations

import csv
import importlib
import os
from pathlib import Path
from typing import Any


def read_image(path: str | os.PathLike[str]) -> Any:
    """A Pillow image of three channels."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def read_table(path: str | os.PathLike[str], *columns: str) -> list[tuple[str, ...]]:
    """These columns of a CSV file with a header, row after row.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it lacks one of the columns.
    """
    # As pandas does, without the mark that spreadsheets write before the header.
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        lacking = [name for name in columns if name not in (reader.fieldnames or ())]
        if lacking:
            raise ValueError(
                f"specs_file: expected the columns {', '.join(columns)}, {path} lacks {lacking[0]}"
            )
        return [tuple(row[name] for name in columns) for row in reader]


def pandas() -> Any:
    """The module, for what gives a DataFrame.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("pandas")
    except ImportError as error:
        raise ImportError("a DataFrame needs pandas: pip install pandas", name="pandas") from error
