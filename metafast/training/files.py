"""Files that are either complete or untouched: a temporary file in the same folder, synced, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace ``path`` by ``content``; a crash or full disk at any moment leaves the old file as it was.

    Raises:
        OSError: naming ``path``, where the folder is missing or not writable or the disk is full.
    """
    # The file that a link names is replaced, not the link; a pipe or device (/dev/stdout) is written to.
    path = Path(os.path.realpath(path))
    if path.is_fifo() or path.is_char_device():
        with named_errors(path):
            path.write_bytes(content)
        return
    temporary = ""
    try:
        with named_errors(path, "; the file that was there is unchanged"):
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            # mkstemp makes the file private; give it the permissions that open() would have.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


@contextlib.contextmanager
def named_errors(path: Path, if_there: str = "") -> Iterator[None]:
    """Within, an OSError becomes one that names ``path``, and adds ``if_there`` where that file exists."""
    try:
        yield
    except OSError as error:
        there = if_there if os.path.exists(path) else ""
        raise OSError(error.errno, f"could not write {path} ({error.strerror or error}){there}") from error


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Delete the temporary files of writes to ``folder / name`` that a kill cut short."""
    for name in names:
        for path in folder.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut (folders cannot be opened on Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
