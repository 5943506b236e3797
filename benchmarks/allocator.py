"""What keeping freed memory is worth: ``python -m benchmarks.allocator [--out FILE]``.

A training step of a prototypical network with Conv4-64 on 360 images of 28 x 28 (60-way 1-shot, 5 queries), float32,
with Adam, in processes that do and do not call ``keep_pages``: the setting cannot be taken back. The processes
alternate, and the median of their medians counts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import cpu_model
from benchmarks.ratios import metafast_version
from metafast import Conv4, EpisodeSampler
from metafast._library import keep_pages
from metafast.data import glyphs
from metafast.learners import ProtoNet
from metafast.training.files import write_atomically

STEPS, WARM_UP = 20, 4


def seconds_per_step(keeps: bool, threads: int) -> float:
    """The median step of this process."""
    torch.set_num_threads(threads)
    if keeps and not keep_pages():
        raise RuntimeError("this C library has no such setting")
    torch.manual_seed(0)
    learner = ProtoNet(Conv4()).train()
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    sampler = EpisodeSampler(glyphs(100), ways=60, shots=1, queries=5)
    times = []
    for step in range(WARM_UP + STEPS):
        begin = time.perf_counter()
        optimizer.zero_grad()
        learner(sampler(step)).loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:])


def measure(rounds: int, threads: int) -> dict[str, Any]:
    """Medians over alternating processes, in seconds."""
    found: dict[str, list[float]] = {"default": [], "kept": []}
    for _ in range(rounds):
        for name, values in found.items():
            command = [
                sys.executable,
                "-m",
                "benchmarks.allocator",
                "--once",
                name,
                "--threads",
                str(threads),
            ]
            values.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {"rounds": found, "seconds_per_step": medians, "ratio": medians["default"] / medians["kept"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--once", choices=("default", "kept"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(seconds_per_step(options.once == "kept", options.threads))
        return
    result = {
        "command": shlex.join(["python", "-m", "benchmarks.allocator", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "threads": options.threads,
        "versions": {"metafast": metafast_version(), "torch": torch.__version__},
        **measure(options.rounds, options.threads),
    }
    step = result["seconds_per_step"]
    print(
        f"default allocator {1e3 * step['default']:.0f} ms a step, pages kept {1e3 * step['kept']:.0f} ms",
        end=": ",
    )
    print(f"{result['ratio']:.2f}x")
    if options.out:
        write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
