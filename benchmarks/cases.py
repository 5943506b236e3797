"""Every benchmark case, once: its inputs, our operator, the competitors, the correctness check and the goals.

``benchmarks.ratios`` times the variants of a case interleaved and decides the goals; ``pytest benchmarks``
times the same variants one by one. A new case is one more entry of ``CASES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import encoder, episodes, inner_mlp, inner_module, peers, task_heads
from metafast import (
    adapted_logits,
    pairwise_distance,
    prototypes,
    prototypical_loss,
    reference,
    ridge_logits,
    sgd_update,
)

OURS = "metafast"

#: Largest error of a variant relative to the largest entry of the float64 result; float32 stays below 1e-6.
TOLERANCE = 5e-6

FLOAT_BYTES = 4

Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """``tasks`` episodes of ``ways`` classes with ``shots`` support and ``queries`` query rows each."""

    tasks: int = 32
    ways: int = 5
    shots: int = 5
    queries: int = 15
    features: int = 64

    @property
    def support_rows(self) -> int:
        return self.ways * self.shots

    @property
    def query_rows(self) -> int:
        return self.ways * self.queries

    def shrunk(self) -> Sizes:
        """The same shape in small."""
        limits = {"tasks": 2, "ways": 3, "shots": 2, "queries": 2, "features": 7}
        return replace(self, **{name: min(limit, getattr(self, name)) for name, limit in limits.items()})


@dataclass(frozen=True)
class Inputs:
    """What every variant of a case receives: the arguments, and the gradient that comes in."""

    arguments: tuple[Any, ...]
    upstream: Tensor | None = None

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        return tuple(a for a in self.arguments if isinstance(a, Tensor) and a.requires_grad)

    def each(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        """``function`` of every tensor, as leaves of their own."""

        def convert(argument: Any) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            return function(argument.detach()).requires_grad_(argument.requires_grad)

        return Inputs(tuple(map(convert, self.arguments)), convert(self.upstream))

    def double(self) -> Inputs:
        """The same inputs in float64."""
        return self.each(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def forward_backward(function: Callable[..., Tensor], inputs: Inputs) -> Call:
    """A call of ``function`` and its backward: ``(output, gradient of each differentiable argument)``."""
    differentiable = inputs.differentiable

    def call() -> tuple[Tensor, ...]:
        output = function(*inputs.arguments)
        return output, *torch.autograd.grad(output, differentiable, inputs.upstream)

    return call


@dataclass(frozen=True)
class Variant:
    """One way to do a case's work: ``prepare(function, inputs)`` gives the call that is timed."""

    name: str
    function: Callable[..., Any]
    prepare: Callable[[Callable[..., Any], Inputs], Call] = forward_backward
    compiled: bool = False
    #: False for a yardstick that does other work on purpose.
    checked: bool = True
    #: False: too many kernels for the CUDA graph that times them on a GPU.
    on_gpu: bool = True
    #: Another library's own loop; it need not be installed.
    peer: bool = False

    def lacks(self, error: Exception) -> bool:
        """Is it this variant's compiler or library that is missing, no mistake here or in metafast?"""
        return self.compiled or (self.peer and isinstance(error, ImportError))

    def calls(self, copies: Sequence[Inputs], compiler: Callable[..., Any] = torch.compile) -> list[Call]:
        """The same work on each of several copies of the inputs."""
        function = compiler(self.function, fullgraph=True, dynamic=False) if self.compiled else self.function
        return [self.prepare(function, inputs) for inputs in copies]

    def call(self, inputs: Inputs, compiler: Callable[..., Any] = torch.compile) -> Call:
        return self.calls([inputs], compiler)[0]


@dataclass(frozen=True)
class Goal:
    """What our time is held against: the fastest variant of ``against``.

    The ratio is their time over ours, to be at least ``gate`` and, better, ``stretch``; with ``at_most`` it
    is ours over theirs, to be at most these.
    """

    against: tuple[str, ...]
    gate: float
    stretch: float | None = None
    at_most: bool = False


@dataclass(frozen=True)
class Case:
    """One workload. The first variant is ours; ``check(inputs)`` gives a function from result to error."""

    name: str
    title: str
    sizes: Any
    #: Sizes of a correctness test of milliseconds.
    tiny: Any
    inputs: Callable[[Any], Inputs]
    check: Callable[[Inputs], Callable[[Any], float]]
    variants: tuple[Variant, ...]
    goals: tuple[Goal, ...]
    #: Least bytes to and from cold caches and least arithmetic of a call; 0 where the case is not about them.
    traffic: int = 0
    flops: int = 0
    #: Episodes that a call builds.
    episodes: int = 0
    quick: bool = False
    #: Of its results' errors; larger where roundings choose between pixels.
    tolerance: float = TOLERANCE


