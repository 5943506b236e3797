"""``metafast doctor``: what metafast runs on here, which kernels it has, and what is wrong, in words; with ``--model``
how an inner loop adapts a model, and what keeps it from exact second-order gradients."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from metafast import distance, prototype, reference, second_order
from metafast._library import keep_pages, operator, vector_bits
from metafast.config import UsageError
from metafast.inner_loop import inner_loop

OLDEST_TORCH = (2, 11)
#: What the packages of an extra are for.
EXTRAS = {
    "train": {
        "tqdm": "progress bars",
        "matplotlib": "pictures",
        "PIL": "image files",
        "tensorboard": "TensorBoard files",
    },
    "bench": {"pytest": "timed cases", "pytest_benchmark": "timed cases", "matplotlib": "charts"},
}
#: Has a CUDA kernel only, and exists for this report.
PROBE = "cuda_probe"


@dataclass(frozen=True)
class Device:
    """A CUDA device; ``error`` tells why a kernel of this build does not run on it."""

    name: str
    capability: tuple[int, int]
    error: str | None = None


@dataclass(frozen=True)
class Findings:
    """All that the report says; :func:`problems` judges it."""

    metafast: str
    torch: str
    torch_cuda: str | None
    devices: tuple[Device, ...]
    nvidia_driver: bool
    compiler: str
    built_cuda: str | None
    built_architectures: str | None
    vector_bits: int
    threads: int
    kernels: dict[str, tuple[bool, bool]]
    wrong: tuple[str, ...]
    keeps_pages: bool
    wait_policy: str | None
    missing: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Problem:
    """Something wrong, with its remedy; ``fatal`` if metafast does not work before it is put right."""

    text: str
    fatal: bool = False


def examine() -> Findings:
    """Look at this machine: versions, devices, kernels, and whether the operators compute what they should."""
    build = json.loads(operator("build_info")())
    try:
        version = importlib.metadata.version("metafast")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed, run from its source"
    return Findings(
        metafast=version,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        devices=tuple(_device(k) for k in range(torch.cuda.device_count())),
        nvidia_driver=shutil.which("nvidia-smi") is not None,
        compiler=build["compiler"],
        built_cuda=build["cuda"],
        built_architectures=build["cuda_architectures"],
        vector_bits=vector_bits(),
        threads=torch.get_num_threads(),
        kernels=_kernels(),
        wrong=_wrong_operators(),
        keeps_pages=keep_pages(),
        wait_policy=os.environ.get("OMP_WAIT_POLICY"),
        missing={
            extra: tuple(name for name in packages if importlib.util.find_spec(name) is None)
            for extra, packages in EXTRAS.items()
        },
    )


def _device(index: int) -> Device:
    error = None
    try:
        x = torch.zeros(4, device=f"cuda:{index}")
        if not bool((operator(PROBE)(x) == 1).all()):
            error = "it returned wrong numbers"
    except (RuntimeError, NotImplementedError) as failure:
        error = str(failure).partition("\n")[0]
    return Device(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), error)


def _kernels() -> dict[str, tuple[bool, bool]]:
    """Whether each operator has a kernel for the CPU and one for CUDA."""
    found = {}
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, _, short = name.partition("::")
        has = tuple(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CPU", "CUDA"))
        if namespace == "metafast" and short != PROBE and any(has):
            found[short] = (has[0], has[1])
    return found


def _wrong_operators() -> tuple[str, ...]:
    """Public operators whose CPU kernel disagrees with the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 37, dtype=torch.float64, generator=generator)
    y = torch.randn(2, 9, 37, dtype=torch.float64, generator=generator)
    x_labels, y_labels = torch.arange(6).remainder(3).expand(2, 6), torch.arange(9).remainder(3).expand(2, 9)
    pairs = {
        f"pairwise_distance({metric})": (
            distance.pairwise_distance(x, y, metric),
            reference.pairwise_distance(x, y, metric),
        )
        for metric in ("sqeuclidean", "euclidean", "cityblock", "cosine")
    }
    pairs["prototypes"] = prototype.prototypes(x, x_labels, 3), reference.prototypes(x, x_labels, 3)
    head = x, x_labels, y, y_labels, 3
    pairs["prototypical_loss"] = (
        prototype.prototypical_loss(*head)[1],
        reference.prototypical_loss(*head)[1],
    )
    return tuple(name for name, (got, wanted) in pairs.items() if not torch.allclose(got, wanted, rtol=1e-9))


