"""Times the variants of every case interleaved and decides the goals: ``python -m benchmarks.ratios``.

A case whose values or gradients are wrong is reported and never timed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ceilings
from benchmarks.cases import OURS, Call, Case, Goal, Variant, find
from benchmarks.machine import cpu_model
from benchmarks.text import bound, duration, table

DEFAULT_OUT = Path("benchmarks/results/cpu-2-threads.json")

#: A sample repeats the call until it lasts this long, far above the resolution of the clock.
SAMPLE_SECONDS = 0.002

#: Share of interrupted samples above which a case's table says that the machine is busy.
BUSY = 0.2

#: A sample is kept while it saw at most one preemption in this many seconds.
PREEMPTION_SECONDS = 0.020


@dataclass(frozen=True)
class Budget:
    """Seconds of timing for each variant, split evenly over the rounds."""

    seconds: float
    rounds: int


FULL = Budget(seconds=4.0, rounds=10)
QUICK = Budget(seconds=0.4, rounds=4)


def prepare(threads: int = 2, default_allocator: bool = False) -> str:
    """Set the threads and the allocator for all variants alike; says which allocator that is."""
    torch.set_num_threads(threads)
    if default_allocator:
        return "default"
    from metafast._library import keep_pages

    return "keeps its pages" if keep_pages() else "default (this one cannot keep its pages)"


class Clock:
    """Samples of one call, collected over rounds that alternate with those of other calls."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.rounds: list[list[float]] = []
        self.taken = self.disturbed = 0
        call()
        self.repeat = 1
        while self._sample()[0] * self.repeat < SAMPLE_SECONDS:
            self.repeat *= 2

    def _run(self) -> None:
        for _ in range(self.repeat):
            self.call()

    def _sample(self) -> tuple[float, bool]:
        """Seconds of one call, and whether the sample was left in peace."""
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        start = time.perf_counter()
        self._run()
        elapsed = time.perf_counter() - start
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches
        return elapsed / self.repeat, switches <= elapsed / PREEMPTION_SECONDS

    def round(self, seconds: float) -> None:
        """Sample for about ``seconds``. Disturbed samples stand in for a round that has no other."""
        clean: list[float] = []
        disturbed: list[float] = []
        # The other calls have just used the caches: one call that does not count.
        self.call()
        deadline = time.perf_counter() + seconds
        while not (clean or disturbed) or time.perf_counter() < deadline:
            value, undisturbed = self._sample()
            (clean if undisturbed else disturbed).append(value)
        self.taken += len(clean) + len(disturbed)
        self.disturbed += len(disturbed)
        self.rounds.append(clean or disturbed)

    def summary(self) -> dict[str, Any]:
        medians = [statistics.median(samples) for samples in self.rounds]
        pooled = [sample for samples in self.rounds for sample in samples]
        return {
            "median": statistics.median(medians),
            "p10": float(np.quantile(pooled, 0.1)),
            "rounds": medians,
            "samples": self.taken,
            "disturbed": self.disturbed,
        }


def measure(calls: dict[str, Call], budget: Budget, kind: type[Clock] = Clock) -> dict[str, dict[str, Any]]:
    """Seconds of one call, for all calls in turn, round after round."""
    clocks = {name: kind(call) for name, call in calls.items()}
    order = list(clocks.values())
    enabled = gc.isenabled()
    gc.disable()
    # What is there already need not be looked at in every round.
    gc.freeze()
    try:
        for _ in range(budget.rounds):
            for clock in order:
                gc.collect()
                clock.round(budget.seconds / budget.rounds)
            # A variant is not to run behind the same one each time.
            order.reverse()
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
    return {name: clock.summary() for name, clock in clocks.items()}


def ready(variant: Variant, inputs: Any) -> tuple[Call, Any]:
    """The variant's call and its first result; compilation happens here."""
    call = variant.call(inputs)
    with quiet(variant):
        return call, call()


@contextlib.contextmanager
def quiet(variant: Variant) -> Iterator[None]:
    """What the compiler or another library warns about is not ours to repair."""
    with warnings.catch_warnings():
        if variant.compiled or variant.peer:
            warnings.simplefilter("ignore")
        yield