def relative_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest error of any result relative to the largest entry expected; NaN and wrong shapes never pass."""
    if len(results) != len(expected):
        return float("inf")
    errors = []
    for result, wanted in zip(results, expected, strict=True):
        value = result.detach()
        if value.shape != wanted.shape:
            return float("inf")
        scale = wanted.abs().max()
        errors.append((value.double() - wanted).abs().max() / torch.where(scale > 0, scale, 1.0))
    return float(torch.stack(errors).max())


def against_float64(function: Callable[..., Tensor]) -> Callable[[Inputs], Callable[[Any], float]]:
    """A check of values and gradients against ``function`` in float64."""

    def check(inputs: Inputs) -> Callable[[Any], float]:
        expected = tuple(t.detach() for t in forward_backward(function, inputs.double())())
        return lambda results: relative_error(results, expected)

    return check


def shuffled_labels(tasks: int, ways: int, per_class: int, generator: torch.Generator) -> Tensor:
    """Every class ``per_class`` times in each task, in random order: ``[T, ways * per_class]``."""
    order = torch.rand(tasks, ways * per_class, generator=generator).argsort(-1)
    return torch.arange(ways).repeat_interleave(per_class)[order]


def head_inputs(sizes: Sizes) -> Inputs:
    """Clusters of unit size, so that the softmax is not saturated and no gradient is a denormal number."""
    g = torch.Generator().manual_seed(0)
    support_labels = shuffled_labels(sizes.tasks, sizes.ways, sizes.shots, g)
    query_labels = shuffled_labels(sizes.tasks, sizes.ways, sizes.queries, g)
    centres = torch.randn(sizes.tasks, sizes.ways, sizes.features, generator=g)

    def features(labels: Tensor) -> Tensor:
        own_centre = centres.gather(1, labels.unsqueeze(-1).expand(-1, -1, sizes.features))
        noise = torch.randn(own_centre.shape, generator=g)
        return ((own_centre + noise) / math.sqrt(sizes.features)).requires_grad_()

    return Inputs(
        (features(support_labels), support_labels, features(query_labels), query_labels, sizes.ways)
    )


def anil_inputs(steps: int) -> Callable[[Sizes], Inputs]:
    """The arguments of ANIL's head: everything but the labels gets its gradient, the rates of the steps too."""

    def inputs(sizes: Sizes) -> Inputs:
        g = torch.Generator().manual_seed(4)
        support, labels, query, _, ways = head_inputs(sizes).arguments
        weight = torch.randn(ways, sizes.features, generator=g) / math.sqrt(sizes.features)
        bias, rates = torch.randn(ways, generator=g), 0.05 + 0.1 * torch.rand(steps, generator=g)
        parameters = (t.requires_grad_() for t in (weight, bias, rates))
        upstream = torch.randn(sizes.tasks, sizes.query_rows, ways, generator=g)
        return Inputs((support, labels, query, *parameters), upstream)

    return inputs


def prototypes_inputs(sizes: Sizes) -> Inputs:
    g = torch.Generator().manual_seed(1)
    labels = shuffled_labels(sizes.tasks, sizes.ways, sizes.shots, g)
    features = torch.randn(sizes.tasks, sizes.support_rows, sizes.features, generator=g).requires_grad_()
    upstream = torch.randn(sizes.tasks, sizes.ways, sizes.features, generator=g)
    return Inputs((features, labels, sizes.ways), upstream)


def distance_inputs(sizes: Sizes) -> Inputs:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(sizes.tasks, sizes.query_rows, sizes.features, generator=g).requires_grad_()
    y = torch.randn(sizes.tasks, sizes.ways, sizes.features, generator=g).requires_grad_()
    return Inputs((x, y), torch.randn(sizes.tasks, sizes.query_rows, sizes.ways, generator=g))


