"""How much memory a training step takes, and how many tasks fit into a budget."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metafast.data import Episodes

#: Operators copy and pad inside: a process grows by 1.3 to 2.3 times its tensors (benchmarks/memory.py).
OVER_TENSORS = 2


class Memory(NamedTuple):
    """The most bytes of tensors that live at one time of a step, as a line in the number of its tasks.

    Attributes:
        base: without any task.
        per_task: of each task.
    """

    base: int
    per_task: int

    def tensors(self, tasks: int) -> int:
        """Of so many tasks at once."""
        return self.base + tasks * self.per_task

    def peak(self, tasks: int) -> int:
        """What a step with so many tasks is expected to take with all that operators need inside: twice that."""
        return OVER_TENSORS * self.tensors(tasks)

    def tasks(self, budget: int) -> int:
        """How many tasks at once stay within ``budget`` bytes by :meth:`peak`, at least 1."""
        return max(1, (budget // OVER_TENSORS - self.base) // max(self.per_task, 1))


def predicted_memory(learner: nn.Module, episodes: Episodes) -> Memory:
    """The peak of the tensors that a training step of ``learner`` makes, from steps with one task and with two.

    A step is forward and backward in training mode. The learner's mode, buffers and gradients and the random numbers
    are left as they were.

    Args:
        learner: ``learner(episodes) -> Outcome``.
        episodes: at least one task, of the sizes of training.

    Raises:
        ValueError: no tasks.
    """
    if episodes.tasks == 0:
        raise ValueError("episodes: expected at least one task, got none")
    modes = [(module, module.training) for module in learner.modules()]
    buffers = {name: value.clone() for name, value in learner.named_buffers()}
    devices = [episodes.device.index or 0] if episodes.device.type == "cuda" else []
    try:
        learner.train()
        with torch.random.fork_rng(devices):
            # The first step of a learner may do more than others.
            _, first, second = (_peak(learner, _tasks(episodes, count)) for count in (1, 1, 2))
    finally:
        with torch.no_grad():
            for name, value in learner.named_buffers():
                value.copy_(buffers[name])
        for module, training in modes:
            module.training = training
    return Memory(max(0, 2 * first - second), max(0, second - first))


def _tasks(episodes: Episodes, count: int) -> Episodes:
    """So many of the tasks, the first one again where there are fewer."""
    chosen = [min(k, episodes.tasks - 1) for k in range(count)]
    support_x, support_y, query_x, query_y = (
        torch.stack([part[k] for k in chosen])
        for part in (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
    )
    return Episodes(support_x, support_y, query_x, query_y, episodes.ways)


def _peak(learner: nn.Module, episodes: Episodes) -> int:
    parameters = [value for value in learner.parameters() if value.requires_grad]
    with torch.enable_grad(), Peak() as live:
        loss = learner(episodes).loss
        if loss.requires_grad:
            torch.autograd.grad(loss, parameters, allow_unused=True)
    return live.peak


class Peak(TorchDispatchMode):
    """Inside, the tensors that are made are counted, each storage from when it is made until it is freed.

    Attributes:
        peak: the most bytes that lived at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {self._key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._see(value, known)
        return out

    @staticmethod
    def _key(value: Tensor) -> int:
        return value.untyped_storage()._cdata

    def _see(self, value: Tensor, known: set[int]) -> None:
        key = self._key(value)
        if key in known or key in self._sizes:
            return
        storage = value.untyped_storage()
        self._sizes[key] = storage.nbytes()
        self._now += self._sizes[key]
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key, 0)
