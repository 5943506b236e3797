"""The benchmarks' own logic, without timing: every variant at small sizes, goals, tables, the report."""

from __future__ import annotations

import copy
import importlib
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cases, ceilings, compat, inner_mlp, memory, peers, ratios, report, training
from benchmarks.cases import OURS, TOLERANCE, Case, Goal, Inputs, Sizes, Variant
from metafast import reference


def uncompiled(function: Any, **_: Any) -> Any:
    return function


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_variant_computes_the_case(case: Case) -> None:
    inputs = case.inputs(case.tiny)
    error_of = case.check(inputs)
    assert case.variants[0].name == OURS and case.variants[0].checked
    for variant in case.variants:
        if variant.peer:
            continue
        result = variant.call(inputs, uncompiled)()
        if variant.checked:
            assert error_of(result) <= case.tolerance, variant.name


def test_cases_are_named_once_and_goals_name_their_variants() -> None:
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    for case in cases.CASES:
        assert {name for goal in case.goals for name in goal.against} <= {v.name for v in case.variants[1:]}


def test_traffic_and_arithmetic_of_the_head() -> None:
    head = next(case for case in cases.CASES if case.name == "prototypical-head-d1600")
    assert (head.traffic, head.flops) == (40_960_000, 117_760_000)


def test_find() -> None:
    assert cases.find([]) == cases.CASES
    assert [case.name for case in cases.find(["prototypes-d"])] == ["prototypes-d1600", "prototypes-d64"]
    with pytest.raises(ValueError, match="no case named 'transformer'"):
        cases.find(["transformer"])


@pytest.mark.parametrize(
    ("result", "expected", "error"),
    [
        pytest.param(
            [torch.tensor([1.0, 4.0])], [torch.tensor([1.0, 5.0])], 0.2, id="relative to the largest"
        ),
        pytest.param([torch.tensor([0.0])], [torch.tensor([0.0])], 0.0, id="zero"),
        pytest.param([torch.ones(1, 2)], [torch.ones(2)], float("inf"), id="other shape"),
        pytest.param([torch.ones(2)], [torch.ones(2), torch.ones(2)], float("inf"), id="missing gradient"),
    ],
)
def test_relative_error(result: Any, expected: Any, error: float) -> None:
    assert cases.relative_error(result, [e.double() for e in expected]) == pytest.approx(error)


def test_nan_is_wrong() -> None:
    error = cases.relative_error(
        [torch.tensor([torch.nan, 1.0]), torch.ones(1)], [torch.ones(2), torch.ones(1)]
    )
    assert not error <= TOLERANCE


def timing(median: float, rounds: list[float] | None = None) -> dict[str, Any]:
    return {
        "median": median,
        "p10": median,
        "rounds": rounds or [median, median],
        "samples": 20,
        "disturbed": 1,
    }


SPEED_UP = Goal(("slow", "fast"), gate=2.0, stretch=4.0)
COST = Goal(("fast",), gate=1.2, stretch=0.8, at_most=True)


@pytest.mark.parametrize(
    ("goal", "ours", "ratio", "word"),
    [
        pytest.param(SPEED_UP, 0.50, 1.6, "miss", id="speed-up missed"),
        pytest.param(SPEED_UP, 0.40, 2.0, "pass", id="speed-up at the gate"),
        pytest.param(SPEED_UP, 0.20, 4.0, "stretch", id="speed-up at the stretch"),
        pytest.param(COST, 1.00, 1.25, "miss", id="cost missed"),
        pytest.param(COST, 0.88, 1.1, "pass", id="cost within the gate"),
        pytest.param(COST, 0.60, 0.75, "stretch", id="cost within the stretch"),
        pytest.param(Goal(("fast",), gate=2.0), 0.01, 80.0, "pass", id="no stretch"),
    ],
)
def test_goal_is_decided_against_the_fastest(goal: Goal, ours: float, ratio: float, word: str) -> None:
    decision = ratios.decide(goal, {OURS: timing(ours), "slow": timing(3.0), "fast": timing(0.8)})
    assert decision is not None
    assert decision["against"] == "fast"
    assert decision["ratio"] == pytest.approx(ratio)
    assert ratios.verdict(goal, decision) == word


def test_goal_keeps_the_spread_over_the_rounds() -> None:
    timings = {OURS: timing(1.0, [1.0, 0.5, 2.0]), "fast": timing(3.0, [3.0, 3.0, 4.0])}
    decision = ratios.decide(SPEED_UP, timings)
    assert decision == {"against": "fast", "ratio": 3.0, "lowest": 2.0, "highest": 6.0}


