"""Batches of random episodes: a pure function of a seed and the step."""

from __future__ import annotations

import abc
import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metafast.data._arguments import integer, integer_range
from metafast.data._random import RandomStream
from metafast.data.classes import Classes
from metafast.data.episodes import Episodes

Plan = TypeVar("Plan")
Sampler = TypeVar("Sampler", bound="TaskSampler[Any]")
ClassWeights = Mapping[str, float] | Sequence[float] | Tensor


class TaskSampler(abc.ABC, Generic[Plan]):
    """Random tasks, `tasks` of them at each step: the base of the samplers.

    `sampler(step)` is a pure function of `(seed, step)`: any step of a run can be made again by itself. What
    is random is drawn on the CPU as a plan of numbers, which is the same on every machine and device and
    under every version of torch and numpy; the tensors are then made where they are wanted.

    Attributes:
        tasks: tasks that a call gives.
        seed: integer from 0 to 2**64 - 1.
    """

    tasks: int
    seed: int
    _drawn_tasks: int
    _first_task: int

    def __init__(self, tasks: int, seed: int) -> None:
        self.tasks = self._drawn_tasks = integer("tasks", tasks, minimum=1)
        self.seed = integer("seed", seed, minimum=0, maximum=2**64 - 1)
        self._first_task = 0

    @abc.abstractmethod
    def _plan(self, random: RandomStream, tasks: int) -> Plan:
        """Draw everything that is random about `tasks` tasks."""

    @abc.abstractmethod
    def _part(self, plan: Plan, start: int, stop: int) -> Plan:
        """Tasks `start` to `stop - 1` of a plan."""

    @abc.abstractmethod
    def _joined(self, plans: Sequence[Plan]) -> Plan:
        """The tasks of several plans of one shape."""

    @abc.abstractmethod
    def _episodes(self, plan: Plan) -> Episodes:
        """Make the tensors."""

    @abc.abstractmethod
    def _shape(self, plan: Plan) -> tuple[int, int, int]:
        """Ways, support rows and query rows of a plan."""

    @abc.abstractmethod
    def _digest(self, plan: Plan) -> bytes:
        """The numbers of a plan, 64 bits each, little-endian."""

    @abc.abstractmethod
    def _source_digest(self) -> bytes:
        """What the numbers of a plan refer to."""

    def __call__(self, step: int) -> Episodes:
        """The episodes of `step`, an integer from 0 to 2**64 - 1."""
        return self._episodes(self._step_plan(step))

    def __iter__(self) -> Iterator[Episodes]:
        """Steps 0, 1, 2 ... without end."""
        step = 0
        while True:
            yield self(step)
            step += 1

    def shard(self: Sampler, rank: int, ranks: int) -> Sampler:
        """A sampler of the tasks that fall to one of `ranks` processes, which share out each step.

        The steps of all ranks in order of rank, put together, are the steps of this sampler, so that the
        number of processes does not change what is trained on.

        Raises:
            ValueError: `tasks` that `ranks` does not divide, a rank out of range.
        """
        ranks = integer("ranks", ranks, minimum=1)
        rank = integer("rank", rank, 0, ranks - 1)
        if self.tasks % ranks:
            raise ValueError(f"ranks must divide the {self.tasks} tasks of a step, got {ranks}")
        part = copy.copy(self)
        part.tasks = self.tasks // ranks
        part._first_task = self._first_task + rank * part.tasks
        return part

    def single_plan(self, number: int) -> Plan:
        """The plan of the first and only task that this sampler with `tasks=1` would give at step `number`."""
        return self._plan(RandomStream(self.seed, number), 1)

    def _step_plan(self, step: int) -> Plan:
        step = integer("step", step, minimum=0, maximum=2**64 - 1)
        plan = self._plan(RandomStream(self.seed, step), self._drawn_tasks)
        if self.tasks == self._drawn_tasks:
            return plan
        return self._part(plan, self._first_task, self._first_task + self.tasks)


