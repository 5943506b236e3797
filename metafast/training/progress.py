"""Progress bars: shown where somebody watches, silent in a pipe or a log."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import time
from typing import Any

from metafast.training.distributed import ranks


class _Silent:
    def update(self, count: int = 1) -> None: ...

    def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...

    def close(self) -> None: ...


def progress_bar(total: int | None, description: str, unit: str, initial: int = 0, leave: bool = True) -> Any:
    """A tqdm bar if standard error is a terminal and tqdm is installed, else an object that shows nothing.

    Of several processes only the first one shows anything.
    """
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
    """Print a line to standard output, by the first process alone, without tearing a progress bar apart."""
    if not ranks().first:
        return
    tqdm = _tqdm()
    if tqdm is None:
        print(line, flush=True)
    else:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def _tqdm() -> Any:
    if not ranks().first or not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return None
    return importlib.import_module("tqdm").tqdm


class Speed:
    """Episodes per second of training, the pauses between its stretches left out: a mean that forgets."""

    #: Seconds after which a stretch counts by 1/e.
    MEMORY = 5.0

    def __init__(self) -> None:
        self._episodes = self._seconds = 0.0
        self._last = time.perf_counter()

    def pause(self) -> None:
        """What happened since the last call of either method does not count."""
        self._last = time.perf_counter()

    def add(self, episodes: int) -> None:
        """``episodes`` more are done."""
        now = time.perf_counter()
        keep = math.exp(-(now - self._last) / self.MEMORY)
        self._episodes = keep * self._episodes + episodes
        self._seconds = keep * self._seconds + now - self._last
        self._last = now

    def __str__(self) -> str:
        if not self._seconds:
            return "-- episodes/s"
        speed = self._episodes / self._seconds
        return f"{speed:.{0 if speed >= 10 else 1}f} episodes/s"