def decide(goal: Goal, timings: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The goal against measured times; None where no variant that it names was measured."""
    measured = [name for name in goal.against if name in timings]
    if not measured:
        return None
    best = min(measured, key=lambda name: timings[name]["median"])
    above, below = (OURS, best) if goal.at_most else (best, OURS)
    per_round = [a / b for a, b in zip(timings[above]["rounds"], timings[below]["rounds"], strict=True)]
    return {
        "against": best,
        "ratio": timings[above]["median"] / timings[below]["median"],
        "lowest": min(per_round),
        "highest": max(per_round),
    }


def verdict(goal: Goal, decision: dict[str, Any] | None) -> str:
    """``stretch``, ``pass``, ``miss`` or ``not measured``."""
    if decision is None:
        return "not measured"
    ratio = decision["ratio"]

    def reaches(bound: float) -> bool:
        return bool(ratio <= bound if goal.at_most else ratio >= bound)

    if not reaches(goal.gate):
        return "miss"
    return "stretch" if goal.stretch is not None and reaches(goal.stretch) else "pass"


def rates(
    case: Case, timings: dict[str, dict[str, Any]], limits: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """Bytes, operations and episodes per second at our median, with the share of the ceilings."""
    seconds = timings[OURS]["median"]
    found: dict[str, float] = {}
    if case.traffic and "copy" in limits:
        found["bytes_per_second"] = case.traffic / seconds
        found["share_of_copy"] = limits["copy"]["median"] / seconds
    if case.flops and "sgemm" in limits:
        found["flops_per_second"] = case.flops / seconds
        found["share_of_sgemm"] = case.flops / seconds / (ceilings.SGEMM_FLOPS / limits["sgemm"]["median"])
    if case.episodes:
        found["episodes_per_second"] = case.episodes / seconds
    return found


def run_case(case: Case, budget: Budget, quick: bool = False) -> dict[str, Any]:
    """Check every variant of the case, then time them. The result is plain data for a JSON file."""
    inputs = case.inputs(case.sizes)
    error_of = case.check(inputs)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    unavailable: dict[str, str] = {}
    for variant in case.variants:
        if quick and (variant.compiled or variant.peer):
            continue
        try:
            call, result = ready(variant, inputs)
        except Exception as error:
            if not variant.lacks(error):
                raise
            unavailable[variant.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        calls[variant.name] = call
        if variant.checked:
            errors[variant.name] = error_of(result)
    del error_of
    wrong = sorted(name for name, error in errors.items() if not error <= case.tolerance)
    record: dict[str, Any] = {
        "name": case.name,
        "title": case.title,
        "sizes": vars(case.sizes),
        "traffic": case.traffic,
        "flops": case.flops,
        "episodes": case.episodes,
        "correct": not wrong,
        "wrong": wrong,
        "errors": errors,
        "unavailable": unavailable,
        "timings": {},
        "ceilings": {},
        "rates": {},
        "goals": [],
    }
    if wrong:
        return record
    limits: dict[str, Call] = {}
    if case.traffic and not quick:
        limits["copy"] = ceilings.copy_call(case.traffic)
    if case.flops and not quick:
        limits["sgemm"] = ceilings.sgemm_call()
    measured = measure({**calls, **limits}, budget)
    record["timings"] = {name: measured[name] for name in calls}
    record["ceilings"] = {name: measured[name] for name in limits}
    record["rates"] = rates(case, record["timings"], record["ceilings"])
    for goal in case.goals:
        decision = decide(goal, record["timings"])
        if quick and decision is None:
            continue
        missing = {"against": goal.against[0], "ratio": None, "lowest": None, "highest": None}
        record["goals"].append(
            {
                **(decision or missing),
                "gate": goal.gate,
                "stretch": goal.stretch,
                "at_most": goal.at_most,
                "verdict": verdict(goal, decision),
            }
        )
    return record


def metafast_version() -> str:
    try:
        return importlib.metadata.version("metafast")
    except importlib.metadata.PackageNotFoundError:
        return "source tree"


def conditions(
    arguments: Sequence[str], threads: int, allocator: str, budget: Budget, quick: bool
) -> dict[str, Any]:
    """All that a reader needs to judge or repeat the figures."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks.ratios", *arguments]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": cpu_model(),
        "threads": threads,
        "allocator": allocator,
        "versions": {
            "metafast": metafast_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "seconds_per_variant": budget.seconds,
        "rounds": budget.rounds,
        "quick": quick,
    }


def rates_text(found: dict[str, float]) -> list[str]:
    """Our rates in words, each with its share of the ceiling."""
    text = []
    if "bytes_per_second" in found:
        text.append(f"{found['bytes_per_second'] / 1e9:.3g} GB/s ({found['share_of_copy']:.0%} of a copy)")
    if "flops_per_second" in found:
        text.append(f"{found['flops_per_second'] / 1e9:.3g} GFLOP/s ({found['share_of_sgemm']:.0%} of sgemm)")
    if "episodes_per_second" in found:
        text.append(f"{found['episodes_per_second']:,.0f} episodes/s")
    return text


