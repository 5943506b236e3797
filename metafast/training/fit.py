"""The training loop."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from metafast._library import keep_pages
from metafast.data import Episodes
from metafast.data.episodes import check
from metafast.training.checkpoint import (
    CheckpointError,
    load_checkpoint,
    packed,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from metafast.training.distributed import (
    RankLostError,
    StepSum,
    ranks,
    shared_out,
    synchronised,
)
from metafast.training.evaluate import (
    Accuracy,
    SquaredError,
    batch_norm_layers,
    evaluate,
    learner_device,
    settled_batch_norm,
)
from metafast.training.events import EventFiles
from metafast.training.files import remove_leftovers
from metafast.training.history import History, HistoryFile, Row, read_history
from metafast.training.progress import Speed, progress_bar, say
from metafast.training.result import environment, optimizer_settings, plain, write_result

LAST = "checkpoint-last.pt"
BEST = "checkpoint-best.pt"
METRICS = "metrics.csv"
RESULT = "result.json"
EVENTS = "tensorboard"
SCHEDULES = ("step", "cosine", "linear", "constant")
#: Those that need no scaling of the loss.
PRECISIONS = ("float32", "bfloat16")
SCALED_PRECISIONS = ("float16",)

#: Steps between reading losses back, by type of device; an accelerator has to wait for it.
READ_EVERY = {"cpu": 1}
READ_EVERY_ELSEWHERE = 20
#: How long to wait for a folder that another process holds.
LOCK_SECONDS = 10

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
    validation: Callable[[int], Episodes] | Iterable[Episodes] | None = None,
    validation_episodes: int = 400,
    validate_every: int = 500,
    patience: int | None = None,
    batch_norm: str | None = None,
    optimizer: Optimizer | None = None,
    schedule: str | LRScheduler = "step",
    decay_every: int = 2000,
    decay: float = 0.5,
    warm_up: int = 0,
    clip_norm: float | None = None,
    tasks_at_once: int | None = None,
    precision: str = "float32",
    sync_batch_norm: bool = True,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    on_step: Callable[[Row], None] | None = None,
) -> History:
    """Train ``learner`` for ``steps`` optimiser steps, each on the episodes of one call ``train(step)``.

    Every ``validate_every`` steps, and after the last, the validation accuracy (in regression, the mean squared
    error) is measured on the same ``validation_episodes`` episodes and a checkpoint is saved. At the end the
    learner holds the weights of the best validation (without validation: the last) and is in evaluation mode.
    :func:`metafast.check` looks at the episodes of the first step.

    The folder ``out`` holds

    - ``metrics.csv``, a row per step, and the same for TensorBoard in ``tensorboard`` where that is installed;
    - ``checkpoint-last.pt``: weights, optimiser, schedule, scale of the loss, step (which is the position of
      ``train``), and the states of the random number generators of torch, numpy and Python;
    - ``checkpoint-best.pt``, the weights of the best validation;
    - ``result.json``, at the end: all settings, seed, versions, time, and the validation accuracy with its
      interval.

    A learner's method ``after_step()``, if it has one, is called after each optimiser step, and its method
    ``before_validation(train)`` before each validation, and where there is none, before each checkpoint in its place.

    Files are replaced atomically, so a kill at any moment leaves complete ones, and a run that is resumed
    after it continues bit for bit on the CPU.

    BatchNorm layers train with the statistics of each batch. The process's allocator is told to keep its
    pages, which about halves the time of a step on the CPU.

    **Several processes.** In a process group of torch.distributed (``torchrun``) every rank calls ``fit`` with
    the same arguments. Each takes its share of a step's tasks; one all-reduce sums the gradients, so that the
    update is that of one process with all tasks, to rounding. Validation is shared out and merged exactly.
    All ranks start from the first one's weights, and it alone writes files. Random numbers that the learner
    draws differ between the ranks. BatchNorm layers normalise by the images of all ranks (two
    more small all-reduces per layer and step); with ``sync_batch_norm=False`` by those of their own rank,
    and running statistics become the mean over the ranks. A layer under a transform of torch.func, which
    sees single tasks, is the same either way.

    Args:
        learner: ``learner(episodes) -> Outcome``, already on its device.
        train: an :class:`~metafast.data.EpisodeSampler` or another function of the step.
        steps: number of optimiser steps, counted from the beginning also for a resumed run.
        validation: sampler whose first episodes measure the validation accuracy, or batches of episodes that
            can be gone through again and again.
        validation_episodes: how many of them.
        validate_every: steps between validations (without validation, between checkpoints).
        patience: stop early after so many validations in a row without a better accuracy; None never does.
        batch_norm: ``"running"`` or ``"transductive"``, for validation (see :func:`evaluate`).
        optimizer: Adam with a rate of 1e-3 if None, as in the paper on prototypical networks.
        schedule: of the learning rate: ``"step"`` multiplies it by ``decay`` every ``decay_every`` steps,
            ``"cosine"`` and ``"linear"`` let it fall to 0 at the end of the last step, ``"constant"`` leaves it, or
            a scheduler of ``optimizer``, stepped after every step.
        decay_every, decay: for the schedule ``"step"``.
        warm_up: number of first steps, in which the rate rises linearly, ``(step + 1) / warm_up`` of the
            schedule's one; the cosine and the line begin after them.
        clip_norm: a gradient (of all the optimiser's parameters together) whose Euclidean norm is greater is
            scaled down to this norm.
        tasks_at_once: go forward and backward through so many tasks of a step at a time and sum the gradients, which
            bounds the memory of a step (:func:`metafast.predicted_memory` tells how many fit); the gradients are those
            of all at once, to rounding. What follows the data, such as running statistics and Reptile's mean squares,
            follows it part by part. None: all. For learners whose loss is the mean over tasks, without BatchNorm over
            the images of several.
        precision: ``"bfloat16"`` and ``"float16"`` run the learner under autocast; distances, losses,
            parameters and validation stay in float32. For float16 the loss is scaled
            (``torch.amp.GradScaler``): a step whose gradients overflow leaves the weights as they are.
        sync_batch_norm: see above; without other processes it changes nothing.
        out: folder for the files, made if it is missing; None saves nothing.
        resume: go on from ``out/checkpoint-last.pt`` (from the beginning if there is none yet).
        overwrite: start again where ``out`` already holds a run.
        settings: plain values that describe the run, kept in the checkpoints; a resumed run must come with
            equal ones. Likewise with equal arguments of this function that matter to the result.
        on_step: called with the :class:`Row` of every step.

    Raises:
        ValueError: bad arguments.
        TypeError: settings, or the state of a scheduler, that a checkpoint cannot hold.
        CheckpointError: a damaged or foreign checkpoint, or one of a run with other settings.
        FileExistsError: ``out`` holds a run and neither ``resume`` nor ``overwrite`` was given.
        NonFiniteError: the loss or a parameter became NaN or infinite. Checkpoints saved before are kept.
        Interrupted: Ctrl-C or SIGTERM; the last complete step was saved first.
        RankLostError: another process died or does not answer. Checkpoints saved before are kept.
        OSError: a file could not be written; the files saved before are intact.
    """
    for name, value, smallest in (
        ("steps", steps, 1),
        ("validation_episodes", validation_episodes, 1 if validation is None else 2),
        ("validate_every", validate_every, 1),
        ("decay_every", decay_every, 1),
        ("warm_up", warm_up, 0),
        ("patience", 1 if patience is None else patience, 1),
        ("tasks_at_once", 1 if tasks_at_once is None else tasks_at_once, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            wanted = "a positive int" if smallest == 1 else f"an int from {smallest}"
            raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    if not 0 < decay < 1:
        raise ValueError(f"decay: expected a number between 0 and 1, got {decay!r}")
    if clip_norm is not None and not (clip_norm > 0 and math.isfinite(clip_norm)):
        raise ValueError(f"clip_norm: expected a positive number or None, got {clip_norm!r}")
    if precision not in (*PRECISIONS, *SCALED_PRECISIONS):
        raise ValueError(f"precision: expected 'float32', 'bfloat16' or 'float16', got {precision!r}")
    mode = (batch_norm or "running") if validation is None else settled_batch_norm(learner, batch_norm)
    if patience is not None and validation is None:
        raise ValueError("patience: early stopping needs validation episodes")
    if resume and overwrite:
        raise ValueError("resume, overwrite: expected at most one of them")
    if resume and out is None:
        raise ValueError("out: resume needs the folder of the run")
    if isinstance(schedule, LRScheduler):
        if schedule.optimizer is not optimizer:
            raise ValueError("schedule: expected a scheduler of the optimizer that is passed along")
        if isinstance(schedule, ReduceLROnPlateau):
            raise ValueError("schedule: expected a scheduler that goes by the step, got ReduceLROnPlateau")
        if warm_up:
            raise ValueError("warm_up: expected 0 with a scheduler, which has its own course of the rate")
    own = getattr(learner, "episode_statistics", False)
    if tasks_at_once is not None and batch_norm_layers(learner) and not own:
        raise ValueError(
            "tasks_at_once: the learner's BatchNorm layers normalise by the images of all tasks of a step"
        )
    keep_pages()
    if optimizer is None:
        optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    if not isinstance(schedule, LRScheduler):
        schedule = LambdaLR(optimizer, _Course(schedule, steps, decay_every, decay, warm_up))
    # What the rows and weights depend on; a schedule of one's own is known by its name alone.
    recorded: dict[str, Any] = optimizer_settings(optimizer)
    if isinstance(schedule, LambdaLR) and isinstance(schedule.lr_lambdas[0], _Course):
        recorded |= schedule.lr_lambdas[0].settings()
    else:
        recorded["schedule"] = type(schedule).__name__
    recorded |= {"clip_norm": clip_norm, "precision": precision, "validate_every": validate_every}
    recorded["tasks_at_once"] = tasks_at_once
    recorded["validation_episodes"] = None if validation is None else validation_episodes
    if validation is not None:
        recorded["batch_norm"] = mode
    if ranks().count > 1:
        recorded["sync_batch_norm"] = sync_batch_norm
    if hasattr(train, "seed"):
        recorded["seed"] = plain(train.seed)
    run = _Run(
        learner=learner,
        optimizer=optimizer,
        schedule=schedule,
        folder=None if out is None else Path(out),
        settings=dict(settings or {}),
        recorded=recorded,
        precision=precision,
        clip_norm=clip_norm,
        tasks_at_once=tasks_at_once,
        sync_batch_norm=sync_batch_norm,
        on_step=on_step,
    )

    prepare: Callable[[Sampler], None] | None = getattr(learner, "before_validation", None)

    def validate() -> Accuracy | SquaredError | None:
        if prepare is not None:
            prepare(train)
        if validation is None:
            return None
        return evaluate(learner, validation, validation_episodes, batch_norm=mode, progress="validation")

    try:
        run.open(resume, overwrite, steps)
        run.train(train, steps, validate, validate_every, patience)
        run.finish({"steps": steps, "patience": patience}, mode)
    finally:
        run.unlock()
    return run.history


class _Course:
    """Course of the learning rate: its factor in each step. As an object, so that a scheduler can save it."""

    def __init__(self, schedule: str, steps: int, decay_every: int, decay: float, warm_up: int) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected {', '.join(SCHEDULES)} or a scheduler, got {schedule!r}")
        if schedule in ("cosine", "linear") and warm_up >= steps:
            raise ValueError(
                f"warm_up: expected fewer than the {steps} steps of schedule {schedule!r}, got {warm_up}"
            )
        self.schedule = schedule
        self.steps = steps
        self.decay_every = decay_every
        self.decay = decay
        self.warm_up = warm_up

    def __call__(self, step: int) -> float:
        factor = min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        if self.schedule == "step":
            factor *= self.decay ** (step // self.decay_every)
        elif self.schedule in ("cosine", "linear") and step > self.warm_up:
            # The rate after the last step is asked for as well.
            part = min(1.0, (step - self.warm_up) / (self.steps - self.warm_up))
            factor *= (1 + math.cos(math.pi * part)) / 2 if self.schedule == "cosine" else 1 - part
        return factor

    def settings(self) -> dict[str, Any]:
        """What the course depends on."""
        found: dict[str, Any] = {"schedule": self.schedule, "warm_up": self.warm_up}
        if self.schedule == "step":
            found |= {"decay_every": self.decay_every, "decay": self.decay}
        elif self.schedule in ("cosine", "linear"):
            found["steps"] = self.steps
        return found


class _Run:
    """What changes during training, and its files."""

    def __init__(
        self,
        learner: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
        folder: Path | None,
        settings: dict[str, Any],
        recorded: dict[str, Any],
        precision: str,
        clip_norm: float | None,
        tasks_at_once: int | None,
        sync_batch_norm: bool,
        on_step: Callable[[Row], None] | None,
    ) -> None:
        self.learner = learner
        self.device = learner_device(learner)
        self.optimizer = optimizer
        self.schedule = schedule
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision in SCALED_PRECISIONS)
        self.autocast = None if precision == "float32" else getattr(torch, precision)
        self.clip_norm = clip_norm
        self.tasks_at_once = tasks_at_once
        self.folder = folder
        self.settings = settings
        self.recorded = recorded
        self.on_step = on_step
        self.ranks = ranks()
        norms = list(batch_norm_layers(learner).values()) if self.ranks.count > 1 else []
        # An episode, whose own statistics they may be, is on one rank.
        shared = sync_batch_norm and not getattr(learner, "episode_statistics", False)
        self.synchronised_norms = norms if shared else []
        following = [] if shared else _running_statistics(norms)
        self.after_step: Callable[[], None] | None = getattr(learner, "after_step", None)
        of_learner: Any = getattr(learner, "running_statistics", None)
        if of_learner is not None:
            following += of_learner()
        self.step_sum = StepSum(learner, self.ranks, following)
        # Buffers that hold infinity on purpose, such as attention masks, are no broken weights.
        self.masks = {
            n for n, b in learner.named_buffers() if b.is_floating_point() and not bool(b.isfinite().all())
        }
        self.step = 0
        self.history = History()
        self.file = HistoryFile(folder / METRICS if folder is not None and self.ranks.first else None)
        self.events = EventFiles(None, 0)
        self.best_model: dict[str, Any] | None = None
        self.best_saved = True
        # (step, [loss, right answers, answers, wishes to stop] on the device, learning rate) of steps whose
        # numbers were not read back yet.
        self.unread: list[tuple[int, Tensor, float]] = []
        # Rows whose loss is in a line that was printed.
        self.said = 0
        self.lock: int | None = None
        self.seconds_before = 0.0
        self.begin = 0.0
        self.stop_agreed = False

    def open(self, resume: bool, overwrite: bool, steps: int) -> None:
        """Make the folder; take up the run in it, or refuse to destroy it."""
        found = self.ranks.by_first(lambda: self._open_folder(resume, overwrite))
        if found is not None:
            self._load(*found, steps)
        elif self.ranks.count > 1:
            # The same weights everywhere, but not the same dropout.
            state = self.ranks.by_first(lambda: _on_cpu(self.learner.state_dict()))
            self.learner.load_state_dict(state)
            if not self.ranks.first:
                torch.manual_seed(torch.initial_seed() + self.ranks.rank)
        self.ranks.by_first(self._begin_files)

    def _open_folder(
        self, resume: bool, overwrite: bool
    ) -> tuple[dict[str, Any], dict[str, Any] | None, list[Row]] | None:
        """The last checkpoint, the best one and the rows up to the last, if there is a run to go on with."""
        if self.folder is None:
            return None
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"out: expected a folder, got the file {self.folder}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                error.errno, f"out: could not make the folder {self.folder} ({error.strerror})"
            ) from error
        self._lock()
        last = self.folder / LAST
        if last.exists() and not resume and not overwrite:
            raise FileExistsError(
                f"out: {self.folder} already holds a run; resume it, overwrite it or choose another folder"
            )
        if not (resume and last.exists()):
            return None
        checkpoint = load_checkpoint(last)
        rows = read_history(self.folder / METRICS, checkpoint["step"])
        best = None
        # Where the two steps are equal, a kill may have come before the best one was written.
        validated = History(rows, checkpoint["best_step"]).best_validation is not None
        if validated and checkpoint["best_step"] != checkpoint["step"]:
            best = load_checkpoint(self.folder / BEST)
            if best["step"] != checkpoint["best_step"]:
                raise CheckpointError(
                    f"resume: {self.folder / BEST} is of step {best['step']}, "
                    f"{last} belongs to one of step {checkpoint['best_step']}"
                )
        return checkpoint, best, rows

    def _lock(self) -> None:
        """Keep other processes out of the folder, by a lock that the system lets go of when this one dies."""
        try:
            import fcntl
        except ImportError:
            return
        assert self.folder is not None
        self.lock = os.open(self.folder, os.O_RDONLY)
        # The loader's workers of a killed run hold its lock until they notice.
        for attempt in range(LOCK_SECONDS * 10, -1, -1):
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not attempt:
                    self.unlock()
                    raise BlockingIOError(
                        errno.EWOULDBLOCK,
                        f"out: another process trains in {self.folder}; wait for it or choose another folder",
                    ) from None
                time.sleep(0.1)
            except OSError:
                return

    def unlock(self) -> None:
        """Let others into the folder."""
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def _begin_files(self) -> None:
        if self.folder is None:
            return
        # Better now than at the first save.
        packed({"settings": self.settings, "schedule": self.schedule.state_dict()})
        remove_leftovers(self.folder, (LAST, BEST, METRICS, RESULT))
        if not self.step:
            # Else a run stopped early would leave the files of another run beside its own metrics.
            for name in (LAST, BEST, RESULT):
                (self.folder / name).unlink(missing_ok=True)
        self.file.restart(self.history.rows)
        if not self.best_saved:
            self._save_best()
        self.events = EventFiles(self.folder / EVENTS, self.step)

    def _load(
        self, checkpoint: dict[str, Any], best: dict[str, Any] | None, rows: list[Row], steps: int
    ) -> None:
        assert self.folder is not None
        path = self.folder / LAST
        different = _differences(checkpoint, self.settings, self.recorded)
        if different:
            raise CheckpointError(f"resume: {path} was made with other settings: {'; '.join(different)}")
        if checkpoint["step"] > steps:
            raise CheckpointError(f"steps: {path} is already at step {checkpoint['step']}, got {steps}")
        try:
            self.learner.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.schedule.load_state_dict(checkpoint["schedule"])
            if checkpoint["scaler"]:
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.history.best_step = checkpoint["best_step"]
            self.history.best_accuracy = checkpoint["best_accuracy"]
            random_states_of_ranks = checkpoint["random"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"resume: {path} does not fit this learner and optimizer: {error}"
            ) from error
        self.step = checkpoint["step"]
        if best is not None:
            self.best_model = best["model"]
        elif self.history.best_step == self.step:
            self.best_model, self.best_saved = checkpoint["model"], False
        self.history.rows = rows
        self.said = len(rows)
        self.seconds_before = self.history.seconds
        # With more ranks than before, the new ones go on with what they have.
        if self.ranks.rank < len(random_states_of_ranks):
            restore_random_states(random_states_of_ranks[self.ranks.rank])

    def train(
        self,
        train: Sampler,
        steps: int,
        validate: Callable[[], Accuracy | SquaredError | None],
        validate_every: int,
        patience: int | None,
    ) -> None:
        read_every = READ_EVERY.get(self.device.type, READ_EVERY_ELSEWHERE)
        first, self.begin = self.step, time.perf_counter()
        share = shared_out(train, self.ranks)
        speed = Speed()
        bar = progress_bar(steps, "training", " steps", initial=first)
        try:
            with _stop_request(aloud=self.ranks.first) as stop_requested:
                while self.step < steps and not self._out_of_patience(patience):
                    episodes, weight = share(self.step)
                    episodes = episodes.to(self.device)
                    if self.step == first:
                        check(episodes)
                    self._update(episodes, weight, read_every, stop_requested())
                    speed.add(round(episodes.tasks / weight))
                    bar.update(1)
                    # Alone a process can stop at once; several agree on it with the next numbers they read.
                    stopping = self.ranks.count == 1 and stop_requested()
                    at_validation = self.step % validate_every == 0 or self.step == steps
                    if at_validation or stopping or len(self.unread) >= read_every:
                        self._read()
                        stopping = stopping or self.stop_agreed
                    if at_validation:
                        self._validate(validate, steps)
                        speed.pause()
                    self._hand_out(bar, speed)
                    if at_validation or stopping:
                        self._save()
                        speed.pause()
                    # A request that came in a validation finds its step saved; after the last one nobody asks again.
                    if stopping or (at_validation and self.ranks.count == 1 and stop_requested()):
                        raise Interrupted(self._stopped(steps))
                if self.step == first and self.step == steps and self.history.best_step != self.step:
                    self._end_unvalidated(validate, steps)
        except NonFiniteError:
            # The steps that led to it are worth a look.
            self._hand_out(bar, speed)
            self.ranks.by_first(lambda: self.events.write(self._flush()))
            raise
        except RankLostError as error:
            raise RankLostError(f"{error}; {self._kept()}") from error
        finally:
            bar.close()
            self.events.close()
        if self.step < steps:
            self.history.stopped_early = True
            say(
                f"stopped early after step {self.step} of {steps}: "
                f"{self.history.validations_since_best} validations were no better than that of step "
                f"{self.history.best_step}"
            )

    def _end_unvalidated(self, validate: Callable[[], Accuracy | SquaredError | None], steps: int) -> None:
        """Complete a run that was stopped between validations at the step that is now to be its last."""
        rows = self.history.rows
        if math.isnan(rows[-1].validation_loss):
            self.said = len(rows) - 1
            self._validate(validate, steps)
            self.ranks.by_first(lambda: self.file.restart(rows))
            self._save()

    def _out_of_patience(self, patience: int | None) -> bool:
        rows = self.history.rows
        # Only a validation can exhaust it; counting goes through all rows.
        if patience is None or not rows or math.isnan(rows[-1].validation_loss):
            return False
        return self.history.validations_since_best >= patience

    def _update(self, episodes: Episodes, weight: float, read_every: int, stop: bool) -> None:
        self.learner.train()
        self.optimizer.zero_grad(set_to_none=True)
        numbers = torch.zeros(4, dtype=torch.float64, device=self.device)
        numbers[3] = stop
        tasks = max(episodes.tasks, 1)
        at_once = self.tasks_at_once or tasks
        for first in range(0, tasks, at_once):
            part = episodes[first : first + at_once]
            numbers[:3] += self._go_through(part, weight * (part.tasks / tasks))
        numbers = self.step_sum(numbers, weight)
        if read_every == 1 and not math.isfinite(float(numbers[0])):
            # Before the update, so that the learner keeps the weights of the step before.
            raise self._non_finite(self.step + 1, float(numbers[0]))
        rate = float(self.optimizer.param_groups[0]["lr"])
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.after_step is not None:
            self.after_step()
        with _first_step_left_out() if self.step == 0 else contextlib.nullcontext():
            self.schedule.step()
        self.step += 1
        self.unread.append((self.step, numbers, rate))

    def _go_through(self, episodes: Episodes, share: float) -> Tensor:
        """Forward and backward: the loss times its share, the right answers and how many there could be."""
        with synchronised(self.synchronised_norms, self.ranks):
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                loss, logits = self.learner(episodes)
            self.scaler.scale(loss if share == 1 else loss * share).backward()
        right = torch.zeros((), dtype=torch.float64, device=self.device)
        if not episodes.regression:
            right = (logits.detach().argmax(-1) == episodes.query_y).sum().double()
        answers = right.new_full((), 0 if episodes.regression else episodes.query_y.numel())
        return torch.stack([loss.detach().double() * share, right, answers])

    def _read(self) -> None:
        """Turn the numbers on the device into rows."""
        if not self.unread:
            return
        seconds = self.seconds_before + time.perf_counter() - self.begin
        numbers = torch.stack([values for _, values, _ in self.unread]).tolist()
        for (step, _, rate), (loss, right, answers, stop) in zip(self.unread, numbers, strict=True):
            if not math.isfinite(loss):
                raise self._non_finite(step, loss)
            accuracy = right / answers if answers else math.nan
            self.history.rows.append(Row(step, loss, accuracy, rate, seconds))
            self.stop_agreed |= stop > 0
        self.unread.clear()

    def _validate(self, validate: Callable[[], Accuracy | SquaredError | None], steps: int) -> None:
        self._require_finite()
        result, rows = validate(), self.history.rows
        losses = [row.loss for row in rows[self.said :]]
        self.said = len(rows)
        line = f"step {self.step}/{steps}  loss {sum(losses) / len(losses):.4f}"
        if result is None:
            say(line)
            self._take_best(None)
            return
        best, accuracy = self.history.best_validation, None
        if isinstance(result, Accuracy):
            accuracy, loss = result.mean, result.loss
            better = best is None or accuracy > best.validation_accuracy
        else:
            loss = result.mean
            better = best is None or loss < best.validation_loss
        rows[-1] = replace(
            rows[-1],
            validation_accuracy=math.nan if accuracy is None else accuracy,
            validation_interval=result.interval,
            validation_loss=loss,
        )
        say(f"{line}  validation {result}{'  best so far' if better else ''}")
        if better:
            self._take_best(accuracy)

    def _hand_out(self, bar: Any, speed: Speed) -> None:
        """Pass new rows on, once each and complete with their validation."""
        new = self.file.take_new(self.history.rows)
        for row in new:
            if self.on_step is not None:
                self.on_step(row)
        if new:
            text = f"{speed}, loss {new[-1].loss:.4f}"
            if not math.isnan(new[-1].accuracy):
                text += f", accuracy {100 * new[-1].accuracy:.1f} %"
            best = self.history.best_validation
            if self.history.best_accuracy is not None:
                text += f", best validation {100 * self.history.best_accuracy:.2f} %"
            elif best is not None:
                text += f", best validation {best.validation_loss:.4f}"
            bar.set_postfix_str(text, refresh=False)

    def _take_best(self, accuracy: float | None) -> None:
        """Remember the weights of this moment as the best ones; the next save writes them."""
        self.best_model = {name: value.clone() for name, value in self.learner.state_dict().items()}
        self.best_saved = False
        self.history.best_step, self.history.best_accuracy = self.step, accuracy

    def _save(self) -> None:
        """Write the metrics, then the checkpoint that refers to them, then the best one if it is new."""
        self._require_finite()
        if self.folder is None:
            return
        states = self.ranks.gather(random_states())
        self.ranks.by_first(lambda: self._write(states))
        self.best_saved = True

    def _write(self, states: Sequence[dict[str, Any]]) -> None:
        assert self.folder is not None
        rows = self._flush()
        try:
            # Before the checkpoint: events after it are purged on resume, missing ones before it never written.
            self.events.write(rows)
        finally:
            self._write_checkpoints(states)

    def _write_checkpoints(self, states: Sequence[dict[str, Any]]) -> None:
        assert self.folder is not None
        save_checkpoint(
            self.folder / LAST,
            {
                "step": self.step,
                "model": dict(self.learner.state_dict()),
                "settings": self.settings,
                "recorded": self.recorded,
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": list(states),
                "best_step": self.history.best_step,
                "best_accuracy": self.history.best_accuracy,
            },
        )
        if not self.best_saved:
            self._save_best()

    def _save_best(self) -> None:
        assert self.folder is not None
        save_checkpoint(
            self.folder / BEST,
            {
                "step": self.history.best_step,
                "model": self.best_model,
                "settings": self.settings,
                "validation_accuracy": self.history.best_accuracy,
            },
        )

    def _flush(self) -> list[Row]:
        """Write the rows that wait; they are the result."""
        return self.file.flush()

    def _require_finite(self) -> None:
        """No checkpoint of broken weights may replace a good one."""
        for name, value in self.learner.state_dict().items():
            if name not in self.masks and value.is_floating_point() and not bool(value.isfinite().all()):
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

    def _kept(self) -> str:
        if self.folder is None or not (self.folder / LAST).exists():
            return "no checkpoint was saved yet"
        return f"resume goes on from {self.folder / LAST}"

    def finish(self, arguments: dict[str, Any], batch_norm: str) -> None:
        """Leave the best weights in the learner, and the result in the folder."""
        if self.best_model is not None:
            self.learner.load_state_dict(self.best_model)
        self.learner.eval()
        history = self.history
        best = history.best_validation
        history.result = {
            "settings": plain(self.settings),
            "fit": {**self.recorded, **arguments},
            "seed": self.recorded.get("seed"),
            "environment": environment(self.device),
            "batch_norm": {"train": "batch", "evaluation": batch_norm},
            "steps": len(history.rows),
            "stopped_early": history.stopped_early,
            "train_seconds": round(history.seconds, 1),
            "best_step": history.best_step,
            "best_validation_accuracy": history.best_accuracy,
            "best_validation_loss": None if best is None else best.validation_loss,
            "best_validation_interval": None if best is None else best.validation_interval,
        }
        if self.folder is not None:
            folder = self.folder
            self.ranks.by_first(lambda: write_result(folder / RESULT, history.result))


@contextlib.contextmanager
def _first_step_left_out() -> Iterator[None]:
    """Without torch's warning that the schedule comes before the optimiser: the scaler may leave its first step out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield


def _differences(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], recorded: Mapping[str, Any]
) -> list[str]:
    """What a resumed run was given otherwise than the run that made the checkpoint."""
    saved, given = dict(checkpoint["settings"]), dict(settings)
    # What only one of them recorded says nothing: versions of torch differ in the options of an optimiser.
    for name in checkpoint.get("recorded", {}).keys() & recorded.keys():
        saved.setdefault(name, checkpoint["recorded"][name])
        given.setdefault(name, recorded[name])
    return [
        f"{name} was {saved.get(name)!r}, is {given.get(name)!r}"
        for name in sorted(saved.keys() | given.keys())
        if not _same(saved.get(name), given.get(name))
    ]


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
    return bool(first == second)


def _running_statistics(norms: Sequence[nn.Module]) -> list[Tensor]:
    found = [getattr(norm, name) for norm in norms for name in ("running_mean", "running_var")]
    return [value for value in found if value is not None]


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in state.items()}


@contextlib.contextmanager
def _stop_request(aloud: bool) -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C or SIGTERM only sets a flag (``aloud``: and says so); a second one acts at once."""
    requested = False
    previous: dict[int, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        restore()
        if aloud:
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
