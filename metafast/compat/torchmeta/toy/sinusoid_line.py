"""Regression on sine waves and straight lines."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from metafast.compat import absent
from metafast.compat.torchmeta._chain import Transform
from metafast.compat.torchmeta.toy._tasks import Array, RegressionTask, of_tasks
from metafast.compat.torchmeta.toy.sinusoid import Sinusoid
from metafast.compat.torchmeta.utils.data._whole import Rows

__getattr__ = absent(__name__)


class SinusoidAndLine(Sinusoid):
    r"""Half of the tasks are those of :class:`Sinusoid`, half lines :math:`y = c + b x` with b and c in [-3, 3].

    Finn, Xu and Levine, *Probabilistic Model-Agnostic Meta-Learning*, 2018. Which are which ``np_random`` draws.
    """

    _is_sinusoid: NDArray[np.bool_] | None = None

    @property
    def slopes(self) -> Array:
        """``[num_tasks]``."""
        return self._uniform("slopes", -3.0, 3.0)

    @property
    def intercepts(self) -> Array:
        """``[num_tasks]``."""
        return self._uniform("intercepts", -3.0, 3.0)

    @property
    def is_sinusoid(self) -> NDArray[np.bool_]:
        """``[num_tasks]``, false for lines."""
        if self._is_sinusoid is None:
            self._is_sinusoid = np.arange(self.num_tasks) >= self.num_tasks // 2
            self.np_random.shuffle(self._is_sinusoid)
        return self._is_sinusoid

    def _task(self, index: int) -> RegressionTask:
        if self.is_sinusoid[index]:
            return super()._task(index)
        return LinearTask(
            index,
            self.slopes[index],
            self.intercepts[index],
            self._input_range,
            self.noise_std,
            self.num_samples_per_task,
            self.transform,
            self.target_transform,
            np_random=self.np_random,
        )

    def _ready(self) -> bool:
        drawn = {"amplitudes", "phases", "slopes", "intercepts"} <= self._drawn.keys()
        return type(self) is SinusoidAndLine and drawn and self._is_sinusoid is not None

    def _draw(self, indices: Rows) -> tuple[Array, Array]:
        x, waves = super()._draw(indices)
        lines = line(x, of_tasks(self.slopes, indices), of_tasks(self.intercepts, indices))
        return x, np.where(self.is_sinusoid[indices][:, None, None], waves, lines)

    def _made(self, index: int, inputs: Array, targets: Array) -> RegressionTask:
        if self.is_sinusoid[index]:
            return super()._made(index, inputs, targets)
        own = {"slope": self.slopes[index], "intercept": self.intercepts[index]}
        return LinearTask._of(self, index, inputs, targets, **own, input_range=self._input_range)


def line(x: Array, slope: Any, intercept: Any) -> Array:
    return intercept + slope * x


class LinearTask(RegressionTask):
    """One line, see :class:`SinusoidAndLine`."""

    def __init__(
        self,
        index: int,
        slope: float,
        intercept: float,
        input_range: Array,
        noise_std: float | None,
        num_samples: int,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        np_random: np.random.RandomState | None = None,
    ) -> None:
        draw: Any = np.random.RandomState(None) if np_random is None else np_random
        self.slope, self.intercept, self.input_range = slope, intercept, input_range
        x = draw.uniform(input_range[0], input_range[1], size=(num_samples, 1))
        super().__init__(index, x, line(x, slope, intercept), noise_std, transform, target_transform, draw)
