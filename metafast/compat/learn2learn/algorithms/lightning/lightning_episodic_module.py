"""Training, validation and testing on episodes."""

from __future__ import annotations

import contextlib
from argparse import ArgumentParser
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metafast.compat.learn2learn._lightning import lightning


class LightningEpisodicModule(lightning().LightningModule):  # type: ignore[misc]
    """What the modules share: a step is :meth:`meta_learn` on one episode, whose loss and accuracy are logged.

    Args:
        options: those of :meth:`add_model_specific_args`, such as ``train_ways``; others are left alone.
    """

    train_shots = 1
    train_queries = 1
    train_ways = 5
    test_shots = 1
    test_queries = 1
    test_ways = 5
    lr = 0.001
    scheduler_step = 20
    scheduler_decay = 1.0
    #: The names of the options, whose defaults are the attributes of the class.
    options: tuple[str, ...] = (
        "train_ways",
        "train_shots",
        "train_queries",
        "test_ways",
        "test_shots",
        "test_queries",
        "lr",
        "scheduler_step",
        "scheduler_decay",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in self.options:
            setattr(self, name, options.get(name, getattr(type(self), name)))
        self.save_hyperparameters({name: getattr(self, name) for name in self.options})

    @classmethod
    def add_model_specific_args(cls, parent_parser: ArgumentParser) -> ArgumentParser:
        """A parser with an argument for each option, and ``--data_parallel``."""
        parser = ArgumentParser(parents=[parent_parser], add_help=True, conflict_handler="resolve")
        for name in cls.options:
            default = getattr(cls, name)
            parser.add_argument(f"--{name}", type=type(default), default=default)
        parser.add_argument("--data_parallel", action="store_true", help="not used")
        return parser

    def meta_learn(
        self, batch: Any, batch_idx: int, ways: int, shots: int, queries: int
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of the queries of an episode ``(data, labels)``."""
        raise NotImplementedError

    def _step(self, name: str, batch: Any, batch_idx: int) -> Tensor:
        part = "train" if name == "train" else "test"
        sizes = (getattr(self, f"{part}_{size}") for size in ("ways", "shots", "queries"))
        loss, accuracy = self.meta_learn(batch, batch_idx, *sizes)
        self.log(f"{name}_loss", loss.item(), on_step=False, on_epoch=True, prog_bar=False, logger=True)
        self.log(
            f"{name}_accuracy", accuracy.item(), on_step=False, on_epoch=True, prog_bar=True, logger=True
        )
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step("train", batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step("valid", batch, batch_idx).detach()

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step("test", batch, batch_idx).detach()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        scheduler = torch.optim.lr_scheduler.StepLR(
            optimizer, step_size=self.scheduler_step, gamma=self.scheduler_decay
        )
        return [optimizer], [scheduler]


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Gradients are recorded, also where Lightning evaluates."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def support_rows(ways: int, shots: int, queries: int) -> Tensor:
    """Which rows of an episode whose classes stand one after the other are support rows."""
    return (torch.arange(ways * (shots + queries)) % (shots + queries)) < shots
