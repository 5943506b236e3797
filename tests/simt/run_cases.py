"""Runs cases of cases.cuh in one build of the emulator.

``python tests/simt/run_cases.py LIBRARY`` reads a JSON list of ``[case, order, seed, fatal]`` and writes the list of
what each said: ``""`` where it passed, the message of its RuntimeError, or, in a process of its own where it is
expected to be ``fatal``, the report of the sanitizer that ended it. torch's libraries have to be on LD_LIBRARY_PATH;
torch itself is not imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from types import ModuleType


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("metafast_simt", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(module: ModuleType, case: str, order: str, seed: int) -> str:
    module.configure(order, seed)
    try:
        module.run(case)
    except RuntimeError as error:
        return str(error)
    return ""


def _run_in_child(module: ModuleType, case: str, order: str, seed: int) -> str:
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            os.write(2, _run(module, case, order, seed).encode())
            os._exit(0)
        os.waitpid(child, 0)
        said.seek(0)
        return said.read().decode(errors="replace")


def main() -> None:
    module = _load(sys.argv[1])
    asked = json.load(sys.stdin)
    print(json.dumps([(_run_in_child if fatal else _run)(module, *case) for *case, fatal in asked]))


if __name__ == "__main__":
    main()
