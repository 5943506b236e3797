"""Which lines of the CUDA sources do the tests reach, by gcov in the emulator's coverage build?

``python -m tests.simt.coverage`` runs the tests of the emulated kernels, prints a table of the files in csrc/cuda and
csrc/math, and ends with 1 if a line is neither reached nor explained below.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.simt import build

TESTS = (
    "tests/test_values.py",
    "tests/test_errors.py",
    "tests/test_derivatives.py",
    "tests/test_emulated.py",
    "tests/test_linear_head.py",
    "tests/test_mlp.py",
    "tests/test_matching.py",
    "tests/test_ridge.py",
    "tests/test_conv_block.py",
    "tests/test_norm_relu_pool.py",
)
#: Not those that only repeat what others reach: in more orders, at more points, with every combination of options.
SELECTION = (
    "not emulated-reverse and not emulated-random and not FiniteDifferences and not test_every_option "
    "and not same_bits and not python_threads"
)
#: (file, a part of the line) -> why no test reaches it.
EXPLAINED: Mapping[tuple[str, str], str] = {
    ("csrc/cuda/rows.cuh", "return pair.sum"): "inner products are wanted in parts alone",
    ("csrc/cuda/norm_relu_pool.cu", "too many pixels"): "needs more than 2^31 windows",
    ("csrc/cuda/features.cuh", "too many tasks and rows for one call"): "needs more than 2^31 blocks",
}


def counts(folder: Path) -> dict[str, dict[int, int]]:
    """File -> line -> how often it ran, over all objects and all instances of a template."""
    gcov = os.environ.get("GCOV", "gcov")
    total: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for notes in sorted(folder.glob("*.gcno")):
        done = subprocess.run(
            [gcov, "--json-format", "--stdout", str(notes)],
            cwd=build.ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for document in done.stdout.splitlines():
            for file in json.loads(document)["files"]:
                name = os.path.normpath(file["file"])
                if name.startswith(("csrc/cuda/", "csrc/math/")):
                    for line in file["lines"]:
                        total[name][line["line_number"]] += line["count"]
    return total


def unreached(found: Mapping[str, Mapping[int, int]]) -> Iterable[tuple[str, int, str, str]]:
    """File, line, its text and the explanation, or nothing, of every line that never ran."""
    for name, lines in sorted(found.items()):
        text = (build.ROOT / name).read_text().splitlines()
        for number in sorted(number for number, count in lines.items() if count == 0):
            line = text[number - 1].strip()
            if line == "}":
                continue  # of a function that has returned before
            reasons = [why for (file, part), why in EXPLAINED.items() if file == name and part in line]
            yield name, number, line, reasons[0] if reasons else ""


def main() -> None:
    folder = build.library("coverage").parent
    for data in folder.glob("*.gcda"):
        data.unlink()
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", SELECTION, *TESTS],
        cwd=build.ROOT,
        env={**os.environ, "METAFAST_SIMT": "coverage"},
        check=True,
    )
    found = counts(folder)
    missing = list(unreached(found))
    if not any(name.endswith(".cuh") for name in found):
        raise SystemExit("gcov told of no kernel")
    for name, lines in sorted(found.items()):
        reached = sum(count > 0 for count in lines.values())
        print(f"{name:30} {reached:4} of {len(lines):4} lines  {100 * reached / len(lines):5.1f} %")
    for name, number, line, why in missing:
        print(f"{name}:{number}: {line}  [{why or 'NOT REACHED'}]")
    if any(not why for *_, why in missing):
        raise SystemExit(1)


if __name__ == "__main__":
    if shutil.which(os.environ.get("GCOV", "gcov")) is None:
        raise SystemExit("the coverage needs gcov, which comes with gcc")
    main()
