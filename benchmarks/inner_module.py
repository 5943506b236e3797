"""Meta-gradients through the inner loop of a network with BatchNorm: the workloads, and the ways to compute them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast import MLP, Conv4, inner_loop


@dataclass(frozen=True)
class ModuleSizes:
    """5-way tasks with ``shots`` support rows and ``queries`` query rows for each class; images of ``size`` pixels."""

    tasks: int
    shots: int
    queries: int
    steps: int
    #: Channels of Conv4; None: the MLP of the MAML paper, with BatchNorm.
    channels: int | None = 64
    hidden: tuple[int, ...] = (256, 128, 64, 64)
    size: int = 28
    rate: float = 0.01
    ways: int = 5

    def shrunk(self) -> ModuleSizes:
        """The same shape in small."""
        channels = None if self.channels is None else 3
        return replace(self, tasks=2, shots=2, queries=2, steps=2, channels=channels, hidden=(6, 5), size=16)


#: Those that :func:`network` has made; torch.compile would trace through a cache of functools.
_NETWORKS: dict[ModuleSizes, nn.Sequential] = {}


def network(sizes: ModuleSizes) -> nn.Sequential:
    if sizes not in _NETWORKS:
        torch.manual_seed(3)
        if sizes.channels is None:
            _NETWORKS[sizes] = MLP((sizes.size**2, *sizes.hidden, sizes.ways), batch_norm=True)
        else:
            encoder = Conv4(1, sizes.channels)
            _NETWORKS[sizes] = nn.Sequential(encoder, nn.Linear(encoder.features(sizes.size), sizes.ways))
    return _NETWORKS[sizes]


def inputs(sizes: ModuleSizes) -> tuple[Any, ...]:
    """Rows and labels of support and query, then the parameters, which get gradients; not so the biases before a
    BatchNorm, whose gradients are 0 but for roundings."""
    g = torch.Generator().manual_seed(7)
    data = []
    for rows in (sizes.shots, sizes.queries):
        data.append(torch.rand(sizes.tasks, sizes.ways * rows, 1, sizes.size, sizes.size, generator=g))
        data.append(torch.arange(sizes.ways).repeat(rows).expand(sizes.tasks, -1).contiguous())
    named = list(network(sizes).named_parameters())
    shifts = {named[k][0] for k in range(1, len(named) - 2, 4)}
    parameters = [value.detach().clone().requires_grad_(name not in shifts) for name, value in named]
    return sizes, *data, *parameters


def fused(
    sizes: ModuleSizes,
    x: Tensor,
    y: Tensor,
    query: Tensor,
    query_y: Tensor,
    *parameters: Tensor,
    **options: Any,
) -> Tensor:
    module = network(sizes)
    own = dict(zip((name for name, _ in module.named_parameters()), parameters, strict=True))
    adapted = inner_loop(module, x, y, sizes.rate, sizes.steps, parameters=own, **options)
    return F.cross_entropy(adapted(query).flatten(0, 1), query_y.flatten())


recomputed = functools.partial(fused, recompute=True)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, True)


def written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch's own has a wrong second derivative under vmap of grad (pytorch/functorch#534)."""
    over = [k for k in range(x.dim()) if k != 1]
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    shape = [1, -1, *[1] * (x.dim() - 2)]
    return (x - mean) * (variance + 1e-5).rsqrt() * weight.view(shape) + bias.view(shape)


def outputs(
    sizes: ModuleSizes, parameters: tuple[Tensor, ...], x: Tensor, norm: Callable[..., Tensor]
) -> Tensor:
    """The network in plain PyTorch."""
    *layers, weight, bias = parameters
    if sizes.channels is None:
        x = x.flatten(1)
    for k in range(0, len(layers), 4):
        if sizes.channels is None:
            x = F.relu(norm(F.linear(x, *layers[k : k + 2]), *layers[k + 2 : k + 4]))
        else:
            x = F.conv2d(x, *layers[k : k + 2], padding=1)
            x = F.max_pool2d(F.relu(norm(x, *layers[k + 2 : k + 4])), 2)
    return F.linear(x.flatten(1), weight, bias)


def task_loss(
    sizes: ModuleSizes,
    parameters: tuple[Tensor, ...],
    data: tuple[Tensor, ...],
    norm: Callable[..., Tensor],
    gradient: Callable[..., tuple[Tensor, ...]],
) -> Tensor:
    """The query loss of one task after steps along ``gradient(loss, parameters)``."""
    x, y, query, query_y = data

    def loss(own: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(outputs(sizes, own, x, norm), y)

    for _ in range(sizes.steps):
        change = gradient(loss, parameters)
        parameters = tuple(p - sizes.rate * g for p, g in zip(parameters, change, strict=True))
    return F.cross_entropy(outputs(sizes, parameters, query, norm), query_y)


def mapped(sizes: ModuleSizes, *tensors: Tensor) -> Tensor:
    """torch.func: vmap over the tasks of grad in the inner loop."""

    def of_task(*data: Tensor) -> Tensor:
        return task_loss(sizes, tensors[4:], data, written_out, lambda loss, own: torch.func.grad(loss)(own))

    return torch.vmap(of_task)(*tensors[:4]).mean()


def recorded(loss: Callable[..., Tensor], own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = tuple(p if p.requires_grad else p.detach().requires_grad_() for p in own)
    return torch.autograd.grad(loss(leaves), leaves, create_graph=True)


def looped(sizes: ModuleSizes, *tensors: Tensor) -> Tensor:
    """One task after the other, as in learn2learn: a clone of the parameters, recorded steps."""
    total = tensors[4].new_zeros(())
    for data in zip(*tensors[:4], strict=True):
        own = tuple(p.clone() for p in tensors[4:])
        total = total + task_loss(sizes, own, data, batch_norm, recorded)
    return total / sizes.tasks
