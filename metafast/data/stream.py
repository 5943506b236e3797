"""Episodes made by worker processes, for data sets that are read from files."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from metafast.data._arguments import integer
from metafast.data.episodes import Episodes


class EpisodeStream(IterableDataset[Episodes]):
    """The steps `start`, `start + 1` ... of a sampler as an iterable for :class:`torch.utils.data.DataLoader`.

    Worker `w` of `W` makes the steps `start + w`, `start + w + W` ..., each step once; the loader takes them
    in turn, so that the batches come in the order of the steps whatever the number of workers is::

        stream = EpisodeStream(EpisodeSampler(image_folder("photos", lazy=True), 5, 1, 15))
        for episodes in DataLoader(stream, batch_size=None, num_workers=4):
            ...

    `batch_size=None` is needed, for each item is a batch of tasks already. A DataLoader takes a number from
    torch's global generator at every start, unless it is given a `generator`.

    Args:
        sampler: a function of the step, such as :class:`EpisodeSampler`, on the CPU.
        start: the first step.
        stop: the step to end before; None for no end.
    """

    def __init__(self, sampler: Callable[[int], Episodes], start: int = 0, stop: int | None = None) -> None:
        if not callable(sampler):
            raise TypeError(f"sampler must be a function of the step, got {type(sampler).__name__}")
        self.sampler = sampler
        self.start = integer("start", start, minimum=0)
        self.stop = None if stop is None else integer("stop", stop, minimum=self.start)

    def __iter__(self) -> Iterator[Episodes]:
        worker = get_worker_info()
        step, stride = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while self.stop is None or step < self.stop:
            yield self.sampler(step)
            step += stride


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C is for the main process, which still needs episodes to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class EpisodeLoader:
    """A sampler whose next steps are made by worker processes while the present one is learnt from.

    It is itself a function of the step with the sampler's results, to be given to :func:`metafast.training.fit`.
    Steps that follow one another come from the workers; any other step starts them again from there. It
    leaves torch's global random numbers alone.

    Args:
        sampler: a function of the step, such as :class:`EpisodeSampler`, whose data set is on the CPU.
        workers: number of processes.
        ahead: steps that each of them may be ahead.
        pin_memory: whether to give the episodes in page-locked memory, for quick copies to a CUDA device.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range, a data set on another device.
    """

    def __init__(
        self,
        sampler: Callable[[int], Episodes],
        workers: int = 2,
        ahead: int = 2,
        pin_memory: bool = False,
    ) -> None:
        if not callable(sampler):
            raise TypeError(f"sampler must be a function of the step, got {type(sampler).__name__}")
        for data in getattr(sampler, "datasets", ()):
            if data.device.type != "cpu":
                raise ValueError(f"sampler must have its data set on the CPU for workers, got {data.device}")
        self.sampler = sampler
        self.workers = integer("workers", workers, minimum=1)
        self.ahead = integer("ahead", ahead, minimum=1)
        self.pin_memory = bool(pin_memory)
        self._batches: Iterator[Any] | None = None
        self._next = 0

    @property
    def seed(self) -> int | None:
        """The sampler's seed, if it has one."""
        return getattr(self.sampler, "seed", None)

    def __call__(self, step: int) -> Episodes:
        """The episodes of `step`."""
        step = integer("step", step, minimum=0)
        if self._batches is None or step != self._next:
            self.close()
            self._batches = iter(
                DataLoader(
                    EpisodeStream(self.sampler, step),
                    batch_size=None,
                    num_workers=self.workers,
                    prefetch_factor=self.ahead,
                    pin_memory=self.pin_memory,
                    generator=torch.Generator(),
                    worker_init_fn=_ignore_interrupt,
                )
            )
        try:
            episodes: Episodes = next(self._batches)
        except BaseException:
            # The loader has gone past this step, which a second call for it must not give another one for.
            self.close()
            raise
        self._next = step + 1
        return episodes

    def __iter__(self) -> Iterator[Episodes]:
        """Steps 0, 1, 2 ... without end."""
        step = 0
        while True:
            yield self(step)
            step += 1

    def close(self) -> None:
        """Stop the workers; the next call starts them again."""
        self._batches = None

    def __repr__(self) -> str:
        return f"EpisodeLoader({self.sampler!r}, workers={self.workers}, ahead={self.ahead})"