@dataclass(frozen=True, eq=False)
class EpisodePlan:
    """Which rows an :class:`EpisodeSampler` takes for its tasks.

    Attributes:
        ways: classes in a task.
        even: whether all classes of all tasks have equally many rows.
        sources: `[T]` int64, the number of each task's data set.
        classes: `[T, ways]` int64, the number of the class that stands for each label, in its data set.
        support_rows, query_rows: `[T, n]` and `[T, m]` int64, rows of the data set.
        support_y, query_y: `[T, n]` and `[T, m]` int64, their labels.
    """

    ways: int
    even: bool
    sources: NDArray[np.int64]
    classes: NDArray[np.int64]
    support_rows: NDArray[np.int64]
    support_y: NDArray[np.int64]
    query_rows: NDArray[np.int64]
    query_y: NDArray[np.int64]

    def arrays(self) -> tuple[NDArray[np.int64], ...]:
        """All that has a task dimension."""
        return (
            self.sources,
            self.classes,
            self.support_rows,
            self.support_y,
            self.query_rows,
            self.query_y,
        )


class EpisodeSampler(TaskSampler[EpisodePlan]):
    """Random N-way K-shot episodes, `tasks` of them at each step.

    `sampler(step)` is a pure function of `(seed, step)`, on every device: any step of a run can be made
    again by itself. Within a task the classes are distinct, drawn without replacement, and the images of a
    class are distinct, so that support and query share none. The label of a class is its random position in
    the task; the rows of a task are ordered by label.

    The random numbers are those of a Philox generator on the CPU with key `(seed, step)`: no two pairs
    share a stream (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        dataset: the classes to draw from, or several such data sets with rows of one shape, dtype and
            device. A task then comes from one of them, and a batch may mix tasks of several.
        ways: classes in a task: a number, or a pair (smallest, largest) from which it is drawn for each
            step, equal for its tasks.
        shots: support images of each class, likewise.
        queries: query images of each class, likewise.
        tasks: tasks `T` at each step.
        seed: integer from 0 to 2**64 - 1.
        uneven_shots: every class of a task has its own number of shots from the pair `shots`. The numbers
            of a step are drawn once and dealt out anew in each of its tasks, so that all have `n` rows.
        dataset_weights: for several data sets, the chance of each in proportion; equal if None.
        class_weights: the chance of each class in proportion, drawn one after the other without replacement:
            a number for each of the data set's `names` in their order, or a mapping from all names. 0 leaves
            a class out; rotated classes have the weight of the upright one. For several data sets a sequence
            with one entry for each, which may be None. Equal if None.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range, more ways than classes, a class with fewer than shots + queries
            images (it is named), data sets that do not fit together, weights that are not there.
    """

    def __init__(
        self,
        dataset: Classes | Sequence[Classes],
        ways: int | tuple[int, int],
        shots: int | tuple[int, int],
        queries: int | tuple[int, int],
        tasks: int = 1,
        seed: int = 0,
        *,
        uneven_shots: bool = False,
        dataset_weights: Sequence[float] | None = None,
        class_weights: ClassWeights | Sequence[ClassWeights | None] | None = None,
    ) -> None:
        super().__init__(tasks, seed)
        self.datasets = as_datasets(dataset)
        self._ways = integer_range("ways", ways, minimum=1)
        self._shots = integer_range("shots", shots, minimum=1)
        self._queries = integer_range("queries", queries, minimum=1)
        self.uneven_shots = bool(uneven_shots)
        if self.uneven_shots and self._shots[0] == self._shots[1]:
            raise ValueError(f"shots must be a pair (smallest, largest) for uneven_shots, got {self.shots}")
        self._dataset_weights = _dataset_weights(dataset_weights, len(self.datasets))
        several = not isinstance(dataset, Classes)
        self._class_weights = _class_weights(class_weights, self.datasets, several)
        self._check_ways()
        self._check_sizes()
        self._starts = np.concatenate([data.class_starts.numpy() for data in self.datasets])
        self._sizes = np.concatenate([data.class_sizes.numpy() for data in self.datasets])
        self._offsets = np.cumsum([0] + [len(data.names) for data in self.datasets[:-1]])
        self._largest = int(self._sizes.max())

    @property
    def ways(self) -> int | tuple[int, int]:
        """Classes in a task, a number or a pair as they were given."""
        return _given(self._ways)

    @property
    def shots(self) -> int | tuple[int, int]:
        """Support images of each class, a number or a pair as they were given."""
        return _given(self._shots)

    @property
    def queries(self) -> int | tuple[int, int]:
        """Query images of each class, a number or a pair as they were given."""
        return _given(self._queries)

    def plan(self, step: int) -> EpisodePlan:
        """The data sets, classes and rows of the episodes of `step`, without the images."""
        return self._step_plan(step)

    def _check_ways(self) -> None:
        for number, (data, weights) in enumerate(zip(self.datasets, self._class_weights, strict=True)):
            which = "the data set" if len(self.datasets) == 1 else f"data set {number}"
            drawable = data.num_classes if weights is None else int((weights > 0).sum())
            if self._ways[1] > drawable:
                weighted = "" if weights is None else " with a weight"
                raise ValueError(
                    f"ways must be at most the {drawable} classes{weighted} of {which}, got {self._ways[1]}"
                )

    def _check_sizes(self) -> None:
        shots, queries = self._shots[1], self._queries[1]
        needed = shots + queries
        for number, (data, weights) in enumerate(zip(self.datasets, self._class_weights, strict=True)):
            sizes = data.class_sizes.numpy()
            small = sizes < needed
            if weights is not None:
                small &= weights[: len(sizes)] > 0
            if small.any():
                smallest = int(np.where(small, sizes, needed).argmin())
                which = "" if len(self.datasets) == 1 else f" of data set {number}"
                noun = "image" if len(data.row_shape) == 3 else "row"
                more = int(small.sum()) - 1
                others = (
                    f"; {more} more {'class is' if more == 1 else 'classes are'} too small" if more else ""
                )
                raise ValueError(
                    f"shots + queries must be at most the images of every class: class "
                    f"{data.names[smallest]!r}{which} has {_plural(int(sizes[smallest]), noun)}, {needed} are "
                    f"needed for {_plural(shots, 'shot')} + {'1 query' if queries == 1 else f'{queries} queries'}"
                    f"{others} (dataset.at_least({needed}) leaves out what is too small)"
                )

    def _plan(self, random: RandomStream, tasks: int) -> EpisodePlan:
        ways, shots, queries = (
            random.one_between(*ends) for ends in (self._ways, self._shots, self._queries)
        )
        class_shots = random.between(*self._shots, ways) if self.uneven_shots else np.full(ways, shots)
        sources = np.zeros(tasks, dtype=np.int64)
        if len(self.datasets) > 1:
            sources = random.choices(tasks, self._dataset_weights)
        classes = np.empty((tasks, ways), dtype=np.int64)
        base = np.empty((tasks, ways), dtype=np.int64)
        for number, (data, weights) in enumerate(zip(self.datasets, self._class_weights, strict=True)):
            own = np.flatnonzero(sources == number)
            if weights is None:
                drawn = random.distinct(len(own), ways, data.num_classes)
            else:
                drawn = random.weighted(len(own), ways, weights)
            classes[own] = drawn
            base[own] = drawn % len(data.names) + self._offsets[number]
        sizes, starts = self._sizes[base], self._starts[base]
        most = int(class_shots.max())
        numbers = random.distinct_below(sizes.reshape(-1), most + queries, self._largest)
        images = numbers.reshape(tasks, ways, most + queries) + starts[..., None]
        support, query = images[..., :most], images[..., most:]
        support_y = np.tile(np.arange(ways).repeat(most), (tasks, 1))
        if self.uneven_shots:
            dealt = class_shots[random.order(tasks, ways)]
            taken = np.arange(most) < dealt[..., None]
            support, support_y = support[taken], support_y[taken.reshape(tasks, -1)]
        return EpisodePlan(
            ways=ways,
            even=not self.uneven_shots,
            sources=sources,
            classes=classes,
            support_rows=support.reshape(tasks, -1),
            support_y=support_y.reshape(tasks, -1),
            query_rows=query.reshape(tasks, -1),
            query_y=np.tile(np.arange(ways).repeat(queries), (tasks, 1)),
        )

    def _episodes(self, plan: EpisodePlan) -> Episodes:
        tasks, n = plan.support_rows.shape
        m = plan.query_rows.shape[1]
        x = self._gather(plan)
        return Episodes(
            x[: tasks * n].view(tasks, n, *x.shape[1:]),
            _labels(plan.support_y, plan, x.device),
            x[tasks * n :].view(tasks, m, *x.shape[1:]),
            _labels(plan.query_y, plan, x.device),
            plan.ways,
        )

    def _gather(self, plan: EpisodePlan) -> Tensor:
        """The support rows of all tasks, then their query rows."""
        rows = np.concatenate([plan.support_rows.reshape(-1), plan.query_rows.reshape(-1)])
        owners = np.concatenate(
            [plan.sources.repeat(side.shape[1]) for side in (plan.support_rows, plan.query_rows)]
        )
        return gathered(self.datasets, owners, rows, lambda data: _turns(plan, data))

    def _part(self, plan: EpisodePlan, start: int, stop: int) -> EpisodePlan:
        return EpisodePlan(plan.ways, plan.even, *(array[start:stop] for array in plan.arrays()))

    def _joined(self, plans: Sequence[EpisodePlan]) -> EpisodePlan:
        columns = zip(*(plan.arrays() for plan in plans), strict=True)
        return EpisodePlan(plans[0].ways, plans[0].even, *map(np.concatenate, columns))

    def _shape(self, plan: EpisodePlan) -> tuple[int, int, int]:
        return plan.ways, plan.support_rows.shape[1], plan.query_rows.shape[1]

    def _digest(self, plan: EpisodePlan) -> bytes:
        return b"".join(array.astype("<i8").tobytes() for array in plan.arrays())

    def _source_digest(self) -> bytes:
        text = "\n".join(
            f"{name}\t{size}"
            for data in self.datasets
            for name, size in zip(data.names, data.class_sizes.tolist(), strict=True)
        )
        return hashlib.sha256(text.encode()).digest()

    def __repr__(self) -> str:
        data = repr(self.datasets[0]) if len(self.datasets) == 1 else repr(list(self.datasets))
        uneven = ", uneven_shots=True" if self.uneven_shots else ""
        return (
            f"EpisodeSampler({data}, ways={self.ways}, shots={self.shots}, "
            f"queries={self.queries}, tasks={self.tasks}, seed={self.seed}{uneven})"
        )


