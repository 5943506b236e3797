"""Published data sets that come as pickles, read without letting them run code."""

from __future__ import annotations

import pickle
from collections import OrderedDict, defaultdict
from typing import IO, Any

import numpy as np


def _encode(text: str, encoding: str) -> bytes:
    """What `_codecs.encode` is there for in pickles: bytes written as text."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


_ARRAY = np.zeros(1)
#: All that arrays and plain values are made of, under the names of numpy 1 and 2.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "list"): list,
    ("builtins", "int"): int,
    ("_codecs", "encode"): _encode,
} | {
    (f"numpy.{core}.{module}", name): function
    for core in ("core", "_core")
    for module, name, function in (
        ("multiarray", "_reconstruct", _ARRAY.__reduce__()[0]),
        ("multiarray", "scalar", np.float64(0).__reduce__()[0]),
        ("numeric", "_frombuffer", _ARRAY.__reduce_ex__(5)[0]),
    )
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def load_plain_pickle(file: IO[bytes], where: str) -> dict[str, Any]:
    """A dictionary of arrays and plain values, its keys as text.

    Raises:
        ValueError: a pickle of anything else, which is not made, or a damaged one; `where` names it.
    """
    try:
        values = _PlainUnpickler(file, encoding="bytes").load()
    except Exception as error:  # A damaged pickle raises whatever it stumbles over.
        raise ValueError(f"{where} is no intact pickle of arrays and plain values ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold a dictionary, got {type(values).__name__}")
    return {as_text(key): value for key, value in values.items()}


def as_text(value: object) -> str:
    """Text that Python 2 may have written as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
