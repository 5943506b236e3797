"""The migration pages of drop-in modules: their tables of names and their examples."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest


class Page(NamedTuple):
    """``names`` is the table's (name, status, note); ``blocks`` are the examples."""

    names: list[tuple[str, str, str]]
    blocks: list[str]


def page(library: str) -> Page:
    text = (Path(__file__).parents[1] / "docs" / "migration" / f"{library}.md").read_text()
    return Page(
        re.findall(r"^\| `([\w.]+)` \| (\w+) \| (.*?) ?\|$", text, re.MULTILINE),
        re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL),
    )


def assert_row_is_true(name: str, status: str, note: str) -> None:
    """Whether a name is there, and otherwise says why not."""
    assert status in ("provided", "better", "absent")
    assert note or status == "provided", "say what is better, or why it is absent"
    owner, _, last = f"metafast.compat.{name}".rpartition(".")
    statement = f"from {owner} import {last}"
    if "pytorch-lightning" in note or "utils.lightning" in name:
        if importlib.util.find_spec("pytorch_lightning") is None:
            with pytest.raises(ImportError, match="pip install pytorch-lightning"):
                exec(statement)
            return
        pytest.importorskip("pytorch_lightning")
    if status == "absent":
        with pytest.raises(ImportError, match=r"is not provided: "):
            exec(statement)
    else:
        exec(statement)
