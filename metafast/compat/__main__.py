"""``python -m metafast.compat --as higher script.py args``: run a program whose ``import higher`` gets metafast's."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from metafast import compat


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m metafast.compat",
        usage="%(prog)s --as LIBRARY [--as LIBRARY ...] (script.py | -m module) [argument ...]",
        description="Run a program that is not to be edited on metafast in place of the libraries that it imports.",
    )
    parser.add_argument(
        "--as",
        dest="libraries",
        action="append",
        required=True,
        choices=compat.LIBRARIES,
        metavar="LIBRARY",
        help=f"a library to stand in for: {', '.join(compat.LIBRARIES)}",
    )
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, help="a module to run, and its arguments"
    )
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a Python file to run, and its arguments")
    options = parser.parse_args(arguments)
    command: list[str] = options.module or options.script
    if not command:
        parser.error("expected script.py or -m module")
    compat.install(*options.libraries)
    sys.argv[:] = command
    if options.module:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        return
    script = Path(command[0])
    if not script.is_file():
        parser.error(f"{script}: no such file")
    # As `python script.py` has it, in place of the current folder that -m puts there.
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
