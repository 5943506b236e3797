"""Times the operators and a training step on a GPU: ``python -m benchmarks.gpu [--quick] [--out FILE]``.

The cases, their competitors and their check against float64 are those of ``benchmarks.cases``; ``make gpu-check`` runs
this after the tests and writes the report. Three times are taken of a call, which is a forward and a backward pass:

wall
    Time of the host per call, while calls follow one another and the last is waited for: the larger of what Python
    and torch take to launch it and what the device takes to run it. This is what an eager training loop sees.
kernel
    Time of the device per call: a CUDA graph holds one call for each copy of the inputs, CUDA events stand around its
    replays, and the time between them is divided by the number of calls. It counts all kernels of a call, torch's
    as well, and the gaps between them on the device, but nothing of the host. *Cold*: the copies are together at
    least ``CACHES`` times as large as the L2 cache, so that every call reads its inputs from device memory (what a call
    writes may stay in the cache). *Warm*: all calls read the same inputs, which may lie in the L2 cache, as
    features do that an encoder has just written. Gates and shares of ceilings are about cold inputs; those of a case
    that is not about memory are never cold.
profile
    Duration of every kernel of our call by torch.profiler (CUPTI), warm, the mean of ``PROFILED`` calls. Their sum
    leaves the gaps out.

Variants are timed in turn, round after round, and the median of the rounds' medians counts. Bytes and operations are
the least that the shapes ask for. Ceilings are a copy of ``COPY_BYTES`` (read and written together) and a float32
product without tf32, timed in the same process.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, ceilings, gpu_report, inner_mlp
from benchmarks.cases import CASES, OURS, Call, Case, Goal, Inputs
from benchmarks.ratios import Budget, Clock, decide, measure, metafast_version, quiet, verdict
from metafast import MLP, Conv4, Episodes
from metafast.learners import ANIL, MAML, Outcome, ProtoNet
from metafast.training.files import write_atomically
from metafast.training.graphs import GraphedStep, no_read_back

#: Copies of the inputs together are this many times as large as the L2 cache, and at most MOST_COPIES.
CACHES = 3
MOST_COPIES = 1024
#: Calls in the graph that reads the same inputs every time.
WARM_CALLS = 20
PROFILED = 20

COPY_BYTES = 2**31
SGEMM_SIZE = 4096

WALL, KERNEL = Budget(seconds=0.6, rounds=6), Budget(seconds=0.3, rounds=6)
QUICK = Budget(seconds=0.06, rounds=2)

#: Most that the cold kernel time of a case may be, in seconds, by a word in the device's name.
KERNEL_GATES = {
    "prototypical-head-d1600": {"H100": 28e-6, "H200": 20e-6},
    "prototypical-head-d64": {"H100": 10e-6, "H200": 10e-6},
    "prototypes-d1600": {"H100": 10e-6, "H200": 8e-6},
    "anil-d1600-K5": {"H100": 45e-6, "H200": 45e-6},
    "maml-sinusoid-k1": {"H100": 10e-6, "H200": 10e-6},
    "maml-sinusoid-k5": {"H100": 20e-6, "H200": 20e-6},
    "maml-sinusoid-k10": {"H100": 32e-6, "H200": 32e-6},
}

#: Most that it may be in times of a large copy of as many bytes.
COPY_GATES = {f"norm-relu-pool-{size}": 1.5 for size in (28, 14, 7)}

#: Least ratio of wall times for the heads, against the faster torch.cdist form.
CDIST_GATE = 6.0

#: Largest difference of the loss after FIRST_STEPS training steps; torch's convolutions multiply in tf32.
TRAINING_TOLERANCE = 0.02
FIRST_STEPS = 5


class HostClock(Clock):
    """Wall time of calls that follow one another, until the device has finished the last."""

    def _run(self) -> None:
        super()._run()
        torch.cuda.synchronize()


class DeviceClock(Clock):
    """Time between CUDA events around the calls."""

    def _sample(self) -> tuple[float, bool]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.repeat, True


def captured(calls: Sequence[Call]) -> Call:
    """A call that replays a CUDA graph of all ``calls``. Raises RuntimeError where one of them waits for the device."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
        # A capture that fails leaves torch in a bad state, so see first whether this one can succeed.
        with no_read_back():
            calls[0]()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    finally:
        torch.cuda.set_stream(current)
    replay: Call = graph.replay
    return replay


