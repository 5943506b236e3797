"""Meta-gradients through the inner loop of an MLP: the workloads of the benchmark, and the ways to compute them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metafast import adapted_mlp, reference


@dataclass(frozen=True)
class MlpSizes:
    """``tasks`` tasks of ``rows`` support and ``queries`` query rows; more than one output: class numbers."""

    tasks: int
    rows: int
    queries: int
    steps: int
    widths: tuple[int, ...]
    rate: float

    def shrunk(self) -> MlpSizes:
        """The same shape in small."""
        return replace(
            self,
            tasks=3,
            rows=4,
            queries=5,
            steps=min(self.steps, 2),
            widths=tuple(min(w, 6) for w in self.widths),
        )

    @property
    def loss(self) -> str:
        return "mse" if self.widths[-1] == 1 else "cross_entropy"

    @property
    def flops(self) -> int:
        """18 n P for each step and 6 m P for the query, P the weights of a task."""
        weights = sum(i * o for i, o in itertools.pairwise(self.widths))
        return self.tasks * weights * (18 * self.rows * self.steps + 6 * self.queries)


def inputs(sizes: MlpSizes) -> tuple[Any, ...]:
    """Sinusoids, or rows of pixels with class numbers; then the network, of which every parameter gets its gradient."""
    g = torch.Generator().manual_seed(7)
    rows, queries = (
        torch.rand(sizes.tasks, n, sizes.widths[0], generator=g) for n in (sizes.rows, sizes.queries)
    )
    if sizes.loss == "mse":
        rows, queries = 10 * rows - 5, 10 * queries - 5
        phase = 3 * torch.rand(sizes.tasks, 1, 1, generator=g)
        targets = [(x[..., :1] + phase).sin() for x in (rows, queries)]
    else:
        classes = sizes.widths[-1]
        targets = [
            torch.rand(sizes.tasks, n, generator=g).argsort(-1) % classes for n in (sizes.rows, sizes.queries)
        ]
    pairs = list(itertools.pairwise(sizes.widths))
    weights = [torch.randn(o, i, generator=g).div(i**0.5).requires_grad_() for i, o in pairs]
    biases = [torch.randn(o, generator=g).mul(0.1).requires_grad_() for _, o in pairs]
    return sizes, rows, targets[0], queries, targets[1], *weights, *biases


Parameters = tuple[list[Tensor], list[Tensor]]


def split(parameters: tuple[Tensor, ...]) -> Parameters:
    half = len(parameters) // 2
    return list(parameters[:half]), list(parameters[half:])


def loss_of(sizes: MlpSizes, outputs: Tensor, targets: Tensor) -> Tensor:
    if sizes.loss == "mse":
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def fused(
    sizes: MlpSizes, x: Tensor, y: Tensor, query: Tensor, query_y: Tensor, *parameters: Tensor
) -> Tensor:
    weights, biases = split(parameters)
    out = adapted_mlp(x, y, query, weights, biases, sizes.rate, sizes.steps, loss=sizes.loss)
    return loss_of(sizes, out, query_y)


def exact(
    sizes: MlpSizes, x: Tensor, y: Tensor, query: Tensor, query_y: Tensor, *parameters: Tensor
) -> Tensor:
    weights, biases = split(parameters)
    out = reference.adapted_mlp(x, y, query, weights, biases, sizes.rate, sizes.steps, loss=sizes.loss)
    return loss_of(sizes, out, query_y)


def inner_loop(gradient: Callable[..., Parameters]) -> Callable[..., Tensor]:
    """The query loss of one task after steps along ``gradient(loss, parameters)``."""

    def task(
        sizes: MlpSizes, own: Parameters, x: Tensor, y: Tensor, query: Tensor, query_y: Tensor
    ) -> Tensor:
        def loss(own: Parameters) -> Tensor:
            return loss_of(sizes, reference.mlp(x, *own), y)

        for _ in range(sizes.steps):
            change = gradient(loss, own)
            own = tuple(  # type: ignore[assignment]
                [p - sizes.rate * g for p, g in zip(*pair, strict=True)]
                for pair in zip(own, change, strict=True)
            )
        return loss_of(sizes, reference.mlp(query, *own), query_y)

    return task


def recorded_gradient(loss: Callable[[Parameters], Tensor], own: Parameters) -> Parameters:
    return split(torch.autograd.grad(loss(own), [*own[0], *own[1]], create_graph=True))


def mapped(
    sizes: MlpSizes, x: Tensor, y: Tensor, query: Tensor, query_y: Tensor, *parameters: Tensor
) -> Tensor:
    """torch.func: vmap over the tasks of grad in the inner loop."""
    task = inner_loop(lambda loss, own: torch.func.grad(loss)(own))
    losses = torch.vmap(lambda *data: task(sizes, split(parameters), *data))(x, y, query, query_y)
    return losses.mean()


def looped(
    sizes: MlpSizes, x: Tensor, y: Tensor, query: Tensor, query_y: Tensor, *parameters: Tensor
) -> Tensor:
    """One task after the other, as in learn2learn: a clone of the parameters, recorded steps."""
    task = inner_loop(recorded_gradient)
    total = 0.0
    for data in zip(x, y, query, query_y, strict=True):
        own = split(tuple(p.clone() for p in parameters))
        total = total + task(sizes, own, *data)
    return total / sizes.tasks  # type: ignore[return-value]
