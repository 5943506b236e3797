"""Decoded images on disk: complete or absent, whatever is killed, and made by one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np
from numpy.typing import NDArray


class Decoded(NamedTuple):
    """Pixels `[N, channels, size, size]` uint8, and the numbers of the files that gave none with the reasons."""

    pixels: NDArray[np.uint8]
    failed: dict[int, str]


def key_of(description: Any) -> str:
    """A file name for what JSON values describe."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:32]


def cached(folder: Path | None, key: str, decode: Callable[[], Decoded]) -> Decoded:
    """What `decode` gives, from the file `<key>.npz` in `folder` if it is there, else kept in it.

    Of several processes that ask at once one decodes while the others wait for it. The file is written under
    another name, synced and renamed, so that a kill at any moment leaves it complete or absent; a file that
    is damaged is made anew. Where nothing can be written a warning says so, and the result is there all
    the same. It is a zip of two numpy arrays without objects, and is read without pickle.
    """
    if folder is None:
        return decode()
    path = folder / f"{key}.npz"
    found = load(path)
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            locked = stack.enter_context(_lock(folder / f"{key}.lock"))
        except OSError as error:
            _warn(folder, error)
            return decode()
        # Another process may have finished it while this one waited.
        found = load(path) if locked else None
        if found is not None:
            return found
        decoded = decode()
        try:
            save(path, decoded, alone=locked)
        except OSError as error:
            _warn(folder, error)
        return decoded


def load(path: Path) -> Decoded | None:
    """What a complete file holds, or None."""
    try:
        # np.load leaves a file open that it opened itself and cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            pixels, numbers, reasons = arrays["pixels"], arrays["failed"], arrays["reasons"]
    except (OSError, BadZipFile, EOFError, KeyError, TypeError, ValueError, RuntimeError, ZlibError):
        return None
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        return None
    return Decoded(pixels, dict(zip(numbers.tolist(), reasons.tolist(), strict=True)))


def save(path: Path, decoded: Decoded, alone: bool) -> None:
    """Write the file; `alone` promises that no other process writes the same one."""
    # Under the one name, what a killed process left behind is written over and not added to.
    temporary = path.with_name(f"{path.stem}{'' if alone else f'.{uuid.uuid4().hex}'}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                pixels=decoded.pixels,
                failed=np.array(list(decoded.failed), dtype=np.int64),
                reasons=np.array(list(decoded.failed.values()), dtype=np.str_),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Hold a lock file, which the system lets go of when the process dies; False where there are no locks."""
    with path.open("ab") as file:
        yield _acquire(file.fileno())


def _acquire(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:
        return _acquire_on_windows(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _acquire_on_windows(handle: int) -> bool:
    msvcrt: Any = __import__("msvcrt")
    os.lseek(handle, 0, os.SEEK_SET)
    while True:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            return True
        except PermissionError:
            time.sleep(0.1)
        except OSError:
            return False


def _warn(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"the decoded images are not kept: {folder} cannot be written ({error.strerror or error}); "
        "give another folder as cache, or cache=False",
        stacklevel=5,
    )
