"""``python -m tests.simt.sanitized ARGUMENTS``: ``pytest -q ARGUMENTS`` with the sanitizers' runtimes loaded first."""

import os
import sys

from tests.simt import build

if __name__ == "__main__":
    # Without them: the compiler is not to be watched.
    build.library("address")
    environment = {**os.environ, **build.sanitizer_environment(), "METAFAST_SIMT": "address"}
    os.execve(sys.executable, [sys.executable, "-m", "pytest", "-q", *sys.argv[1:]], environment)