def enough_copies(inputs: Inputs, cache: int) -> int:
    """How many copies of the inputs exceed the cache ``CACHES`` times."""
    tensors = [a for a in (*inputs.arguments, inputs.upstream) if isinstance(a, torch.Tensor)]
    size = sum(t.numel() * t.element_size() for t in tensors)
    return min(max(math.ceil(CACHES * cache / size), 1), MOST_COPIES)


def per_call(timing: dict[str, Any], calls: int) -> dict[str, Any]:
    """The timing of one of ``calls`` that were timed together."""
    return {
        **timing,
        "median": timing["median"] / calls,
        "p10": timing["p10"] / calls,
        "rounds": [seconds / calls for seconds in timing["rounds"]],
    }


def measure_ceilings(quick: bool) -> dict[str, float]:
    """Bytes and operations per second of a large copy and of a large product."""
    torch.set_float32_matmul_precision("highest")
    calls = {
        "copy": ceilings.copy_call(COPY_BYTES, "cuda"),
        "sgemm": ceilings.sgemm_call(SGEMM_SIZE, "cuda"),
    }
    timings = measure(calls, QUICK if quick else KERNEL, DeviceClock)
    return {
        "bytes_per_second": COPY_BYTES / timings["copy"]["median"],
        "flops_per_second": 2 * SGEMM_SIZE**3 / timings["sgemm"]["median"],
    }


def shares(case: Case, seconds: float, limits: dict[str, float]) -> dict[str, float]:
    """Rates of a call of ``seconds``, and their shares of the ceilings."""
    found = {}
    for unit, amount in (("bytes", case.traffic), ("flops", case.flops)):
        if amount == 0:
            continue
        rate = amount / seconds
        found[f"{unit}_per_second"] = rate
        found[f"share_of_{'copy' if unit == 'bytes' else 'sgemm'}"] = rate / limits[f"{unit}_per_second"]
    return found


def kernel_gate(
    case: Case, device: str, seconds: float | None, limits: dict[str, float]
) -> dict[str, Any] | None:
    """The verdict on a cold kernel time, where a gate is set for that case."""
    gates = [gate for word, gate in KERNEL_GATES.get(case.name, {}).items() if word in device]
    if case.name in COPY_GATES:
        gates.append(COPY_GATES[case.name] * case.traffic / limits["bytes_per_second"])
    if not gates:
        return None
    if seconds is None:
        return {"gate": min(gates), "verdict": "not measured"}
    return {"gate": min(gates), "verdict": "pass" if seconds <= min(gates) else "miss"}


