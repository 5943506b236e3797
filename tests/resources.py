"""What nvcc says of each kernel: registers, shared memory, and spills, of which there have to be none.

``python -m tests.resources LOG ...`` reads the logs of ``nvcc --resource-usage`` that ``make cuda`` keeps, prints a
table and ends with 1 if a kernel spills or keeps an array in local memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Kernel(NamedTuple):
    """Bytes, but for the registers of a thread."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spilled: int


def read(log: str) -> list[Kernel]:
    """The kernels that a log of nvcc tells of, their names as in the sources.

    Raises:
        ValueError: a kernel without its numbers: the format of the log is another.
    """
    found = []
    for part in re.split(r"Compiling entry function ", log)[1:]:
        entry = re.match(r"'(\w+)' for '(\w+)'", part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers.*", part)
        if not (entry and frame and used):
            raise ValueError(f"nvcc's log is not as expected: {part[:200]!r}")
        shared = re.search(r"(\d+) bytes smem", used[0])
        found.append(
            Kernel(
                entry[1],
                entry[2],
                int(used[1]),
                int(shared[1]) if shared else 0,
                int(frame[1]),
                int(frame[2]) + int(frame[3]),
            )
        )
    names = subprocess.run(
        ["c++filt"], input="\n".join(k.name for k in found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [k._replace(name=short(name)) for k, name in zip(found, names, strict=True)]


def short(name: str) -> str:
    """A kernel's name with its template arguments, without namespaces, result and parameters."""
    name = re.sub(r"\(metafast::cuda::(\w+)\)(\d)", r"\1 \2", name)
    name = re.sub(r"\((anonymous namespace)\)::|\b(metafast|cuda|c10|torch|headeronly)::", "", name)
    return re.sub(r"^void |\([^()]*(\([^()]*\)[^()]*)*\)$", "", name)


def table(kernels: Iterable[Kernel]) -> str:
    rows = [("kernel", "for", "registers", "shared", "stack", "spilled")]
    rows += [tuple(map(str, k)) for k in sorted(set(kernels))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if c < 2 else cell.rjust(w)
            for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main() -> None:
    kernels = [k for path in sys.argv[1:] for k in read(Path(path).read_text())]
    if not kernels:
        raise SystemExit("no kernel in the logs")
    print(table(kernels))
    bad = [k for k in kernels if k.spilled or k.stack]
    print(f"{len(kernels)} kernels, {len(bad)} with spills or arrays in local memory")
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
