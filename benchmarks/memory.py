"""Peak memory of a meta-step: ``python -m benchmarks.memory [--out FILE]``.

Second-order MAML of Conv4-64, tasks of 5 ways and 1 shot with 15 queries per class. Each way runs in a process of its
own, which makes one step before and gives all free memory back to the system (glibc); the peak is what it then grows by
at most. Against it stands what :func:`metafast.predicted_memory` says before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import inner_module
from benchmarks.inner_module import ModuleSizes
from benchmarks.training import conditions, memory, options_of
from metafast import Conv4, Episodes, predicted_memory
from metafast.learners import MAML
from metafast.training.files import write_atomically

TASKS, STEPS, RATE = 8, 5, 0.01
OURS, AGAIN, PARTS = "metafast", "metafast, recompute", "metafast, recompute, a task at a time"
LOOP, LOOP_PARTS = "task loop, one backward", "task loop, backward after each task"
MAPPED = "torch.func.vmap"
WAYS_TO_DO_IT = (OURS, AGAIN, PARTS, MAPPED, LOOP, LOOP_PARTS)
#: Inner steps that the growth is shown for, of those that are ours.
GROWTH = (1, 5, 10, 20)


def learner(recompute: bool, steps: int) -> MAML:
    encoder = Conv4(1, 64)
    return MAML(nn.Sequential(encoder, nn.Linear(encoder.features(28), 5)), RATE, steps, recompute=recompute)


def episodes() -> Episodes:
    _, x, y, query, query_y, *_ = inner_module.inputs(ModuleSizes(TASKS, 1, 15, STEPS))
    return Episodes(x, y, query, query_y, 5)


def metafast_step(way: str, steps: int) -> tuple[Callable[[], None], int]:
    """A step, and the peak that is predicted for it."""
    own, batch = learner(way != OURS, steps), episodes()
    at_once = 1 if way == PARTS else TASKS

    def step() -> None:
        for first in range(0, TASKS, at_once):
            loss: Tensor = own(batch[first : first + at_once]).loss
            (loss * (at_once / TASKS)).backward()
        own.zero_grad()

    return step, predicted_memory(own, batch).peak(at_once)


def plain_step(way: str, steps: int) -> Callable[[], None]:
    sizes = ModuleSizes(TASKS, 1, 15, steps, rate=RATE)
    _, *tensors = inner_module.inputs(sizes)
    data, parameters = tensors[:4], tensors[4:]

    def step() -> None:
        if way == MAPPED:
            inner_module.mapped(sizes, *data, *parameters).backward()
        elif way == LOOP:
            inner_module.looped(sizes, *data, *parameters).backward()
        else:
            for t in range(TASKS):
                alone = ModuleSizes(1, 1, 15, steps, rate=RATE)
                part = (value[t : t + 1] for value in data)
                (inner_module.looped(alone, *part, *parameters) / TASKS).backward()
        for value in parameters:
            value.grad = None

    return step


def once(way: str, steps: int, threads: int) -> dict[str, int]:
    """What this process grows by in a step, and what was predicted."""
    torch.set_num_threads(threads)
    found = {}
    if way in (OURS, AGAIN, PARTS):
        step, found["predicted_bytes"] = metafast_step(way, steps)
    else:
        step = plain_step(way, steps)
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    # From here on Linux counts the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    step()
    return {"peak_bytes": memory("VmHWM") - before, **found}


def measured(way: str, steps: int, rounds: int, threads: int) -> dict[str, float]:
    """Medians over processes."""
    command = [sys.executable, "-m", "benchmarks.memory", "--once", way, "--steps", str(steps)]
    command += ["--threads", str(threads)]
    each = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(rounds)
    ]
    return {key: statistics.median(value[key] for value in each) for key in each[0]}


def measure(rounds: int, threads: int) -> dict[str, Any]:
    ways = {way: measured(way, STEPS, rounds, threads) for way in WAYS_TO_DO_IT}
    growth = {
        way: {str(steps): measured(way, steps, rounds, threads) for steps in GROWTH} for way in (OURS, AGAIN)
    }
    pairs = ((AGAIN, LOOP), (AGAIN, MAPPED), (PARTS, LOOP_PARTS), (AGAIN, LOOP_PARTS))
    return {
        "ways": ways,
        "growth": growth,
        "peak_ratio": {f"{a} / {b}": ways[a]["peak_bytes"] / ways[b]["peak_bytes"] for a, b in pairs},
    }


def main() -> None:
    parser = options_of(__doc__, WAYS_TO_DO_IT)
    parser.add_argument("--steps", type=int, default=STEPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(options.once, options.steps, options.threads)))
        return
    result = {
        **conditions("benchmarks.memory", options.threads),
        **measure(options.rounds, options.threads),
    }

    def line(name: str, found: dict[str, float]) -> str:
        said = f", predicted {found['predicted_bytes'] / 2**20:5.0f}" if "predicted_bytes" in found else ""
        return f"{name:40} peak {found['peak_bytes'] / 2**20:5.0f} MiB{said}"

    for way, found in result["ways"].items():
        print(line(way, found))
    for way, each in result["growth"].items():
        for steps, found in each.items():
            print(line(f"{way}, {steps} steps", found))
    for name, ratio in result["peak_ratio"].items():
        print(f"peak: {name}  {ratio:.2f}")
    if options.out is not None:
        write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