def wall_goals(case: Case) -> tuple[Goal, ...]:
    cdist = tuple(variant.name for variant in case.variants if variant.name.startswith("torch.cdist"))
    return (Goal(cdist, CDIST_GATE),) if cdist and case.name.startswith("prototypical-head") else ()


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for every variant, ours first: its times and their ratios to ours."""
    cold, warm = record["kernel"]["cold"], record["kernel"]["warm"]
    names = [OURS, *(name for name in (*record["wall"], *record["unavailable"]) if name != OURS)]
    found = []
    for name in names:
        row: dict[str, Any] = {"variant": name}
        for key, timings in (("wall", record["wall"]), ("kernel", cold), ("kernel_warm", warm)):
            row[key] = timings[name]["median"] if name in timings else None
            both = name in timings and OURS in timings
            row[f"{key}_ratio"] = row[key] / timings[OURS]["median"] if both and name != OURS else None
        row["note"] = record["unavailable"].get(name) or record["not_captured"].get(name) or ""
        found.append(row)
    return found


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def blank(name: str, title: str, sizes: Any, traffic: int, flops: int) -> dict[str, Any]:
    return {
        "name": name,
        "title": title,
        "sizes": sizes,
        "traffic": traffic,
        "flops": flops,
        "correct": True,
        "wrong": [],
        "errors": {},
        "unavailable": {},
        "not_captured": {},
        "wall": {},
        "kernel": {"cold": {}, "warm": {}},
        "copies": 0,
        "shares": {},
        "goals": [],
        "kernel_gate": None,
        "profile": [],
        "rows": [],
    }


def run_case(case: Case, limits: dict[str, float], quick: bool) -> dict[str, Any]:
    """Check every variant, then time them. The record is plain data for a JSON file."""
    properties = torch.cuda.get_device_properties(0)
    record = blank(case.name, case.title, vars(case.sizes), case.traffic, case.flops)
    inputs = case.inputs(case.sizes).each(lambda tensor: tensor.cuda())
    error_of = case.check(inputs)
    count = record["copies"] = enough_copies(inputs, properties.L2_cache_size) if case.traffic else 1
    copies = [inputs, *(inputs.each(torch.clone) for _ in range(count - 1))]
    calls: dict[str, list[Call]] = {}
    for variant in case.variants:
        if (quick and variant.compiled) or not variant.on_gpu:
            continue
        try:
            own = variant.calls(copies)
            with quiet(variant):
                result = own[0]()
        except Exception as error:
            # Only a compiler may be missing; any other failure is a mistake here or in metafast.
            if not variant.compiled:
                raise
            record["unavailable"][variant.name] = first_line(error)
            continue
        calls[variant.name] = own
        if variant.checked:
            record["errors"][variant.name] = error_of(result)
    del error_of, result
    record["wrong"] = sorted(name for name, error in record["errors"].items() if not error <= case.tolerance)
    record["correct"] = not record["wrong"]
    if not record["correct"]:
        return record
    budgets = (QUICK, QUICK) if quick else (WALL, KERNEL)
    record["wall"] = measure({name: own[0] for name, own in calls.items()}, budgets[0], HostClock)
    for kind in ("cold", "warm"):
        graphs: dict[str, Call] = {}
        lengths: dict[str, int] = {}
        for name, own in calls.items():
            together = own if kind == "cold" and case.traffic else own[:1] * WARM_CALLS
            try:
                graphs[name] = captured(together)
                lengths[name] = len(together)
            except RuntimeError as error:
                record["not_captured"][name] = f"no graph: {first_line(error)}"
        timings = measure(graphs, budgets[1], DeviceClock)
        record["kernel"][kind] = {name: per_call(t, lengths[name]) for name, t in timings.items()}
    seconds = record["kernel"]["cold"].get(OURS, {}).get("median")
    if seconds is not None:
        record["shares"] = shares(case, seconds, limits)
    record["kernel_gate"] = kernel_gate(case, properties.name, seconds, limits)
    record["goals"] = [judged(goal, record["wall"]) for goal in wall_goals(case)]
    record["rows"] = rows(record)
    return record


def judged(goal: Goal, timings: dict[str, Any]) -> dict[str, Any]:
    decision = decide(goal, timings) or {"against": goal.against[0], "ratio": None}
    return {**decision, "gate": goal.gate, "verdict": verdict(goal, decide(goal, timings))}


def profile(call: Call) -> list[dict[str, Any]]:
    """Every kernel of a call: its name, how often it runs and how many seconds it takes in all."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    call()
    torch.cuda.synchronize()
    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    return [
        {
            "kernel": event.key[:160],
            "runs": event.count / PROFILED,
            "seconds": event.self_device_time_total / 1e6 / PROFILED,
        }
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CUDA and event.self_device_time_total > 0
    ]


@dataclass(frozen=True)
class StepSizes:
    """A batch of a training step: 28 x 28 images of ``tasks`` episodes."""

    tasks: int
    ways: int
    shots: int
    queries: int

    @property
    def images(self) -> int:
        return self.tasks * self.ways * (self.shots + self.queries)

    @property
    def flops(self) -> int:
        """Of Conv4-64's convolutions, forward and backward; the first layer's input needs no gradient."""
        side, total = 28, 0
        for layer in range(4):
            channels = 1 if layer == 0 else 64
            total += (2 if layer == 0 else 3) * 2 * 9 * channels * 64 * side * side
            side //= 2
        return total * self.images


@dataclass(frozen=True)
class InnerStepSizes(StepSizes):
    """Of a step with an inner loop, whose arithmetic is not counted."""

    @property
    def flops(self) -> int:
        return 0


class CdistNet(ProtoNet):
    """The same network with the head that eager PyTorch code has."""

    def forward(self, batch: Episodes) -> Outcome:
        support, query = self.embed(batch)
        head = cases.cdist_head(cases.one_hot_means)
        loss = head(support, batch.support_y, query, batch.query_y, batch.ways)
        return Outcome(loss, loss)


