"""Regression tasks: sine waves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from metafast.data._arguments import integer_range, interval
from metafast.data._random import RandomStream
from metafast.data.episodes import Episodes
from metafast.data.sampler import TaskSampler


@dataclass(frozen=True, eq=False)
class SinusoidPlan:
    """The waves and points of some tasks.

    Attributes:
        shots: support points of each task.
        amplitude, phase, frequency: `[T]` float64.
        x: `[T, shots + queries]` float64, the support points first.
    """

    shots: int
    amplitude: NDArray[np.float64]
    phase: NDArray[np.float64]
    frequency: NDArray[np.float64]
    x: NDArray[np.float64]

    def arrays(self) -> tuple[NDArray[np.float64], ...]:
        """All that has a task dimension."""
        return self.amplitude, self.phase, self.frequency, self.x


class SinusoidSampler(TaskSampler[SinusoidPlan]):
    """Regression on sine waves `y = amplitude * sin(frequency * x - phase)`, `tasks` of them at each step.

    Amplitude, phase, frequency and the points `x` are drawn uniformly. The defaults are those of Finn, Abbeel,
    Levine, "Model-agnostic meta-learning for fast adaptation of deep networks" (2017), whose training takes
    10 shots, 10 queries and 25 tasks. Li et al., "Meta-SGD" (2017): `frequency=(0.8, 1.2)`. Nichol, Achiam,
    Schulman, "On first-order meta-learning algorithms" (2018): `phase=(0, 2 * math.pi)`.

    `sampler(step)` is a pure function of `(seed, step)`. Waves and points are the same on every machine; the
    sine is that of the machine and rounded to float32.

    Args:
        shots: support points of a task: a number, or a pair (smallest, largest) from which it is drawn for
            each step, equal for its tasks.
        queries: query points of a task, likewise.
        tasks: tasks `T` at each step.
        seed: integer from 0 to 2**64 - 1.
        amplitude, phase, frequency: pairs (smallest, largest), or one number.
        x_range: where the points are, likewise.
        device: where the episodes are to be.

    Returns of a call:
        :class:`Episodes` with 0 ways: inputs and targets `[T, shots, 1]` and `[T, queries, 1]`, float32.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a number out of range.
    """

    def __init__(
        self,
        shots: int | tuple[int, int] = 10,
        queries: int | tuple[int, int] = 10,
        tasks: int = 25,
        seed: int = 0,
        *,
        amplitude: float | tuple[float, float] = (0.1, 5.0),
        phase: float | tuple[float, float] = (0.0, math.pi),
        frequency: float | tuple[float, float] = 1.0,
        x_range: tuple[float, float] = (-5.0, 5.0),
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(tasks, seed)
        self._shots = integer_range("shots", shots, minimum=1)
        self._queries = integer_range("queries", queries, minimum=1)
        self.amplitude = interval("amplitude", amplitude)
        self.phase = interval("phase", phase)
        self.frequency = interval("frequency", frequency)
        self.x_range = interval("x_range", x_range)
        self.device = torch.device(device)

    ways = 0

    @property
    def shots(self) -> int | tuple[int, int]:
        """Support points of a task, a number or a pair as they were given."""
        return self._shots[0] if self._shots[0] == self._shots[1] else self._shots

    @property
    def queries(self) -> int | tuple[int, int]:
        """Query points of a task, a number or a pair as they were given."""
        return self._queries[0] if self._queries[0] == self._queries[1] else self._queries

    def plan(self, step: int) -> SinusoidPlan:
        """The waves and points of `step`."""
        return self._step_plan(step)

    def _plan(self, random: RandomStream, tasks: int) -> SinusoidPlan:
        shots, queries = (random.one_between(*ends) for ends in (self._shots, self._queries))

        def drawn(ends: tuple[float, float], *shape: int) -> NDArray[np.float64]:
            return ends[0] + (ends[1] - ends[0]) * random.uniform(*shape)

        return SinusoidPlan(
            shots=shots,
            amplitude=drawn(self.amplitude, tasks),
            phase=drawn(self.phase, tasks),
            frequency=drawn(self.frequency, tasks),
            x=drawn(self.x_range, tasks, shots + queries),
        )

    def _episodes(self, plan: SinusoidPlan) -> Episodes:
        wave = np.sin(plan.frequency[:, None] * plan.x - plan.phase[:, None])
        x, y = (
            torch.from_numpy(values.astype(np.float32))[..., None].to(self.device)
            for values in (plan.x, plan.amplitude[:, None] * wave)
        )
        n = plan.shots
        return Episodes(x[:, :n], y[:, :n], x[:, n:], y[:, n:], ways=0)

    def _part(self, plan: SinusoidPlan, start: int, stop: int) -> SinusoidPlan:
        return SinusoidPlan(plan.shots, *(array[start:stop] for array in plan.arrays()))

    def _joined(self, plans: Sequence[SinusoidPlan]) -> SinusoidPlan:
        columns = zip(*(plan.arrays() for plan in plans), strict=True)
        return SinusoidPlan(plans[0].shots, *map(np.concatenate, columns))

    def _shape(self, plan: SinusoidPlan) -> tuple[int, int, int]:
        return 0, plan.shots, plan.x.shape[1] - plan.shots

    def _digest(self, plan: SinusoidPlan) -> bytes:
        return b"".join(array.astype("<f8").tobytes() for array in plan.arrays())

    def _source_digest(self) -> bytes:
        return b""

    def __repr__(self) -> str:
        return (
            f"SinusoidSampler(shots={self.shots}, queries={self.queries}, tasks={self.tasks}, seed={self.seed}, "
            f"amplitude={self.amplitude}, phase={self.phase}, frequency={self.frequency}, "
            f"x_range={self.x_range})"
        )
