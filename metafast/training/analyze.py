"""The generalisation report: how a trained learner does beyond the episodes it was trained on."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metafast.data import Classes, Episodes, FixedEpisodes
from metafast.learners import Outcome
from metafast.training.distributed import ranks
from metafast.training.evaluate import (
    Accuracy,
    Meter,
    batch_norm_layers,
    confidence_interval,
    each_outcome,
    fixed_episodes,
    settled_batch_norm,
)

FORMAT = "metafast-generalisation-1"
#: What the curves go through, as far as the data set has as many classes and images.
WAYS = (2, 5, 10, 20)
SHOTS = (1, 2, 3, 5, 10)
STEPS = (0, 1, 2, 3, 5, 10)
#: Bins of a reliability diagram, as in Guo et al.
BINS = 15
#: Between these the temperature is sought.
TEMPERATURES = (0.01, 100.0)

AnyClasses = Classes | Sequence[Classes]


@dataclass(frozen=True)
class Estimate:
    """A number with the half-width of its 95 % interval, which is infinite where there is none."""

    value: float
    interval: float

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "interval_95": self.interval if math.isfinite(self.interval) else None}


@dataclass(frozen=True)
class Bin:
    """Answers whose confidence is above ``low`` and at most ``high``.

    Attributes:
        low, high: limits of the bin.
        share: how many of all answers are in it, from 0 to 1.
        confidence: their mean confidence; None for an empty bin.
        accuracy: how many of them are right.
        interval: lower and upper end of the accuracy's 95 % interval, Wilson's with the number of answers
            reduced by how much more the episodes differ than single answers would.
    """

    low: float
    high: float
    share: float
    confidence: float | None
    accuracy: float | None
    interval: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "interval": None if self.interval is None else list(self.interval)}


@dataclass(frozen=True)
class Reliability:
    """How far the softmax of a learner's logits can be taken for probabilities.

    The confidence of an answer is its probability. With ``n_b`` of ``N`` answers in bin ``b``, their accuracy
    ``a_b`` and mean confidence ``c_b``, the expected calibration error is ``sum_b n_b / N |a_b - c_b|``.

    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks" (2017).

    Attributes:
        bins: :data:`BINS` bins of equal width.
        error: expected calibration error.
        loss: mean negative log-likelihood.
        confidence: mean confidence of all answers.
    """

    bins: tuple[Bin, ...]
    error: Estimate
    loss: Estimate
    confidence: Estimate

    def as_dict(self) -> dict[str, Any]:
        return {
            "expected_calibration_error": self.error.as_dict(),
            "negative_log_likelihood": self.loss.as_dict(),
            "mean_confidence": self.confidence.as_dict(),
            "bins": [part.as_dict() for part in self.bins],
        }


@dataclass(frozen=True)
class Calibration:
    """Reliability on the test episodes, and with the temperature that suits validation episodes best.

    Attributes:
        before: of ``softmax(logits)``.
        temperature: the ``T`` of ``softmax(logits / T)`` with the least negative log-likelihood on validation
            episodes; None without validation classes.
        after: of ``softmax(logits / T)``, on the same test episodes as ``before``.
    """

    before: Reliability
    temperature: Estimate | None
    after: Reliability | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "before": self.before.as_dict(),
            "temperature": None if self.temperature is None else self.temperature.as_dict(),
            "after": None if self.after is None else self.after.as_dict(),
        }


@dataclass(frozen=True)
class Report:
    """Result of :func:`analyze`; printing shows a table.

    Attributes:
        learner: name of its class.
        ways, shots, queries: the setting, in which everything is measured where nothing else is said.
        episodes, seed, batch_norm: of every measurement.
        steps: the learner's own number of inner steps; None for a learner without them.
        by_shots, by_ways: accuracy on test classes against the number of shots, and of ways.
        by_steps: the same against inner steps; None for a learner without them.
        by_classes: accuracy on classes of ``"train"``, ``"validation"`` and ``"test"``, as far as they were given.
        by_data: accuracy on other data sets, by their names.
        calibration: reliability and temperature.
        notes: what could not be measured, in words.
    """

    learner: str
    ways: int
    shots: int
    queries: int
    episodes: int
    seed: int
    batch_norm: str
    steps: int | None
    by_shots: dict[int, Accuracy]
    by_ways: dict[int, Accuracy]
    by_steps: dict[int, Accuracy] | None
    by_classes: dict[str, Accuracy]
    by_data: dict[str, Accuracy]
    calibration: Calibration
    notes: tuple[str, ...]

    @property
    def gap(self) -> Estimate | None:
        """Accuracy on training classes minus that on test classes; None without training classes."""
        train = self.by_classes.get("train")
        return None if train is None else difference(train, self.by_classes["test"])

    @property
    def shifts(self) -> dict[str, Estimate]:
        """Accuracy on each other data set minus that on the test classes."""
        return {name: difference(other, self.by_classes["test"]) for name, other in self.by_data.items()}

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values for a JSON file."""

        def rows(name: str, points: Mapping[Any, Accuracy]) -> list[dict[str, Any]]:
            return [{name: key, **accuracy.as_dict()} for key, accuracy in points.items()]

        return {
            "format": FORMAT,
            "learner": self.learner,
            "setting": {
                "ways": self.ways,
                "shots": self.shots,
                "queries": self.queries,
                "episodes": self.episodes,
                "seed": self.seed,
                "batch_norm": self.batch_norm,
                "steps": self.steps,
            },
            "by_shots": rows("shots", self.by_shots),
            "by_ways": rows("ways", self.by_ways),
            "by_steps": None if self.by_steps is None else rows("steps", self.by_steps),
            "by_classes": rows("classes", self.by_classes),
            "gap": None if self.gap is None else self.gap.as_dict(),
            "by_data": rows("data", self.by_data),
            "shifts": [{"data": name, **shift.as_dict()} for name, shift in self.shifts.items()],
            "calibration": self.calibration.as_dict(),
            "notes": list(self.notes),
        }

    def setting(self) -> str:
        """The conditions of all measurements in one line."""
        norm = "no BatchNorm" if self.batch_norm == "none" else f"{self.batch_norm} BatchNorm"
        return (
            f"{self.ways}-way {self.shots}-shot {self.queries}-query where nothing else is said, "
            f"{self.episodes} episodes each, {norm}, seed {self.seed}"
        )

    def __str__(self) -> str:
        rows = self.rows()
        width = 2 + max(len(name) for _, name, _ in rows)
        lines = [self.setting(), "numbers behind +- are half-widths of 95 % intervals", ""]
        lines += [f"{title:13}{name:{width}}{value}".rstrip() for title, name, value in rows]
        for note in self.notes:
            lines += textwrap.wrap(f"note: {note}", 110, subsequent_indent="      ")
        return "\n".join(lines)

    def rows(self) -> list[tuple[str, str, str]]:
        """Heading (where it is a new one), name and value of each line of the table."""
        shifts, before, after = self.shifts, self.calibration.before, self.calibration.after
        classes = [(CLASSES[name], percent(value)) for name, value in self.by_classes.items()]
        if self.gap is not None:
            classes.append(("gap: training - test classes", points(self.gap)))
        data = []
        for name, value in self.by_data.items():
            data += [(name, percent(value)), (f"shift: {name} - test classes", points(shifts[name]))]
        calibration = [
            ("mean confidence", percent(before.confidence)),
            ("expected calibration error", percent(before.error)),
            ("log-likelihood loss", plain(before.loss)),
        ]
        if self.calibration.temperature is not None and after is not None:
            calibration += [
                ("temperature T of validation", plain(self.calibration.temperature)),
                ("calibration error with T", percent(after.error)),
                ("log-likelihood loss with T", plain(after.loss)),
            ]
        sections = {
            "shots": [(f"{key}-shot", percent(value)) for key, value in self.by_shots.items()],
            "ways": [(f"{key}-way", percent(value)) for key, value in self.by_ways.items()],
            "inner steps": [(f"{key}", percent(value)) for key, value in (self.by_steps or {}).items()]
            or [(f"{self.learner} has none", "")],
            "classes": classes,
            "other data": data,
            "calibration": calibration,
        }
        return [
            ("" if number else title, name, value)
            for title, rows in sections.items()
            for number, (name, value) in enumerate(rows)
        ]