def test_goal_without_a_competitor_is_not_measured() -> None:
    assert ratios.decide(SPEED_UP, {OURS: timing(1.0)}) is None
    assert ratios.verdict(SPEED_UP, None) == "not measured"


def test_summary_is_the_median_of_the_rounds() -> None:
    clock = ratios.Clock.__new__(ratios.Clock)
    clock.rounds = [[1.0, 2.0, 9.0], [4.0], [5.0, 7.0]]
    clock.taken, clock.disturbed = 8, 2
    summary = clock.summary()
    assert summary["rounds"] == [2.0, 4.0, 6.0]
    assert (summary["median"], summary["samples"], summary["disturbed"]) == (4.0, 8, 2)
    assert summary["p10"] == pytest.approx(1.5)


def test_rates_share_the_ceilings() -> None:
    found = ratios.rates(
        canned_case(traffic=8000, flops=4 * ceilings.SGEMM_FLOPS, episodes=10),
        {OURS: timing(2.0)},
        {"copy": timing(0.5), "sgemm": timing(0.25)},
    )
    assert found["bytes_per_second"] == 4000
    assert found["share_of_copy"] == 0.25
    assert found["share_of_sgemm"] == pytest.approx(0.5)
    assert found["episodes_per_second"] == 5


def test_busy_machine_is_said() -> None:
    records = [{"timings": {OURS: timing(1.0), "other": timing(1.0) | {"samples": 4, "disturbed": 2}}}]
    assert ratios.disturbed_share(records) == pytest.approx((1 / 20 + 2 / 4) / 2)
    assert "28% of the samples" in ratios.busy_note(records)
    assert ratios.busy_note([{"timings": {OURS: timing(1.0)}}]) == ""
    assert ratios.disturbed_share([{"timings": {}}]) == 0.0