def problems(found: Findings) -> list[Problem]:
    """What is wrong, the worst first, each with what to do about it."""
    result = []
    release = re.match(r"(\d+)\.(\d+)", found.torch)
    if release and (int(release[1]), int(release[2])) < OLDEST_TORCH:
        result.append(
            Problem(
                f"torch {found.torch} is older than 2.11: pip install --upgrade 'torch>=2.11'.", fatal=True
            )
        )
    if found.wrong:
        result.append(
            Problem(
                f"wrong results from {', '.join(found.wrong)}: the extension and this machine do not fit. Build it "
                "again here (make clean; make test) and report it if it stays.",
                fatal=True,
            )
        )
    for index, device in enumerate(found.devices):
        if found.built_cuda and device.error:
            result.append(
                Problem(
                    f"CUDA kernels do not run on cuda:{index} ({device.name}, compute capability "
                    f"{device.capability[0]}.{device.capability[1]}): {device.error}. They were built for "
                    f"{found.built_architectures}; build again with "
                    f"TORCH_CUDA_ARCH_LIST={device.capability[0]}.{device.capability[1]}, or update the driver if it "
                    f"is older than CUDA {found.built_cuda}.",
                    fatal=True,
                )
            )
    if found.devices and not found.built_cuda:
        result.append(
            Problem(
                "there is a CUDA device, but the extension was built without CUDA, so plain PyTorch runs on it. Put "
                "nvcc on PATH or set CUDA_HOME, unset METAFAST_CUDA, and build again: "
                "pip install --no-build-isolation --force-reinstall --no-deps ."
            )
        )
    if found.torch_cuda and not found.devices:
        result.append(
            Problem(
                f"torch was built for CUDA {found.torch_cuda} but sees no device. If there should be one, see whether "
                "nvidia-smi lists it and whether CUDA_VISIBLE_DEVICES hides it."
            )
        )
    if found.nvidia_driver and not found.torch_cuda:
        result.append(
            Problem(
                "an NVIDIA driver is installed, but this torch is CPU-only: install a CUDA build of torch."
            )
        )
    for extra, packages in found.missing.items():
        if packages:
            uses = ", ".join(f"{name} ({EXTRAS[extra][name]})" for name in packages)
            result.append(Problem(f"not installed: {uses}. Optional: pip install 'metafast[{extra}]'."))
    return sorted(result, key=lambda problem: not problem.fatal)