#: The parts of a data set in words.
CLASSES = {"train": "training classes (seen)", "validation": "validation classes", "test": "test classes"}


def percent(result: Accuracy | Estimate) -> str:
    value = result.mean if isinstance(result, Accuracy) else result.value
    return f"{100 * value:6.2f} % +- {100 * result.interval:.2f}"


def points(result: Estimate) -> str:
    return f"{100 * result.value:+6.2f} points +- {100 * result.interval:.2f}"


def plain(result: Estimate) -> str:
    return f"{result.value:6.3f} +- {result.interval:.3f}"


def difference(first: Accuracy, second: Accuracy) -> Estimate:
    """``first - second`` of results on different classes, whose errors are independent."""
    return Estimate(first.mean - second.mean, math.hypot(first.interval, second.interval))


@dataclass(frozen=True)
class _Point:
    """One measurement: which data, and the shape of the episodes; steps None leaves the learner's own."""

    data: str
    ways: int
    shots: int
    steps: int | None = None

    def __str__(self) -> str:
        steps = "" if self.steps is None else f" {self.steps} steps"
        return f"{self.data} {self.ways}-way {self.shots}-shot{steps}"


def analyze(
    learner: nn.Module,
    test: AnyClasses,
    *,
    train: AnyClasses | None = None,
    validation: AnyClasses | None = None,
    others: Mapping[str, AnyClasses] | None = None,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    vary_ways: Sequence[int] | None = None,
    vary_shots: Sequence[int] | None = None,
    vary_steps: Sequence[int] | None = None,
    episodes: int = 600,
    seed: int = 0,
    batch_norm: str | None = None,
) -> Report:
    """Measure how a trained learner generalises.

    - accuracy on the test classes against shots (at ``ways``), against ways (at ``shots``) and against inner
      steps, for a learner that has an attribute ``steps``: the number of gradient steps it adapts by, an int,
      which is set for the measurements and put back;
    - the gap between the classes of training and the test classes, and the shift to other data sets;
    - calibration on the test classes: reliability, expected calibration error, and the temperature that
      minimises the negative log-likelihood on validation episodes.

    Every number comes with its 95 % interval and is measured by :func:`~metafast.training.evaluate` on
    :class:`~metafast.data.FixedEpisodes`, which are the same on every machine.

    Args:
        learner: ``learner(episodes) -> Outcome(loss, logits [T, m, C])``.
        test: classes that it was not trained on; a data set, or several that episodes are drawn from.
        train, validation: the classes of its training, and of its validation.
        others: other data sets by name, with inputs of the same shape.
        ways, shots, queries: the setting of all that is not varied.
        vary_ways, vary_shots, vary_steps: values of the curves; if None those of :data:`WAYS`, :data:`SHOTS`
            and :data:`STEPS` that the data set can give.
        episodes: number of episodes of every measurement, at least 2.
        seed: of the episodes.
        batch_norm: see :func:`~metafast.training.evaluate`.

    Raises:
        ValueError: more ways or images of a class than a data set has, other ways than a learner with an attribute
            ``ways`` has outputs for, ``vary_steps`` for a learner without inner steps, and what
            :func:`~metafast.training.evaluate` raises.
    """
    notes: list[str] = []
    datasets: dict[str, AnyClasses] = {"test": test}
    datasets |= {} if train is None else {"train": train}
    datasets |= {} if validation is None else {"validation": validation}
    datasets |= {f"other data {name}": data for name, data in (others or {}).items()}
    if episodes < 2:
        raise ValueError(f"episodes: expected at least 2 (an interval needs them), got {episodes}")
    batch_norm = settled_batch_norm(learner, batch_norm)
    own_steps = inner_steps(learner)
    if vary_steps is not None and own_steps is None:
        raise ValueError(f"vary_steps: {type(learner).__name__} has no inner steps (no attribute steps)")
    if validation is None:
        notes.append("no temperature was fitted: there are no validation classes")
    if train is None:
        notes.append("no gap: the training classes were not given")

    most_ways, most_shots = _limits(test, queries)
    head = getattr(learner, "ways", None)
    if head is None:
        ways_values = _values("ways", vary_ways, WAYS, ways, most_ways, notes)
    elif any(value != head for value in (ways, *(vary_ways or ()))):
        raise ValueError(
            f"ways: {type(learner).__name__} has a head for {head} classes, and takes {head} ways alone"
        )
    else:
        ways_values = [head]
        notes.append(f"one number of ways: {type(learner).__name__} has a head for {head} classes")
    shots_values = _values("shots", vary_shots, SHOTS, shots, most_shots, notes)
    steps_values = (
        [] if own_steps is None else sorted({*(STEPS if vary_steps is None else vary_steps), own_steps})
    )

    base = _Point("test", ways, shots)
    curves: dict[str, dict[int, _Point]] = {
        "shots": {value: _Point("test", ways, value) for value in shots_values},
        "ways": {value: _Point("test", value, shots) for value in ways_values},
        "steps": {value: _Point("test", ways, shots, value) for value in steps_values},
    }
    parts = {name: _Point(name, ways, shots) for name in datasets}
    wanted = dict.fromkeys([base, *(point for curve in curves.values() for point in curve.values())])
    wanted |= dict.fromkeys(parts.values())
    # All samplers first: what the data cannot give is said before anything is measured.
    sources = {
        point: fixed_episodes(datasets[point.data], point.ways, point.shots, queries, episodes, seed)
        for point in wanted
    }
    results: dict[_Point, Accuracy] = {}
    scores: dict[str, tuple[Tensor, Tensor]] = {}
    for number, (point, source) in enumerate(sources.items(), 1):
        keep = point in (base, parts.get("validation"))
        with with_inner_steps(learner, point.steps):
            results[point], kept = _measure(
                learner, source, batch_norm, f"{number}/{len(sources)} {point}", keep
            )
        if kept is not None:
            scores[point.data] = kept

    def curve(name: str) -> dict[int, Accuracy]:
        return {value: results[point] for value, point in curves[name].items()}

    return Report(
        learner=type(learner).__name__,
        ways=ways,
        shots=shots,
        queries=queries,
        episodes=episodes,
        seed=seed,
        batch_norm=results[base].batch_norm,
        steps=own_steps,
        by_shots=curve("shots"),
        by_ways=curve("ways"),
        by_steps=None if own_steps is None else curve("steps"),
        by_classes={name: results[parts[name]] for name in CLASSES if name in parts},
        by_data={name: results[parts[f"other data {name}"]] for name in others or {}},
        calibration=_calibration(scores, notes),
        notes=tuple(notes),
    )


