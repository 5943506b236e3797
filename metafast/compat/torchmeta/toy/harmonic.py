"""Regression on sums of two sine waves."""

from __future__ import annotations

from typing import Any

import numpy as np

from metafast.compat import absent
from metafast.compat.torchmeta._chain import Transform
from metafast.compat.torchmeta.toy._tasks import Array, RegressionDataset, RegressionTask, of_tasks
from metafast.compat.torchmeta.utils.data._whole import Rows

__getattr__ = absent(__name__)


class Harmonic(RegressionDataset):
    r"""Waves :math:`y = a_1 \sin(f x + b_1) + a_2 \sin(2 f x + b_2)`.

    f is uniform in [5, 7] and b in [0, 2 pi], a is normal, and x is normal around a mean that is uniform in [-4, 4].
    Lacoste et al., *Uncertainty in Multitask Transfer Learning*, 2018.

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
        num_tasks: int = 5000,
        noise_std: float | None = None,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        dataset_transform: Transform | None = None,
    ) -> None:
        super().__init__(
            num_samples_per_task, num_tasks, noise_std, transform, target_transform, dataset_transform
        )

    @property
    def domains(self) -> Array:
        """Means of the inputs, ``[num_tasks]``."""
        return self._uniform("domains", -4.0, 4.0)

    @property
    def frequencies(self) -> Array:
        """``[num_tasks]``."""
        return self._uniform("frequencies", 5.0, 7.0)

    @property
    def phases(self) -> Array:
        """``[num_tasks, 2]``."""
        return self._uniform("phases", 0.0, 2 * np.pi, columns=2)

    @property
    def amplitudes(self) -> Array:
        """``[num_tasks, 2]``."""
        if "amplitudes" not in self._drawn:
            self._drawn["amplitudes"] = self.np_random.randn(self.num_tasks, 2)
        return self._drawn["amplitudes"]

    def _task(self, index: int) -> RegressionTask:
        return HarmonicTask(
            index,
            self.domains[index],
            self.frequencies[index],
            self.phases[index],
            self.amplitudes[index],
            self.noise_std,
            self.num_samples_per_task,
            self.transform,
            self.target_transform,
            np_random=self.np_random,
        )

    def _ready(self) -> bool:
        drawn = {"domains", "frequencies", "phases", "amplitudes"} <= self._drawn.keys()
        return type(self) is Harmonic and drawn

    def _draw(self, indices: Rows) -> tuple[Array, Array]:
        size = len(indices), self.num_samples_per_task, 1
        x = of_tasks(self.domains, indices) + self.np_random.randn(*size)
        phases, amplitudes = (
            [of_tasks(values[:, k], indices) for k in range(2)] for values in (self.phases, self.amplitudes)
        )
        return x, harmonics(x, of_tasks(self.frequencies, indices), phases, amplitudes)

    def _made(self, index: int, inputs: Array, targets: Array) -> RegressionTask:
        return HarmonicTask._of(
            self,
            index,
            inputs,
            targets,
            domain=self.domains[index],
            frequency=self.frequencies[index],
            phases=self.phases[index],
            amplitudes=self.amplitudes[index],
        )


def harmonics(x: Array, frequency: Any, phases: Any, amplitudes: Any) -> Array:
    first = amplitudes[0] * np.sin(frequency * x + phases[0])
    return first + amplitudes[1] * np.sin(2 * frequency * x + phases[1])


class HarmonicTask(RegressionTask):
    """One wave, see :class:`Harmonic`."""

    def __init__(
        self,
        index: int,
        domain: float,
        frequency: float,
        phases: Array,
        amplitudes: Array,
        noise_std: float | None,
        num_samples: int,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        np_random: np.random.RandomState | None = None,
    ) -> None:
        draw = np.random.RandomState(None) if np_random is None else np_random
        self.domain, self.frequency, self.phases, self.amplitudes = domain, frequency, phases, amplitudes
        x = domain + draw.randn(num_samples, 1)
        y = harmonics(x, frequency, phases, amplitudes)
        super().__init__(index, x, y, noise_std, transform, target_transform, draw)