def random_episodes(sizes: StepSizes, device: torch.device | str) -> Episodes:
    g = torch.Generator().manual_seed(0)

    def rows_of(per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = cases.shuffled_labels(sizes.tasks, sizes.ways, per_class, g)
        return torch.rand(*labels.shape, 1, 28, 28, generator=g), labels

    return Episodes(*rows_of(sizes.shots), *rows_of(sizes.queries), sizes.ways).to(device)


def eager_step(learner: torch.nn.Module, batch: Episodes) -> Call:
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3, fused=True)
    learner.train()

    def call() -> torch.Tensor:
        loss: torch.Tensor = learner(batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def graphed_step(learner: torch.nn.Module, batch: Episodes) -> Call:
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3, fused=True, capturable=True)
    step = GraphedStep(learner, optimizer)
    return lambda: step(batch).loss


SINUSOID = cases.sinusoid_sizes(steps=5)


class MappedMaml(MAML):
    """The same network whose tasks torch.func maps over."""

    def forward(self, batch: Episodes) -> Outcome:
        layers = [layer for layer in self.model.children() if isinstance(layer, torch.nn.Linear)]
        parameters = [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]
        loss = inner_mlp.mapped(SINUSOID, *data_of(batch), *parameters)
        return Outcome(loss, loss)


def data_of(batch: Episodes) -> tuple[torch.Tensor, ...]:
    return batch.support_x, batch.support_y, batch.query_x, batch.query_y


def sinusoids(device: torch.device | str) -> Episodes:
    return Episodes(*inner_mlp.inputs(SINUSOID)[1:5], 0).to(device)


def maml(network: type[MAML]) -> MAML:
    return network(MLP(SINUSOID.widths), SINUSOID.rate, SINUSOID.steps, loss="mse")


#: A network, and how its step runs.
StepVariant = tuple[Callable[[], torch.nn.Module], Callable[[torch.nn.Module, Episodes], Call]]


@dataclass(frozen=True)
class TrainingStep:
    """A step with Adam. The first variant is ours, a :class:`GraphedStep`; the second is right by definition."""

    title: str
    sizes: StepSizes | inner_mlp.MlpSizes
    batch: Callable[[torch.device | str], Episodes]
    variants: dict[str, StepVariant]


def protonet_step(sizes: StepSizes) -> TrainingStep:
    return TrainingStep(
        f"ProtoNet training step, {sizes.images} images, {sizes.ways}-way; metafast's as a CUDA graph",
        sizes,
        lambda device: random_episodes(sizes, device),
        {
            OURS: (lambda: ProtoNet(Conv4()), graphed_step),
            "metafast, eager": (lambda: ProtoNet(Conv4()), eager_step),
            "torch.cdist, eager": (lambda: CdistNet(Conv4()), eager_step),
            "torch.cdist, CUDA graph": (lambda: CdistNet(Conv4()), graphed_step),
        },
    )


def anil_step(sizes: StepSizes) -> TrainingStep:
    def network() -> ANIL:
        return ANIL(Conv4(), 64, sizes.ways)

    return TrainingStep(
        f"ANIL training step, {sizes.images} images, {sizes.ways}-way; as a CUDA graph",
        sizes,
        lambda device: random_episodes(sizes, device),
        {OURS: (network, graphed_step), "metafast, eager": (network, eager_step)},
    )


def conv_maml_step(sizes: InnerStepSizes) -> TrainingStep:
    def network() -> MAML:
        return MAML(torch.nn.Sequential(Conv4(), torch.nn.Linear(64, sizes.ways)), 0.01, 5)

    return TrainingStep(
        f"second-order MAML training step, Conv4-64, {sizes.tasks} tasks, K = 5; as a CUDA graph",
        sizes,
        lambda device: random_episodes(sizes, device),
        {OURS: (network, graphed_step), "metafast, eager": (network, eager_step)},
    )


STEPS = {
    "training-step-5-way": protonet_step(StepSizes(tasks=4, ways=5, shots=1, queries=5)),
    "training-step-60-way": protonet_step(StepSizes(tasks=1, ways=60, shots=1, queries=5)),
    "training-step-anil": anil_step(StepSizes(tasks=16, ways=5, shots=1, queries=1)),
    "training-step-maml": TrainingStep(
        f"second-order MAML training step, sinusoid, K = {SINUSOID.steps}; metafast's as a CUDA graph",
        SINUSOID,
        sinusoids,
        {
            OURS: (lambda: maml(MAML), graphed_step),
            "metafast, eager": (lambda: maml(MAML), eager_step),
            "torch.func vmap, eager": (lambda: maml(MappedMaml), eager_step),
            "torch.func vmap, CUDA graph": (lambda: maml(MappedMaml), graphed_step),
        },
    ),
    "training-step-maml-conv4": conv_maml_step(InnerStepSizes(tasks=8, ways=5, shots=1, queries=15)),
}


