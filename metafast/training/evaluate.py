"""Accuracy of a learner over many episodes, with its confidence interval."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count as count_from

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metafast.data import Episodes
from metafast.training.progress import progress_bar

BATCH_NORM_MODES = ("running", "transductive")


@dataclass(frozen=True)
class Accuracy:
    """Result of :func:`evaluate`. Accuracies are fractions from 0 to 1; printing shows percent.

    Attributes:
        mean: mean over the episodes of the fraction of query images that were classified correctly.
        interval: half-width of the 95 % confidence interval, ``1.96 s / sqrt(E)`` with the sample standard
            deviation ``s`` of the ``E`` episodes.
        episodes: ``E``.
        ways, shots, queries: shape of the episodes; shots and queries are per class, None where they differ.
        batch_norm: ``"running"`` or ``"transductive"``; ``"none"`` for a learner without BatchNorm layers.
        seed: seed of the sampler, None for episodes that did not come from one.
        loss: mean loss over the episodes.
        per_episode: ``[E]`` float64, the accuracy of every episode.
    """

    mean: float
    interval: float
    episodes: int
    ways: int
    shots: int | None
    queries: int | None
    batch_norm: str
    seed: int | None
    loss: float
    per_episode: Tensor

    def __str__(self) -> str:
        shape = f"{self.ways}-way"
        shape += f" {self.shots}-shot" if self.shots is not None else ""
        shape += f" {self.queries}-query" if self.queries is not None else ""
        norm = "no BatchNorm" if self.batch_norm == "none" else f"{self.batch_norm} BatchNorm"
        seed = "" if self.seed is None else f", seed {self.seed}"
        return (
            f"{100 * self.mean:.2f} % +- {100 * self.interval:.2f} "
            f"({self.episodes} episodes, {shape}, {norm}{seed})"
        )

    def as_dict(self) -> dict[str, object]:
        """Everything but the values of the single episodes, as plain values for a JSON file."""
        return {
            "accuracy": self.mean,
            "interval_95": self.interval,
            "episodes": self.episodes,
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "batch_norm": self.batch_norm,
            "seed": self.seed,
            "loss": self.loss,
        }


def confidence_interval(values: Tensor) -> float:
    """Half-width of the 95 % interval of the mean of ``values [E]``: ``1.96 s / sqrt(E)``."""
    return float(1.96 * values.double().std() / len(values) ** 0.5)


def learner_device(learner: nn.Module) -> torch.device:
    """Where the learner's parameters are (the CPU if it has none)."""
    parameter = next(learner.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def evaluate(
    learner: nn.Module,
    episodes: Callable[[int], Episodes] | Iterable[Episodes],
    count: int | None = 1000,
    *,
    batch_norm: str = "running",
    progress: str = "evaluation",
) -> Accuracy:
    """Classify the query images of ``count`` episodes.

    Runs in inference mode and evaluation mode and puts the learner's training mode back. Running statistics
    of BatchNorm layers are read or ignored, never changed.

    Args:
        learner: ``learner(episodes) -> Outcome(loss, logits [T, m, C])``.
        episodes: an :class:`~metafast.data.EpisodeSampler`, whose steps 0, 1, 2 ... are taken, or batches of
            episodes with equal ways.
        count: number of episodes ``E``, at least 2. Surplus episodes of the last batch are left out. None
            means all (not for a sampler, which has no end).
        batch_norm: ``"running"`` normalises by the running statistics of training, ``"transductive"`` by the
            statistics of the support and query images of each single episode.
        progress: title of the progress bar, which appears where standard error is a terminal.

    Raises:
        ValueError: an unknown ``batch_norm``, or ``"running"`` for layers without running statistics; a
            ``count`` below 2; episodes that end early or change their number of ways.
        FloatingPointError: NaN among the logits.
    """
    if batch_norm not in BATCH_NORM_MODES:
        raise ValueError(f"batch_norm: expected 'running' or 'transductive', got {batch_norm!r}")
    if count is not None and count < 2:
        raise ValueError(f"count: expected at least 2 episodes (an interval needs them), got {count}")
    if callable(episodes):
        if count is None:
            raise ValueError("count: a sampler has no end, so give the number of episodes")
        batches: Iterable[Episodes] = map(episodes, count_from())
    else:
        batches = episodes
    norms = {name: module for name, module in learner.named_modules() if isinstance(module, _BatchNorm)}
    has_norm = bool(norms)
    if batch_norm == "running":
        for name, norm in norms.items():
            if norm.running_mean is None:
                raise ValueError(
                    f"batch_norm: the layer {name} keeps no running statistics; "
                    "evaluate with batch_norm='transductive'"
                )
    device = learner_device(learner)
    shape: tuple[int, int | None, int | None] | None = None
    correct: list[Tensor] = []
    losses: list[Tensor] = []
    done = 0
    bar = progress_bar(count, progress, " episodes", leave=False)
    try:
        with torch.inference_mode(), _evaluation_mode(learner, batch_norm):
            for batch in batches:
                if count is not None and done + batch.tasks > count:
                    batch = _tasks(batch, 0, count - done)
                batch = batch.to(device)
                if shape is None:
                    shape = _shape(batch)
                elif batch.ways != shape[0]:
                    raise ValueError(
                        f"episodes: expected {shape[0]} ways as in the first batch, got {batch.ways}"
                    )
                # Statistics of one episode at a time, or the result would depend on how many share a batch.
                parts = (
                    [_tasks(batch, task, task + 1) for task in range(batch.tasks)]
                    if has_norm and batch_norm == "transductive"
                    else [batch]
                )
                for part in parts:
                    loss, logits = learner(part)
                    hits = (logits.argmax(-1) == part.query_y).double().mean(-1)
                    correct.append(torch.where(logits.isnan().any(-1).any(-1), torch.nan, hits))
                    losses.append(loss.double() * part.tasks)
                done += batch.tasks
                bar.update(batch.tasks)
                if count is not None and done == count:
                    break
    finally:
        bar.close()
    if shape is None or done < 2 or (count is not None and done < count):
        raise ValueError(f"episodes: expected {count or 'at least 2'}, got {done}")
    per_episode = torch.cat(correct).cpu()
    if per_episode.isnan().any():
        first = int(per_episode.isnan().nonzero()[0])
        raise FloatingPointError(
            f"the logits of {int(per_episode.isnan().sum())} of {done} episodes hold NaN, "
            f"those of episode {first} first"
        )
    return Accuracy(
        mean=float(per_episode.mean()),
        interval=confidence_interval(per_episode),
        episodes=done,
        ways=shape[0],
        shots=shape[1],
        queries=shape[2],
        batch_norm=batch_norm if has_norm else "none",
        seed=getattr(episodes, "seed", None),
        loss=float(torch.stack(losses).sum() / done),
        per_episode=per_episode,
    )


def _tasks(episodes: Episodes, start: int, stop: int) -> Episodes:
    return Episodes(
        episodes.support_x[start:stop],
        episodes.support_y[start:stop],
        episodes.query_x[start:stop],
        episodes.query_y[start:stop],
        episodes.ways,
    )


def _shape(episodes: Episodes) -> tuple[int, int | None, int | None]:
    """Ways, shots and queries; None for the latter two where they are not the same for all classes."""

    def rows_per_class(labels: Tensor) -> int | None:
        counts = (labels.unsqueeze(-1) == torch.arange(episodes.ways, device=labels.device)).sum(-2)
        return int(counts.min()) if bool(counts.min() == counts.max()) else None

    return episodes.ways, rows_per_class(episodes.support_y), rows_per_class(episodes.query_y)


@contextlib.contextmanager
def _evaluation_mode(learner: nn.Module, batch_norm: str) -> Iterator[None]:
    """Evaluation mode inside; if transductive, BatchNorm layers without their running statistics."""
    modes = [(module, module.training) for module in learner.modules()]
    hidden = []
    learner.eval()
    try:
        if batch_norm == "transductive":
            for module in learner.modules():
                if isinstance(module, _BatchNorm):
                    hidden.append((module, module.running_mean, module.running_var))
                    module.running_mean = module.running_var = None
        yield
    finally:
        for norm, mean, variance in hidden:
            norm.running_mean, norm.running_var = mean, variance
        for module, training in modes:
            module.training = training
