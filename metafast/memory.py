"""What the graph of a training step keeps until its backward pass, and how many tasks fit into a budget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from metafast.data import Episodes
from metafast.inner_loop import Recomputed, replayed
from metafast.second_order import nodes_of

#: A backward pass has gradients beside what the graph keeps: peaks of 1.4 to 2.8 times the graph were measured
#: (benchmarks/memory.py).
PEAK_OVER_GRAPH = 3


class Memory(NamedTuple):
    """The memory that a graph keeps as a line in the number of its tasks, in bytes.

    Attributes:
        base: without any task.
        per_task: of each task.
    """

    base: int
    per_task: int

    def graph(self, tasks: int) -> int:
        """Of so many tasks at once, until their backward pass."""
        return self.base + tasks * self.per_task

    def peak(self, tasks: int) -> int:
        """The most that forward and backward of so many tasks at once are expected to take, three times the graph."""
        return PEAK_OVER_GRAPH * self.graph(tasks)

    def tasks(self, budget: int) -> int:
        """How many tasks at once stay within ``budget`` bytes by :meth:`peak`, at least 1."""
        return max(1, (budget // PEAK_OVER_GRAPH - self.base) // max(self.per_task, 1))


def predicted_memory(learner: nn.Module, episodes: Episodes) -> Memory:
    """What a training call of ``learner`` keeps for its backward pass, from calls with one task and with two.

    It counts what the graph refers to: activations, the parameters of each inner step, and where steps are recomputed
    the graph of one of them; not the weights and the optimiser's state. The learner's buffers and the random numbers
    are left as they were.

    Args:
        learner: ``learner(episodes) -> Outcome``.
        episodes: at least one task, of the sizes of training.

    Raises:
        ValueError: no tasks.
    """
    if episodes.tasks == 0:
        raise ValueError("episodes: expected at least one task, got none")
    first, second = (_step_bytes(learner, _tasks(episodes, count)) for count in (1, 2))
    return Memory(max(0, 2 * first - second), max(0, second - first))


def _tasks(episodes: Episodes, count: int) -> Episodes:
    """So many of the tasks in memory of their own, the first one again where there are fewer."""
    chosen = [min(k, episodes.tasks - 1) for k in range(count)]
    support_x, support_y, query_x, query_y = (
        torch.stack([part[k] for k in chosen])
        for part in (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
    )
    return Episodes(support_x, support_y, query_x, query_y, episodes.ways)


def _step_bytes(learner: nn.Module, episodes: Episodes) -> int:
    buffers = {name: value.clone() for name, value in learner.named_buffers()}
    devices = [episodes.device.index or 0] if episodes.device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        kept = graph_bytes([learner(episodes).loss])
    with torch.no_grad():
        for name, value in learner.named_buffers():
            value.copy_(buffers[name])
    return kept


def graph_bytes(ends: Iterable[Tensor]) -> int:
    """Bytes of all tensors that the graph of these keeps, each storage once, and of the largest recomputed part."""
    seen: dict[tuple[torch.device, int], int] = {}
    again = 0
    for node in nodes_of(ends):
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            seen[storage.device, storage.data_ptr()] = storage.nbytes()
        if getattr(node, "_forward_cls", None) is Recomputed:
            _, results = replayed(node, history=False)
            again = max(again, graph_bytes(value for value in results if value.requires_grad))
            del results
    return sum(seen.values()) + again


def _saved(node: Any) -> Iterable[Tensor]:
    """The tensors that a node of the graph keeps."""
    names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
    if isinstance(node, torch._C._FunctionBase):
        names = ["saved_tensors"]
    for name in names:
        for value in tree_flatten(getattr(node, name))[0]:
            if isinstance(value, Tensor):
                yield value