def run_step(name: str, step: TrainingStep, quick: bool) -> dict[str, Any]:
    record = blank(name, step.title, vars(step.sizes), 0, step.sizes.flops)
    batch = step.batch("cuda")
    calls, losses = {}, {}
    for variant, (network, prepare) in step.variants.items():
        torch.manual_seed(0)
        calls[variant] = prepare(network().cuda(), batch)
        losses[variant] = [float(calls[variant]()) for _ in range(FIRST_STEPS)]
    wanted = losses["metafast, eager"]
    record["errors"] = {variant: largest_difference(found, wanted) for variant, found in losses.items()}
    record["wrong"] = sorted(v for v, error in record["errors"].items() if not error <= TRAINING_TOLERANCE)
    record["correct"] = not record["wrong"]
    if record["correct"]:
        record["wall"] = measure(calls, QUICK if quick else WALL, HostClock)
        graphs = {
            variant: call for variant, call in calls.items() if step.variants[variant][1] is graphed_step
        }
        record["kernel"]["warm"] = measure(graphs, QUICK if quick else KERNEL, DeviceClock)
        record["rows"] = rows(record)
    return record


def largest_difference(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Relative to the wanted number or to 1, whichever is larger; NaN where one is."""
    differences = [abs(a - b) / max(abs(b), 1) for a, b in zip(found, wanted, strict=True)]
    return max(differences, key=lambda difference: (math.isnan(difference), difference))


def run(quick: bool, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Time everything; ``save`` gets the result so far after every case."""
    result: dict[str, Any] = {
        "metafast": metafast_version(),
        "quick": quick,
        "complete": False,
        "ceilings": measure_ceilings(quick),
        "cases": [],
        "failed": {},
    }
    on_device = {case.name: case for case in CASES if case.traffic or case.name in KERNEL_GATES}
    for name, case in on_device.items():
        attempt(result, name, lambda case=case: run_case(case, result["ceilings"], quick))
        save(result)
    for name, step in STEPS.items():
        attempt(result, name, lambda name=name, step=step: run_step(name, step, quick))
        save(result)
    # At the end: once loaded, the profiler may slow down later launches.
    for record in [] if quick else result["cases"]:
        if record["name"] in on_device and record["correct"]:
            add_profile(record, on_device[record["name"]])
    result["complete"] = True
    save(result)
    return result


def attempt(result: dict[str, Any], name: str, work: Callable[[], dict[str, Any]]) -> None:
    """Add the record of a case, or why it has none; the next one runs in any case."""
    try:
        record = work()
    except Exception as error:
        result["failed"][name] = first_line(error)
    else:
        result["cases"].append(record)
        print("  ".join(gpu_report.short_row(record)), flush=True)
    # Graphs hold memory of their own.
    gc.collect()
    torch.cuda.empty_cache()


def add_profile(record: dict[str, Any], case: Case) -> None:
    inputs = case.inputs(case.sizes).each(lambda tensor: tensor.cuda())
    try:
        record["profile"] = profile(case.variants[0].call(inputs))
    except Exception as error:
        record["profile_failed"] = first_line(error)


def wrong(result: dict[str, Any]) -> list[str]:
    """What makes a result unusable, in words."""
    found = [f"{name}: {reason}" for name, reason in result["failed"].items()]
    found += [
        f"{r['name']}: wrong results of {', '.join(r['wrong'])}" for r in result["cases"] if not r["correct"]
    ]
    found += [f"{r['name']}: {r['not_captured'][OURS]}" for r in result["cases"] if OURS in r["not_captured"]]
    return found if result["complete"] else [*found, "not complete"]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short rounds, and no torch.compile")
    parser.add_argument("--out", type=Path, help="write the result as JSON, after every case")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2

    def save(result: dict[str, Any]) -> None:
        if options.out is not None:
            write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())

    result = run(options.quick, save)
    for reason in wrong(result):
        print(f"FAILED {reason}")
    return 1 if wrong(result) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
