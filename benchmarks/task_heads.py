"""A new head for each task by SGD, as Baseline and Baseline++ test: the workload, and the ways to compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metafast import Episodes
from metafast.learners import Baseline, BaselinePlusPlus


@dataclass(frozen=True)
class FitSizes:
    """``tasks`` tasks of ``ways`` classes with ``shots`` rows each; ``epochs`` passes over them in batches of 4."""

    tasks: int = 16
    ways: int = 5
    shots: int = 5
    queries: int = 15
    features: int = 64
    epochs: int = 20

    def shrunk(self) -> FitSizes:
        """The same shape in small."""
        return replace(self, tasks=2, ways=3, shots=2, queries=2, features=7, epochs=2)


def inputs(sizes: FitSizes) -> tuple[Any, ...]:
    """Support rows, labels, query rows, and the sizes."""
    g = torch.Generator().manual_seed(7)
    support, query = (
        torch.randn(sizes.tasks, sizes.ways * rows, sizes.features, generator=g).relu()
        for rows in (sizes.shots, sizes.queries)
    )
    return support, torch.arange(sizes.ways).repeat(sizes.shots).expand(sizes.tasks, -1), query, sizes


def learner_of(kind: type[Baseline], sizes: FitSizes) -> Baseline:
    return kind(nn.Identity(), sizes.features, epochs=sizes.epochs)


def fused(kind: type[Baseline]) -> Callable[..., Tensor]:
    def call(support: Tensor, labels: Tensor, query: Tensor, sizes: FitSizes) -> Tensor:
        answers = labels[:, :1].expand(query.shape[:2])
        return learner_of(kind, sizes)(Episodes(support, labels, query, answers, sizes.ways)).logits

    return call


def batches(learner: Baseline, orders: Tensor) -> Iterator[Tensor]:
    for order in orders:
        yield from order.split(learner.batch_size)


def stacked(kind: type[Baseline]) -> Callable[..., Tensor]:
    """All tasks' heads as one tensor, by autograd."""

    def call(support: Tensor, labels: Tensor, query: Tensor, sizes: FitSizes) -> Tensor:
        learner = learner_of(kind, sizes)
        head, orders = learner.start(support.shape[1], sizes.ways)
        head = head.to(support)
        values = {
            name: value.detach().expand(sizes.tasks, *value.shape).clone().requires_grad_()
            for name, value in head.named_parameters()
        }
        optimizer = torch.optim.SGD(values.values(), **learner.sgd)
        for rows in batches(learner, orders):
            optimizer.zero_grad()
            logits = functional_call(head, values, (support[:, rows],))
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, rows].flatten(), reduction="sum")
            (loss / len(rows)).backward()
            optimizer.step()
        return functional_call(head, values, (query,)).detach()

    return call


def looped(kind: type[Baseline]) -> Callable[..., Tensor]:
    """One task after the other, as the authors' code."""

    def call(support: Tensor, labels: Tensor, query: Tensor, sizes: FitSizes) -> Tensor:
        learner, logits = learner_of(kind, sizes), []
        for x, y, q in zip(support, labels, query, strict=True):
            head, orders = learner.start(len(x), sizes.ways)
            head = head.to(x)
            optimizer = torch.optim.SGD(head.parameters(), **learner.sgd)
            for rows in batches(learner, orders):
                optimizer.zero_grad()
                F.cross_entropy(head(x[rows]), y[rows]).backward()
                optimizer.step()
            logits.append(head(q).detach())
        return torch.stack(logits)

    return call


#: By the names of the command line.
KINDS = {"baseline": Baseline, "baseline-plus-plus": BaselinePlusPlus}
