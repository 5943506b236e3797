"""make gpu-check and the GPU benchmarks without a GPU: phases, time limits, verdicts, tables, and the result files."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cases, gpu, gpu_check, gpu_report, machine
from benchmarks.cases import OURS, Inputs
from benchmarks.gpu_check import FAILED, LEFT_OUT, PASSED, Finding, Phase, Run
from metafast import doctor

MACHINE = {"device": "NVIDIA H200", "capability": "9.0", "torch": "2.11.0", "commit": "abc", "cpu": "a | b"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path / "work")
    (tmp_path / "work").mkdir()
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    return Run(quick=False, capability="9.0", environment=dict(os.environ))


class TestCommands:
    def test_log_and_exit_code(self, run: Run) -> None:
        command = ["sh", "-c", 'echo "$WORD"; echo wrong >&2; exit 3']
        assert run.execute("build", command, time.monotonic() + 60, WORD="hello") == 3
        lines = gpu_check.log_of("build").read_text().splitlines()
        assert lines[0].startswith("$ sh -c ") and lines[1:] == ["hello", "wrong"]

    def test_overrun_stops_everything_that_was_started(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The command may say how far it came; what ignores the interrupt is killed."""
        monkeypatch.setattr(gpu_check, "GRACE", 0.5)
        script = "trap 'echo half way; exit 1' INT; (trap '' INT; exec sleep 300) & echo $!; wait"
        assert run.execute("build", ["bash", "-c", script], time.monotonic()) is None
        _, child, said = gpu_check.log_of("build").read_text().splitlines()
        assert said == "half way"
        deadline = time.monotonic() + 30
        while alive(int(child)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not alive(int(child))

    def test_missing_command_fails_its_phase(self, run: Run) -> None:
        def work(run: Run, end: float) -> Finding:
            return Finding(PASSED, str(run.execute("build", ["/no/such/program"], end)))

        record = gpu_check.perform(Phase("build", work, 1, 1), run, 1, time.monotonic() + 1)
        assert record["verdict"] == FAILED and "FileNotFoundError" in record["detail"]
        assert record["log"] == ["$ /no/such/program"]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_values" name="test_dtypes[cuda-float32]"/>
<testcase classname="tests.test_values" name="test_dtypes[cuda-float16]"><failure message="error 3"/></testcase>
<testcase classname="tests.test_cuda" name="test_second_device"><skipped message="one device"/></testcase>
<testcase classname="tests.test_cuda" name="test_graphs"><error message="out of memory"/></testcase>
</testsuite></testsuites>"""


class TestSuite:
    def test_counts(self, tmp_path: Path) -> None:
        (tmp_path / "tests.xml").write_text(JUNIT)
        found = gpu_check.tests_of(tmp_path / "tests.xml")
        assert found["passed"] == 1 and found["skipped"] == {"one device": 1}
        assert found["failed"] == [
            {"test": "tests.test_values::test_dtypes[cuda-float16]", "message": "error 3"},
            {"test": "tests.test_cuda::test_graphs", "message": "out of memory"},
        ]

    @pytest.mark.parametrize("text", [None, "<testsuites><testsui"], ids=["missing", "torn"])
    def test_no_counts(self, text: str | None, tmp_path: Path) -> None:
        if text is not None:
            (tmp_path / "tests.xml").write_text(text)
        assert gpu_check.tests_of(tmp_path / "tests.xml")["passed"] == 0

    @pytest.mark.parametrize(
        ("code", "passed", "failed", "verdict", "detail"),
        [
            (0, 5, [], PASSED, "5 passed, 0 failed, 2 skipped; 2 x one device; a note"),
            (1, 5, [{}], FAILED, "exit code 1; 5 passed, 1 failed, 2 skipped; 2 x one device; a note"),
            (0, 0, [], FAILED, "0 passed, 0 failed, 2 skipped; 2 x one device; a note"),
            (None, 5, [], FAILED, "stopped at the end of its time; 5 passed, 0 failed, 2 skipped; 2 x one device; "
             "a note"),
        ],
        ids=["passed", "failed", "nothing ran", "overrun"],
    )  # fmt: skip
    def test_verdict(self, code: Any, passed: int, failed: Any, verdict: str, detail: str) -> None:
        tests = {"passed": passed, "failed": failed, "skipped": Counter({"one device": 2})}
        finding = gpu_check.judge_tests(code, tests, ["a note"])
        assert (finding.verdict, finding.detail) == (verdict, detail)

    @pytest.mark.parametrize("quick", [False, True])
    def test_asks_for_tests_on_cuda(self, run: Run, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """The command itself, in which no test is left over on a machine without a GPU."""
        asked: list[str] = []

        def execute(self: Run, name: str, command: Any, end: float, **environment: str) -> int:
            asked.extend(command)
            return 0

        monkeypatch.setattr(Run, "execute", execute)
        present = {"pytest", "xdist"}
        monkeypatch.setattr(
            gpu_check.importlib.util, "find_spec", lambda name: name if name in present else None
        )
        finding = gpu_check.suite(dataclasses.replace(run, quick=quick), 0)
        assert finding.verdict == FAILED and "hypothesis is not installed" in finding.detail
        assert asked[:3] == [sys.executable, "-m", "pytest"] and "--ignore=tests/test_properties.py" in asked
        assert asked[asked.index("-k") + 1].startswith("cuda") and asked[asked.index("-n") + 1] == "8"
        present.clear()
        assert gpu_check.suite(run, 0).detail == "pytest is not installed"


def test_operators_without_a_kernel() -> None:
    found = dataclasses.replace(doctor.examine(), kernels={"one": (True, True), "two": (True, False)})
    assert gpu_check.without_kernel(doctor.describe(found)) == ["two"]


MEMCHECK = "12 passed, 300 deselected in 3.1s\n========= ERROR SUMMARY: {} errors\n"
RACECHECK = "12 passed in 3.1s\n========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("code", "log", "verdict"),
    [
        (0, MEMCHECK.format(0), PASSED),
        (86, MEMCHECK.format(2), FAILED),
        (0, RACECHECK.format(0, 0), PASSED),
        (86, RACECHECK.format(1, 1), FAILED),
        (0, "12 passed in 3.1s\n", FAILED),
        (0, "no tests ran\n========= ERROR SUMMARY: 0 errors\n", FAILED),
        (None, MEMCHECK.format(0), FAILED),
    ],
)
def test_sanitizer_verdict(code: int | None, log: str, verdict: str) -> None:
    assert gpu_check.judge_sanitizer("memcheck", code, log).verdict == verdict


@pytest.mark.parametrize(
    ("program", "verdict", "detail"),
    [
        (None, LEFT_OUT, "there is no compute-sanitizer"),
        ("echo nothing to say", LEFT_OUT, "memcheck does not work here: it found none of the planted bugs"),
        ('echo "========= ERROR SUMMARY: 3 errors"; exit 86', FAILED, "exit code 86; 3 complaints"),
    ],
    ids=["absent", "broken", "complains"],
)
def test_sanitizer_has_to_find_a_planted_bug(
    program: str | None, verdict: str, detail: str, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = folder / "compute-sanitizer"
    if program is not None:
        tool.write_text(f"#!/bin/sh\n{program}\n")
        tool.chmod(0o755)
    gpu_check.executable().touch()
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: tool if program is not None else None)
    finding = gpu_check.sanitize("memcheck")(run, time.monotonic() + 60)
    assert (finding.verdict, finding.detail) == (verdict, detail)


def row(variant: str, times: float, note: str = "") -> dict[str, Any]:
    ratio = None if variant == OURS else times
    found: dict[str, Any] = {"variant": variant, "note": note}
    for key, scale in (("wall", 1e-4), ("kernel", 2e-5), ("kernel_warm", 1e-5)):
        found |= {key: None if note else times * scale, f"{key}_ratio": None if note else ratio}
    return found


def record(**fields: Any) -> dict[str, Any]:
    made = gpu.blank("head", "a head", {"tasks": 32}, 40_000_000, 118_000_000)
    made |= {
        "shares": {
            "bytes_per_second": 2e12, "share_of_copy": 0.5, "flops_per_second": 6e12, "share_of_sgemm": 0.12,
        },
        "copies": 8,
        "kernel_gate": {"gate": 28e-6, "verdict": "pass"},
        "goals": [{"against": "torch.cdist, b", "ratio": 7.0, "gate": 6.0, "verdict": "pass"}],
        "profile": [{"kernel": "loss_kernel", "runs": 1.0, "seconds": 9e-6}],
        "rows": [
            row(OURS, 1.0),
            row("torch.cdist, a", 8.0),
            row("torch.cdist, b", 7.0),
            row("linear form", 5.0),
            row("torch.compile, linear form", 0.0, "no Triton"),
        ],
    }  # fmt: skip
    return made | fields


def test_short_table() -> None:
    lines = gpu_report.short_table([record(), record(correct=False, wrong=["linear form"])]).splitlines()
    assert lines[0].split() == " ".join(gpu_report.SHORT_HEAD).split()
    for words in ("a head", "20 us", "10 us", "28 us pass", "50%", "12%", "100 us", "7 / 7", "5 / 5"):
        assert words in lines[1]
    assert "WRONG, not timed: linear form" in lines[2]


def benchmark_result(*records: dict[str, Any]) -> dict[str, Any]:
    return {
        "complete": True,
        "ceilings": {"bytes_per_second": 4e12, "flops_per_second": 5e13},
        "cases": list(records),
        "failed": {"pairs": "RuntimeError: no"},
    }


def check_phases(monkeypatch: pytest.MonkeyPatch, **works: Callable[[Run, float], Finding]) -> list[float]:
    """Let these be the phases; the list gets the times that they have."""
    times: list[float] = []

    def timed(work: Callable[[Run, float], Finding]) -> Callable[[Run, float], Finding]:
        def phase(run: Run, end: float) -> Finding:
            times.append(end - time.monotonic())
            return work(run, end)

        return phase

    phases = tuple(
        Phase(name, timed(work), 100, None if name == "memcheck" else 10) for name, work in works.items()
    )
    monkeypatch.setattr(gpu_check, "PHASES", phases)
    monkeypatch.setattr(gpu_check, "lacks", lambda: "")
    monkeypatch.setattr(machine, "facts", lambda root: dict(MACHINE))
    return times


def fails(run: Run, end: float) -> Finding:
    run.execute("tests", ["sh", "-c", "for k in $(seq 100); do echo line $k; done"], end)
    return Finding(FAILED, "3 failed")


def breaks(run: Run, end: float) -> Finding:
    raise RuntimeError("no memory")


def test_a_failed_phase_stops_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = check_phases(
        monkeypatch,
        build=breaks,
        tests=fails,
        benchmarks=lambda run, end: Finding(PASSED, "1 workload", {"benchmarks": benchmark_result(record())}),
        memcheck=lambda run, end: Finding(LEFT_OUT, "not here"),
    )
    results = folder / "new" / "results"
    assert gpu_check.main(["--results", str(results), "--commit", "def"]) == 1
    assert sorted(path.name for path in results.iterdir()) == [
        "gpu-check-nvidia-h200.json",
        "gpu-check-nvidia-h200.md",
    ]
    result = json.loads((results / "gpu-check-nvidia-h200.json").read_text())
    assert result["verdict"] == "failed: build, tests"
    assert result["machine"] == {**MACHINE, "commit": "def"}
    assert [phase["verdict"] for phase in result["phases"]] == [FAILED, FAILED, PASSED, LEFT_OUT]
    assert result["phases"][0]["detail"] == "RuntimeError: no memory"
    assert result["phases"][1]["log"] == [f"line {k}" for k in range(41, 101)]
    assert result["benchmarks"]["cases"][0]["name"] == "head"
    # What a phase leaves over goes to the next.
    assert [round(seconds) for seconds in times] == [100, 200, 300, 400]
    printed = capsys.readouterr().out
    assert "a head" in printed.splitlines()[-3] and printed.rstrip().endswith("gpu-check-nvidia-h200.md")

    text = (results / "gpu-check-nvidia-h200.md").read_text()
    for words in (
        "# GPU check: NVIDIA H200", "**failed: build, tests**", "| cpu | a / b |", "line 100", "copy 4000 GB/s",
        "sgemm 50 TFLOP/s", "Failed: pairs: RuntimeError: no", "40 MB; 118 MFLOP", "2000 GB/s (50% of the copy)",
        "| torch.cdist, b | 700 us | 7x | 140 us | 7x | 70 us | 7x |  |", "no Triton", "| `loss_kernel` | 1 | 9 us |",
        "kernel time at most 28 us: **pass**", "at least 6 times as fast as torch.cdist, b: **pass**",
    ):  # fmt: skip
        assert words in text
    for table in text.split("\n\n"):
        widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
        assert len(widths) <= 1


def test_quick_run_has_its_own_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Finding(PASSED, "good")
    times = check_phases(monkeypatch, build=lambda run, end: good, memcheck=lambda run, end: good)
    assert gpu_check.main(["--results", str(folder), "--quick"]) == 0
    result = json.loads((folder / "gpu-check-nvidia-h200-quick.json").read_text())
    assert result["verdict"] == PASSED and result["quick"]
    assert [(p["verdict"], p["detail"]) for p in result["phases"]] == [
        (PASSED, "good"),
        (LEFT_OUT, "in a quick run"),
    ]
    assert [round(seconds) for seconds in times] == [10]


def test_interrupted_run_keeps_what_it_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: Run, end: float) -> Finding:
        raise KeyboardInterrupt

    check_phases(monkeypatch, build=lambda run, end: Finding(PASSED, "good"), tests=interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main(["--results", str(folder)])
    result = json.loads((folder / "gpu-check-nvidia-h200.json").read_text())
    assert result["verdict"] == "not finished" and len(result["phases"]) == 1


def test_phases_fit_into_their_time() -> None:
    assert sum(phase.seconds for phase in gpu_check.PHASES) <= 9 * 60 - 2 * gpu_check.GRACE
    assert sum(phase.quick_seconds or 0 for phase in gpu_check.PHASES) <= 2 * 60 - gpu_check.GRACE


@pytest.mark.parametrize(
    ("version", "cuda", "nvcc", "message"),
    [
        ("2.10.1", True, "nvcc", "torch 2.11 or later, this is 2.10.1"),
        ("2.11.0+cu130", False, "nvcc", "an NVIDIA GPU"),
        ("3.0.0", True, None, "nvcc"),
        ("2.13.0+cu130", True, "nvcc", None),
    ],
)
def test_says_what_is_missing(
    version: str, cuda: bool, nvcc: str | None, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(machine, "nvcc", lambda: nvcc)
    assert gpu_check.lacks().startswith(message or "") and bool(gpu_check.lacks()) == bool(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_refuses_a_machine_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--results", str(tmp_path / "results")]) == 2
    assert "gpu-check needs an NVIDIA GPU" in capsys.readouterr().err
    assert gpu.main([]) == 2
    assert not (tmp_path / "results").exists()


def test_commit(tmp_path: Path) -> None:
    assert machine.commit(tmp_path) == ""
    assert machine.output(["/no/such/program"]) == ""


class TestBenchmarks:
    def test_copies_exceed_the_cache(self) -> None:
        inputs = Inputs((torch.zeros(10, 100), torch.zeros(10, dtype=torch.int64), 5), torch.zeros(5))
        assert gpu.enough_copies(inputs, cache=10_000) == -(-gpu.CACHES * 10_000 // (4000 + 80 + 20))
        assert gpu.enough_copies(inputs, cache=10) == 1
        assert gpu.enough_copies(inputs, cache=10**12) == gpu.MOST_COPIES

    def test_time_of_one_call(self) -> None:
        timing = {"median": 6.0, "p10": 5.0, "rounds": [6.0, 8.0], "samples": 4, "disturbed": 0}
        expected = {"median": 3.0, "p10": 2.5, "rounds": [3.0, 4.0], "samples": 4, "disturbed": 0}
        assert gpu.per_call(timing, 2) == expected

    @pytest.mark.parametrize(
        ("name", "device", "seconds", "expected"),
        [
            ("prototypical-head-d1600", "NVIDIA H100 80GB HBM3", 27e-6, {"gate": 28e-6, "verdict": "pass"}),
            ("prototypical-head-d1600", "NVIDIA H200", 27e-6, {"gate": 20e-6, "verdict": "miss"}),
            ("prototypes-d1600", "NVIDIA H200", None, {"gate": 8e-6, "verdict": "not measured"}),
            ("prototypes-d1600", "NVIDIA A100", 1e-6, None),
            ("prototypes-d64", "NVIDIA H100", 1e-6, None),
            ("maml-sinusoid-k5", "NVIDIA H200", 21e-6, {"gate": 20e-6, "verdict": "miss"}),
        ],
    )
    def test_kernel_gates(self, name: str, device: str, seconds: Any, expected: Any) -> None:
        case = SimpleNamespace(name=name, traffic=0)
        assert gpu.kernel_gate(case, device, seconds, LIMITS) == expected

    @pytest.mark.parametrize(("times", "verdict"), [(1.49, "pass"), (1.51, "miss")])
    def test_gates_in_times_of_a_copy(self, times: float, verdict: str) -> None:
        case = cases.find(["norm-relu-pool-14"])[0]
        copy = case.traffic / LIMITS["bytes_per_second"]
        found = gpu.kernel_gate(case, "any device", times * copy, LIMITS)
        assert found == {"gate": pytest.approx(1.5 * copy), "verdict": verdict}

    def test_gates_name_cases(self) -> None:
        named = {case.name: case for case in cases.CASES}
        assert set(gpu.KERNEL_GATES) | set(gpu.COPY_GATES) <= set(named)
        assert all(named[name].traffic for name in gpu.COPY_GATES)
        goals = {name: goal for name, case in named.items() for goal in gpu.wall_goals(case)}
        assert set(goals) == {"prototypical-head-d1600", "prototypical-head-d64"}
        assert all(goal.gate == 6 and len(goal.against) == 2 for goal in goals.values())

    def test_shares(self) -> None:
        head = cases.find(["prototypical-head-d1600"])[0]
        found = gpu.shares(head, 20e-6, {"bytes_per_second": 4.096e12, "flops_per_second": 58.88e12})
        assert found["share_of_copy"] == pytest.approx(0.5) and found["share_of_sgemm"] == pytest.approx(0.1)

    def test_arithmetic_of_a_training_step(self) -> None:
        sizes = gpu.StepSizes(tasks=2, ways=5, shots=1, queries=3)
        first, second, third, fourth = (
            28 * 28 * 9 * 64,
            14 * 14 * 9 * 64 * 64,
            7 * 7 * 9 * 64 * 64,
            9 * 9 * 64 * 64,
        )
        assert sizes.images == 40
        assert sizes.flops == 40 * (4 * first + 6 * (second + third + fourth))

    def test_largest_difference(self) -> None:
        assert gpu.largest_difference([1.0, 22.0], [1.5, 20.0]) == pytest.approx(1 / 3)
        assert not gpu.largest_difference([1.0, float("nan"), 3.0], [1.0, 2.0, 3.0]) <= 1

    @pytest.mark.parametrize(
        "name",
        ["training-step-5-way", "training-step-anil", "training-step-maml", "training-step-maml-conv4"],
    )
    def test_all_networks_of_a_step_train_alike(self, name: str) -> None:
        step = gpu.STEPS[name]
        if isinstance(step.sizes, gpu.InnerStepSizes):
            step = gpu.conv_maml_step(gpu.InnerStepSizes(tasks=2, ways=3, shots=1, queries=2))
        elif isinstance(step.sizes, gpu.StepSizes):
            step = {"training-step-anil": gpu.anil_step}.get(name, gpu.protonet_step)(
                gpu.StepSizes(tasks=2, ways=3, shots=1, queries=2)
            )
        batch = step.batch("cpu")
        losses = []
        for network, _ in step.variants.values():
            torch.manual_seed(0)
            call = gpu.eager_step(network(), batch)
            losses.append([call().item() for _ in range(3)])
        assert losses[0][2] < losses[0][0]
        # Adam's first steps divide a gradient by itself: where it is tiny, roundings decide.
        for other in losses[1:]:
            assert other[0] == pytest.approx(losses[0][0], rel=1e-5)
            assert gpu.largest_difference(other, losses[0]) < gpu.TRAINING_TOLERANCE


def doubling(*others: cases.Variant, **fields: Any) -> cases.Case:
    head = cases.find(["prototypical-head-d64"])[0]
    given: dict[str, Any] = {
        "inputs": lambda sizes: Inputs((torch.ones(50, requires_grad=True),), torch.ones(50)),
        "check": cases.against_float64(lambda x: 2 * x),
        "variants": (cases.Variant(OURS, lambda x: x + x), *others),
        "traffic": 8_000_000,
        "flops": 4_000_000,
    }
    return dataclasses.replace(head, **(given | fields))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU: tensors stay where they are, a graph is a loop, and ours takes 1 us a call, any other 3 us."""
    properties = SimpleNamespace(name="NVIDIA H200", L2_cache_size=400)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    lengths: dict[int, int] = {}

    def captured(calls: Any) -> Callable[[], None]:
        results = [call() for call in calls]
        if any(isinstance(result[0], str) for result in results):
            raise RuntimeError("called a synchronizing CUDA operation")

        def replay() -> None:
            pass

        lengths[id(replay)] = len(calls)
        return replay

    def measure(calls: dict[str, Any], budget: Any, kind: Any) -> dict[str, Any]:
        times = {
            name: (1e-6 if name == OURS else 3e-6) * lengths.get(id(call), 1) for name, call in calls.items()
        }
        return {name: {"median": t, "p10": t, "rounds": [t, t]} for name, t in times.items()}

    monkeypatch.setattr(gpu, "captured", captured)
    monkeypatch.setattr(gpu, "measure", measure)


LIMITS = {"bytes_per_second": 16e12, "flops_per_second": 40e12}


@pytest.mark.usefixtures("stand_in")
class TestCases:
    def test_times_and_ratios(self) -> None:
        def broken(x: Any) -> Any:
            raise RuntimeError("no Triton\nat all")

        def compiler(function: Any, **options: Any) -> Any:
            return broken

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cases.Variant.calls, "__defaults__", (compiler,))
            other = cases.Variant("torch.cdist", lambda x: 2 * x)
            case = doubling(other, cases.Variant("torch.compile", lambda x: 2 * x, compiled=True))
            found = gpu.run_case(case, LIMITS, quick=False)
        assert found["correct"] and found["copies"] == 3
        assert found["unavailable"] == {"torch.compile": "RuntimeError: no Triton"}
        assert found["shares"]["share_of_copy"] == pytest.approx(0.5)
        assert found["kernel_gate"] == {"gate": 10e-6, "verdict": "pass"}
        assert found["goals"][0]["ratio"] == pytest.approx(3) and found["goals"][0]["verdict"] == "miss"
        ours, cdist, compiled = found["rows"]
        assert (ours["variant"], ours["kernel"]) == (OURS, pytest.approx(1e-6))
        assert [cdist[f"{key}_ratio"] for key in ("wall", "kernel", "kernel_warm")] == [pytest.approx(3)] * 3
        assert compiled["note"] == "RuntimeError: no Triton" and compiled["wall"] is None
        assert "torch.compile" in "\n".join(gpu_report.workload(found))
        json.dumps(found)

    def test_what_is_not_about_memory_has_one_copy(self) -> None:
        """The kernel time of a case without traffic, whose inputs no cache would miss."""
        loop = cases.Variant("loop", lambda x: 1 / 0, on_gpu=False)
        found = gpu.run_case(doubling(loop, name="maml-sinusoid-k1", traffic=0), LIMITS, quick=True)
        assert found["copies"] == 1 and [row["variant"] for row in found["rows"]] == [OURS]
        assert found["rows"][0]["kernel"] == found["rows"][0]["kernel_warm"] == pytest.approx(1e-6)
        assert found["kernel_gate"] == {"gate": 10e-6, "verdict": "pass"}
        assert set(found["shares"]) == {"flops_per_second", "share_of_sgemm"}
        text = "\n".join(gpu_report.workload(found))
        assert "of the sgemm" in text and "of the copy" not in text and "copies" not in text

    def test_what_runs_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every case that is about memory, and every one with a gate."""
        tried: list[str] = []
        monkeypatch.setattr(gpu, "measure_ceilings", lambda quick: LIMITS)
        monkeypatch.setattr(gpu, "attempt", lambda result, name, work: tried.append(name))
        gpu.run(False, lambda result: None)
        assert set(gpu.KERNEL_GATES) | {"pairwise-distance-d64"} <= set(tried)
        assert not [name for name in tried if name.startswith(("host-cost", "episodes"))]

    def test_wrong_results_are_not_timed(self) -> None:
        found = gpu.run_case(doubling(cases.Variant("other", lambda x: x + x.detach())), LIMITS, quick=True)
        assert found["wrong"] == ["other"] and found["wall"] == {} and found["rows"] == []
        result = benchmark_result(found) | {"failed": {}}
        assert gpu.wrong(result) == ["prototypical-head-d64: wrong results of other"]
        assert gpu.wrong(result | {"complete": False})[-1] == "not complete"

    def test_what_waits_has_no_kernel_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def waits(function: Any, inputs: Inputs) -> Any:
            called = []

            def call() -> Any:
                # The first result is the one that is checked.
                called.append(0)
                return cases.forward_backward(function, inputs)() if len(called) == 1 else ("waits",)

            return call

        other = cases.Variant("other", lambda x: 2 * x, prepare=waits)
        found = gpu.run_case(doubling(other), LIMITS, quick=True)
        assert found["not_captured"]["other"].startswith("no graph: RuntimeError: called a synchronizing")
        assert found["rows"][1]["kernel"] is None and found["rows"][1]["wall_ratio"] == pytest.approx(3)
        assert gpu.wrong(benchmark_result(found) | {"failed": {}}) == []

        found = gpu.run_case(doubling(variants=(dataclasses.replace(other, name=OURS),)), LIMITS, quick=True)
        assert found["kernel_gate"]["verdict"] == "not measured"
        assert "no graph" in gpu.wrong(benchmark_result(found) | {"failed": {}})[0]

    def test_failure_of_a_case_is_recorded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "measure_ceilings", lambda quick: LIMITS)
        monkeypatch.setattr(gpu, "CASES", (doubling(check=lambda inputs: 1 / 0), doubling(name="second")))
        monkeypatch.setattr(gpu, "STEPS", {})
        monkeypatch.setattr(gpu, "profile", lambda call: [])
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        saved: list[int] = []
        result = gpu.run(False, lambda result: saved.append(len(result["cases"])))
        assert result["failed"] == {"prototypical-head-d64": "ZeroDivisionError: division by zero"}
        assert [record["name"] for record in result["cases"]] == ["second"] and saved == [0, 1, 1]
        json.dumps(result)
