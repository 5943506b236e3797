"""How the benchmarks write times and tables; needs nothing but Python."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """Three digits in the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return (
                f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:.0f} {unit}"
            )
    return f"{seconds * 1e6:.3g} us"


def bound(value: float | None, at_most: bool) -> str:
    return "" if value is None else f"{'<= ' if at_most else ''}{value:g}x"


def table(rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