def describe(found: Findings) -> str:
    """The report on ``found``."""
    cuda = f"built for CUDA {found.torch_cuda}" if found.torch_cuda else "CPU-only build"
    built = f"CUDA {found.built_cuda} for {found.built_architectures}" if found.built_cuda else "no"
    lines = [
        "versions",
        f"  metafast       {found.metafast}",
        f"  torch          {found.torch}, {cuda} (metafast needs 2.11 or later)",
        f"  Python         {platform.python_version()}, {platform.system()} {platform.machine()}",
        "extension",
        f"  compiler       {found.compiler}",
        f"  CUDA kernels   {built}",
        f"  CPU vectors    {found.vector_bits} bits, {found.threads} threads",
        "CUDA devices",
    ]
    for index, device in enumerate(found.devices):
        state = (
            f"a kernel of this build failed: {device.error}" if device.error else "a kernel of this build ran"
        )
        capability = ".".join(map(str, device.capability))
        lines.append(f"  cuda:{index}         {device.name}, compute capability {capability}; {state}")
    if not found.devices:
        lines.append("  none")
    width = max(map(len, found.kernels), default=0)
    lines += ["kernels", f"  {'operator':{width}}  CPU            CUDA"]
    for name, has in found.kernels.items():
        cpu, gpu = ("kernel" if each else "plain PyTorch" for each in has)
        lines.append(f"  {name:{width}}  {cpu:13}  {gpu}")
    if found.keeps_pages:
        allocator = "can keep freed memory (glibc); metafast train makes it do so, your own code by"
        lines += ["memory", f"  the allocator {allocator}", "  metafast._library.keep_pages()"]
    else:
        lines += ["memory", "  the allocator is not glibc's; metafast train leaves it as it is"]
    if (found.wait_policy or "").upper() == "PASSIVE":
        waiting = "OMP_WAIT_POLICY=PASSIVE: idle threads sleep"
    else:
        waiting = "OMP_WAIT_POLICY is not PASSIVE: idle threads spin, which slows down machines with few or busy cores"
    lines += ["threads", f"  {waiting}", "problems"]
    found_problems = problems(found)
    lines += [f"  {'ERROR' if p.fatal else 'note'}: {p.text}" for p in found_problems] or ["  none found"]
    return "\n".join(lines)


def report() -> str:
    """What metafast runs on here, and what is wrong with it."""
    return describe(examine())


def load_model(place: str) -> nn.Module:
    """The model of ``module:name``, where the name is of a class or a function without arguments, or of a model.

    Raises:
        UsageError: there is none.
    """
    path, _, name = place.partition(":")
    if not path or not name:
        raise UsageError(f"--model: expected module:name, such as package.models:Net, got {place!r}")
    # As of `python -m`, the folder one is in comes first.
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(path)
        for part in name.split("."):
            found = getattr(found, part)
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--model: {place} does not give a model: {reason}") from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise UsageError(f"--model: expected a torch.nn.Module from {place}, got {type(model).__name__}")
    return model


def examine_named_model(options: argparse.Namespace) -> second_order.Report:
    """What :func:`metafast.second_order.examine_model` finds on random rows."""
    torch.manual_seed(0)
    model = load_model(options.model)
    rows = torch.randn(options.rows, *options.input)
    try:
        with torch.no_grad():
            outputs = deepcopy(model)(rows)
    except Exception as error:
        shape, reason = " ".join(map(str, options.input)), str(error).partition("\n")[0]
        raise UsageError(
            f"--input {shape}: {options.model} cannot be called with such rows: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(outputs, torch.Tensor):
        raise UsageError(
            f"--model: expected a tensor of outputs from {options.model}, got {type(outputs).__name__}"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"--model: {options.model} has no parameters that adapt")
    return second_order.examine_model(inner_loop, model, rows, batch_norm=options.batch_norm)


def describe_model(name: str, found: second_order.Report) -> str:
    """The report on a model."""
    ways = {
        "fused": "one fused operator runs all steps of all tasks",
        "batched": "every layer is called with the weights of all tasks at once",
        "loop": "the tasks are taken one after the other, which is slow",
    }
    lines = [f"model {name}", f"  inner loop     {found.path}: {ways[found.path]}"]
    lines += [f"  note           {note}" for note in found.notes]
    lines += ["problems"]
    lines += [f"  {'ERROR' if each.fatal else 'note'}: {each}" for each in found.findings] or ["  none found"]
    return "\n".join(lines)


def main(options: argparse.Namespace) -> int:
    """Print the report; 1 if a problem keeps metafast, or second order of the model, from working, else 0."""
    if options.model is not None:
        report = examine_named_model(options)
        print(describe_model(options.model, report))
        return int(any(finding.fatal for finding in report.findings))
    found = examine()
    print(describe(found))
    return int(any(problem.fatal for problem in problems(found)))
