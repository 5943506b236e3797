"""A fixed list of evaluation episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from typing import Any, overload

from metafast.data._arguments import integer
from metafast.data.episodes import Episodes
from metafast.data.sampler import TaskSampler


class FixedEpisodes:
    """The first `count` episodes of a sampler, one by one: the same list on every machine.

    Episode `i` is the one task that the sampler with `tasks=1` draws at step `i`, so it depends on the data
    set, the seed and the shape of the episodes, and not on how many of them are made at a time, on the
    device, on the version of torch or numpy, or on the number of processes.

    It is a sequence of batches: `for episodes in fixed`, `fixed[0]`, `len(fixed)` batches of `count`
    episodes. A batch holds consecutive episodes of one shape, at most `batch` of them.

    Args:
        sampler: an :class:`EpisodeSampler` or :class:`SinusoidSampler`; its `tasks` do not matter here.
        count: number of episodes.
        batch: most episodes in a batch; the sampler's `tasks` if None.

    Attributes:
        count: number of episodes.
        seed: that of the sampler.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range.
    """

    def __init__(self, sampler: TaskSampler[Any], count: int = 600, batch: int | None = None) -> None:
        if not isinstance(sampler, TaskSampler):
            raise TypeError(f"sampler must be a metafast.data.TaskSampler, got {type(sampler).__name__}")
        self.sampler = sampler
        self.batch = sampler.tasks if batch is None else integer("batch", batch, minimum=1)
        self._numbers = range(integer("count", count, minimum=1))

    @property
    def count(self) -> int:
        """Number of episodes."""
        return len(self._numbers)

    @property
    def seed(self) -> int:
        """The sampler's seed."""
        return self.sampler.seed

    @cached_property
    def _batches(self) -> list[range]:
        """The numbers of the episodes of each batch."""
        batches = []
        for _, group in groupby(self._numbers, self._shape):
            run = list(group)
            batches += [
                range(run[i], min(run[i] + self.batch, run[-1] + 1)) for i in range(0, len(run), self.batch)
            ]
        return batches

    def _shape(self, number: int) -> tuple[int, int, int]:
        return self.sampler._shape(self.sampler.single_plan(number))

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, batch: int) -> Episodes: ...

    @overload
    def __getitem__(self, batch: slice) -> list[Episodes]: ...

    def __getitem__(self, batch: int | slice) -> Episodes | list[Episodes]:
        """Batch number `batch` (:class:`Episodes`); a slice gives a list of them."""
        if isinstance(batch, slice):
            return [self._make(numbers) for numbers in self._batches[batch]]
        return self._make(self._batches[batch])

    def __iter__(self) -> Iterator[Episodes]:
        return map(self._make, self._batches)

    def _make(self, numbers: range) -> Episodes:
        plans = [self.sampler.single_plan(number) for number in numbers]
        return self.sampler._episodes(self.sampler._joined(plans))

    def shard(self, rank: int, ranks: int) -> FixedEpisodes:
        """The episodes that fall to one of `ranks` processes: consecutive ones, as equal a number as can be.

        What the ranks measure, put together in order of rank, is what one process measures.

        Raises:
            ValueError: a rank out of range, fewer episodes than ranks.
        """
        ranks = integer("ranks", ranks, minimum=1)
        rank = integer("rank", rank, 0, ranks - 1)
        if self.count < ranks:
            raise ValueError(f"ranks must be at most the {self.count} episodes, got {ranks}")
        part = FixedEpisodes(self.sampler, self.count, self.batch)
        part._numbers = self._numbers[self.count * rank // ranks : self.count * (rank + 1) // ranks]
        return part

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of what the list consists of: equal lists have equal fingerprints.

        Of the names and sizes of the classes as UTF-8 lines `name<tab>size`, then of 64-bit little-endian
        numbers for each episode: ways, support rows `n`, query rows `m`, then the data set, the classes,
        the support rows, their labels, the query rows, their labels. (For sinusoids the numbers are those of
        :class:`SinusoidSampler`.) Pixels do not enter.
        """
        digest = hashlib.sha256(self.sampler._source_digest())
        for number in self._numbers:
            plan = self.sampler.single_plan(number)
            for size in self.sampler._shape(plan):
                digest.update(size.to_bytes(8, "little"))
            digest.update(self.sampler._digest(plan))
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"FixedEpisodes({self.sampler!r}, count={self.count}, batch={self.batch})"