def describe(record: dict[str, Any]) -> str:
    """One case as text: our time and rates, then every other variant with its ratio and goal."""
    heading = f"{record['title']}  [{record['name']}]"
    if not record["correct"]:
        wrong = ", ".join(f"{name} (error {record['errors'][name]:.1e})" for name in record["wrong"])
        return f"{heading}\n  WRONG, not timed: {wrong}"
    ours = record["timings"][OURS]
    rows = [("", "median", "p10", "ratio", "gate", "stretch", "")]
    rows.append(
        (
            OURS,
            duration(ours["median"]),
            duration(ours["p10"]),
            "",
            "",
            "",
            ", ".join(rates_text(record["rates"])),
        )
    )
    goals = {goal["against"]: goal for goal in record["goals"]}
    for name, timing in record["timings"].items():
        if name == OURS:
            continue
        goal = goals.get(name)
        if goal is None:
            ratio, judged = f"{timing['median'] / ours['median']:.2f}x", ("", "", "")
        else:
            ratio = f"{goal['ratio']:.2f}x"
            bounds = (bound(goal["gate"], goal["at_most"]), bound(goal["stretch"], goal["at_most"]))
            judged = (*bounds, goal["verdict"].upper() if goal["verdict"] == "miss" else goal["verdict"])
        rows.append((name, duration(timing["median"]), duration(timing["p10"]), ratio, *judged))
    for name, reason in record["unavailable"].items():
        goal = goals.get(name)
        bounds = (
            (bound(goal["gate"], goal["at_most"]), bound(goal["stretch"], goal["at_most"]))
            if goal
            else ("", "")
        )
        rows.append((name, "-", "-", "-", *bounds, f"unavailable: {reason}"))
    return heading + "\n" + "\n".join("  " + line for line in table(rows).splitlines()) + busy_note([record])


def describe_quick(records: Iterable[dict[str, Any]]) -> str:
    """The short table: our time beside each plain PyTorch form."""
    rows = [("forward + backward", "plain PyTorch", "time", "metafast", "ratio")]
    for record in records:
        if not record["correct"]:
            rows.append((record["title"], "WRONG, not timed: " + ", ".join(record["wrong"]), "", "", ""))
            continue
        ours = record["timings"][OURS]["median"]
        for name, timing in record["timings"].items():
            if name != OURS:
                theirs = timing["median"]
                rows.append(
                    (record["title"], name, duration(theirs), duration(ours), f"{theirs / ours:.1f}x")
                )
    return table(rows)


def disturbed_share(records: Iterable[dict[str, Any]]) -> float:
    """Share of the samples in which another process took the processor; each variant counts alike."""
    shares = [
        timing["disturbed"] / timing["samples"] for record in records for timing in record["timings"].values()
    ]
    return statistics.fmean(shares) if shares else 0.0


def busy_note(records: Iterable[dict[str, Any]]) -> str:
    """A line of warning where other processes took too much; else nothing."""
    share = disturbed_share(records)
    if share <= BUSY:
        return ""
    return (
        f"\n  Busy machine: other processes interrupted {share:.0%} of the samples. Do not trust these times."
    )


def gate_failures(records: Iterable[dict[str, Any]]) -> list[str]:
    """What keeps the gates from holding, in words; empty if they hold."""
    failures = []
    for record in records:
        if not record["correct"]:
            failures.append(f"{record['name']}: wrong results of {', '.join(record['wrong'])}")
        for goal in record["goals"]:
            if goal["verdict"] == "miss":
                wanted = bound(goal["gate"], goal["at_most"])
                failures.append(
                    f"{record['name']}: {goal['ratio']:.2f}x against {goal['against']}, gate {wanted}"
                )
            elif goal["verdict"] == "not measured":
                failures.append(f"{record['name']}: no time of {goal['against']}")
    return failures


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ratios", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="cases whose name contains this"
    )
    parser.add_argument(
        "--quick", action="store_true", help="about 20 s: the main operators against eager PyTorch"
    )
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--seconds", type=float, help="timing budget of each variant")
    parser.add_argument("--rounds", type=int, help="rounds that the budget is split into")
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="do not make the allocator keep its pages (for any variant)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        nargs="?",
        const=DEFAULT_OUT,
        help=f"write the results as JSON (default name {DEFAULT_OUT})",
    )
    parser.add_argument("--gate", action="store_true", help="exit with 1 if a gate is missed")
    options = parser.parse_args(arguments)
    if options.threads < 1 or (options.rounds or 1) < 1 or (options.seconds or 1.0) <= 0:
        parser.error("--threads, --rounds and --seconds must be positive")
    try:
        options.cases = find(options.only)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    allocator = prepare(options.threads, options.default_allocator)
    base = QUICK if options.quick else FULL
    budget = Budget(options.seconds or base.seconds, options.rounds or base.rounds)
    result = conditions(arguments, options.threads, allocator, budget, options.quick)
    print(
        f"{result['cpu']}, {options.threads} threads, torch {torch.__version__}, allocator: {allocator}; "
        f"float32, medians of {budget.rounds} interleaved rounds\n",
        flush=True,
    )
    records: list[dict[str, Any]] = []
    for case in options.cases:
        if options.quick and not case.quick:
            continue
        records.append(run_case(case, budget, options.quick))
        if not options.quick:
            print(describe(records[-1]) + "\n", flush=True)
    if options.quick:
        print(describe_quick(records) + busy_note(records))
    result["cases"] = records
    result["disturbed"] = disturbed_share(records)
    if options.out is not None:
        from metafast.training.files import write_atomically

        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())
        print(f"written: {os.fspath(options.out)}")
    wrong = any(not record["correct"] for record in records)
    failures = gate_failures(records)
    if failures and not options.quick:
        print("gates missed:\n  " + "\n  ".join(failures))
    return 1 if wrong or (options.gate and failures) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
