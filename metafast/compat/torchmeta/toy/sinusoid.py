"""Regression on sine waves."""

from __future__ import annotations

from typing import Any

import numpy as np

from metafast.compat import absent
from metafast.compat.torchmeta._chain import Transform
from metafast.compat.torchmeta.toy._tasks import Array, RegressionDataset, RegressionTask, of_tasks
from metafast.compat.torchmeta.utils.data._whole import Rows

__getattr__ = absent(__name__)


class Sinusoid(RegressionDataset):
    r"""Sine waves :math:`y = a \sin(x - \phi)`: a in [0.1, 5], phase in [0, pi], x in [-5, 5], all uniform.

    Finn, Abbeel and Levine, *Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks*, 2017. Tasks draw their
    inputs from ``np_random`` whenever they are asked for. Arguments are those of ``RegressionDataset``:

    Args:
        num_samples_per_task: rows of a task.
        num_tasks: how many there are.
        noise_std: of the targets' normal noise; None: no noise.
        transform, target_transform: of a row ``[1]`` of a task.
        dataset_transform: of tasks, such as ``ClassSplitter(...)``.
    """

    def __init__(
        self,
        num_samples_per_task: int,
        num_tasks: int = 1000000,
        noise_std: float | None = None,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        dataset_transform: Transform | None = None,
    ) -> None:
        super().__init__(
            num_samples_per_task, num_tasks, noise_std, transform, target_transform, dataset_transform
        )
        self._input_range = np.array([-5.0, 5.0])

    @property
    def amplitudes(self) -> Array:
        """``[num_tasks]``."""
        return self._uniform("amplitudes", 0.1, 5.0)

    @property
    def phases(self) -> Array:
        """``[num_tasks]``."""
        return self._uniform("phases", 0.0, np.pi)

    def _task(self, index: int) -> RegressionTask:
        return SinusoidTask(
            index,
            self.amplitudes[index],
            self.phases[index],
            self._input_range,
            self.noise_std,
            self.num_samples_per_task,
            self.transform,
            self.target_transform,
            np_random=self.np_random,
        )

    def _ready(self) -> bool:
        return type(self) is Sinusoid and {"amplitudes", "phases"} <= self._drawn.keys()

    def _draw(self, indices: Rows) -> tuple[Array, Array]:
        low, high = self._input_range
        x = self.np_random.uniform(low, high, size=(len(indices), self.num_samples_per_task, 1))
        return x, sine(x, of_tasks(self.amplitudes, indices), of_tasks(self.phases, indices))

    def _made(self, index: int, inputs: Array, targets: Array) -> RegressionTask:
        own = {"amplitude": self.amplitudes[index], "phase": self.phases[index]}
        return SinusoidTask._of(self, index, inputs, targets, **own, input_range=self._input_range)


def sine(x: Array, amplitude: Any, phase: Any) -> Array:
    return amplitude * np.sin(x - phase)


class SinusoidTask(RegressionTask):
    """One sine wave, see :class:`Sinusoid`."""

    def __init__(
        self,
        index: int,
        amplitude: float,
        phase: float,
        input_range: Array,
        noise_std: float | None,
        num_samples: int,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        np_random: np.random.RandomState | None = None,
    ) -> None:
        draw = np.random.RandomState(None) if np_random is None else np_random
        self.amplitude, self.phase, self.input_range = amplitude, phase, input_range
        x = draw.uniform(input_range[0], input_range[1], size=(num_samples, 1))
        super().__init__(index, x, sine(x, amplitude, phase), noise_std, transform, target_transform, draw)