def inner_steps(learner: nn.Module) -> int | None:
    """How many gradient steps the learner adapts by; None if it does not adapt in steps."""
    steps = getattr(learner, "steps", None)
    return steps if isinstance(steps, int) and not isinstance(steps, bool) else None


def _limits(test: AnyClasses, queries: int) -> tuple[int, int]:
    """Most ways and shots that episodes of the data can have."""
    parts = (test,) if isinstance(test, Classes) else test
    smallest = min(int(part.class_sizes.min()) for part in parts)
    return min(part.num_classes for part in parts), smallest - queries


def _values(
    name: str, given: Sequence[int] | None, usual: Sequence[int], base: int, most: int, notes: list[str]
) -> list[int]:
    """Values of a curve in order: those asked for, or the usual ones that there are enough classes or images for."""
    if given is not None:
        return sorted({*given, base})
    possible = {base, *(value for value in usual if value <= most)}
    left_out = [str(value) for value in usual if value > most]
    if left_out:
        # The largest number that is possible stands in for them.
        possible |= {most} if most > max(possible) else set()
        what = "classes" if name == "ways" else "images in the smallest class beside the queries"
        notes.append(f"{name} {', '.join(left_out)} left out: there are {max(most, 0)} {what}")
    return sorted(possible)


@contextmanager
def with_inner_steps(learner: Any, steps: int | None) -> Iterator[None]:
    """The learner with this number of inner steps."""
    if steps is None:
        yield
        return
    before = learner.steps
    learner.steps = steps
    try:
        yield
    finally:
        learner.steps = before


