"""Everything that only a GPU can show, in one run: ``make gpu-check RESULTS=dir [QUICK=1]``.

Builds metafast in place for the GPU that is there, with the python and torch that run this and the nvcc of setup.py.
Then it runs every test on the device ``cuda``, the emulator's own kernels on the hardware, the benchmarks, and
compute-sanitizer over a call of every kernel, and writes one JSON and one Markdown file into the folder. Nothing is
downloaded.

Every phase has a share of the time. What one does not need goes to the next ones, and one that overruns is stopped;
the result so far is written after every phase. The exit code is 1 if a phase failed, 2 if the machine lacks what is
needed. A gate that is missed is in the report and fails nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_report, machine

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu-check"
OLDEST_TORCH = (2, 11)

#: Seconds from asking a phase to stop until it is made to.
GRACE = 8
#: Lines of a failed phase's log in the result.
LOG_LINES = 60
#: Test processes at a time, where pytest-xdist is installed.
TEST_PROCESSES = 8

PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"

#: What compute-sanitizer says at its end.
SANITIZER_SUMMARY = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?).*")
#: Patches nothing but metafast's kernels.
OWN_KERNELS = ("--kernel-regex", "kns=metafast")
#: Bugs of which the tool has to find one here, or its silence about our kernels means nothing.
PLANTED = {
    "memcheck": ("global_write_past_end", "misaligned_vector"),
    "racecheck": ("no_barrier", "no_second_barrier"),
}


@dataclass
class Finding:
    """How a phase ended: in one line, with the end of its log if it failed, and what else belongs into the JSON."""

    verdict: str
    detail: str
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What the phases share."""

    quick: bool
    capability: str
    environment: dict[str, str]

    def execute(self, name: str, command: Sequence[str], end: float, **environment: str) -> int | None:
        """The exit code of a command, None if it had to be stopped at ``end``; its output is added to the log."""
        with log_of(name).open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment, **environment},
                start_new_session=True,
            )
            try:
                return process.wait(max(end - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                stop(process)
                return None
            except BaseException:
                stop(process)
                raise


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a command and all that it started, as Ctrl-C does, so that it can say how far it came; then kill it."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def log_of(name: str) -> Path:
    return FOLDER / f"{name}.log"


def ending(code: int | None) -> str:
    return "stopped at the end of its time" if code is None else f"exit code {code}"


def build(run: Run, end: float) -> Finding:
    """Compile metafast._C for this GPU; ninja does again only what changed."""
    # Were it to stay where the build fails, the other phases would be about an old one.
    for old in (ROOT / "metafast").glob("_C*.so"):
        old.unlink()
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--inplace",
        # Of what else is there only ninja knows whether it was compiled for this GPU.
        "--force",
        f"--build-temp={FOLDER / 'objects'}",
    ]
    code = run.execute("build", command, end, METAFAST_CUDA="1", TORCH_CUDA_ARCH_LIST=run.capability)
    return Finding(PASSED if code == 0 else FAILED, f"for {run.capability}" if code == 0 else ending(code))


def doctor(run: Run, end: float) -> Finding:
    """Load the library, launch a kernel, and see that every operator has one for CUDA."""
    code = run.execute("doctor", [sys.executable, "-m", "metafast", "doctor"], end)
    if code != 0:
        return Finding(FAILED, ending(code))
    missing = without_kernel(log_of("doctor").read_text())
    if missing:
        return Finding(FAILED, f"no CUDA kernel of {', '.join(missing)}")
    return Finding(PASSED, "every operator has a CUDA kernel")


def without_kernel(report: str) -> list[str]:
    """The operators that run as plain PyTorch on CUDA, from the report of ``metafast doctor``."""
    return re.findall(r"^  (\w+) .*plain PyTorch$", report, re.MULTILINE)


def suite(run: Run, end: float) -> Finding:
    """Every test whose name says cuda; the fixtures' device is a part of the names."""
    if importlib.util.find_spec("pytest") is None:
        return Finding(FAILED, "pytest is not installed")
    # No plugins but those named here: others have options and warnings of their own.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    notes = []
    if importlib.util.find_spec("xdist") is not None:
        command += ["-p", "xdist", "-n", str(TEST_PROCESSES)]
    if importlib.util.find_spec("hypothesis") is None:
        command += ["--ignore=tests/test_properties.py"]
        notes.append("tests/test_properties.py left out: hypothesis is not installed")
    junit = FOLDER / "tests.xml"
    junit.unlink(missing_ok=True)
    command += [f"--junitxml={junit}", "-k", "cuda and (test_cuda or test_dtypes)" if run.quick else "cuda"]
    code = run.execute("tests", command, end, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", OMP_NUM_THREADS="2")
    return judge_tests(code, tests_of(junit), notes)


def tests_of(junit: Path) -> dict[str, Any]:
    """Counts, the failed tests and the reasons of the skipped ones, from pytest's XML file."""
    found: dict[str, Any] = {"passed": 0, "failed": [], "skipped": Counter()}
    try:
        cases = ElementTree.parse(junit).getroot().iter("testcase")
    except (OSError, ElementTree.ParseError):
        return found
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        broken = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if broken is not None:
            found["failed"].append({"test": name, "message": (broken.get("message") or "")[:300]})
        elif skipped is not None:
            found["skipped"][skipped.get("message") or "no reason"] += 1
        else:
            found["passed"] += 1
    return found


def judge_tests(code: int | None, tests: dict[str, Any], notes: Iterable[str]) -> Finding:
    skipped = sum(tests["skipped"].values())
    parts = [f"{tests['passed']} passed, {len(tests['failed'])} failed, {skipped} skipped"]
    parts += [f"{count} x {reason}" for reason, count in tests["skipped"].most_common()]
    parts += notes
    if code != 0:
        parts.insert(0, ending(code))
    good = code == 0 and tests["passed"] > 0 and not tests["failed"]
    return Finding(PASSED if good else FAILED, "; ".join(parts), {"tests": tests})


def executable() -> Path:
    return FOLDER / "hardware"


def hardware(run: Run, end: float) -> Finding:
    """The kernels that guard the emulator, on the GPU: what they do there is what the emulator has to do."""
    nvcc = machine.nvcc()
    assert nvcc is not None
    executable().unlink(missing_ok=True)
    flags = f"-std=c++17 -O2 -lineinfo -arch=sm_{run.capability.replace('.', '')} -Icsrc -Itests/simt"
    command = [str(nvcc), *flags.split(), "tests/simt/hardware.cu", "-o", str(executable())]
    code = run.execute("hardware", command, end)
    if code != 0:
        return Finding(FAILED, f"nvcc: {ending(code)}")
    code = run.execute("hardware", [str(executable())], end)
    lines = log_of("hardware").read_text().splitlines()
    right = sum(line.startswith("ok ") for line in lines)
    wrong = [line.split()[1].rstrip(":") for line in lines if line.startswith("WRONG ")]
    if code != 0 or wrong or right == 0:
        return Finding(FAILED, f"{ending(code)}; {right} kernels right, wrong: {', '.join(wrong) or 'none'}")
    return Finding(PASSED, f"{right} kernels give on the GPU what the emulator is held to")


def benchmarks(run: Run, end: float) -> Finding:
    """``benchmarks.gpu``; what it measured before it was stopped counts."""
    out = FOLDER / "benchmarks.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out), *(["--quick"] if run.quick else [])]
    caches = {name: str(FOLDER / "cache") for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    code = run.execute("benchmarks", command, end, **caches)
    try:
        result = json.loads(out.read_text())
    except (OSError, ValueError):
        return Finding(FAILED, f"{ending(code)}, no result")
    detail = f"{len(result['cases'])} workloads"
    gates = [record["kernel_gate"] for record in result["cases"]]
    gates += [goal for record in result["cases"] for goal in record["goals"]]
    missed = sum(gate is not None and gate["verdict"] == "miss" for gate in gates)
    if missed:
        detail += f", {missed} gates missed"
    if code != 0:
        detail = f"{ending(code)}; {detail}"
    return Finding(PASSED if code == 0 else FAILED, detail, {"benchmarks": result})


def sanitizer() -> Path | None:
    """compute-sanitizer: on PATH, or in the toolkit of nvcc."""
    if found := shutil.which("compute-sanitizer"):
        return Path(found)
    if nvcc := machine.nvcc():
        home = nvcc.resolve().parents[1]
        for path in (home / "bin" / "compute-sanitizer", home / "compute-sanitizer" / "compute-sanitizer"):
            if path.exists():
                return path
    return None


def sanitize(tool: str) -> Callable[[Run, float], Finding]:
    """A phase that runs every kernel once under a tool of compute-sanitizer, if that tool works here."""

    def phase(run: Run, end: float) -> Finding:
        program = sanitizer()
        if program is None:
            return Finding(LEFT_OUT, "there is no compute-sanitizer")
        if not executable().exists():
            return Finding(LEFT_OUT, "the planted bugs that show whether the tool works were not compiled")
        command = [str(program), "--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        for bug in PLANTED[tool]:
            run.execute(f"{tool}-planted", [*command, str(executable()), bug], end)
        planted = summaries(log_of(f"{tool}-planted").read_text(errors="replace"))
        if not any(planted):
            return Finding(LEFT_OUT, f"{tool} does not work here: it found none of the planted bugs")
        code = run.execute(
            tool,
            [
                *command, *OWN_KERNELS, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                "tests/test_cuda.py", "-k", "test_every_kernel",
            ],
            end,
            PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
            # Every tensor in memory of its own, so that a kernel cannot leave one and stay unnoticed in the next.
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip
        return judge_sanitizer(tool, code, log_of(tool).read_text(errors="replace"))

    return phase


def summaries(log: str) -> list[int]:
    """The number of errors or hazards in every summary of a compute-sanitizer log."""
    return [int(match[1]) for match in SANITIZER_SUMMARY.finditer(log)]


def judge_sanitizer(tool: str, code: int | None, log: str) -> Finding:
    found = summaries(log)
    tests = re.search(r"^(\d+) passed", log, re.MULTILINE)
    if code == 0 and found and not any(found) and tests:
        return Finding(
            PASSED, f"no complaint about metafast's kernels in {tests[1]} tests; it finds a planted bug"
        )
    return Finding(FAILED, f"{ending(code)}; {sum(found)} complaints")


@dataclass(frozen=True)
class Phase:
    """Its share of the time in seconds; the short run has its own and leaves out what has none."""

    name: str
    work: Callable[[Run, float], Finding]
    seconds: float
    quick_seconds: float | None


PHASES = (
    Phase("build", build, 110, 60),
    Phase("doctor", doctor, 20, 8),
    Phase("tests", suite, 120, 14),
    Phase("hardware", hardware, 30, None),
    # Before the sanitizer: a tool that breaks down may take the device along.
    Phase("benchmarks", benchmarks, 140, 24),
    Phase("memcheck", sanitize("memcheck"), 50, None),
    Phase("racecheck", sanitize("racecheck"), 50, None),
)


def perform(phase: Phase, run: Run, seconds: float | None, end: float) -> dict[str, Any]:
    """Run one phase; whatever happens in it, there is a record."""
    begin = time.monotonic()
    if seconds is None:
        finding = Finding(LEFT_OUT, "in a quick run")
    else:
        try:
            finding = phase.work(run, end)
        except Exception as error:
            finding = Finding(FAILED, f"{type(error).__name__}: {error}")
    log = log_of(phase.name)
    failed_log = finding.verdict == FAILED and log.exists()
    return {
        "name": phase.name,
        "verdict": finding.verdict,
        "detail": finding.detail,
        "seconds": time.monotonic() - begin,
        "log": log.read_text(errors="replace").splitlines()[-LOG_LINES:] if failed_log else [],
        **finding.more,
    }


def write(path: Path, text: str) -> None:
    """Replace a file at once. metafast.training.files cannot be imported where the build failed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def save(result: dict[str, Any], results: Path) -> list[Path]:
    """Write the two files, named after the device."""
    device = re.sub(r"[^a-z0-9]+", "-", result["machine"]["device"].lower()).strip("-")
    name = f"gpu-check-{device}{'-quick' if result['quick'] else ''}"
    paths = [results / f"{name}.json", results / f"{name}.md"]
    write(paths[0], json.dumps(result, indent=1) + "\n")
    write(paths[1], gpu_report.markdown(result))
    return paths


def lacks() -> str:
    """What this machine does not have and everything needs, in words."""
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version and (int(version[1]), int(version[2])) < OLDEST_TORCH:
        return f"torch 2.11 or later, this is {torch.__version__}"
    if not torch.cuda.is_available():
        return f"an NVIDIA GPU, and torch {torch.__version__} sees none"
    if machine.nvcc() is None:
        return "nvcc: put it on PATH or set CUDA_HOME"
    return ""


def check(results: Path, quick: bool, command: str, commit: str) -> tuple[dict[str, Any], list[Path]]:
    """Run all phases: the result and where it lies."""
    begin = time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for phase in PHASES:
        log_of(phase.name).unlink(missing_ok=True)
        log_of(f"{phase.name}-planted").unlink(missing_ok=True)
    facts = machine.facts(ROOT)
    if commit:
        facts["commit"] = commit
    result: dict[str, Any] = {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "machine": facts,
        "verdict": "not finished",
        "seconds": 0.0,
        "phases": [],
        "benchmarks": None,
    }
    run = Run(quick, facts["capability"], {**os.environ, "PYTHONUNBUFFERED": "1"})
    end = begin
    for phase in PHASES:
        seconds = phase.quick_seconds if quick else phase.seconds
        end += seconds or 0
        print(f"{phase.name} ...", flush=True)
        record = perform(phase, run, seconds, end)
        result["benchmarks"] = record.pop("benchmarks", result["benchmarks"])
        result["phases"].append(record)
        result["seconds"] = time.monotonic() - begin
        print(
            f"{phase.name}: {record['verdict']} in {record['seconds']:.0f} s. {record['detail']}", flush=True
        )
        save(result, results)
    failed = [record["name"] for record in result["phases"] if record["verdict"] == FAILED]
    result["verdict"] = f"failed: {', '.join(failed)}" if failed else PASSED
    return result, save(result, results)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--quick", action="store_true", help="in two minutes: fewer tests, short benchmarks")
    parser.add_argument("--commit", default="", help="commit to note in a copy of the sources without git")
    options = parser.parse_args(arguments)
    if missing := lacks():
        print(f"gpu-check needs {missing}", file=sys.stderr)
        return 2
    options.results.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.gpu_check", *arguments])
    result, paths = check(options.results.resolve(), options.quick, command, options.commit)
    print("\n" + gpu_report.summary(result) + "\n")
    print("written: " + ", ".join(path.name for path in paths))
    return 0 if result["verdict"] == PASSED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
