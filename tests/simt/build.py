"""Compiles the CUDA sources for the emulator: build/simt/<kind>/metafast_simt.so.

``python -m tests.simt.build [kind ...]`` builds without running anything. Each library registers the operators of
csrc/cuda under ``torch.ops.metafast_simt`` and is the Python module that controls the emulator. ``CXX`` names the
compiler, ``MAX_JOBS`` the compilations at a time.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
MODULE = "metafast_simt"


class Flags(NamedTuple):
    compile: str
    link: str = ""
    race_check: bool = False


# Without the checks that take half of the compilation and find what the address sanitizer finds as well.
_SANITIZERS = (
    "-fsanitize=address,undefined -fno-sanitize=null,object-size,pointer-overflow,vptr "
    "-fno-sanitize-recover=undefined"
)
# What the compiler inserts hides from its own warning that a variable is set.
_INSTRUMENTED = "-O1 -g1 -Wno-maybe-uninitialized"
KINDS = {
    "plain": Flags("-O2 -g1"),
    "address": Flags(f"{_INSTRUMENTED} {_SANITIZERS}", _SANITIZERS),
    # The calls that the compiler inserts reach the functions of race_check.cpp, not libtsan, which is not linked.
    "race": Flags(f"{_INSTRUMENTED} -fsanitize=thread", race_check=True),
    "coverage": Flags("-O0 -g1 --coverage", "--coverage"),
}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def sanitizer_environment() -> dict[str, str]:
    """What a process that loads the address build has to find in its environment."""
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    paths = [
        subprocess.check_output([*compiler().split(), f"-print-file-name={name}"], text=True).strip()
        for name in libraries
    ]
    return {
        "LD_PRELOAD": " ".join(paths),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


def _fused() -> list[str]:
    """nvcc contracts a product and a sum to one instruction; so does the compiler, where the processor can."""
    info = Path("/proc/cpuinfo")
    x86 = platform.machine() == "x86_64"
    fma = x86 and info.exists() and " fma " in info.read_text()
    return ["-ffp-contract=fast", *(["-mfma"] if fma else [])]


def missing() -> str:
    """What this machine lacks to build the emulator, or nothing."""
    if shutil.which(compiler().split()[0]) is None:
        return f"the emulator needs a C++ compiler, and there is no {compiler()}"
    lacking = [name for name in ("pybind11", "ninja") if importlib.util.find_spec(name) is None]
    return f"the emulator needs {' and '.join(lacking)}: pip install 'metafast[dev]'" if lacking else ""


def _rules(kind: str, build_file: Path) -> None:
    """Write the ninja file; paths are relative to the repository, so that a copy of the folder stays up to date."""
    import ninja
    import pybind11
    import torch

    folder = Path("build", "simt", kind)
    flags = KINDS[kind]
    torch_home = Path(torch.__file__).parent
    system = [torch_home / "include", pybind11.get_include(), sysconfig.get_path("include")]
    common = [
        "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"'-DSIMT_KIND=\"{kind}\"'", "-Icsrc", "-Itests/simt",
        *_fused(), *(f"-isystem {path}" for path in system),
    ]  # fmt: skip
    sources = [*sorted(Path(ROOT, "csrc", "cuda").glob("*.cu")), ROOT / "tests" / "simt" / "module.cpp"]
    text = build_file.with_suffix(".new")
    with text.open("w") as file:
        writer = ninja.Writer(file, width=120)
        writer.variable("builddir", str(folder))
        writer.variable("flags", " ".join([*common, flags.compile]))
        command = f"{compiler()} $flags -MD -MF $out.d -x c++ -c $in -o $out"
        writer.rule("compile", command, depfile="$out.d", deps="gcc", description="$in ($kind)")
        libraries = f"-L{torch_home / 'lib'} -ltorch_cpu"
        writer.rule("link", f"{compiler()} -shared $in -o $out {libraries} {flags.link}", description="$out")
        objects = []
        for source in sources:
            objects.append(str(folder / f"{source.stem}.o"))
            writer.build(objects[-1], "compile", str(source.relative_to(ROOT)), variables={"kind": kind})
        if flags.race_check:
            objects.append(str(folder / "race_check.o"))
            own = {"kind": kind, "flags": " ".join([*common, "-O2 -g1"])}
            writer.build(objects[-1], "compile", "tests/simt/race_check.cpp", variables=own)
        writer.build(str(folder / f"{MODULE}.so"), "link", objects)
    os.replace(text, build_file)


@functools.cache
def _build(kind: str) -> str:
    """Build the library of that kind; what the compiler says if it cannot."""
    import ninja

    folder = ROOT / "build" / "simt" / kind
    folder.mkdir(parents=True, exist_ok=True)
    # The sanitizers' runtime that is preloaded for the tests is not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    jobs = ["-j", os.environ.get("MAX_JOBS", "2")]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _rules(kind, folder / "build.ninja")
        command = [Path(ninja.BIN_DIR, "ninja"), *jobs, "-f", folder / "build.ninja"]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    return done.stdout if done.returncode else ""


def library(kind: str) -> Path:
    """The library of that kind, built if a source or header changed since; a process tries it once."""
    if failure := _build(kind):
        raise RuntimeError(f"the emulator ({kind}) does not compile:\n{failure}")
    return ROOT / "build" / "simt" / kind / f"{MODULE}.so"


@functools.cache
def load(kind: str) -> ModuleType:
    """The module of that kind; a process can hold one, since a library registers its operators when it is loaded."""
    if MODULE in sys.modules:
        raise RuntimeError(f"a {sys.modules[MODULE].kind} build of the emulator is loaded already")
    if kind == "address" and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError(
            "the address build needs the runtimes of the sanitizers preloaded: use 'make sanitize'"
        )
    spec = importlib.util.spec_from_file_location(MODULE, library(kind))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
    return module


def main() -> None:
    kinds = sys.argv[1:] or list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        raise SystemExit(f"no such kind: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    for kind in kinds:
        print(library(kind).relative_to(ROOT))


if __name__ == "__main__":
    main()
