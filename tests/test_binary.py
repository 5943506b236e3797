"""The compiled library asks for nothing that torch 2.11 and Python 3.10 do not have."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import metafast._C
from metafast._library import operator

ROOT = Path(__file__).parents[1]
LIBRARY = Path(metafast._C.__file__)
FLOOR = (2, 11)
#: What the module needs of the stable ABI of Python 3.10; extend it only by names in that ABI.
PYTHON = {
    *("PyModule_Create2", "_Py_Dealloc", "_Py_NoneStruct", "PyTuple_Pack", "PyType_GetFlags"),
    *("PyErr_Format", "PyErr_NoMemory", "PyErr_Occurred", "PyExc_TypeError", "PyExc_ValueError"),
    *("PyByteArray_AsString", "PyByteArray_FromStringAndSize", "PyBytes_AsStringAndSize"),
    *(
        "PyList_Append",
        "PyList_GetItem",
        "PyList_New",
        "PyList_SetItem",
        "PyList_Size",
        "PyList_Type",
        "PySet_Add",
        "PySet_New",
    ),
    *(
        "PyLong_AsLongLong",
        "PyLong_AsLongLongAndOverflow",
        "PyLong_AsSsize_t",
        "PyLong_AsUnsignedLongLong",
        "PyLong_FromLongLong",
        "PyLong_FromSsize_t",
        "PyLong_Type",
    ),
    "PyCapsule_GetPointer",
    *("PyObject_CallFunctionObjArgs", "PyObject_CallMethod", "PyObject_GetItem"),
    *("PySequence_GetItem", "PySequence_List", "PySequence_Size"),
}
#: In libtorch_cuda only: weak, so that the library loads in a CPU-only torch too.
CUDA_ONLY = {"aoti_torch_get_current_cuda_stream"}
WEAK = 2


class Symbol(NamedTuple):
    name: str
    binding: int = 1
    defined: bool = False


def read_dynamic(path: Path) -> tuple[list[Symbol], list[str]]:
    """The dynamic symbols and the needed libraries of a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", f"{path} is not a 64-bit little-endian ELF library"
    start, size, count = (*struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HH", data, 58))
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]

    def text(section: int, offset: int) -> str:
        begin = sections[section][4] + offset
        return data[begin : data.index(b"\0", begin)].decode()

    symbols, needed = [], []
    for _, kind, _, _, offset, length, link, _, _, _ in sections:
        if kind == 11:  # SHT_DYNSYM
            for at in range(offset + 24, offset + length, 24):
                name, info, _, index = struct.unpack_from("<IBBH", data, at)
                symbols.append(Symbol(text(link, name), info >> 4, index != 0))
        elif kind == 6:  # SHT_DYNAMIC
            for at in range(offset, offset + length, 16):
                tag, value = struct.unpack_from("<QQ", data, at)
                if tag == 1:  # DT_NEEDED
                    needed.append(text(link, value))
    return symbols, needed


def shims() -> dict[str, tuple[int, int]]:
    """Every C function of torch's stable ABI with the version that brought it; (0, 0) where that is before 2.10."""
    include = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    found: dict[str, tuple[int, int]] = {}
    aoti = "inductor/aoti_torch"
    for header in ("stable/c/shim.h", f"{aoti}/c/shim.h", f"{aoti}/generated/c_shim_aten.h"):
        blocks: list[tuple[int, int]] = []
        for line in (include / header).read_text().splitlines():
            if re.match(r"\s*#\s*if", line):
                since = re.search(r"TORCH_FEATURE_VERSION >= TORCH_VERSION_(\d+)_(\d+)", line)
                blocks.append((int(since[1]), int(since[2])) if since else (0, 0))
            elif re.match(r"\s*#\s*endif", line):
                blocks.pop()
            else:
                for name in re.findall(r"\b((?:aoti_)?torch_\w+)\(", line):
                    found.setdefault(name, max(blocks, default=(0, 0)))
    return found


SHIMS = shims()


