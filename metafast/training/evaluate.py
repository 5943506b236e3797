"""Accuracy, or squared error, of a learner over many episodes, with its confidence interval."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metafast.data import Classes, Episodes, EpisodeSampler, FixedEpisodes
from metafast.learners import Outcome
from metafast.training.distributed import ranks
from metafast.training.progress import progress_bar

BATCH_NORM_MODES = ("running", "transductive")
#: Episodes that are taken of a source without end.
DEFAULT_EPISODES = 1000
#: Numbers that go through the encoder at once in :func:`episode_grid`, 1,000 images of 28 x 28.
VALUES_AT_ONCE = 28 * 28 * 1000
#: Seconds between looks at the results so far, which an accelerator has to wait for.
LOOK_EVERY = 0.2

Source = Callable[[int], Episodes] | Iterable[Episodes]


@dataclass(frozen=True)
class _Score:
    """What was measured on many episodes: see :class:`Accuracy` and :class:`SquaredError`."""

    mean: float
    interval: float
    episodes: int
    ways: int | None
    shots: int | None
    queries: int | None
    batch_norm: str
    seed: int | None
    loss: float
    per_episode: Tensor

    def _conditions(self) -> str:
        parts = [f"{self.episodes} episodes"]
        shape = ((self.ways, "way"), (self.shots, "shot"), (self.queries, "query"))
        if any(number is not None for number, _ in shape):
            parts.append(" ".join(f"{number}-{what}" for number, what in shape if number is not None))
        parts.append("no BatchNorm" if self.batch_norm == "none" else f"{self.batch_norm} BatchNorm")
        if self.seed is not None:
            parts.append(f"seed {self.seed}")
        return ", ".join(parts)

    def _as_dict(self, name: str, per_episode: bool) -> dict[str, Any]:
        values: dict[str, Any] = {
            name: self.mean,
            "interval_95": self.interval,
            "episodes": self.episodes,
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "batch_norm": self.batch_norm,
            "seed": self.seed,
            "loss": self.loss,
        }
        if per_episode:
            values["per_episode"] = self.per_episode.tolist()
        return values


class Accuracy(_Score):
    """Result of :func:`evaluate`. Accuracies are fractions from 0 to 1; printing shows percent.

    Attributes:
        mean: mean over the episodes of the fraction of query images that were classified correctly.
        interval: half-width of the 95 % confidence interval (see :func:`confidence_interval`).
        episodes: number of episodes ``E``.
        ways, shots, queries: shape of the episodes; shots and queries are per class. None where they differ.
        batch_norm: ``"running"`` or ``"transductive"``; ``"none"`` for a learner without BatchNorm layers.
        seed: seed of the sampler, None for episodes that did not come from one.
        loss: mean loss over the episodes.
        per_episode: ``[E]`` float64, the accuracy of every episode in its order.
    """

    def __str__(self) -> str:
        return f"{100 * self.mean:.2f} % +- {100 * self.interval:.2f} ({self._conditions()})"

    def as_dict(self, per_episode: bool = False) -> dict[str, Any]:
        """Plain values for a JSON file, those of the single episodes only if asked for."""
        return self._as_dict("accuracy", per_episode)


class SquaredError(_Score):
    """Result of :func:`evaluate` in regression.

    Attributes:
        mean: mean over the episodes of the mean squared error (MSE) of the query rows' predictions.
        interval, episodes, batch_norm, seed, loss: as in :class:`Accuracy`.
        ways: None.
        shots, queries: support and query rows of an episode. None where they differ.
        per_episode: ``[E]`` float64, the mean squared error of every episode in its order.
    """

    def __str__(self) -> str:
        return f"MSE {self.mean:.4f} +- {self.interval:.4f} ({self._conditions()})"

    def as_dict(self, per_episode: bool = False) -> dict[str, Any]:
        """Plain values for a JSON file, those of the single episodes only if asked for."""
        return self._as_dict("mse", per_episode)


class Accuracies(Mapping[Any, Accuracy | SquaredError]):
    """Results of :func:`evaluate` for several sources, by their names; printing shows a table."""

    def __init__(self, results: Mapping[Any, Accuracy | SquaredError]) -> None:
        self._results = dict(results)

    def __getitem__(self, key: Any) -> Accuracy | SquaredError:
        return self._results[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __str__(self) -> str:
        width = max((len(label(key)) for key in self), default=0)
        return "\n".join(f"{label(key):{width}}  {score}" for key, score in self.items())

    def as_dict(self, per_episode: bool = False) -> dict[str, dict[str, Any]]:
        """Plain values for a JSON file."""
        return {label(key): score.as_dict(per_episode) for key, score in self.items()}


def label(key: Any) -> str:
    """A key of :class:`Accuracies` in words: a pair of numbers is ways and shots."""
    if isinstance(key, tuple) and len(key) == 2 and all(isinstance(number, int) for number in key):
        return f"{key[0]}-way {key[1]}-shot"
    return str(key)


def confidence_interval(values: Tensor) -> float:
    """Half-width of the 95 % interval of the mean of ``values [E]``, ``1.96 s / sqrt(E)``.

    ``s`` is the sample standard deviation (divisor ``E - 1``). 1.96 is the quantile of the normal distribution,
    which the literature uses; Student's is larger by 1.3 % at 100 episodes and by 5 % at 25.
    """
    return float(1.96 * values.double().std() / len(values) ** 0.5)


def learner_device(learner: nn.Module) -> torch.device:
    """Where the learner's parameters are (the CPU if it has none)."""
    parameter = next(learner.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def episode_grid(
    dataset: Classes | Sequence[Classes],
    ways: Iterable[int] = (5,),
    shots: Iterable[int] = (1,),
    queries: int = 15,
    count: int = DEFAULT_EPISODES,
    seed: int = 0,
) -> dict[tuple[int, int], FixedEpisodes]:
    """Fixed test episodes for every pair of ways and shots, for one call of :func:`evaluate`.

    Raises:
        ValueError: episodes that the data set cannot give (see :class:`~metafast.data.EpisodeSampler`).
    """
    shots = tuple(shots)
    return {
        (way, shot): fixed_episodes(dataset, way, shot, queries, count, seed)
        for way in ways
        for shot in shots
    }


def fixed_episodes(
    dataset: Classes | Sequence[Classes], ways: int, shots: int, queries: int, count: int, seed: int
) -> FixedEpisodes:
    """Fixed episodes in batches of about :data:`VALUES_AT_ONCE` numbers."""
    sampler = EpisodeSampler(dataset, ways, shots, queries, seed=seed)
    values = ways * (shots + queries) * sampler.datasets[0].row_shape.numel()
    return FixedEpisodes(sampler, count, batch=max(1, VALUES_AT_ONCE // max(1, values)))


@overload
def evaluate(
    learner: nn.Module,
    episodes: Mapping[Any, Source],
    count: int | None = None,
    *,
    batch_norm: str | None = None,
    progress: str = "evaluation",
) -> Accuracies: ...


@overload
def evaluate(
    learner: nn.Module,
    episodes: Source,
    count: int | None = None,
    *,
    batch_norm: str | None = None,
    progress: str = "evaluation",
) -> Accuracy | SquaredError: ...


def evaluate(
    learner: nn.Module,
    episodes: Source | Mapping[Any, Source],
    count: int | None = None,
    *,
    batch_norm: str | None = None,
    progress: str = "evaluation",
) -> Accuracy | SquaredError | Accuracies:
    """Classify the query images of ``count`` episodes; in regression, predict the targets of the query rows.

    Runs under ``torch.no_grad`` (an inner loop may switch gradients on again) and in evaluation mode, and
    puts the training mode of every module back. Running statistics of BatchNorm layers are read or ignored,
    never changed. The processes of torchrun share out the batches, and each gets the result of all of them.

    Args:
        learner: ``learner(episodes) -> Outcome(loss, logits [T, m, C])``.
        episodes: a sampler, whose steps 0, 1, 2 ... are taken, or another function of the step; or any iterable
            of batches, such as :class:`~metafast.data.FixedEpisodes`; or a mapping from names to such sources,
            such as :func:`episode_grid` gives for several ways and shots. Ways and shots may vary.
        count: number of episodes ``E``, at least 2. Surplus episodes of the last batch are left out. None
            means all of an iterable and 1,000 of a sampler or function.
        batch_norm: ``"running"`` normalises by the running statistics of training, ``"transductive"`` by the
            statistics of the support and query images of each single episode. None: as the learner's attribute
            ``batch_norm`` says, if it has one that says it, or else by running statistics.
        progress: title of the progress bar, which appears where standard error is a terminal.

    Returns:
        :class:`Accuracy`, for regression :class:`SquaredError`, and for a mapping :class:`Accuracies`, a mapping
        from the same names.

    Raises:
        TypeError: ``episodes`` of another kind.
        ValueError: an unknown ``batch_norm``, or ``"running"`` for layers without running statistics; a
            ``count`` below 2; episodes that end early; episodes of classes and of regression in one source.
        FloatingPointError: NaN among the logits.
    """
    if isinstance(episodes, Mapping):
        return Accuracies(
            {
                key: evaluate(
                    learner, source, count, batch_norm=batch_norm, progress=f"{progress} {label(key)}".strip()
                )
                for key, source in episodes.items()
            }
        )
    meter = Meter()
    batch_norm = settled_batch_norm(learner, batch_norm)
    each_outcome(learner, episodes, count, meter.take, batch_norm, progress, meter.status)
    return meter.result(batch_norm if batch_norm_layers(learner) else "none", getattr(episodes, "seed", None))


class Meter:
    """Collects what :func:`evaluate` reports, from the outcomes that :func:`each_outcome` gives."""

    def __init__(self) -> None:
        # Of each episode, the share of right answers or the mean squared error.
        self.scores: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.shapes: set[tuple[int, int, int]] = set()
        # Smallest and largest number of support, and of query rows of a class, of each batch.
        self.rows: list[Tensor] = []
        self.regression = False
        # Episodes that this process has seen the outcomes of.
        self.own = 0

    def take(self, episodes: Episodes, outcome: Outcome | None) -> None:
        if self.shapes and episodes.regression != self.regression:
            raise ValueError("episodes: expected either classes or regression tasks, got both")
        self.regression = episodes.regression
        self.shapes.add((episodes.ways, episodes.support_y.shape[1], episodes.query_y.shape[1]))
        self.rows.append(_rows_of_classes(episodes))
        if outcome is None:
            zeros = episodes.support_y.new_zeros(episodes.tasks + 1, dtype=torch.float64)
            self.scores.append(zeros[1:])
            self.losses.append(zeros[0])
            return
        logits = outcome.logits
        if episodes.regression:
            each = (logits - episodes.query_y).double().square()
        else:
            each = (logits.argmax(-1) == episodes.query_y).double()
        each = each.flatten(1).mean(-1)
        self.scores.append(torch.where(logits.isnan().flatten(1).any(-1), torch.nan, each))
        self.losses.append(outcome.loss.double() * episodes.tasks)
        self.own += episodes.tasks

    def status(self) -> str:
        """Loss, and accuracy, so far."""
        if not self.own:
            return ""
        loss, hits = float(torch.stack(self.losses).sum()), float(torch.cat(self.scores).sum())
        text = f"loss {loss / self.own:.4f}"
        return text if self.regression else f"{text}, accuracy {100 * hits / self.own:.1f} %"

    def result(self, batch_norm: str, seed: int | None) -> Accuracy | SquaredError:
        """The score over what was taken; on every process over what all of them have taken together."""
        group = ranks()
        per_episode = group.sum(torch.cat(self.scores)).cpu()
        losses = group.sum(torch.stack(self.losses))
        episodes = len(per_episode)
        if per_episode.isnan().any():
            first = int(per_episode.isnan().nonzero()[0])
            raise FloatingPointError(
                f"the logits of {int(per_episode.isnan().sum())} of {episodes} episodes hold NaN, "
                f"those of episode {first} first"
            )
        low, high = torch.stack(self.rows).unbind(-1)
        smallest, largest = low.amin(0).tolist(), high.amax(0).tolist()
        shots, queries = (a if a == b else None for a, b in zip(smallest, largest, strict=True))
        ways = {shape[0] for shape in self.shapes}
        kind = SquaredError if self.regression else Accuracy
        return kind(
            mean=float(per_episode.mean()),
            interval=confidence_interval(per_episode),
            episodes=episodes,
            ways=ways.pop() if len(ways) == 1 and not self.regression else None,
            shots=shots,
            queries=queries,
            batch_norm=batch_norm,
            seed=seed,
            loss=float(losses.sum() / episodes),
            per_episode=per_episode,
        )


def each_outcome(
    learner: nn.Module,
    episodes: Source,
    count: int | None,
    take: Callable[[Episodes, Outcome | None], None],
    batch_norm: str | None = None,
    progress: str = "evaluation",
    status: Callable[[], str] | None = None,
) -> None:
    """Give ``take`` each batch with the learner's outcome on it, in evaluation mode and without gradients.

    Several processes share out the batches: the outcome is None on those that another one works on.
    Arguments and errors are those of :func:`evaluate`; ``status`` tells the progress bar of the results so far.
    """
    batch_norm = settled_batch_norm(learner, batch_norm)
    norms = batch_norm_layers(learner)
    if count is not None and count < 2:
        raise ValueError(f"count: expected at least 2 episodes (an interval needs them), got {count}")
    batches, count = _batches(episodes, count)
    device = learner_device(learner)
    group = ranks()
    done = 0
    bar = progress_bar(count, progress, " episodes", leave=False)
    watched = status is not None and not getattr(bar, "disable", True)
    looked = time.perf_counter()
    try:
        with torch.no_grad(), evaluation_mode(learner, batch_norm):
            for number, batch in enumerate(batches):
                if count is not None and done + batch.tasks > count:
                    batch = batch[: count - done]
                batch = batch.to(device)
                # Statistics of one episode at a time, or the result would depend on how many share a batch.
                own = getattr(learner, "episode_statistics", False)
                alone = bool(norms) and batch_norm == "transductive" and not own
                for part in [batch[task] for task in range(batch.tasks)] if alone else [batch]:
                    take(part, learner(part) if group.takes(number) else None)
                done += batch.tasks
                if watched and status is not None and time.perf_counter() - looked >= LOOK_EVERY:
                    bar.set_postfix_str(status(), refresh=False)
                    looked = time.perf_counter()
                bar.update(batch.tasks)
                if done == count:
                    break
    finally:
        bar.close()
    if done < 2 or (count is not None and done < count):
        raise ValueError(f"episodes: expected {count or 'at least 2'}, got {done}")


def _batches(episodes: Source, count: int | None) -> tuple[Iterable[Episodes], int | None]:
    """The batches of a source, and how many episodes to take of them if that is known."""
    if isinstance(episodes, Episodes):
        return [episodes], count
    if callable(episodes):
        return map(episodes, count_from()), DEFAULT_EPISODES if count is None else count
    if not isinstance(episodes, Iterable):
        raise TypeError(
            "episodes: expected a sampler, batches of Episodes or a mapping of them, "
            f"got {type(episodes).__name__}"
        )
    return episodes, episodes.count if count is None and isinstance(episodes, FixedEpisodes) else count


def batch_norm_layers(learner: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of a learner by their names."""
    return {name: module for name, module in learner.named_modules() if isinstance(module, _BatchNorm)}


def settled_batch_norm(learner: nn.Module, batch_norm: str | None) -> str:
    """The mode to evaluate a learner in.

    Raises:
        ValueError: a mode that is unknown, or that the learner cannot be evaluated in.
    """
    own: str | None = getattr(learner, "batch_norm", None)
    if own not in (None, "transductive"):
        # Other policies of learners are about which running statistics there are.
        own = "running"
    if batch_norm is None:
        batch_norm = own or "running"
    if batch_norm not in BATCH_NORM_MODES:
        raise ValueError(f"batch_norm: expected 'running' or 'transductive', got {batch_norm!r}")
    norms = batch_norm_layers(learner)
    if norms and own not in (None, batch_norm):
        raise ValueError(
            f"batch_norm: expected {own!r}, by which this {type(learner).__name__} normalises, got {batch_norm!r}"
        )
    if batch_norm == "running":
        for name, norm in norms.items():
            if norm.running_mean is None:
                raise ValueError(
                    f"batch_norm: the layer {name} keeps no running statistics; "
                    "evaluate with batch_norm='transductive'"
                )
    return batch_norm


def _rows_of_classes(episodes: Episodes) -> Tensor:
    """Smallest and largest number of rows of a class, ``[2, 2]`` for support and query, on the device.

    Regression has no classes: all rows count.
    """
    if episodes.regression:
        sizes = [labels.shape[1] for labels in (episodes.support_y, episodes.query_y)]
        return torch.tensor(sizes, device=episodes.device).unsqueeze(-1).expand(2, 2)
    classes = torch.arange(episodes.ways, device=episodes.device)
    counts = [(labels.unsqueeze(-1) == classes).sum(-2) for labels in (episodes.support_y, episodes.query_y)]
    return torch.stack([torch.stack([count.min(), count.max()]) for count in counts])


@contextlib.contextmanager
def evaluation_mode(learner: nn.Module, batch_norm: str) -> Iterator[None]:
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
