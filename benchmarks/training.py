"""A whole training step of a prototypical network, time and memory: ``python -m benchmarks.training [--out FILE]``.

Conv4-64, 60-way 1-shot with 5 queries (360 images of 28 x 28), Adam; sampling, forward, backward and update. "Plain" is
what a user writes in PyTorch: tasks and classes drawn in Python, torch's layers, ``torch.cdist``; ours is
:func:`metafast.training.fit` with all that it does beside. Each way runs in a
process of its own, since an allocator that keeps its pages cannot be told to stop; the processes alternate, and the
median of their medians counts. The peak is what the process grows by from before the first step.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.machine import cpu_model
from benchmarks.ratios import metafast_version
from metafast import Conv4, EpisodeSampler
from metafast._library import keep_pages
from metafast.data import glyphs
from metafast.learners import ProtoNet
from metafast.training import fit
from metafast.training.files import write_atomically
from metafast.training.history import Row

WAYS, SHOTS, QUERIES, CLASSES, PER_CLASS = 60, 1, 5, 100, 20
STEPS, WARM_UP = 16, 4
PLAIN, PLAIN_KEPT = "plain PyTorch", "plain PyTorch, pages kept"
DEFAULT, OURS, HALF = "metafast, default allocator", "metafast", "metafast, bfloat16"
#: What `metafast train` runs is the last but one, and with `--precision bfloat16` the last.
WAYS_TO_DO_IT = (PLAIN, PLAIN_KEPT, DEFAULT, OURS, HALF)

Step = Callable[[], Tensor]


def block(inputs: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)
    )


def plain_step() -> Step:
    """The loss of a step as a user writes it."""
    images = glyphs(CLASSES, per_class=PER_CLASS)
    data = [images.images[k * PER_CLASS : (k + 1) * PER_CLASS].float() / 255 for k in range(CLASSES)]
    encoder = nn.Sequential(block(1, 64), block(64, 64), block(64, 64), block(64, 64), nn.Flatten())
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-3)
    labels = torch.arange(WAYS).repeat_interleave(QUERIES)

    def step() -> Tensor:
        chosen = random.sample(range(CLASSES), WAYS)
        rows = [random.sample(range(PER_CLASS), SHOTS + QUERIES) for _ in chosen]
        support = torch.stack([data[c][r] for c, own in zip(chosen, rows, strict=True) for r in own[:SHOTS]])
        query = torch.stack([data[c][r] for c, own in zip(chosen, rows, strict=True) for r in own[SHOTS:]])
        features = encoder(torch.cat([support, query]).reshape(-1, 1, 28, 28))
        prototypes = features[: WAYS * SHOTS].view(WAYS, SHOTS, -1).mean(1)
        loss = cross_entropy(-torch.cdist(features[WAYS * SHOTS :], prototypes).square(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def plain_times(steps: int) -> list[float]:
    """Seconds of each step."""
    step, times = plain_step(), []
    for number in range(steps):
        begin = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - begin)
        if not loss.isfinite():
            raise RuntimeError(f"the loss of step {number} is {float(loss)}")
    return times


def metafast_rows(steps: int, precision: str) -> list[Row]:
    """A run as ``metafast train`` makes it: losses looked at in every step, rows and a checkpoint written."""
    sampler = EpisodeSampler(glyphs(CLASSES, per_class=PER_CLASS), WAYS, SHOTS, QUERIES)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        return fit(ProtoNet(Conv4()), sampler, steps, precision=precision, out=folder).rows


def memory(field: str) -> int:
    """Bytes of this process by Linux's name: VmRSS, or VmHWM for its peak."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("this system does not tell a process's peak memory")
    return int(found.group(1)) * 1024


def once(way: str, threads: int, steps: int = STEPS) -> dict[str, float]:
    """The median step of this process, and how much it grows."""
    torch.set_num_threads(threads)
    if way not in (PLAIN, DEFAULT) and not keep_pages():
        raise RuntimeError("this C library cannot keep its pages")
    torch.manual_seed(0)
    random.seed(0)
    before = memory("VmRSS")
    if way in (PLAIN, PLAIN_KEPT):
        times = plain_times(WARM_UP + steps)
    else:
        rows = metafast_rows(WARM_UP + steps, "bfloat16" if way == HALF else "float32")
        times = [row.seconds - last.seconds for last, row in itertools.pairwise(rows)]
        times.insert(0, rows[0].seconds)
    return {"seconds": statistics.median(times[WARM_UP:]), "peak_bytes": memory("VmHWM") - before}


def measure(rounds: int, threads: int) -> dict[str, Any]:
    """Medians over alternating processes, and the ratios to what is plain."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS_TO_DO_IT}
    for _ in range(rounds):
        for way, values in found.items():
            command = [sys.executable, "-m", "benchmarks.training", "--once", way, "--threads", str(threads)]
            values.append(
                json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            )
    medians = {
        way: {key: statistics.median(value[key] for value in values) for key in ("seconds", "peak_bytes")}
        for way, values in found.items()
    }
    return {
        "rounds": found,
        "medians": medians,
        "step_ratio": {
            f"{plain} / {ours}": medians[plain]["seconds"] / medians[ours]["seconds"]
            for plain, ours in ((PLAIN, OURS), (PLAIN, HALF), (PLAIN_KEPT, OURS), (PLAIN, DEFAULT))
        },
        "peak_ratio": {
            f"{ours} / {plain}": medians[ours]["peak_bytes"] / medians[plain]["peak_bytes"]
            for ours, plain in ((OURS, PLAIN_KEPT), (DEFAULT, PLAIN), (HALF, PLAIN))
        },
    }


def conditions(module: str, threads: int) -> dict[str, Any]:
    """What a result file of ``module`` says of how it came about."""
    policy = os.environ.get("OMP_WAIT_POLICY")
    waiting = [] if policy is None else [f"OMP_WAIT_POLICY={policy}"]
    return {
        "command": shlex.join([*waiting, "python", "-m", module, *sys.argv[1:]]),
        "cpu": cpu_model(),
        "threads": threads,
        "versions": {"metafast": metafast_version(), "torch": torch.__version__},
    }


def options_of(doc: str | None, ways: Sequence[str]) -> argparse.ArgumentParser:
    """The options of a benchmark each of whose ways runs in processes of its own."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--once", choices=ways, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = options_of(__doc__, WAYS_TO_DO_IT).parse_args()
    if options.once:
        print(json.dumps(once(options.once, options.threads)))
        return
    result = {
        **conditions("benchmarks.training", options.threads),
        **measure(options.rounds, options.threads),
    }
    for way, median in result["medians"].items():
        print(
            f"{way:30} {1e3 * median['seconds']:6.1f} ms a step, peak {median['peak_bytes'] / 2**20:6.0f} MiB"
        )
    for kind in ("step_ratio", "peak_ratio"):
        for name, ratio in result[kind].items():
            print(f"{kind.removesuffix('_ratio')}: {name}  {ratio:.2f}")
    if options.out is not None:
        write_atomically(options.out, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
