"""Progress bars: shown where somebody watches, silent in a pipe or a log."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any


class _Silent:
    def update(self, count: int = 1) -> None: ...

    def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...

    def close(self) -> None: ...


def progress_bar(total: int | None, description: str, unit: str, initial: int = 0, leave: bool = True) -> Any:
    """A tqdm bar if standard error is a terminal and tqdm is installed, else an object that shows nothing."""
    tqdm = _tqdm()
    if tqdm is None:
        return _Silent()
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        leave=leave,
        file=sys.stderr,
        dynamic_ncols=True,
    )


def say(line: str) -> None:
    """Print a line to standard output without tearing a progress bar apart."""
    tqdm = _tqdm()
    if tqdm is None:
        print(line, flush=True)
    else:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def _tqdm() -> Any:
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return None
    return importlib.import_module("tqdm").tqdm
