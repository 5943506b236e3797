"""The inner loop of the MLP workloads in the libraries that metafast replaces, each in its own documented way.

They are no dependencies: ``pip install -r benchmarks/peers.txt`` installs those that still install. A library that is
not there is listed as such. Each takes the tasks one after the other.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inner_mlp import MlpSizes, loss_of


def network(sizes: MlpSizes, parameters: tuple[Tensor, ...]) -> nn.Sequential:
    """The module whose parameters these tensors are."""
    half = len(parameters) // 2
    modules: list[nn.Module] = []
    for (inputs, outputs), weight, bias in zip(
        pairwise(sizes.widths), parameters[:half], parameters[half:], strict=True
    ):
        layer = nn.Linear(inputs, outputs, device="meta")
        # Not new leaves: the gradient is wanted for the given tensors.
        layer._parameters.update(weight=weight, bias=bias)  # type: ignore[dict-item]
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def higher_loop(
    sizes: MlpSizes, x: Tensor, y: Tensor, query: Tensor, query_y: Tensor, *parameters: Tensor
) -> Tensor:
    import higher  # type: ignore[import-not-found, unused-ignore]

    net = network(sizes, parameters)
    inner = torch.optim.SGD(net.parameters(), lr=sizes.rate)
    total: Any = 0.0
    for task_x, task_y, task_query, task_query_y in zip(x, y, query, query_y, strict=True):
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (adapted, steps):
            for _ in range(sizes.steps):
                steps.step(loss_of(sizes, adapted(task_x), task_y))
            total = total + loss_of(sizes, adapted(task_query), task_query_y)
    result: Tensor = total / sizes.tasks
    return result


def torchopt_loop(
    sizes: MlpSizes, x: Tensor, y: Tensor, query: Tensor, query_y: Tensor, *parameters: Tensor
) -> Tensor:
    import torchopt  # type: ignore[import-not-found, unused-ignore]

    net = network(sizes, parameters)
    inner = torchopt.MetaSGD(net, lr=sizes.rate)
    before = (
        torchopt.extract_state_dict(net, by="reference"),
        torchopt.extract_state_dict(inner, by="reference"),
    )
    total: Any = 0.0
    for task_x, task_y, task_query, task_query_y in zip(x, y, query, query_y, strict=True):
        for _ in range(sizes.steps):
            inner.step(loss_of(sizes, net(task_x), task_y))
        total = total + loss_of(sizes, net(task_query), task_query_y)
        torchopt.recover_state_dict(net, before[0])
        torchopt.recover_state_dict(inner, before[1])
    result: Tensor = total / sizes.tasks
    return result


def learn2learn_loop(
    sizes: MlpSizes, x: Tensor, y: Tensor, query: Tensor, query_y: Tensor, *parameters: Tensor
) -> Tensor:
    import learn2learn  # type: ignore[import-not-found, unused-ignore]

    learner = learn2learn.algorithms.MAML(network(sizes, parameters), lr=sizes.rate)
    total: Any = 0.0
    for task_x, task_y, task_query, task_query_y in zip(x, y, query, query_y, strict=True):
        clone = learner.clone()
        for _ in range(sizes.steps):
            clone.adapt(loss_of(sizes, clone(task_x), task_y))
        total = total + loss_of(sizes, clone(task_query), task_query_y)
    result: Tensor = total / sizes.tasks
    return result
