"""The training loop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, StepLR

from metafast._library import keep_pages
from metafast.data import Episodes
from metafast.data.episodes import check
from metafast.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from metafast.training.evaluate import Accuracy, evaluate, learner_device
from metafast.training.history import History, HistoryFile, Row, read_history
from metafast.training.progress import progress_bar, say

LAST = "checkpoint-last.pt"
BEST = "checkpoint-best.pt"
METRICS = "metrics.csv"
SCHEDULES = ("halve", "cosine", "constant")
PRECISIONS = ("float32", "bfloat16")

#: Steps between reading losses back, by type of device; an accelerator has to wait for it.
READ_EVERY = {"cpu": 1}
READ_EVERY_ELSEWHERE = 20

Sampler = Callable[[int], Episodes]


class NonFiniteError(FloatingPointError):
    """Training met a loss or a parameter that is NaN or infinite."""


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM, after its checkpoint was saved."""


def fit(
    learner: nn.Module,
    train: Sampler,
    steps: int,
    *,
    validation: Sampler | None = None,
    validation_episodes: int = 400,
    validate_every: int = 500,
    batch_norm: str = "running",
    optimizer: Optimizer | None = None,
    schedule: str | LRScheduler = "halve",
    halve_every: int = 2000,
    precision: str = "float32",
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    on_step: Callable[[Row], None] | None = None,
) -> History:
    """Train ``learner`` for ``steps`` optimiser steps, each on the episodes of one call ``train(step)``.

    Every ``validate_every`` steps, and after the last, the validation accuracy is measured on the same
    ``validation_episodes`` episodes and a checkpoint is saved. At the end the learner holds the weights of
    the best validation (without validation: the last) and is in evaluation mode. :func:`metafast.check` looks
    at the episodes of the first step.

    The folder ``out`` holds ``metrics.csv`` (a row per step), ``checkpoint-last.pt`` and
    ``checkpoint-best.pt``. Checkpoints are replaced atomically, so a kill at any moment leaves complete ones.
    A resumed run on the CPU continues bit for bit: the checkpoint has the weights, the optimiser, the
    schedule, the step and the states of the random number generators; ``train`` is a function of the step.

    BatchNorm layers train with the statistics of each batch. The process's allocator is told to keep its
    pages, which about halves the time of a step on the CPU.

    Args:
        learner: ``learner(episodes) -> Outcome``, already on its device.
        train: an :class:`~metafast.data.EpisodeSampler` or another function of the step.
        steps: number of optimiser steps, counted from the beginning also for a resumed run.
        validation: sampler whose first episodes measure the validation accuracy.
        validation_episodes: how many of them.
        validate_every: steps between validations (without validation, between checkpoints).
        batch_norm: ``"running"`` or ``"transductive"``, for validation (see :func:`evaluate`).
        optimizer: Adam with a rate of 1e-3 if None, as in the paper on prototypical networks.
        schedule: of the learning rate: ``"halve"`` every ``halve_every`` steps, ``"cosine"`` to 0 at the last
            step, ``"constant"``, or a scheduler of ``optimizer``, stepped after every step.
        precision: ``"bfloat16"`` runs the learner under autocast; distances, losses, parameters and
            validation stay in float32.
        out: folder for the files, made if it is missing; None saves nothing.
        resume: go on from ``out/checkpoint-last.pt`` (from the beginning if there is none yet).
        overwrite: start again where ``out`` already holds a run.
        settings: plain values that describe the run, kept in the checkpoints; a resumed run must come with
            equal ones.
        on_step: called with the :class:`Row` of every step.

    Raises:
        ValueError: bad arguments.
        CheckpointError: a damaged or foreign checkpoint, or one of a run with other settings.
        FileExistsError: ``out`` holds a run and neither ``resume`` nor ``overwrite`` was given.
        NonFiniteError: the loss or a parameter became NaN or infinite. Checkpoints saved before are kept.
        Interrupted: Ctrl-C or SIGTERM; the last complete step was saved first.
        OSError: a file could not be written; the files saved before are intact.
    """
    for name, value in (
        ("steps", steps),
        ("validation_episodes", validation_episodes),
        ("validate_every", validate_every),
        ("halve_every", halve_every),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: expected a positive int, got {value!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
    if resume and overwrite:
        raise ValueError("resume, overwrite: expected at most one of them")
    if resume and out is None:
        raise ValueError("out: resume needs the folder of the run")
    if isinstance(schedule, LRScheduler) and schedule.optimizer is not optimizer:
        raise ValueError("schedule: expected a scheduler of the optimizer that is passed along")
    keep_pages()
    if optimizer is None:
        optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    run = _Run(
        learner=learner,
        optimizer=optimizer,
        schedule=_schedule(schedule, optimizer, steps, halve_every),
        folder=None if out is None else Path(out),
        settings=dict(settings or {}),
        on_step=on_step,
    )
    run.open(resume, overwrite, steps)

    def validate() -> Accuracy | None:
        if validation is None:
            return None
        return evaluate(
            learner, validation, validation_episodes, batch_norm=batch_norm, progress="validation"
        )

    run.train(train, steps, validate, validate_every, precision)
    run.finish()
    return run.history


def _schedule(schedule: str | LRScheduler, optimizer: Optimizer, steps: int, halve_every: int) -> LRScheduler:
    if isinstance(schedule, LRScheduler):
        return schedule
    if schedule == "halve":
        return StepLR(optimizer, halve_every, gamma=0.5)
    if schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=steps)
    if schedule == "constant":
        return LambdaLR(optimizer, _one)
    raise ValueError(f"schedule: expected {', '.join(SCHEDULES)} or a scheduler, got {schedule!r}")


def _one(step: int) -> float:
    return 1.0


class _Run:
    """What changes during training, and its files."""

    def __init__(
        self,
        learner: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        folder: Path | None,
        settings: dict[str, Any],
        on_step: Callable[[Row], None] | None,
    ) -> None:
        self.learner = learner
        self.device = learner_device(learner)
        self.optimizer = optimizer
        self.schedule = schedule
        self.folder = folder
        self.settings = settings
        self.on_step = on_step
        self.step = 0
        self.history = History()
        self.file = HistoryFile(None if folder is None else folder / METRICS)
        self.best_model: dict[str, Any] | None = None
        # (step, [loss, accuracy] on the device, learning rate) of steps whose numbers were not read back yet.
        self.unread: list[tuple[int, Tensor, float]] = []
        # Rows whose loss is in a line that was printed.
        self.said = 0
        self.seconds_before = 0.0
        self.begin = 0.0

    def open(self, resume: bool, overwrite: bool, steps: int) -> None:
        """Make the folder; take up the run in it, or refuse to destroy it."""
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"out: expected a folder, got the file {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        last = self.folder / LAST
        if last.exists() and not resume and not overwrite:
            raise FileExistsError(
                f"out: {self.folder} already holds a run; resume it, overwrite it or choose another folder"
            )
        if resume and last.exists():
            self._load(load_checkpoint(last), steps)
        else:
            # Else a run stopped early would leave the checkpoints of another run beside its own metrics.
            for name in (LAST, BEST):
                (self.folder / name).unlink(missing_ok=True)
        self.file.restart(self.history.rows)

    def _load(self, checkpoint: dict[str, Any], steps: int) -> None:
        assert self.folder is not None
        path = self.folder / LAST
        saved, given = checkpoint["settings"], self.settings
        different = [
            f"{name} was {saved.get(name)!r}, is {given.get(name)!r}"
            for name in sorted(saved.keys() | given.keys())
            if saved.get(name) != given.get(name)
        ]
        if different:
            raise CheckpointError(f"resume: {path} was made with other settings: {'; '.join(different)}")
        if checkpoint["step"] > steps:
            raise CheckpointError(f"steps: {path} is already at step {checkpoint['step']}, got {steps}")
        try:
            self.learner.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.schedule.load_state_dict(checkpoint["schedule"])
            self.history.best_step = checkpoint["best_step"]
            self.history.best_accuracy = checkpoint["best_accuracy"]
            random_state = checkpoint["random"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"resume: {path} does not fit this learner and optimizer: {error}"
            ) from error
        if self.history.best_accuracy is not None:
            self.best_model = load_checkpoint(self.folder / BEST)["model"]
        self.step = checkpoint["step"]
        self.history.rows = read_history(self.folder / METRICS, self.step)
        self.said = len(self.history.rows)
        self.seconds_before = self.history.seconds
        restore_random_states(random_state)

    def train(
        self,
        train: Sampler,
        steps: int,
        validate: Callable[[], Accuracy | None],
        validate_every: int,
        precision: str,
    ) -> None:
        read_every = READ_EVERY.get(self.device.type, READ_EVERY_ELSEWHERE)
        first, self.begin = self.step, time.perf_counter()
        bar = progress_bar(steps, "training", " steps", initial=first)
        try:
            with _stop_request() as stop_requested:
                while self.step < steps:
                    episodes = train(self.step).to(self.device)
                    if self.step == first:
                        check(episodes)
                    self._update(episodes, precision, read_every)
                    bar.update(1)
                    stopping = stop_requested()
                    at_validation = self.step % validate_every == 0 or self.step == steps
                    if at_validation or stopping or len(self.unread) >= read_every:
                        self._read()
                    if at_validation:
                        self._validate(validate, steps)
                    self._hand_out(bar)
                    if at_validation or stopping:
                        self._save()
                    if stopping:
                        raise Interrupted(self._stopped(steps))
        except NonFiniteError:
            # The steps that led to it are worth a look.
            self._hand_out(bar)
            self.file.flush()
            raise
        finally:
            bar.close()

    def _update(self, episodes: Episodes, precision: str, read_every: int) -> None:
        self.learner.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss, logits = self.learner(episodes)
        accuracy = (logits.detach().argmax(-1) == episodes.query_y).double().mean()
        values = torch.stack([loss.detach().double(), accuracy])
        if read_every == 1 and not math.isfinite(float(values[0])):
            # Before the update, so that the learner keeps the weights of the step before.
            raise self._non_finite(self.step + 1, float(values[0]))
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.unread.append((self.step, values, rate))

    def _read(self) -> None:
        """Turn the numbers on the device into rows."""
        if not self.unread:
            return
        seconds = self.seconds_before + time.perf_counter() - self.begin
        numbers = torch.stack([values for _, values, _ in self.unread]).tolist()
        for (step, _, rate), (loss, accuracy) in zip(self.unread, numbers, strict=True):
            if not math.isfinite(loss):
                raise self._non_finite(step, loss)
            self.history.rows.append(Row(step, loss, accuracy, rate, seconds))
        self.unread.clear()

    def _validate(self, validate: Callable[[], Accuracy | None], steps: int) -> None:
        self._require_finite()
        result, rows = validate(), self.history.rows
        losses = [row.loss for row in rows[self.said :]]
        self.said = len(rows)
        line = f"step {self.step}/{steps}  loss {sum(losses) / len(losses):.4f}"
        if result is None:
            say(line)
            self._take_best(None)
            return
        rows[-1] = replace(
            rows[-1],
            validation_accuracy=result.mean,
            validation_interval=result.interval,
            validation_loss=result.loss,
        )
        best = self.history.best_accuracy
        better = best is None or result.mean > best
        say(f"{line}  validation {result}{'  best so far' if better else ''}")
        if better:
            self._take_best(result.mean)

    def _hand_out(self, bar: Any) -> None:
        """Pass new rows on, once each and complete with their validation."""
        new = self.file.take_new(self.history.rows)
        for row in new:
            if self.on_step is not None:
                self.on_step(row)
        if new:
            best = self.history.best_accuracy
            text = f"loss {new[-1].loss:.4f}, accuracy {100 * new[-1].accuracy:.1f} %"
            text += "" if best is None else f", best validation {100 * best:.2f} %"
            bar.set_postfix_str(text, refresh=False)

    def _take_best(self, accuracy: float | None) -> None:
        """Remember the weights of this moment as the best ones, also in the folder."""
        self._require_finite()
        self.best_model = {name: value.clone() for name, value in self.learner.state_dict().items()}
        self.history.best_step, self.history.best_accuracy = self.step, accuracy
        if self.folder is not None:
            save_checkpoint(
                self.folder / BEST,
                {
                    "step": self.step,
                    "model": self.best_model,
                    "settings": self.settings,
                    "validation_accuracy": accuracy,
                },
            )

    def _save(self) -> None:
        """Write the metrics, then the checkpoint that refers to them."""
        self._require_finite()
        if self.folder is None:
            return
        self.file.flush()
        save_checkpoint(
            self.folder / LAST,
            {
                "step": self.step,
                "model": self.learner.state_dict(),
                "settings": self.settings,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "random": random_states(),
                "best_step": self.history.best_step,
                "best_accuracy": self.history.best_accuracy,
            },
        )

    def _require_finite(self) -> None:
        """No checkpoint of broken weights may replace a good one."""
        for name, value in self.learner.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise NonFiniteError(
                    f"{name} holds NaN or infinite values after step {self.step}; {self._advice()}"
                )

    def _non_finite(self, step: int, loss: float) -> NonFiniteError:
        return NonFiniteError(f"the loss is {loss} at step {step}; {self._advice()}")

    def _advice(self) -> str:
        saved = self.folder is not None and (self.folder / LAST).exists()
        kept = (
            f"the checkpoints in {self.folder} are from before that"
            if saved
            else "no checkpoint was saved yet"
        )
        return f"{kept}. A smaller learning rate usually helps"

    def _stopped(self, steps: int) -> str:
        kept = "" if self.folder is None else f"; {self.folder / LAST} holds it and resume goes on from there"
        return f"stopped after step {self.step} of {steps}{kept}"

    def finish(self) -> None:
        """Leave the best weights in the learner."""
        if self.best_model is not None:
            self.learner.load_state_dict(self.best_model)
        self.learner.eval()


@contextlib.contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C or SIGTERM only sets a flag; a second one acts at once."""
    requested = False
    previous: dict[int, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        restore()
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step; once more stops at once, without saving\n")

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    # Only the main thread may set handlers; elsewhere an interrupt behaves as usual.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request)
    try:
        yield lambda: requested
    finally:
        restore()
