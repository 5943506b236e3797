"""Trains in real processes and kills them: `python -m tests.killing FOLDER` (see test_resume.py).

Torch is imported once; every training is a fork of this process, which has started no threads.
"""

from __future__ import annotations

import builtins
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from metafast.data import Episodes, EpisodeSampler, ImageClasses, glyphs
from metafast.learners import Outcome, ProtoNet
from metafast.training import fit
from metafast.training.events import EventFiles

KILLS = 24


class Noisy(ProtoNet):
    """Draws from all three global generators, so that a state that is not restored shows."""

    def forward(self, episodes: Episodes) -> Outcome:
        if self.training:
            noise = random.gauss(0, 0.1) + float(numpy.random.standard_normal()) / 10
            episodes = Episodes(
                episodes.support_x + noise,
                episodes.support_y,
                episodes.query_x + noise * torch.randn(()),
                episodes.query_y,
                episodes.ways,
            )
        return super().forward(episodes)


def train(
    data: ImageClasses, others: ImageClasses, folder: Path, steps: int, every: int, **options: Any
) -> None:
    random.seed(1)
    numpy.random.seed(2)
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.BatchNorm1d(16), nn.Dropout(0.2))
    learner = Noisy(encoder)
    fit(
        learner,
        EpisodeSampler(data, ways=4, shots=1, queries=2, tasks=3, seed=1),
        steps,
        validation=EpisodeSampler(others, ways=4, shots=1, queries=2, tasks=5, seed=2),
        validation_episodes=10,
        validate_every=every,
        optimizer=torch.optim.AdamW(learner.parameters(), lr=0.01),
        schedule="cosine",
        warm_up=3,
        clip_norm=1.0,
        out=folder,
        resume=True,
        **options,
    )


def fork(action: Callable[[], None]) -> int:
    """A new process that does `action` and ends with code 0; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        action()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def ended(child: int) -> int | None:
    """How the process ended (minus the signal, or its code); None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_random(action: Callable[[Path], None], folder: Path) -> dict[str, Any]:
    """Kill trainings at random moments, each resuming the one before, until they were killed often enough."""
    moments = random.Random(os.urandom(8))
    longest, kills, runs, in_a_write = 0.05, 0, 0, 0
    while kills < KILLS or not runs:
        here = folder / str(runs)
        while True:
            begin, before = time.monotonic(), marks(here)
            child = fork(lambda here=here: action(here))
            time.sleep(moments.uniform(0, longest))
            if kills < 3 * KILLS:
                os.kill(child, signal.SIGKILL)
            code = wait(child)
            if code == 0:
                runs += 1
                # Shorter next time, for this one was hardly killed.
                longest = max(0.02, 0.8 * min(longest, time.monotonic() - begin))
                break
            if code != -signal.SIGKILL:
                raise SystemExit(f"a resumed training failed with code {code}")
            kills += 1
            in_a_write += any(here.glob(".*.tmp"))
            if marks(here) == before:
                longest *= 1.3
    return {"kills": kills, "runs": runs, "in_a_write": in_a_write}


def marks(folder: Path) -> float:
    """What changes where a training saves."""
    path = folder / "checkpoint-last.pt"
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_at_file_operations(action: Callable[[Path], None], folder: Path) -> dict[str, Any]:
    """Kill a training before its first operation on files, another before its second, and so on; resume each."""
    number = 0
    while True:
        number += 1
        here = folder / str(number)
        child = fork(lambda here=here, number=number: (die_at(number), action(here)))
        code = wait(child)
        if code == 0:
            return {"operations": number - 1}
        if code != -signal.SIGKILL:
            raise SystemExit(f"the training failed with code {code} at operation {number}")
        code = wait(fork(lambda here=here: action(here)))
        if code:
            raise SystemExit(f"the training killed at operation {number} could not be resumed: code {code}")


def die_at(number: int) -> None:
    """Let this process be killed at its file operation `number`; a write gets half of its bytes out."""
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return operation

    def with_half_writes(call: Callable[..., Any]) -> Callable[..., Any]:
        def opened(*arguments: Any, **options: Any) -> Any:
            file = call(*arguments, **options)
            if len(arguments) > 1 and arguments[1] in ("wb", "a"):
                whole = file.write

                def write(content: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == number:
                        whole(content[: len(content) // 2])
                        file.flush()
                        os.kill(os.getpid(), signal.SIGKILL)
                    return whole(content)

                file = Proxy(file, write)
            return file

        return opened

    for name in ("fsync", "replace", "unlink", "chmod"):
        setattr(os, name, counted(getattr(os, name)))
    tempfile.mkstemp = counted(tempfile.mkstemp)
    os.fdopen = with_half_writes(os.fdopen)
    builtins.open = with_half_writes(builtins.open)


class Proxy:
    """A file with another `write`."""

    def __init__(self, file: Any, write: Callable[[Any], Any]) -> None:
        self._file = file
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # TensorBoard's threads and files are not what is looked at here, and cost much in so short a run.
    EventFiles.write = lambda self, rows: None  # type: ignore[method-assign]
    data = glyphs(12, per_class=4, size=16)
    others = glyphs(8, per_class=4, size=16, first_class=12)

    def long(here: Path) -> None:
        train(data, others, here, steps=150, every=3, patience=30)

    def short(here: Path) -> None:
        train(data, others, here, steps=6, every=2)

    # All that torch imports at the first use, which the forks then have.
    train(data, others, folder / "warm-up", steps=4, every=2)
    # A fork copies fewer pages if the collector leaves them alone.
    gc.freeze()
    summary: dict[str, Any] = {}
    for name, action, kill in (("random", long, kill_at_random), ("file", short, kill_at_file_operations)):
        begin = time.monotonic()
        if wait(fork(lambda action=action, name=name: action(folder / name / "undisturbed"))):
            raise SystemExit(f"the undisturbed training '{name}' failed")
        alone = time.monotonic() - begin
        summary[name] = {**kill(action, folder / name), "seconds_alone": alone}
        summary[name]["seconds"] = time.monotonic() - begin
    print(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
