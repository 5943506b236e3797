"""Task sets for trainers of PyTorch Lightning."""

from __future__ import annotations

from typing import Any

from metafast.compat import absent
from metafast.compat.learn2learn._lightning import lightning

__getattr__ = absent(
    __name__,
    {
        "NoLeaveProgressBar": "it changes a private method of one release's progress bar",
        "TrackTestAccuracyCallback": "it tests within validation, which newer releases refuse; call trainer.test",
    },
)


class _Epoch:
    """So many tasks, drawn when they are asked for."""

    def __init__(self, tasks: Any, length: int) -> None:
        self.tasks = tasks
        self.length = length

    def __getitem__(self, k: int) -> Any:
        if not 0 <= k < self.length:
            raise IndexError(k)
        return self.tasks.sample()

    def __len__(self) -> int:
        return self.length


class EpisodicBatcher(lightning().LightningDataModule):  # type: ignore[misc]
    """Epochs of ``epoch_length`` tasks of each task set.

    Args:
        train_tasks: a ``Taskset``.
        validation_tasks: None: ``train_tasks``.
        test_tasks: None: ``validation_tasks``.
        epoch_length: tasks of an epoch.
    """

    def __init__(
        self, train_tasks: Any, validation_tasks: Any = None, test_tasks: Any = None, epoch_length: int = 1
    ) -> None:
        super().__init__()
        self.train_tasks = train_tasks
        self.validation_tasks = train_tasks if validation_tasks is None else validation_tasks
        self.test_tasks = self.validation_tasks if test_tasks is None else test_tasks
        self.epoch_length = epoch_length

    @staticmethod
    def epochify(taskset: Any, epoch_length: int) -> _Epoch:
        """An epoch of a task set."""
        return _Epoch(taskset, epoch_length)

    def train_dataloader(self) -> _Epoch:
        return self.epochify(self.train_tasks, self.epoch_length)

    def val_dataloader(self) -> _Epoch:
        return self.epochify(self.validation_tasks, self.epoch_length)

    def test_dataloader(self) -> _Epoch:
        return self.epochify(self.test_tasks, self.epoch_length)