def complaints(symbols: Iterable[Symbol]) -> list[str]:
    """One sentence for every undefined symbol that the oldest supported torch or Python may lack."""
    found = []
    for name, binding, defined in symbols:
        if defined:
            continue
        if re.match(r"_?Py", name) and name not in PYTHON:
            found.append(f"{name}: not known to be in the stable ABI of Python 3.10")
        elif re.match(r"(aoti_)?torch_", name):
            if name not in SHIMS:
                found.append(f"{name}: not in torch's stable shim")
            elif SHIMS[name] > FLOOR:
                found.append(f"{name}: newer than torch {FLOOR[0]}.{FLOOR[1]}")
            elif name in CUDA_ONLY and binding != WEAK:
                found.append(f"{name}: has to be weak, a CPU-only torch does not have it")
        elif re.match(r"_Z", name) and re.search(r"N[KVrRO]*(2at|3c10|5torch|5caffe2)", name):
            found.append(f"{name}: a C++ symbol of torch")
    return found


def test_the_library_needs_nothing_newer_than_its_floor() -> None:
    symbols, _ = read_dynamic(LIBRARY)
    assert {"torch_call_dispatcher", "PyModule_Create2"} <= {s.name for s in symbols if not s.defined}
    assert not complaints(symbols)


def test_the_headers_tell_the_versions() -> None:
    assert SHIMS["aoti_torch_get_dtype"] == (0, 0)
    assert SHIMS["torch_call_dispatcher"] == (2, 10)
    assert SHIMS["torch_from_blob"] == (2, 11)


@pytest.mark.parametrize(
    ("symbol", "reason"),
    [
        # From torch 2.12; the headers of 2.11 do not know it at all.
        (Symbol("torch_tag_core"), "newer than torch 2.11|not in torch's stable shim"),
        (Symbol("aoti_torch_invented"), "not in torch's stable shim"),
        (Symbol("aoti_torch_get_current_cuda_stream"), "has to be weak"),
        (Symbol("_ZN3c106detail14torchCheckFailEPKcS2_jRKSs"), r"a C\+\+ symbol of torch"),
        (Symbol("_ZNK2at6Tensor3addERKS0_"), r"a C\+\+ symbol of torch"),
        (Symbol("_ZN5torch7Library4_defE"), r"a C\+\+ symbol of torch"),
        (Symbol("_ZTVN5torch8autograd4NodeE"), r"a C\+\+ symbol of torch"),
        (Symbol("PyUnicode_AsUTF8"), "stable ABI of Python"),
        (Symbol("_PyObject_GetDictPtr"), "stable ABI of Python"),
    ],
    ids=lambda value: value.name if isinstance(value, Symbol) else "",
)
def test_the_check_rejects(symbol: Symbol, reason: str) -> None:
    (found,) = complaints([symbol])
    assert re.search(reason, found)
    assert not complaints([symbol._replace(defined=True)])


def test_cuda_only_functions_are_weak_in_a_cuda_build() -> None:
    symbols, _ = read_dynamic(LIBRARY)
    weak = {s.name for s in symbols if s.binding == WEAK and not s.defined}
    built_with_cuda = '"cuda": null' not in operator("build_info")()
    assert (weak >= CUDA_ONLY) == built_with_cuda


def test_libraries_and_exports() -> None:
    symbols, needed = read_dynamic(LIBRARY)
    assert LIBRARY.name == "_C.abi3.so"
    # libtorch brings libtorch_cuda along where there is one; libtorch_python would tie the library to one Python.
    assert "libtorch.so" in needed
    assert not [
        name for name in needed if re.match("libtorch_python|libtorch_cuda|libc10_cuda|libcudart", name)
    ]
    # Names with an underscore in front are the linker's and the C++ library's.
    assert [s.name for s in symbols if s.defined and not s.name.startswith("_")] == ["PyInit__C"]


def test_one_floor_everywhere() -> None:
    major, minor = FLOOR
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in (ROOT / "setup.py").read_text()
    bounds = re.findall(r'"torch([^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert len(bounds) == 2 and set(bounds) == {f">={major}.{minor}"}
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000" in (ROOT / "Makefile").read_text()
