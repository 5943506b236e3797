"""Batches of random episodes from a data set held as one tensor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from metafast.data._arguments import integer
from metafast.data.classes import ImageClasses
from metafast.data.episodes import Episodes


class EpisodeSampler:
    """Random N-way K-shot episodes, `tasks` of them at each step.

    `sampler(step)` is a pure function of `(seed, step)`, on every device: any step of a run can be made
    again by itself. Within a task the classes are distinct, drawn uniformly without replacement, and the
    images of a class are distinct, so that support and query share none. The label of a class is its random
    position in the task; the rows of a task are ordered by label.

    The random numbers are those of a Philox generator on the CPU with key `(seed, step)`: no two pairs
    share a stream (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        dataset: the classes to draw from. Episodes are on its device.
        ways: classes in a task.
        shots: support images of each class.
        queries: query images of each class.
        tasks: tasks `T` at each step.
        seed: integer from 0 to 2**64 - 1.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range, more ways than classes, a class with fewer than shots + queries
            images (it is named).
    """

    def __init__(
        self,
        dataset: ImageClasses,
        ways: int,
        shots: int,
        queries: int,
        tasks: int = 1,
        seed: int = 0,
    ) -> None:
        if not isinstance(dataset, ImageClasses):
            raise TypeError(f"dataset must be metafast.data.ImageClasses, got {type(dataset).__name__}")
        self.dataset = dataset
        self.ways = integer("ways", ways, minimum=1)
        self.shots = integer("shots", shots, minimum=1)
        self.queries = integer("queries", queries, minimum=1)
        self.tasks = integer("tasks", tasks, minimum=1)
        self.seed = integer("seed", seed, minimum=0, maximum=2**64 - 1)
        if self.ways > dataset.num_classes:
            raise ValueError(
                f"ways must be at most the {dataset.num_classes} classes of the data set, got {self.ways}"
            )
        needed = self.shots + self.queries
        smallest = int(dataset.class_sizes.argmin())
        if int(dataset.class_sizes[smallest]) < needed:
            raise ValueError(
                f"shots + queries must be at most the images of every class, got {self.shots} + "
                f"{self.queries} = {needed}, but class {dataset.names[smallest]!r} has "
                f"{int(dataset.class_sizes[smallest])}"
            )
        self._starts = dataset.class_starts.numpy()
        self._sizes = dataset.class_sizes.numpy()
        self._largest = int(self._sizes.max())

    def __call__(self, step: int) -> Episodes:
        """The episodes of `step` (0 to 2**64 - 1): support `[T, ways * shots, C, H, W]`, query likewise."""
        step = integer("step", step, minimum=0, maximum=2**64 - 1)
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64)))
        tasks, ways, shots, queries = self.tasks, self.ways, self.shots, self.queries

        classes = _distinct(random, tasks, ways, self.dataset.num_classes)
        base = classes % len(self._sizes)
        # The order of independent random keys is a uniform permutation; keys past a class's end sort last.
        image_keys = random.random((tasks, ways, self._largest))
        image_keys[np.arange(self._largest) >= self._sizes[base][..., None]] = 2.0
        images = image_keys.argsort(axis=2)[..., : shots + queries] + self._starts[base][..., None]

        rows = np.concatenate([images[..., :shots].reshape(-1), images[..., shots:].reshape(-1)])
        turns = None
        if self.dataset.rotations:
            turn = (classes // len(self._sizes)).reshape(-1)
            turns = torch.from_numpy(np.concatenate([turn.repeat(shots), turn.repeat(queries)]))
        x = self.dataset.gather(torch.from_numpy(rows), turns)
        support_rows = tasks * ways * shots
        labels = torch.arange(ways, device=x.device)
        return Episodes(
            x[:support_rows].view(tasks, ways * shots, *x.shape[1:]),
            labels.repeat_interleave(shots).repeat(tasks, 1),
            x[support_rows:].view(tasks, ways * queries, *x.shape[1:]),
            labels.repeat_interleave(queries).repeat(tasks, 1),
            ways,
        )

    def __iter__(self) -> Iterator[Episodes]:
        """Steps 0, 1, 2 ... without end."""
        step = 0
        while True:
            yield self(step)
            step += 1

    def __repr__(self) -> str:
        return (
            f"EpisodeSampler({self.dataset!r}, ways={self.ways}, shots={self.shots}, "
            f"queries={self.queries}, tasks={self.tasks}, seed={self.seed})"
        )


def _distinct(random: np.random.Generator, rows: int, count: int, population: int) -> NDArray[np.int64]:
    """`[rows, count]` numbers below `population`, distinct in a row, each ordered choice equally likely."""
    if count * count > population:
        return random.random((rows, population)).argsort(axis=1)[:, :count]
    # More than half of the rows have no repetition: drawing the others again costs less than keys.
    drawn = random.integers(population, size=(rows, count))
    while True:
        ordered = np.sort(drawn, axis=1)
        again = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if not again.any():
            return drawn
        drawn[again] = random.integers(population, size=(int(again.sum()), count))
