"""Toy problems with their splits in one call."""

from __future__ import annotations

import warnings
from typing import Any

from metafast.compat import absent
from metafast.compat.torchmeta.toy.harmonic import Harmonic
from metafast.compat.torchmeta.toy.sinusoid import Sinusoid
from metafast.compat.torchmeta.transforms import ClassSplitter

__getattr__ = absent(__name__)

__all__ = ["harmonic", "sinusoid"]


def sinusoid(
    shots: int, shuffle: bool = True, test_shots: int | None = None, seed: int | None = None, **kwargs: Any
) -> Any:
    """:class:`Sinusoid` with ``train`` and ``test`` rows in each task.

    Args:
        shots: rows of ``train``.
        shuffle: part the rows at random.
        test_shots: rows of ``test``; None: as many.
        seed: of ``np_random``.
        kwargs: of :class:`Sinusoid`; ``num_samples_per_task`` replaces ``shots``, with a warning.

    Raises:
        ValueError: ``test_shots`` leaves none of ``num_samples_per_task``.
    """
    return _split(Sinusoid, shots, shuffle, test_shots, seed, kwargs)


def harmonic(
    shots: int, shuffle: bool = True, test_shots: int | None = None, seed: int | None = None, **kwargs: Any
) -> Any:
    """:class:`Harmonic` with ``train`` and ``test`` rows in each task; arguments are those of :func:`sinusoid`."""
    return _split(Harmonic, shots, shuffle, test_shots, seed, kwargs)


def _split(
    problem: Any, shots: int, shuffle: bool, test_shots: int | None, seed: int | None, kwargs: dict[str, Any]
) -> Any:
    total = kwargs.pop("num_samples_per_task", None)
    if total is not None:
        warnings.warn("shots: num_samples_per_task is given too, and replaces it", stacklevel=3)
        shots = total // 2 if test_shots is None else total - test_shots
        if shots <= 0:
            raise ValueError(
                f"test_shots: expected fewer than the {total} of num_samples_per_task, got {test_shots}"
            )
    if test_shots is None:
        test_shots = shots
    dataset = problem(num_samples_per_task=shots + test_shots, **kwargs)
    dataset = ClassSplitter(
        dataset, shuffle=shuffle, num_train_per_class=shots, num_test_per_class=test_shots
    )
    dataset.seed(seed)
    return dataset