def _measure(
    learner: nn.Module, source: FixedEpisodes, batch_norm: str, title: str, keep: bool
) -> tuple[Accuracy, tuple[Tensor, Tensor] | None]:
    """Accuracy, and if asked for the logits ``[E, m, C]`` in float64 and the labels ``[E, m]`` on the CPU."""
    meter = Meter()
    logits: list[Tensor] = []
    labels: list[Tensor] = []

    def take(episodes: Episodes, outcome: Outcome | None) -> None:
        meter.take(episodes, outcome)
        if keep:
            labels.append(episodes.query_y)
            shape = *episodes.query_y.shape, episodes.ways
            logits.append(
                outcome.logits.double()
                if outcome is not None
                else episodes.query_y.new_zeros(shape, dtype=torch.float64)
            )

    each_outcome(learner, source, None, take, batch_norm, title, meter.status)
    accuracy = meter.result(batch_norm if batch_norm_layers(learner) else "none", source.seed)
    assert isinstance(accuracy, Accuracy)
    return accuracy, (ranks().sum(torch.cat(logits)).cpu(), torch.cat(labels).cpu()) if keep else None


def _calibration(scores: Mapping[str, tuple[Tensor, Tensor]], notes: list[str]) -> Calibration:
    logits, labels = scores["test"]
    before = reliability(logits, labels)
    if "validation" not in scores:
        return Calibration(before, None, None)
    temperature = best_temperature(*scores["validation"])
    if temperature.value in TEMPERATURES:
        notes.append(
            f"the temperature is at the end of its range, {temperature.value:g}, where the log-likelihood of the "
            "validation episodes is best"
        )
    return Calibration(before, temperature, reliability(logits / temperature.value, labels))