def one_hot_means(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Class means by one bmm; weights laid out ``[T, C, n]``, divided before the product, are fastest."""
    classes = torch.arange(ways, device=labels.device).unsqueeze(-1)
    weight = (labels.unsqueeze(1) == classes).to(features.dtype)
    return torch.bmm(weight / weight.sum(-1, keepdim=True), features)


def index_add_means(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Class means by one index_add over all tasks at once; bincount would wait for a GPU."""
    tasks, _, d = features.shape
    row = (labels + ways * torch.arange(tasks, device=labels.device).unsqueeze(-1)).view(-1)
    count = features.new_zeros(tasks * ways).index_add(0, row, features.new_ones(row.numel()))
    per_row = count.reciprocal().unsqueeze(-1)
    total = features.new_zeros(tasks * ways, d).index_add(0, row, features.view(-1, d))
    return (total * per_row).view(tasks, ways, d)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def fused_head(
    support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, ways: int
) -> Tensor:
    return prototypical_loss(support, support_labels, query, query_labels, ways)[0].mean()


def reference_head(
    support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, ways: int
) -> Tensor:
    return reference.prototypical_loss(support, support_labels, query, query_labels, ways)[0].mean()


def cdist_head(means: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def head(
        support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, ways: int
    ) -> Tensor:
        return mean_cross_entropy(
            -torch.cdist(query, means(support, support_labels, ways)).square(), query_labels
        )

    return head


def linear_head(
    support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, ways: int
) -> Tensor:
    """The squared distance without ``|x|^2``, which softmax does not see: ``2 x p - |p|^2``."""
    centre = one_hot_means(support, support_labels, ways)
    logits = 2 * (query @ centre.transpose(1, 2)) - centre.square().sum(-1).unsqueeze(1)
    return mean_cross_entropy(logits, query_labels)


def broadcast_head(
    support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, ways: int
) -> Tensor:
    centre = one_hot_means(support, support_labels, ways)
    logits = -(query.unsqueeze(2) - centre.unsqueeze(1)).square().sum(-1)
    return mean_cross_entropy(logits, query_labels)


def looped_means(features: Tensor, labels: Tensor) -> Tensor:
    present = torch.unique(labels)
    means = features.new_zeros(len(present), features.shape[-1])
    for row, label in enumerate(present):
        means[row] = features[labels == label].mean(0)
    return means


def looped_head(episodes_of: Callable[[Tensor], Sequence[Tensor]]) -> Callable[..., Tensor]:
    """One episode after the other and one class after the other: the shape of learn2learn's classifier."""

    def head(
        support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, ways: int
    ) -> Tensor:
        losses = []
        for x, y, x_query, y_query in zip(
            *map(episodes_of, (support, support_labels, query, query_labels)), strict=True
        ):
            distance = (looped_means(x, y).unsqueeze(0) - x_query.unsqueeze(1)).square().sum(-1)
            losses.append(F.cross_entropy(-distance, y_query))
        return torch.stack(losses).mean()

    return head


def by_index(batch: Tensor) -> list[Tensor]:
    """As users take episodes from a batch; the backward of each index fills a batch with zeros."""
    return [batch[task] for task in range(len(batch))]


def cdist_squared(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y).square()


def expanded_distance(x: Tensor, y: Tensor) -> Tensor:
    """``|x|^2 + |y|^2 - 2 x y`` with the cross term and one sum in a single baddbmm."""
    y_square = y.square().sum(-1).unsqueeze(1)
    return torch.baddbmm(y_square, x, y.transpose(1, 2), alpha=-2) + x.square().sum(-1, keepdim=True)


def four_calls(x: Tensor, y: Tensor) -> Tensor:
    """The yardstick of host cost: a chain of four ATen calls."""
    return x.sub(y).square().sum(-1, keepdim=True).mul(1.0)


def fused_anil(
    support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, rates: Tensor
) -> Tensor:
    return adapted_logits(support, labels, query, weight, bias, rates, len(rates))


def reference_anil(
    support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, rates: Tensor
) -> Tensor:
    return reference.adapted_logits(support, labels, query, weight, bias, rates, len(rates))


def anil_of_first_step(
    support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, rates: Tensor
) -> Tensor:
    return adapted_logits(support, labels, query, weight, bias, rates[:1], 1)


def anil_task(
    support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, rates: Tensor
) -> Tensor:
    for rate in rates.unbind():
        loss = torch.func.grad(lambda w, b: F.cross_entropy(F.linear(support, w, b), labels), (0, 1))
        to_weight, to_bias = loss(weight, bias)
        weight, bias = weight - rate * to_weight, bias - rate * to_bias
    return F.linear(query, weight, bias)


vmapped_anil = torch.func.vmap(anil_task, (0, 0, 0, None, None, None))


def anil_on_gram_matrix(
    support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, rates: Tensor
) -> Tensor:
    """The steps on the Gram matrix of the support rows, in torch's own operators."""
    n = support.shape[1]
    target = F.one_hot(labels, weight.shape[0]).to(support.dtype)
    gram = support @ support.mT + 1
    first = F.linear(support, weight, bias)
    logits, span = first, torch.zeros_like(first)
    for rate in rates.unbind():
        step = rate / n * (logits.softmax(-1) - target)
        logits, span = logits - gram @ step, span + step
    weight, bias = weight - span.mT @ support, bias - span.sum(1)
    return torch.baddbmm(bias.unsqueeze(1), query, weight.mT)


def looped_anil(
    support: Tensor, labels: Tensor, query: Tensor, weight: Tensor, bias: Tensor, rates: Tensor
) -> Tensor:
    """One task after the other, each step by torch.autograd: the shape of learn2learn's MAML."""
    outputs = []
    for x, y, q in zip(support.unbind(), labels.unbind(), query.unbind(), strict=True):
        own_weight, own_bias = weight.clone(), bias.clone()
        for rate in rates.unbind():
            loss = F.cross_entropy(F.linear(x, own_weight, own_bias), y)
            to_weight, to_bias = torch.autograd.grad(loss, (own_weight, own_bias), create_graph=True)
            own_weight, own_bias = own_weight - rate * to_weight, own_bias - rate * to_bias
        outputs.append(F.linear(q, own_weight, own_bias))
    return torch.stack(outputs)


def ridge_inputs(sizes: Sizes, learned: bool = True) -> Inputs:
    """Features as ``head_inputs`` has them, and the three scalars, which R2-D2 learns."""
    support, labels, query, _, ways = head_inputs(sizes).arguments
    scalars = [torch.tensor(value, requires_grad=True) if learned else value for value in (1.0, 10.0, 0.1)]
    g = torch.Generator().manual_seed(3)
    upstream = torch.randn(sizes.tasks, sizes.query_rows, ways, generator=g)
    return Inputs((support, labels, query, *scalars, ways), upstream)


def fused_ridge(
    support: Tensor, labels: Tensor, query: Tensor, ridge: Tensor, scale: Tensor, offset: Tensor, ways: int
) -> Tensor:
    return ridge_logits(support, labels, query, ridge, scale, offset, num_classes=ways)


def eager_ridge(solve: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def head(
        support: Tensor,
        labels: Tensor,
        query: Tensor,
        ridge: Tensor,
        scale: Tensor,
        offset: Tensor,
        ways: int,
    ) -> Tensor:
        identity = torch.eye(support.shape[1], dtype=support.dtype, device=support.device)
        targets = F.one_hot(labels, ways).to(support.dtype)
        alpha = solve(support @ support.mT + ridge * identity, targets)
        return scale * (query @ (alpha.mT @ support).mT) + offset

    return head


def cholesky_solve(matrix: Tensor, targets: Tensor) -> Tensor:
    return torch.cholesky_solve(targets, torch.linalg.cholesky_ex(matrix)[0])


def inverse_product(matrix: Tensor, targets: Tensor) -> Tensor:
    return torch.linalg.inv(matrix) @ targets


@dataclass(frozen=True)
class UpdateSizes:
    """``tasks`` copies of a Conv4's parameters, with a linear head of ``ways`` classes."""

    tasks: int = 32
    channels: int = 64
    ways: int = 5

    def shapes(self) -> list[tuple[int, ...]]:
        blocks = [
            shape
            for before in (1, *(self.channels,) * 3)
            for shape in ((self.channels, before, 3, 3), *((self.channels,),) * 3)
        ]
        return [*blocks, (self.ways, 25 * self.channels), (self.ways,)]


def update_inputs(per_element: bool) -> Callable[[UpdateSizes], Inputs]:
    """Parameters, their gradients and the upstream gradients of every task, then the rates."""

    def make(sizes: UpdateSizes) -> Inputs:
        g = torch.Generator().manual_seed(4)
        shapes = sizes.shapes()
        stacked = [torch.randn(sizes.tasks, *shape, generator=g) for _ in range(3) for shape in shapes]
        leaves = [t.requires_grad_(k < 2 * len(shapes)) for k, t in enumerate(stacked)]
        rates = (
            [torch.rand(shape, generator=g).requires_grad_() for shape in shapes] if per_element else [0.1]
        )
        return Inputs((*leaves, *rates))

    return make


def update_call(function: Callable[..., Sequence[Tensor]], inputs: Inputs) -> Call:
    """A call of ``function(params, grads, lr)`` and its backward."""
    count = len(UpdateSizes().shapes())
    params, grads, upstream = (list(inputs.arguments[k * count : (k + 1) * count]) for k in range(3))
    rates = list(inputs.arguments[3 * count :])
    differentiable = inputs.differentiable

    def call() -> tuple[Tensor, ...]:
        out = function(params, grads, rates if len(rates) > 1 else rates[0])
        return *out, *torch.autograd.grad(out, differentiable, upstream)

    return call


def looped_update(params: list[Tensor], grads: list[Tensor], lr: Any) -> list[Tensor]:
    """One task after the other, as learn2learn's update of a cloned module."""
    rates = lr if isinstance(lr, list) else [lr] * len(params)
    tasks = zip(*(p.unbind() for p in params), strict=True), zip(*(g.unbind() for g in grads), strict=True)
    stepped = [
        [p - rate * g for p, g, rate in zip(own, slopes, rates, strict=True)]
        for own, slopes in zip(*tasks, strict=True)
    ]
    return [torch.stack(values) for values in zip(*stepped, strict=True)]


def subtracted_update(params: list[Tensor], grads: list[Tensor], lr: float) -> list[Tensor]:
    return [torch.sub(p, g, alpha=lr) for p, g in zip(params, grads, strict=True)]


def foreach_update(params: list[Tensor], grads: list[Tensor], lr: float) -> list[Tensor]:
    return list(torch._foreach_add(params, grads, alpha=-lr))


def update_check(inputs: Inputs) -> Callable[[Any], float]:
    expected = tuple(t.detach() for t in update_call(reference.sgd_update, inputs.double())())
    return lambda results: relative_error(results, expected)


def builder(function: Callable[..., Call], inputs: Inputs) -> Call:
    """What builds data has no gradient and makes its own call."""
    return function(*inputs.arguments)


def head_case(features: int, goals: tuple[Goal, ...]) -> Case:
    sizes = Sizes(features=features)
    rows = sizes.support_rows + sizes.query_rows
    return Case(
        name=f"prototypical-head-d{features}",
        title=f"prototypical head, d = {features}",
        sizes=sizes,
        tiny=sizes.shrunk(),
        inputs=head_inputs,
        check=against_float64(reference_head),
        variants=(
            Variant(OURS, fused_head),
            Variant("torch.cdist, one-hot means", cdist_head(one_hot_means)),
            Variant("torch.cdist, index_add means", cdist_head(index_add_means)),
            Variant("linear form", linear_head),
            Variant("torch.compile, linear form", linear_head, compiled=True),
            Variant("torch.compile, broadcast form", broadcast_head, compiled=True),
            Variant("per-class Python loop", looped_head(torch.unbind)),
            Variant("per-class Python loop, indexed", looped_head(by_index)),
        ),
        goals=goals,
        # The features are read once and their gradients written once.
        traffic=2 * sizes.tasks * rows * features * FLOAT_BYTES,
        flops=sizes.tasks * (6 * sizes.query_rows * sizes.ways + 2 * sizes.support_rows) * features,
        quick=True,
    )


def prototypes_case(features: int, goal: Goal) -> Case:
    sizes = Sizes(features=features)
    return Case(
        name=f"prototypes-d{features}",
        title=f"prototypes, d = {features}",
        sizes=sizes,
        tiny=sizes.shrunk(),
        inputs=prototypes_inputs,
        check=against_float64(reference.prototypes),
        variants=(
            Variant(OURS, prototypes),
            Variant("one-hot bmm", one_hot_means),
            Variant("index_add", index_add_means),
        ),
        goals=(goal,),
        # Rows in and means out, then the means' gradient in and the rows' gradient out.
        traffic=2 * sizes.tasks * (sizes.support_rows + sizes.ways) * features * FLOAT_BYTES,
        flops=2 * sizes.tasks * sizes.support_rows * features,
        quick=True,
    )


def distance_case(features: int, goal: Goal) -> Case:
    sizes = Sizes(features=features)
    rows, columns = sizes.query_rows, sizes.ways
    return Case(
        name=f"pairwise-distance-d{features}",
        title=f"pairwise_distance, sqeuclidean, d = {features}",
        sizes=sizes,
        tiny=sizes.shrunk(),
        inputs=distance_inputs,
        check=against_float64(reference.pairwise_distance),
        variants=(
            Variant(OURS, pairwise_distance),
            Variant("torch.cdist, squared", cdist_squared),
            Variant("expanded form, baddbmm", expanded_distance),
        ),
        goals=(goal,),
        # Rows are read by the forward pass, read again by the backward pass and their gradients written.
        traffic=sizes.tasks * (3 * (rows + columns) * features + 2 * rows * columns) * FLOAT_BYTES,
        flops=6 * sizes.tasks * rows * columns * features,
        quick=True,
    )


def anil_case(features: int, steps: int, goals: tuple[Goal, ...], compiled: bool = True) -> Case:
    sizes = Sizes(features=features)
    n, m, ways = sizes.support_rows, sizes.query_rows, sizes.ways
    variants = [
        Variant(OURS, fused_anil),
        Variant("torch.func.vmap", vmapped_anil),
        Variant("torch.compile, torch.func.vmap", vmapped_anil, compiled=True),
        Variant("Gram matrix, eager", anil_on_gram_matrix),
        Variant("loop over tasks", looped_anil, on_gpu=False),
        Variant("metafast, one step", anil_of_first_step, checked=False),
    ]
    return Case(
        name=f"anil-d{features}-K{steps}",
        title=f"ANIL head, d = {features}, K = {steps}",
        sizes=sizes,
        tiny=sizes.shrunk(),
        inputs=anil_inputs(steps),
        check=against_float64(reference_anil),
        variants=tuple(v for v in variants if compiled or not v.compiled),
        goals=goals,
        # The features are read by the forward pass, read again by the backward pass and their gradients written.
        traffic=3 * sizes.tasks * (n + m) * features * FLOAT_BYTES,
        flops=sizes.tasks
        * ((12 * n * ways + 3 * n * n + 6 * m * ways) * features + 6 * steps * n * n * ways),
        quick=steps == 5,
    )


def ridge_case(features: int) -> Case:
    sizes = Sizes(features=features)
    rows = sizes.support_rows + sizes.query_rows
    n, ways = sizes.support_rows, sizes.ways
    eager = ("eager, cholesky_solve", "eager, linalg.solve", "eager, inverse")
    solvers = (cholesky_solve, torch.linalg.solve, inverse_product)
    return Case(
        name=f"ridge-d{features}",
        title=f"ridge head, d = {features}",
        sizes=sizes,
        tiny=sizes.shrunk(),
        inputs=ridge_inputs,
        check=against_float64(eager_ridge(inverse_product)),
        variants=(
            Variant(OURS, fused_ridge),
            *(Variant(name, eager_ridge(solve)) for name, solve in zip(eager, solvers, strict=True)),
        ),
        goals=(Goal(eager, 5.0, 7.0),),
        # The features are read by either pass, and their gradients written once.
        traffic=3 * sizes.tasks * rows * features * FLOAT_BYTES,
        flops=sizes.tasks * (n * n + 12 * n * ways + 6 * sizes.query_rows * ways) * features,
        quick=True,
    )


def update_case(per_element: bool) -> Case:
    sizes = UpdateSizes()
    numbers = sizes.tasks * sum(math.prod(shape) for shape in sizes.shapes())
    stacked = {"stacked autograd": reference.sgd_update}
    if not per_element:
        stacked |= {"stacked, torch.sub": subtracted_update, "stacked, foreach": foreach_update}
    return Case(
        name="sgd-update-elements" if per_element else "sgd-update",
        title="differentiable update of Conv4-64, " + ("a rate per element" if per_element else "one rate"),
        sizes=sizes,
        tiny=replace(sizes, tasks=2, channels=3, ways=2),
        inputs=update_inputs(per_element),
        check=update_check,
        variants=(
            Variant(OURS, sgd_update, prepare=update_call),
            *(Variant(name, function, prepare=update_call) for name, function in stacked.items()),
            Variant("loop over tasks", looped_update, prepare=update_call, on_gpu=False),
        ),
        goals=(Goal(("stacked autograd",), 1.5, 2.5), Goal(("loop over tasks",), 6.0, 10.0)),
        # Parameters and gradients in, parameters out; upstream gradients in, gradients out.
        traffic=5 * numbers * FLOAT_BYTES,
    )


def host_cost_case(
    name: str,
    inputs: Callable[[Sizes], Inputs],
    check: Callable[..., Any],
    ours: Callable[..., Any],
    chain: Callable[..., Any],
) -> Case:
    """Host time of one recorded call and its backward: tensors of one element leave nothing to compute."""
    sizes = Sizes(tasks=1, ways=1, shots=1, queries=1, features=1)
    return Case(
        name=f"host-cost-{name.replace('_', '-')}",
        title=f"host cost of {name}",
        sizes=sizes,
        tiny=sizes,
        inputs=inputs,
        check=check,
        variants=(Variant(OURS, ours), Variant("chain of four ATen calls", chain, checked=False)),
        goals=(Goal(("chain of four ATen calls",), gate=1.2, stretch=0.8, at_most=True),),
    )


def episodes_case(title: str) -> Case:
    sizes = episodes.SIZES[title]
    return Case(
        name=f"episodes-{title.replace(' ', '-')}",
        title=f"building episodes, {title}",
        sizes=sizes,
        tiny=replace(sizes, ways=3, shots=2, queries=2, tasks=2, classes=5),
        inputs=lambda sizes: Inputs((sizes,)),
        check=lambda inputs: lambda batch: float(episodes.wrong(batch, *inputs.arguments)),
        variants=(
            Variant(OURS, episodes.ours, prepare=builder),
            Variant("loop over tasks, DataLoader", episodes.loop_dataloader, prepare=builder),
        ),
        goals=(Goal(("loop over tasks, DataLoader",), 20.0),),
        episodes=sizes.tasks,
    )


def mlp_case(name: str, title: str, sizes: inner_mlp.MlpSizes, goals: tuple[Goal, ...]) -> Case:
    return Case(
        name=name,
        title=title,
        sizes=sizes,
        tiny=sizes.shrunk(),
        inputs=lambda sizes: Inputs(inner_mlp.inputs(sizes)),
        check=against_float64(inner_mlp.exact),
        variants=(
            Variant(OURS, inner_mlp.fused),
            Variant("torch.func vmap", inner_mlp.mapped),
            Variant("torch.compile, torch.func vmap", inner_mlp.mapped, compiled=True),
            Variant("per-task Python loop", inner_mlp.looped, on_gpu=False),
            *(
                Variant(name, loop, on_gpu=False, peer=True)
                for name, loop in (
                    ("higher", peers.higher_loop),
                    ("TorchOpt", peers.torchopt_loop),
                    ("learn2learn", peers.learn2learn_loop),
                )
            ),
        ),
        goals=goals,
        flops=sizes.flops,
    )


def sinusoid_sizes(steps: int) -> inner_mlp.MlpSizes:
    return inner_mlp.MlpSizes(25, 10, 10, steps, (1, 40, 40, 1), 0.01)


def sinusoid_case(steps: int, gates: tuple[float, ...], stretches: tuple[float, ...]) -> Case:
    rivals = ("torch.func vmap", "torch.compile, torch.func vmap", "per-task Python loop")
    return mlp_case(
        f"maml-sinusoid-k{steps}",
        f"second-order MAML, sinusoid, K = {steps}",
        sinusoid_sizes(steps),
        tuple(Goal((r,), g, s) for r, g, s in zip(rivals, gates, stretches, strict=True)),
    )


def omniglot_case(steps: int, gate: float, stretch: float) -> Case:
    return mlp_case(
        f"maml-omniglot-mlp-k{steps}",
        f"second-order MAML, Omniglot MLP, K = {steps}",
        inner_mlp.MlpSizes(32, 5, 75, steps, (784, 256, 128, 64, 64, 5), 0.1),
        (Goal(("torch.func vmap",), gate, stretch),),
    )


def module_case(name: str, title: str, sizes: inner_module.ModuleSizes, goals: tuple[Goal, ...]) -> Case:
    return Case(
        name=name,
        title=title,
        sizes=sizes,
        tiny=sizes.shrunk(),
        inputs=lambda sizes: Inputs(inner_module.inputs(sizes)),
        check=against_float64(inner_module.looped),
        variants=(
            Variant(OURS, inner_module.fused),
            Variant("metafast, steps recomputed", inner_module.recomputed),
            Variant("metafast, torch.compile", inner_module.fused, compiled=True),
            Variant("torch.func vmap", inner_module.mapped),
            Variant("per-task Python loop", inner_module.looped, on_gpu=False),
        ),
        goals=goals,
        # In float32 the steps, over five rows, turn ReLUs on and off at other places: of every variant alike.
        tolerance=0.1,
    )


def without_gradients(function: Callable[..., Tensor], inputs: Inputs) -> Call:
    """What is only evaluated."""
    return lambda: (function(*inputs.arguments),)


def fit_check(kind: str) -> Callable[[Inputs], Callable[[Any], float]]:
    def check(inputs: Inputs) -> Callable[[Any], float]:
        expected = without_gradients(task_heads.looped(task_heads.KINDS[kind]), inputs.double())()
        return lambda results: relative_error(results, expected)

    return check


def fit_case(kind: str, features: int) -> Case:
    sizes = task_heads.FitSizes(features=features)
    ways = {
        OURS: task_heads.fused,
        "all tasks' heads by autograd": task_heads.stacked,
        "loop over tasks": task_heads.looped,
    }
    return Case(
        name=f"{kind}-fit-d{features}",
        title=f"heads of {kind} for {sizes.tasks} tasks, D = {features}",
        sizes=sizes,
        tiny=sizes.shrunk(),
        inputs=lambda sizes: Inputs(task_heads.inputs(sizes)),
        check=fit_check(kind),
        variants=tuple(
            Variant(name, way(task_heads.KINDS[kind]), prepare=without_gradients, on_gpu=False)
            for name, way in ways.items()
        ),
        goals=(),
    )


_CDIST_HEADS = ("torch.cdist, one-hot means", "torch.cdist, index_add means")
_ONE = torch.ones(1, 1, 1)


def in_channels_last(function: Callable[..., Tensor], inputs: Inputs) -> Call:
    """With maps whose channels lie last in memory."""

    def turned(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    return forward_backward(function, inputs.each(turned))


def maps_case(size: int, goals: tuple[Goal, ...]) -> Case:
    sizes = encoder.MapSizes(size=size)
    numbers = sizes.images * sizes.channels * size * size
    return Case(
        name=f"norm-relu-pool-{size}",
        title=f"batch norm, ReLU and pooling, 360 x 64 x {size} x {size}",
        sizes=sizes,
        tiny=encoder.MapSizes(3, 5, 7),
        inputs=lambda sizes: Inputs(*encoder.maps(sizes)),
        check=against_float64(encoder.plain_norm),
        variants=(
            Variant(OURS, encoder.fused_norm, prepare=in_channels_last),
            Variant("metafast, contiguous", encoder.fused_norm),
            Variant("eager", encoder.plain_norm),
            Variant("eager, channels last", encoder.plain_norm, prepare=in_channels_last),
            Variant("torch.compile", encoder.plain_norm, compiled=True),
        ),
        goals=goals,
        # Maps read twice forward and twice backward, their gradient written; results, choices and gradients of results.
        traffic=numbers * (5 * FLOAT_BYTES) + numbers // 4 * (3 * FLOAT_BYTES + 3),
        # torch's sums over maps whose channels lie last have larger rounding errors.
        tolerance=1e-3,
    )


def _without_shift(prepare: Callable[..., Call]) -> Callable[..., Call]:
    """Not the gradient of the convolution's bias, which is 0 but for roundings."""

    def prepared(function: Callable[..., Tensor], inputs: Inputs) -> Call:
        call = prepare(function, inputs)
        return lambda: encoder.of_no_shift(call())

    return prepared


def block_check(inputs: Inputs) -> Callable[[Any], float]:
    expected = [t.detach() for t in _without_shift(forward_backward)(encoder.plain_block, inputs.double())()]
    return lambda results: relative_error(results, expected)


def block_case() -> Case:
    sizes = encoder.MapSizes()
    windows = sizes.images * sizes.channels * (sizes.size // 2) ** 2
    return Case(
        name="conv-block-28",
        title="first block of Conv4-64, 360 images of 28 x 28",
        sizes=sizes,
        tiny=encoder.MapSizes(3, 5, 7),
        inputs=lambda sizes: Inputs(*encoder.images_and_block(sizes)),
        check=block_check,
        variants=(
            Variant(OURS, encoder.fused_block, prepare=_without_shift(in_channels_last)),
            Variant("eager", encoder.plain_block, prepare=_without_shift(forward_backward)),
            Variant("eager, channels last", encoder.plain_block, prepare=_without_shift(in_channels_last)),
            Variant(
                "torch.compile", encoder.plain_block, compiled=True, prepare=_without_shift(forward_backward)
            ),
        ),
        goals=(),
        traffic=windows * (2 * FLOAT_BYTES + 2),
        flops=windows * 4 * 9 * 2 * 2,
        tolerance=0.01,
    )


def encoder_case(precision: torch.dtype, goals: tuple[Goal, ...]) -> Case:
    """Every side in its best layout; convolutions of half precision gain from channels that lie last."""
    sizes, half = encoder.MapSizes(), precision != torch.float32

    def check(inputs: Inputs) -> Callable[[Any], float]:
        plain = encoder.training_step(torch.float32, channels_last=False)
        expected = [t.double() for t in plain(encoder.plain_encoder, inputs.double())()]
        return lambda results: relative_error(results, expected)

    last = encoder.training_step(precision, channels_last=True)
    variants = [
        Variant(OURS, encoder.fused_encoder, prepare=last),
        Variant("eager, channels last", encoder.plain_encoder, prepare=last),
        Variant("torch.compile, channels last", encoder.plain_encoder, prepare=last, compiled=True),
    ]
    if not half:
        plain = encoder.training_step(precision, channels_last=False)
        variants.append(Variant("eager", encoder.plain_encoder, prepare=plain))
        variants.append(Variant("torch.compile", encoder.plain_encoder, prepare=plain, compiled=True))
    return Case(
        name=f"conv4-step-{'bfloat16' if half else 'float32'}",
        title=f"training step of Conv4-64, 360 images, {'bfloat16' if half else 'float32'}",
        sizes=sizes,
        tiny=encoder.MapSizes(6, 5, 17),
        inputs=lambda sizes: Inputs(*encoder.images_and_encoder(sizes)),
        check=check,
        variants=tuple(variants),
        goals=goals,
        tolerance=0.5 if half else 0.05,
    )


CASES: tuple[Case, ...] = (
    head_case(
        1600,
        (
            Goal(_CDIST_HEADS, 4.0, 7.0),
            Goal(("torch.compile, linear form",), 2.5, 4.5),
            Goal(("per-class Python loop",), 45.0, 70.0),
        ),
    ),
    head_case(
        64,
        (
            Goal(_CDIST_HEADS, 3.0, 6.0),
            Goal(("torch.compile, linear form",), 1.7, 3.5),
            Goal(("per-class Python loop",), 80.0, 140.0),
        ),
    ),
    prototypes_case(1600, Goal(("one-hot bmm", "index_add"), 2.0, 3.0)),
    prototypes_case(64, Goal(("one-hot bmm", "index_add"), 1.4, 3.0)),
    distance_case(1600, Goal(("torch.cdist, squared",), 2.5, 6.0)),
    distance_case(64, Goal(("torch.cdist, squared",), 2.5, 6.0)),
    anil_case(
        1600,
        5,
        (
            Goal(("torch.func.vmap",), 8.0, 13.0),
            Goal(("torch.compile, torch.func.vmap",), 7.0, 11.0),
            Goal(("loop over tasks",), 50.0, 80.0),
        ),
    ),
    anil_case(
        1600,
        10,
        (
            Goal(("torch.func.vmap",), 14.0, 21.0),
            Goal(("loop over tasks",), 70.0, 110.0),
            Goal(("metafast, one step",), 1.25, 1.1, at_most=True),
        ),
        compiled=False,
    ),
    anil_case(
        64,
        5,
        (
            Goal(("torch.func.vmap",), 10.0, 25.0),
            Goal(("torch.compile, torch.func.vmap",), 3.0, 8.0),
            Goal(("loop over tasks",), 90.0, 200.0),
        ),
    ),
    host_cost_case(
        "pairwise_distance",
        distance_inputs,
        against_float64(reference.pairwise_distance),
        pairwise_distance,
        four_calls,
    ),
    host_cost_case(
        "prototypes",
        prototypes_inputs,
        against_float64(reference.prototypes),
        prototypes,
        lambda features, labels, ways: four_calls(features, _ONE),
    ),
    host_cost_case(
        "prototypical_loss",
        head_inputs,
        against_float64(lambda *arguments: reference.prototypical_loss(*arguments)[0]),
        lambda *arguments: prototypical_loss(*arguments)[0],
        lambda support, support_labels, query, query_labels, ways: four_calls(support, query),
    ),
    ridge_case(1600),
    ridge_case(64),
    host_cost_case(
        "ridge_logits",
        lambda sizes: ridge_inputs(sizes, learned=False),
        against_float64(eager_ridge(inverse_product)),
        fused_ridge,
        lambda support, labels, query, *rest: four_calls(support, query),
    ),
    update_case(per_element=False),
    update_case(per_element=True),
    *map(episodes_case, episodes.SIZES),
    sinusoid_case(1, (8.0, 1.8, 75.0), (14.0, 3.0, 120.0)),
    sinusoid_case(5, (14.0, 3.0, 130.0), (24.0, 4.8, 230.0)),
    sinusoid_case(10, (14.0, 3.0, 130.0), (24.0, 4.8, 230.0)),
    omniglot_case(1, 1.7, 2.5),
    omniglot_case(5, 3.0, 4.5),
    module_case(
        "maml-conv4-k5",
        "second-order MAML, Conv4-64, 8 tasks, 5-way 1-shot 15-query, K = 5",
        inner_module.ModuleSizes(8, 1, 15, 5),
        (Goal(("torch.func vmap",), 1.4, 2.0), Goal(("per-task Python loop",), 2.0, 3.0)),
    ),
    *(
        module_case(
            f"maml-batchnorm-mlp-k{steps}",
            f"second-order MAML, Omniglot MLP with BatchNorm, 32 tasks, K = {steps}",
            inner_module.ModuleSizes(32, 1, 15, steps, channels=None),
            (Goal(("torch.func vmap",), 1.5, 2.5), Goal(("per-task Python loop",), 10.0, 20.0)),
        )
        for steps in (1, 5)
    ),
    *(fit_case(kind, features) for kind in task_heads.KINDS for features in (64, 1600)),
    maps_case(28, (Goal(("eager",), 4.5, 6.5), Goal(("torch.compile",), 4.0, 5.5))),
    maps_case(14, (Goal(("eager", "eager, channels last"), 3.0, 6.0),)),
    maps_case(7, (Goal(("eager", "eager, channels last"), 2.0, 3.0),)),
    block_case(),
    encoder_case(
        torch.float32,
        (
            Goal(("eager", "eager, channels last"), 1.5, 1.8),
            Goal(("torch.compile", "torch.compile, channels last"), 1.3, 1.6),
        ),
    ),
    encoder_case(torch.bfloat16, (Goal(("eager, channels last",), 1.25, 1.6),)),
)


def find(names: Sequence[str]) -> tuple[Case, ...]:
    """The cases whose name contains one of ``names``; all of them for an empty sequence."""
    for name in names:
        if not any(name in case.name for case in CASES):
            raise ValueError(
                f"only: no case named {name!r}; there are {', '.join(case.name for case in CASES)}"
            )
    return tuple(case for case in CASES if not names or any(name in case.name for name in names))
