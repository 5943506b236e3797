"""Build ``metafast._C``: one abi3 library on the stable ABI of torch 2.11, with the CUDA sources if there is nvcc.

Environment: ``METAFAST_CUDA=0`` leaves CUDA out, ``CUDA_HOME`` names the toolkit, ``TORCH_CUDA_ARCH_LIST`` the
GPUs (default: 7.5 8.0 9.0, and PTX for newer ones), ``MAX_JOBS`` the parallel compilations, ``CXX`` the C++
compiler.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


def cuda_home() -> str | None:
    """The toolkit to build with, or None for a CPU-only build."""
    if os.environ.get("METAFAST_CUDA", "1") == "0":
        return None
    if home := os.environ.get("CUDA_HOME"):
        if not Path(home, "bin", "nvcc").exists():
            raise SystemExit(f"CUDA_HOME={home} holds no bin/nvcc; correct it or set METAFAST_CUDA=0")
        return home
    if nvcc := shutil.which("nvcc"):
        home = Path(nvcc).resolve().parent.parent
        # nvcc on PATH may be a wrapper script outside the toolkit.
        candidates = [home, Path("/usr/local/cuda")]
        return next((str(c) for c in candidates if (c / "include" / "cuda_runtime.h").exists()), None)
    return None


def extension() -> cpp_extension.CppExtension:
    root = Path(__file__).parent
    sources = [root / "csrc" / "library.cpp", *sorted((root / "csrc" / "cpu").glob("*.cpp"))]
    defines = [TORCH_TARGET]
    # torch's headers are system headers here: warnings are errors in our own sources only.
    system = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    cxx = [
        "-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi",
    ]  # fmt: skip
    compile_args = {"cxx": [*cxx, *WARNINGS, *system, *defines]}
    link_args = ["-s", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    libraries, library_dirs = [], []
    if home := cuda_home():
        cpp_extension.CUDA_HOME = home  # torch leaves it None in its CPU-only build
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "7.5;8.0;9.0+PTX")
        sources += sorted((root / "csrc" / "cuda").glob("*.cu"))
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"]
        defines += ["-DUSE_CUDA"]
        compile_args["cxx"] += [
            "-DUSE_CUDA", f'-DMETAFAST_CUDA_ARCHITECTURES="{architectures}"', f"-isystem{home}/include",
        ]  # fmt: skip
        compile_args["nvcc"] = [
            "-std=c++17", "-O3", "--Werror=all-warnings", "-Xcompiler=-fvisibility=hidden,-Wall",
            *(path.replace("-isystem", "-isystem=", 1) for path in system), *defines,
        ]  # fmt: skip
        libraries, library_dirs = ["cudart_static", "rt", "dl", "pthread"], [f"{home}/lib64", f"{home}/lib"]
    return cpp_extension.CppExtension(
        "metafast._C",
        [str(source.relative_to(root)) for source in sources],
        include_dirs=[str(root / "csrc")],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        libraries=libraries,
        library_dirs=library_dirs,
        py_limited_api=LIMITED_API,
    )


# The ninja of the "ninja" package lies beside the interpreter, which need not be on PATH.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=bool(shutil.which("ninja")))},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