def canned_case(**fields: Any) -> Case:
    """Doubling a vector: ours, a right and a wrong competitor can be told apart."""
    given: dict[str, Any] = {
        "name": "doubling",
        "title": "doubling",
        "sizes": Sizes(),
        "tiny": Sizes(),
        "inputs": lambda sizes: Inputs((torch.ones(3, requires_grad=True),), torch.ones(3)),
        "check": cases.against_float64(lambda x: 2 * x),
        "variants": (Variant(OURS, lambda x: x + x), Variant("other", lambda x: x * 2.0)),
        "goals": (Goal(("other",), 2.0, 3.0),),
    }
    return Case(**(given | fields))


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ours takes 1 s and all others 2.5 s, without timing; the list holds the names that were asked for."""
    timed: list[str] = []

    def measure(calls: dict[str, Any], budget: ratios.Budget) -> dict[str, Any]:
        timed.extend(calls)
        return {name: timing(1.0 if name == OURS else 2.5) for name in calls}

    monkeypatch.setattr(ratios, "measure", measure)
    return timed


def test_case_with_a_wrong_gradient_is_not_timed(no_clock: list[str]) -> None:
    stops_gradient = Variant("other", lambda x: x + x.detach())
    record = ratios.run_case(
        canned_case(variants=(Variant(OURS, lambda x: x + x), stops_gradient)), ratios.FULL
    )
    assert no_clock == []
    assert not record["correct"] and record["wrong"] == ["other"] and record["timings"] == {}
    assert "WRONG, not timed: other" in ratios.describe(record)
    assert ratios.gate_failures([record]) == ["doubling: wrong results of other"]


def test_missing_compiler_is_said(no_clock: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Any, **_: Any) -> Any:
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(Variant.call, "__defaults__", (no_compiler,))
    ours = Variant(OURS, lambda x: x + x)
    case = canned_case(variants=(ours, Variant("other", lambda x: 2 * x, compiled=True)))
    record = ratios.run_case(case, ratios.FULL)
    assert no_clock == [OURS]
    assert record["unavailable"] == {"other": "RuntimeError: no C++ compiler"}
    assert "unavailable: RuntimeError: no C++ compiler" in ratios.describe(record)
    assert ratios.gate_failures([record]) == ["doubling: no time of other"]


def test_missing_library_is_said(no_clock: list[str]) -> None:
    def missing(x: Any) -> Any:
        raise ModuleNotFoundError("No module named 'peer'")

    ours = Variant(OURS, lambda x: x + x)
    record = ratios.run_case(
        canned_case(variants=(ours, Variant("peer", missing, peer=True)), goals=()), ratios.FULL
    )
    assert record["unavailable"] == {"peer": "ModuleNotFoundError: No module named 'peer'"}
    assert no_clock == [OURS]
    with pytest.raises(ModuleNotFoundError):
        ratios.run_case(canned_case(variants=(ours, Variant("own", missing))), ratios.FULL)


@pytest.mark.parametrize("loop", [peers.higher_loop, peers.torchopt_loop, peers.learn2learn_loop])
def test_peers_compute_the_same(loop: Any) -> None:
    pytest.importorskip(loop.__name__.removesuffix("_loop"), reason="pip install -r benchmarks/peers.txt")
    sizes = inner_mlp.MlpSizes(3, 4, 5, 2, (1, 6, 6, 1), 0.01)
    inputs = inner_mlp.inputs(sizes)
    loss, expected = loop(*inputs), inner_mlp.exact(*inputs)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        torch.autograd.grad(loss, inputs[5:]), torch.autograd.grad(expected, inputs[5:]), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_module_of_the_peers_has_the_given_parameters() -> None:
    sizes = inner_mlp.MlpSizes(3, 4, 5, 2, (1, 6, 6, 1), 0.01)
    inputs = inner_mlp.inputs(sizes)
    net = peers.network(sizes, inputs[5:])
    assert {id(p) for p in net.parameters()} == {id(p) for p in inputs[5:]}
    torch.testing.assert_close(net(inputs[1]), reference.mlp(inputs[1], *inner_mlp.split(inputs[5:])))


def test_quick_leaves_out_compiled_variants(no_clock: list[str]) -> None:
    variants = (*canned_case().variants, Variant("compiled", lambda x: 2 * x, compiled=True))
    record = ratios.run_case(canned_case(variants=variants, traffic=8), ratios.QUICK, quick=True)
    assert no_clock == [OURS, "other"]
    assert "2.5x" in ratios.describe_quick([record])


def canned_result(case: Case) -> dict[str, Any]:
    result = ratios.conditions(["--out", "results/a.json"], 2, "keeps its pages", ratios.FULL, quick=False)
    record = ratios.run_case(case, ratios.FULL)
    return result | {"cases": [record], "disturbed": ratios.disturbed_share([record])}


@pytest.fixture
def result(no_clock: list[str]) -> dict[str, Any]:
    return canned_result(canned_case(traffic=8000, flops=4000))


def test_main_writes_what_report_reads(
    no_clock: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ratios, "prepare", lambda threads, default_allocator: "default")
    monkeypatch.setattr(ratios, "find", lambda names: (canned_case(),))
    out = tmp_path / "new" / "cpu.json"
    assert ratios.main(["--out", str(out), "--gate"]) == 0
    assert "doubling" in capsys.readouterr().out
    assert report.load(out)["cases"][0]["goals"][0]["verdict"] == "pass"

    monkeypatch.setattr(ratios, "find", lambda names: (canned_case(goals=(Goal(("other",), 9.0),)),))
    assert ratios.main([]) == 0
    assert ratios.main(["--gate"]) == 1
    assert "doubling: 2.50x against other, gate 9x" in capsys.readouterr().out


def test_report_names_its_conditions(result: dict[str, Any]) -> None:
    section = report.render(result, "cpu.png")
    for fact in (
        result["command"],
        result["date"],
        result["cpu"],
        torch.__version__,
        "2 threads",
        "keeps its pages",
    ):
        assert fact in section
    assert "(5% of the samples" in section.replace("\n", " ")
    assert "| doubling | 1 s; 8e-06 GB/s (250% of a copy); 4e-06 GFLOP/s (0% of sgemm) | other |" in section
    assert "| **2.50x** | 2x | 3x | pass |" in section


def test_report_tables_have_one_width(result: dict[str, Any]) -> None:
    result["cases"][0]["unavailable"] = {"compiled": "Error: a | b"}
    lines = [line for line in report.render(result, "cpu.png").splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {9}


def break_correctness(result: dict[str, Any]) -> None:
    result["cases"][0]["correct"] = False


def make_quick(result: dict[str, Any]) -> None:
    result["quick"] = True


def drop_cases(result: dict[str, Any]) -> None:
    del result["cases"]


def empty_cases(result: dict[str, Any]) -> None:
    result["cases"] = []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_correctness, "wrong results in doubling"),
        (make_quick, "measures too little"),
        (drop_cases, "not a result of benchmarks.ratios"),
        (empty_cases, "holds no case"),
    ],
)
def test_report_refuses(result: dict[str, Any], tmp_path: Path, damage: Any, message: str) -> None:
    damaged = copy.deepcopy(result)
    damage(damaged)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=message):
        report.load(path)


@pytest.mark.parametrize(
    "text", ["", f"{report.END}{report.BEGIN}", report.BEGIN, f"{report.BEGIN}{report.END}" * 2]
)
def test_insert_needs_both_markers_once(text: str) -> None:
    with pytest.raises(ValueError, match="readme: expected"):
        report.insert(text, "new")


def test_report_rewrites_its_section_only(
    result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the chart needs matplotlib")
    path, readme = tmp_path / "cpu.json", tmp_path / "README.md"
    path.write_text(json.dumps(result))
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\nForward and backward")
    assert text.endswith(f"|\n{report.END}\nafter\n")
    assert "old" not in text and "](cpu.png)" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert report.main([str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err


def test_training_steps_learn_the_same_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain step and ours, in small: from about the loss of guessing downwards."""
    for name, value in {"WAYS": 4, "QUERIES": 3, "CLASSES": 6, "PER_CLASS": 7}.items():
        monkeypatch.setattr(training, name, value)
    torch.manual_seed(0)
    random.seed(0)
    step = training.plain_step()
    plain = [step().item() for _ in range(40)]
    half, single = (
        [row.loss for row in training.metafast_rows(40, precision)] for precision in ("bfloat16", "float32")
    )
    for losses in (plain, half, single):
        assert all(0 <= loss < 100 for loss in losses)
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_a_process_tells_its_time_and_peak() -> None:
    # One of its own: this one may have grown before.
    code = (
        "import json; from benchmarks import training as t; print(json.dumps(t.once(t.DEFAULT, 1, steps=1)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    found = json.loads(printed)
    assert found["seconds"] > 0 and found["peak_bytes"] > 0


@pytest.mark.parametrize("policy", [None, "PASSIVE"])
def test_a_command_says_how_threads_wait(policy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["training.py", "--out", "a b.json"])
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    before = "" if policy is None else f"OMP_WAIT_POLICY={policy} "
    command = training.conditions("benchmarks.training", 2)["command"]
    assert command == f"{before}python -m benchmarks.training --out 'a b.json'"


def test_training_is_held_against_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {training.PLAIN: 0.4, training.OURS: 0.1}

    def run(command: list[str], **options: Any) -> Any:
        way = command[command.index("--once") + 1]
        said = {"seconds": seconds.get(way, 0.2), "peak_bytes": 1e8 * seconds.get(way, 0.2)}
        return SimpleNamespace(stdout=json.dumps(said))

    monkeypatch.setattr(training.subprocess, "run", run)
    found = training.measure(2, 2)
    assert found["step_ratio"]["plain PyTorch / metafast"] == pytest.approx(4)
    assert found["peak_ratio"]["metafast / plain PyTorch, pages kept"] == pytest.approx(0.5)
    assert len(found["rounds"][training.HALF]) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of peaks")
@pytest.mark.parametrize("way", memory.WAYS_TO_DO_IT)
def test_every_way_of_the_memory_benchmark_runs(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TASKS", 2)
    threads = torch.get_num_threads()
    found = memory.once(way, 1, threads)
    assert found["peak_bytes"] > 2**20
    assert ("predicted_bytes" in found) == way.startswith("metafast")


@pytest.mark.parametrize("workload", compat.WORKLOADS, ids=lambda w: f"{w.library}, {w.name}")
def test_workloads_of_the_drop_in_modules(workload: compat.Workload) -> None:
    """They run on ours, and the line that hands all tasks over gives the same numbers."""
    ours = importlib.import_module(f"metafast.compat.{workload.library}")
    found = workload.of(ours)()
    if workload.handed_over is not None:
        compat.same(workload.handed_over()(), found)


def test_a_drop_in_module_is_timed_against_its_original(monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(name: str) -> Any:
        if name == "absent":
            raise ImportError("no absent here")
        return name

    monkeypatch.setattr(compat, "import_module", imported)
    seconds = {"original": 0.4, "metafast": 0.2, "handed over": 0.01}
    monkeypatch.setattr(compat, "interleaved", lambda runs, _: {name: seconds[name] for name in runs})

    def of(library: str) -> compat.Run:
        return lambda: [torch.ones(2)]

    record = compat.measured(compat.Workload("rows", "higher", of, 2.0, lambda: of("")), 1.0)
    assert record["ratio"] == pytest.approx({"metafast": 2, "handed over": 40})
    assert (
        compat.described(record) == "higher: rows: original 400 ms; metafast 200 ms (2.00x, gate 2), "
        "handed over 10 ms (40.00x, gate 20)"
    )
    away = compat.measured(compat.Workload("rows", "absent", of, 2.0), 1.0)
    assert compat.described(away) == "absent: rows: unavailable: no absent here"
    with pytest.raises(AssertionError):
        compat.measured(compat.Workload("rows", "higher", of, 2.0, lambda: lambda: [torch.zeros(2)]), 1.0)


def test_runs_take_turns() -> None:
    order: list[str] = []
    medians = compat.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 0.0)
    assert order == ["a", "b"] * 5 and medians.keys() == {"a", "b"}