def reliability(logits: Tensor, labels: Tensor) -> Reliability:
    """Reliability of ``softmax(logits)`` for answers to ``labels``.

    The intervals take the episodes, not the single answers, as independent. That of the expected calibration
    error holds the sign of every bin's gap fixed: ``1.96 s / sqrt(E)`` of the episodes' signed gaps.

    Args:
        logits: ``[E, m, C]``.
        labels: ``[E, m]`` int64.
    """
    log_probabilities = logits.double().log_softmax(-1)
    confidence, answer = log_probabilities.exp().max(-1)
    right = (answer == labels).double()
    loss = -log_probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(-1)
    episodes, answers = labels.shape
    # Bin b is (b / BINS, (b + 1) / BINS].
    number = ((confidence * BINS).ceil() - 1).clamp(0, BINS - 1).long()

    def sums(values: Tensor) -> Tensor:
        return torch.zeros(episodes, BINS, dtype=torch.float64).scatter_add_(1, number, values)

    count, sure, correct = sums(torch.ones_like(right)), sums(confidence), sums(right)
    gaps = correct - sure
    signed = (gaps * gaps.sum(0).sign()).sum(1) / answers
    total = count.sum(0)
    bins = []
    for b in range(BINS):
        low, high, n = b / BINS, (b + 1) / BINS, float(total[b])
        if n == 0:
            bins.append(Bin(low, high, 0.0, None, None, None))
            continue
        accuracy = float(correct[:, b].sum()) / n
        bins.append(
            Bin(
                low,
                high,
                n / labels.numel(),
                float(sure[:, b].sum()) / n,
                accuracy,
                _ratio_interval(correct[:, b], count[:, b], accuracy),
            )
        )
    return Reliability(
        bins=tuple(bins),
        error=Estimate(float(signed.mean()), confidence_interval(signed)),
        loss=Estimate(float(loss.mean()), confidence_interval(loss)),
        confidence=Estimate(float(confidence.mean()), confidence_interval(confidence.mean(-1))),
    )


def _ratio_interval(correct: Tensor, count: Tensor, accuracy: float) -> tuple[float, float]:
    """Wilson's 95 % interval of ``sum(correct) / sum(count)``, for numbers of answers that come in episodes."""
    z, n = 1.96, float(count.sum())
    binomial = accuracy * (1 - accuracy) / n
    if binomial > 0:
        residuals = correct - accuracy * count
        variance = float((residuals**2).sum()) / n**2 * len(count) / (len(count) - 1)
        n /= max(1.0, variance / binomial)
    middle = (accuracy + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def best_temperature(logits: Tensor, labels: Tensor) -> Estimate:
    """The ``T`` that minimises the mean negative log-likelihood of ``softmax(logits / T)``.

    The likelihood is convex in ``1 / T``, so the zero of its slope is found by bisection, between
    :data:`TEMPERATURES`. The interval is that of an M-estimator over independent episodes, from the slopes
    of the single episodes and the curvature.

    Args:
        logits: ``[E, m, C]``.
        labels: ``[E, m]`` int64.
    """
    # Differences to the right class: entries of -inf, absent classes, have probability 0 and no slope.
    margins = logits.double() - logits.double().gather(-1, labels.unsqueeze(-1))
    finite = margins.where(margins.isfinite(), 0.0)

    def slopes(beta: float) -> tuple[Tensor, float]:
        """Slope of each episode's loss in ``beta = 1 / T``, and the curvature of their mean."""
        probabilities = (beta * margins).softmax(-1)
        mean = (probabilities * finite).sum(-1)
        square = (probabilities * finite**2).sum(-1)
        return mean.mean(-1), float((square - mean**2).mean())

    low, high = (math.log(1 / temperature) for temperature in reversed(TEMPERATURES))
    ends = low, high
    for _ in range(40):
        middle = (low + high) / 2
        if float(slopes(math.exp(middle))[0].mean()) <= 0:
            low = middle
        else:
            high = middle
    beta = math.exp((low + high) / 2)
    for end, temperature in zip(ends, reversed(TEMPERATURES), strict=True):
        if abs(math.log(beta) - end) < 1e-9:
            return Estimate(temperature, math.inf)
    each, curvature = slopes(beta)
    # dT = T^2 dbeta, and dbeta = slope / curvature.
    return Estimate(1 / beta, confidence_interval(each) / curvature / beta**2)