def gathered(
    datasets: Sequence[Classes],
    owners: NDArray[np.int64],
    rows: NDArray[np.int64],
    turns: Callable[[Classes], Tensor],
) -> Tensor:
    """Rows of several data sets, each of the one that `owners` numbers; `turns(data)` are the quarter turns of all."""
    first = datasets[0]
    if len(datasets) == 1:
        return first.gather(torch.from_numpy(rows), turns(first) if first.rotations else None)
    x = torch.empty(len(rows), *first.row_shape, dtype=first.row_dtype, device=first.device)
    for number, data in enumerate(datasets):
        own = np.flatnonzero(owners == number)
        if len(own):
            own_turns = turns(data)[own] if data.rotations else None
            x.index_copy_(
                0, torch.from_numpy(own).to(x.device), data.gather(torch.from_numpy(rows[own]), own_turns)
            )
    return x


def _given(ends: tuple[int, int]) -> int | tuple[int, int]:
    return ends[0] if ends[0] == ends[1] else ends


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _labels(values: NDArray[np.int64], plan: EpisodePlan, device: torch.device) -> Tensor:
    """Labels on `device`, counted there where all tasks have the same, for a copy would wait."""
    if not plan.even or device.type == "cpu":
        return torch.from_numpy(values).to(device)
    tasks, rows = values.shape
    return torch.arange(plan.ways, device=device).repeat_interleave(rows // plan.ways).repeat(tasks, 1)


def _turns(plan: EpisodePlan, data: Classes) -> Tensor:
    """Quarter turns of the support rows of all tasks, then of their query rows."""
    turns = plan.classes // len(data.names)
    sides = (np.take_along_axis(turns, labels, axis=1) for labels in (plan.support_y, plan.query_y))
    return torch.from_numpy(np.concatenate([side.reshape(-1) for side in sides]))


def as_datasets(dataset: object) -> tuple[Classes, ...]:
    datasets = (dataset,) if isinstance(dataset, Classes) else dataset
    if not isinstance(datasets, (tuple, list)):
        raise TypeError(
            f"dataset must be metafast.data.ImageClasses, other Classes or several of them, "
            f"got {type(dataset).__name__}"
        )
    if not datasets:
        raise ValueError("dataset must hold at least one data set, got none")
    for number, data in enumerate(datasets):
        if not isinstance(data, Classes):
            raise TypeError(
                f"dataset must be metafast.data.ImageClasses, other Classes or several of them, "
                f"got {type(data).__name__} as number {number}"
            )
        for what in ("row_shape", "row_dtype", "device"):
            value, wanted = getattr(data, what), getattr(datasets[0], what)
            if value != wanted:
                shown = (list(value), list(wanted)) if what == "row_shape" else (value, wanted)
                name = what.removeprefix("row_")
                raise ValueError(
                    f"dataset must hold data sets with rows of one shape, dtype and device, "
                    f"got {name} {shown[0]} in number {number} and {shown[1]} in number 0"
                )
    return tuple(datasets)


def _numbers(name: str, values: object, count: int, zero: bool) -> NDArray[np.float64]:
    """Weights as float64: finite, not negative, and positive unless `zero` is allowed."""
    try:
        weights = np.array(values.tolist() if isinstance(values, Tensor) else values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be numbers, got {values!r}") from None
    if weights.shape != (count,):
        raise ValueError(f"{name} must hold {count} numbers, got shape {list(weights.shape)}")
    if not (np.isfinite(weights) & (weights >= 0 if zero else weights > 0)).all():
        raise ValueError(
            f"{name} must be {'not negative' if zero else 'positive'} and finite, got {values!r}"
        )
    return weights


def _dataset_weights(weights: Sequence[float] | None, count: int) -> NDArray[np.float64]:
    if weights is None:
        return np.ones(count)
    if count == 1:
        raise ValueError("dataset_weights must be None for one data set")
    return _numbers("dataset_weights", weights, count, zero=False)


def _class_weights(
    weights: ClassWeights | Sequence[ClassWeights | None] | None,
    datasets: tuple[Classes, ...],
    several: bool,
) -> list[NDArray[np.float64] | None]:
    """For each data set the weights of its classes, the rotated ones included, or None for equal ones."""
    if weights is None:
        return [None] * len(datasets)
    entries: Sequence[Any] = cast(Sequence[Any], weights) if several else [weights]
    if isinstance(entries, (Mapping, Tensor, str)) or len(entries) != len(datasets):
        raise ValueError(
            f"class_weights must be a sequence with one entry for each of {len(datasets)} data sets"
        )
    found: list[NDArray[np.float64] | None] = []
    for number, (entry, data) in enumerate(zip(entries, datasets, strict=True)):
        name = f"class_weights[{number}]" if several else "class_weights"
        if entry is None:
            found.append(None)
            continue
        if isinstance(entry, Mapping):
            missing = next((known for known in data.names if known not in entry), None)
            unknown = next((given for given in entry if given not in data.names), None)
            if missing is not None or unknown is not None:
                raise ValueError(
                    f"{name} must have the names of the data set as its keys, "
                    + (f"got none for {missing!r}" if missing is not None else f"got {unknown!r}")
                )
            entry = [entry[known] for known in data.names]
        base = _numbers(name, entry, len(data.names), zero=True)
        found.append(np.tile(base, 4 if data.rotations else 1))
    return found
