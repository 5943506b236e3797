"""Trains and evaluates in groups of processes: `python -m tests.ranks FOLDER` (see test_distributed.py).

Torch is imported once; every process of a group is a fork of this one, which has started no threads. What each
gives is saved in FOLDER as `SCENARIO-RANK.pt`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metafast.backbones import MLP, Conv4
from metafast.data import Episodes, EpisodeSampler, FixedEpisodes, ImageClasses, glyphs
from metafast.learners import MAMLPlusPlus, Outcome, ProtoNet
from metafast.training import evaluate, fit
from metafast.training.distributed import StepSum, join, leave, ranks
from metafast.training.events import EventFiles

DATA: ImageClasses
OTHERS: ImageClasses

Scenario = Callable[[Path], Any]


def learner(norm: bool = False, dropout: float = 0.0, seed: int = 0) -> ProtoNet:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(16)] if norm else []
    return ProtoNet(
        nn.Sequential(
            nn.Flatten(), nn.Linear(256, 16), *middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 8)
        )
    )


def sampler(tasks: int = 4, **options: Any) -> EpisodeSampler:
    return EpisodeSampler(DATA, ways=4, shots=1, queries=2, tasks=tasks, seed=1, **options)


def held_out() -> EpisodeSampler:
    return EpisodeSampler(OTHERS, ways=4, shots=1, queries=2, tasks=5, seed=2)


def trained(
    net: nn.Module, train: Callable[[int], Episodes], steps: int = 8, **options: Any
) -> dict[str, Any]:
    options = {
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        "validation": held_out(),
        "validation_episodes": 13,
        "validate_every": 4,
        **options,
    }
    history = fit(net, train, steps, **options)
    return {
        "weights": {name: value.clone() for name, value in net.state_dict().items()},
        "rows": [[row.step, row.loss, row.accuracy, row.validation_accuracy] for row in history.rows],
        "best": [history.best_step, history.best_accuracy],
        "random": torch.get_rng_state(),
    }


def plain(folder: Path) -> Any:
    return trained(learner(), sampler())


def unequal(folder: Path) -> Any:
    return trained(learner(), sampler(tasks=5))


def varying(folder: Path) -> Any:
    """A function of the step that is no sampler."""
    big, small = sampler(tasks=5), sampler(tasks=3)
    return trained(learner(), lambda step: (big if step % 2 else small)(step))


def norm(folder: Path) -> Any:
    return trained(learner(norm=True), sampler(tasks=5))


def local_norm(folder: Path) -> Any:
    return trained(learner(norm=True), sampler(), sync_batch_norm=False)


def episode_norm(folder: Path) -> Any:
    """BatchNorm normalises each episode by its own images, wherever it is."""
    torch.manual_seed(0)
    net = ProtoNet(Conv4(1, 4), episode_statistics=True)
    return trained(net, sampler(), batch_norm="transductive")


def norm_of_steps(folder: Path) -> Any:
    """Running statistics that the learner itself keeps, of each inner step."""
    torch.manual_seed(0)
    model = MLP((256, 8, 4), batch_norm=True)
    net = MAMLPlusPlus(model, 0.1, 2, multi_step=4, batch_norm="per_step")
    return trained(net, sampler(tasks=5))


def clipped(folder: Path) -> Any:
    return trained(learner(), sampler(), clip_norm=0.5)


def float16(folder: Path) -> Any:
    return trained(learner(), sampler(), precision="float16", clip_norm=5.0)


def other_weights(folder: Path) -> Any:
    """Each rank comes with weights of its own."""
    return trained(learner(seed=ranks().rank), sampler())


def evaluation(folder: Path) -> Any:
    net = learner(norm=True)
    net.train()(sampler()(0))
    results = {}
    for batch_norm in ("running", "transductive"):
        for name, source in (("sampler", held_out()), ("fixed", FixedEpisodes(held_out(), 23, batch=4))):
            accuracy = evaluate(net, source, 23, batch_norm=batch_norm)
            results[f"{name}, {batch_norm}"] = {**accuracy.as_dict(), "per_episode": accuracy.per_episode}
    return results


def unused_parameters(folder: Path) -> Any:
    """Gradients of parameters that some, all or none of the ranks have."""
    net = nn.ParameterList([nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(3)])
    rank = ranks().rank
    net[0].grad = torch.tensor([10.0, 20.0]) + rank
    net[1].grad = None if rank == 0 else torch.tensor([0.0, float(rank)])
    numbers = StepSum(net, ranks())(torch.tensor([1.0, float(rank)], dtype=torch.float64), 1.0)
    return {"gradients": [p.grad for p in net], "numbers": numbers}


class SingleTasks(ProtoNet):
    """Its BatchNorm sees one task at a time, under torch.func."""

    def forward(self, episodes: Episodes) -> Outcome:
        rows = torch.cat([episodes.support_x, episodes.query_x], 1)
        features = torch.vmap(self.encoder, randomness="error")(rows)
        split = episodes.support_x.shape[1]
        parts = (features[:, :split], episodes.support_y, features[:, split:], episodes.query_y)
        return ProtoNet(nn.Identity())(Episodes(*parts, episodes.ways))


def norm_of_single_tasks(folder: Path) -> Any:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(16, track_running_stats=False)
    net = SingleTasks(nn.Sequential(nn.Flatten(), nn.Linear(256, 16), norm, nn.ReLU()))
    return trained(net, sampler(), batch_norm="transductive")


def files(folder: Path) -> Any:
    own = folder / f"rank{ranks().rank}"
    trained(learner(), sampler(), out=own)
    return own.exists()


def printed(folder: Path) -> Any:
    """Standard output of the rank."""
    target = folder / f"printed-{ranks().rank}.txt"
    handle = os.open(target, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    trained(learner(), sampler())
    sys.stdout.flush()
    return target.read_text()


def errors(folder: Path) -> Any:
    def message(action: Callable[[], Any]) -> str:
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    out = folder / "errors"
    found = {"few tasks": message(lambda: trained(learner(), sampler(tasks=1)))}
    trained(learner(), sampler(), out=out)
    found["holds a run"] = message(lambda: trained(learner(), sampler(), out=out))
    if ranks().first:
        (out / "checkpoint-last.pt").write_bytes(b"damaged")
    found["damaged"] = message(lambda: trained(learner(), sampler(), out=out, resume=True))
    found["in the way"] = message(lambda: trained(learner(), sampler(), out=out / "metrics.csv"))
    found["not finite"] = message(lambda: trained(learner(), broken_for_the_last_rank))
    return found


def broken_for_the_last_rank(step: int) -> Episodes:
    episodes = sampler()(step)
    if step == 3:
        episodes.query_x[-1, 0] = torch.nan
    return episodes


class Halt(Exception):
    pass


def undisturbed(folder: Path) -> Any:
    return trained(learner(norm=True, dropout=0.3), sampler(), out=folder / "undisturbed")


def resumed(folder: Path) -> Any:
    def stop(row: Any) -> None:
        if row.step == 6:
            raise Halt

    with contextlib.suppress(Halt):
        trained(learner(norm=True, dropout=0.3), sampler(), out=folder / "resumed", on_step=stop)
    return trained(learner(norm=True, dropout=0.3, seed=9), sampler(), out=folder / "resumed", resume=True)


def one_is_told_to_stop(folder: Path) -> Any:
    """A signal reaches the last rank alone, and all stop after the same step."""
    last = ranks().rank == ranks().count - 1

    def signalled(row: Any) -> None:
        if last and row.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        trained(learner(norm=True, dropout=0.3), sampler(), out=folder / "told", on_step=signalled)
    except KeyboardInterrupt as error:
        message = f"{type(error).__name__}: {error}"
    again = trained(learner(norm=True, dropout=0.3, seed=9), sampler(), out=folder / "told", resume=True)
    return {**again, "message": message}


def lost(folder: Path, number: int) -> Any:
    """The last rank sends itself a signal in the middle of the training."""
    last = ranks().rank == ranks().count - 1

    def die(row: Any) -> None:
        if last and row.step == 6:
            (folder / f"lost-{number}").touch()
            os.kill(os.getpid(), number)

    try:
        trained(learner(), sampler(), steps=10**6, out=folder / f"lost{number}", on_step=die)
    except ConnectionError as error:
        seconds = time.time() - (folder / f"lost-{number}").stat().st_mtime
        return {"message": f"{type(error).__name__}: {error}", "seconds": seconds}


def killed(folder: Path) -> Any:
    return lost(folder, signal.SIGKILL)


def halted(folder: Path) -> Any:
    return lost(folder, signal.SIGSTOP)


def in_group(scenario: Scenario, folder: Path, count: int, timeout: float = 60) -> None:
    """Run `scenario` in `count` processes, and wait until the first of them ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    children = []
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            os.environ |= environment | {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
            os.environ["LOCAL_WORLD_SIZE"] = str(count)
            warnings.simplefilter("error")
            join("cpu", timedelta(seconds=timeout))
            torch.save(scenario(folder), folder / f"{scenario.__name__}-{count}-{rank}.pt")
            leave()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    codes = {}
    for rank, child in enumerate(children):
        if rank and scenario in (killed, halted):
            os.kill(child, signal.SIGKILL)
        codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if any(code and code != -signal.SIGKILL for code in codes.values()):
        raise SystemExit(f"{scenario.__name__} in {count} processes ended with {codes}")


def main(folder: Path) -> None:
    global DATA, OTHERS
    torch.set_num_threads(1)
    EventFiles.write = lambda self, rows: None  # type: ignore[method-assign]
    DATA, OTHERS = glyphs(12, per_class=4, size=16), glyphs(8, per_class=4, size=16, first_class=12)
    # All that torch imports at the first use, which the forks then have.
    trained(learner(), sampler(), steps=1)
    gc.freeze()
    for scenario in (
        plain, unequal, varying, norm, clipped, float16, norm_of_single_tasks, episode_norm, norm_of_steps,
        evaluation,
    ):  # fmt: skip
        for count in (1, 2):
            in_group(scenario, folder, count)
    for scenario in (unequal, norm, evaluation):
        in_group(scenario, folder, 3)
    in_group(local_norm, folder, 1)
    for scenario in (
        local_norm, other_weights, unused_parameters, files, printed, errors, undisturbed, resumed,
        one_is_told_to_stop, killed,
    ):  # fmt: skip
        in_group(scenario, folder, 2)
    in_group(halted, folder, 2, timeout=2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
