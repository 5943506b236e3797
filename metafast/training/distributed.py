"""Several processes that share out the tasks of a step: ``torchrun --nproc-per-node N -m metafast train ...``.

Every rank holds the whole learner and takes its share of each step's tasks. One sum over the ranks puts the
gradients of a step together, so that all ranks make the same update as one process with all the tasks would,
to rounding. Files are written by the first rank alone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules.batchnorm import _BatchNorm

from metafast.backbones import update_running_statistics
from metafast.data import Episodes, TaskSampler

#: How long a rank waits for another one that is alive but does not answer; a dead one is noticed at once.
TIMEOUT = timedelta(minutes=5)

Result = TypeVar("Result")


class RankLostError(ConnectionError):
    """Another process of the run died, or did not answer in time."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this is; without torchrun there is one.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes the files and prints."""
        return self.rank == 0

    def takes(self, number: int) -> bool:
        """Whether piece ``number`` of some work is for this process: they take turns."""
        return number % self.count == self.rank

    def share(self, tasks: int) -> slice:
        """Which of a step's ``tasks`` this process learns from: consecutive ones, shares as equal as can be.

        Raises:
            ValueError: fewer tasks than processes.
        """
        if tasks < self.count:
            raise ValueError(
                f"tasks: a step has {tasks}, which {self.count} processes cannot share out; "
                f"train on at least {self.count} tasks per step, or with fewer processes"
            )
        return slice(tasks * self.rank // self.count, tasks * (self.rank + 1) // self.count)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of the ranks' ``values``, which are of one shape and dtype; the same bits on every rank.

        A number that all but one rank have as zero comes out exactly as it is on that one.

        Raises:
            RankLostError: another rank died or did not answer in time.
        """
        if self.count == 1:
            return values
        total = values.detach().clone(memory_format=torch.contiguous_format)
        with _lost_ranks(self):
            dist.all_reduce(total)
        return total

    def by_first(self, action: Callable[[], Result]) -> Result:
        """What ``action()`` gives on the first rank, where alone it runs; what it raises, raises on every rank.

        Raises:
            RankLostError: another rank died or did not answer in time.
        """
        if self.count == 1:
            return action()
        answer: list[Any] = [None]
        if self.first:
            try:
                answer = [(action(), None)]
            except Exception as error:
                answer = [(None, error)]
        with _lost_ranks(self):
            dist.broadcast_object_list(answer, src=0)
        result, failure = answer[0]
        if failure is not None:
            raise failure
        return result

    def gather(self, value: Result) -> list[Result]:
        """The values of all ranks, in order of rank.

        Raises:
            RankLostError: another rank died or did not answer in time.
        """
        values: list[Any] = [value] * self.count
        if self.count > 1:
            with _lost_ranks(self):
                dist.all_gather_object(values, value)
        return values


def ranks() -> Ranks:
    """The processes of torch.distributed's default group; a single one where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size())


def join(device: str = "auto", timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the other processes if torchrun started this one, and choose its device.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` ...; ``"auto"`` takes CUDA if there is any. Under torchrun
            ``"cuda"`` is the GPU whose number is the process's number on its machine.
        timeout: how long to wait for a process that does not answer.

    Returns:
        the device. The processes talk over gloo, and over NCCL where it is a GPU.

    Raises:
        ValueError: a device that is not there, or not for as many processes.
        RankLostError: the other processes did not come.
    """
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        gpus = torch.cuda.device_count()
        if here > max(gpus, 1):
            raise ValueError(
                f"cuda: torchrun started {here} processes on this machine, which has {gpus} GPUs; "
                f"--nproc-per-node {gpus} takes one for each"
            )
        name = f"cuda:{local}"
    elif name.startswith("cuda:") and here > 1:
        raise ValueError(f"{name}: torchrun started {here} processes; with cuda each takes a GPU of its own")
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{device}: {str(error).splitlines()[0]}") from error
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ and not dist.is_initialized():
        with _lost_ranks(Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=timeout
            )
    return chosen


def leave() -> None:
    """Leave the group of processes, if this one is in any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def shared_out(train: Callable[[int], Episodes], group: Ranks) -> Callable[[int], tuple[Episodes, float]]:
    """``step -> (this rank's tasks of the step, their fraction of all its tasks)``.

    Every rank draws the same episodes. A sampler whose tasks the ranks divide makes only the images of its
    share; of any other function of the step the share is taken.
    """
    if group.count == 1:
        return lambda step: (train(step), 1.0)
    if isinstance(train, TaskSampler) and train.tasks % group.count == 0:
        part = train.shard(group.rank, group.count)
        return lambda step: (part(step), 1 / group.count)

    def share(step: int) -> tuple[Episodes, float]:
        episodes = train(step)
        own = episodes[group.share(episodes.tasks)]
        return own, own.tasks / episodes.tasks

    return share


class StepSum:
    """The sum over the ranks of everything that a step needs from all of them, in one all-reduce.

    Args:
        learner: its parameters' gradients are summed. A parameter without a gradient counts as zero, and
            stays without one where no rank has any.
        group: the ranks.
        statistics: tensors (BatchNorm's running statistics) that become the mean of the ranks' ones.
    """

    def __init__(self, learner: nn.Module, group: Ranks, statistics: Sequence[Tensor] = ()) -> None:
        self.parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        self.group = group
        self.statistics = list(statistics)

    def __call__(self, numbers: Tensor, weight: float) -> Tensor:
        """Sum the gradients, average the statistics with weights that sum to one, and give the summed ``numbers``."""
        if self.group.count == 1:
            return numbers
        gradients = [p.grad for p in self.parameters]
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in self.parameters), torch.float32)
        there = torch.tensor([float(gradient is not None) for gradient in gradients], dtype=dtype)
        pieces = [
            (torch.zeros_like(p) if gradient is None else gradient).reshape(-1).to(dtype)
            for p, gradient in zip(self.parameters, gradients, strict=True)
        ]
        pieces += [value.reshape(-1).to(dtype) * weight for value in self.statistics]
        pieces += [there.to(numbers.device), numbers.to(dtype)]
        total = self.group.sum(torch.cat(pieces))
        *summed, any_there, numbers = total.split([len(piece) for piece in pieces])
        # Looked at only where it matters, for an accelerator has to wait.
        used = [True] * len(gradients)
        if None in gradients:
            used = (any_there > 0).tolist()
        for p, gradient, value, keep in zip(self.parameters, gradients, summed, used, strict=False):
            if keep:
                p.grad = torch.empty_like(p) if gradient is None else gradient
                p.grad.copy_(value.view_as(p))
        with torch.no_grad():
            for statistic, value in zip(self.statistics, summed[len(gradients) :], strict=True):
                statistic.copy_(value.view_as(statistic))
        return numbers.double()


@contextlib.contextmanager
def synchronised(norms: Sequence[_BatchNorm], group: Ranks) -> Iterator[None]:
    """Within, BatchNorm layers in training mode normalise by the images of all ranks together.

    Mean and (biased) variance are those of all rows, from one sum over the ranks of the counts, the means and
    the mean squares in float64, which is differentiable to any order. Running statistics are updated with
    them, and so are equal on all ranks. Works for every device and backend, unlike ``torch.nn.SyncBatchNorm``.

    A layer that is called under a transform of torch.func sees single tasks, and is left as it is.
    """
    for norm in norms:
        norm.forward = functools.partial(_synchronised_forward, norm, group)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _synchronised_forward(norm: _BatchNorm, group: Ranks, inputs: Tensor) -> Tensor:
    if not norm.training or peek_interpreter_stack() is not None:
        return type(norm).forward(norm, inputs)
    norm._check_input_dim(inputs)
    half = inputs.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(inputs.device.type, enabled=False):
        values = inputs.float() if half else inputs
        features = values.shape[1]
        variance, mean = torch.var_mean(values, [0, *range(2, values.dim())], correction=0)
        rows = torch.full((1,), values.numel() // features, dtype=torch.float64, device=values.device)
        mean, variance = mean.double(), variance.double()
        sums = _SumOverRanks.apply(torch.cat([rows, rows * mean, rows * (variance + mean.square())]), group)
        total, mean, square = sums.split([1, features, features])
        mean, square = mean / total, square / total
        variance = (square - mean.square()).clamp_min(0)
        if norm.track_running_stats:
            update_running_statistics(
                norm, mean.detach(), variance.detach() * total / (total - 1).clamp_min(1)
            )
        scale = (variance + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
        shape = [1, features] + [1] * (values.dim() - 2)
        scale, shift = (value.to(values.dtype).view(shape) for value in (scale, shift))
        return torch.addcmul(shift, values, scale).to(inputs.dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks, whose derivative is one as well: each rank's loss depends on all ranks' inputs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Ranks) -> Tensor:
        ctx.group = group
        return group.sum(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(gradients[0], ctx.group), None


@contextlib.contextmanager
def _lost_ranks(group: Ranks) -> Iterator[None]:
    """Turn the error of a collective operation into one that says what happened."""
    try:
        yield
    except RuntimeError as error:
        # Without the place in gloo's sources, and the guesses that follow.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = re.sub(r"^(\[[^]]*\.(cc|cpp|h):\d+\] )+", "", first_line)
        raise RankLostError(
            f"rank {group.rank} of {group.count} lost another rank, which died or does not answer; "
            f"its own message says why (here: {reason.split('. ')[0]})"
        ) from error
