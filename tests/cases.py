"""The one table of operators: what each computes, its reference and its inputs. The operator tests iterate over it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import metafast
from metafast import reference
from tests import simt

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Steps of the inner loops.
STEPS = 2
#: Sizes for derivative tests: n >= C, so that every class can have a support row.
SMALL = {"n": 4, "m": 3, "d": 3, "C": 2}
#: Sizes that no tile or vector divides.
ODD = {"n": 5, "m": 7, "d": 33, "C": 3}


@dataclass(frozen=True)
class Input:
    """One tensor argument: the names of its sizes (or these) after the leading dimensions, and what its entries are."""

    shape: str
    kind: str = (
        "features"  # or "far" (from 0), "unit" (rows that long, about), "positive", "labels" (class numbers)
    )
    per_task: bool = True  # False: it has no leading dimensions

    @property
    def differentiable(self) -> bool:
        return self.kind != "labels"

    def make(
        self,
        lead: Sequence[int],
        sizes: Mapping[str, int],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        sizes = {"K": STEPS, "2d": 2 * sizes["d"], "4d": 4 * sizes["d"], **sizes}
        own = (int(name) if name.isdigit() else sizes[name] for name in self.shape.split())
        shape = (*(lead if self.per_task else ()), *own)
        if self.kind == "labels":
            return shuffled_labels(shape, sizes["C"]).to(device)
        if self.kind == "positive":
            return (torch.rand(shape, dtype=torch.float64) + 0.5).to(device, dtype)
        features = torch.randn(shape, dtype=torch.float64)
        if self.kind == "unit":
            features = features / max(1, shape[-1]) ** 0.5
        return (features + features.sign() if self.kind == "far" else features).to(device, dtype)


@dataclass(frozen=True)
class Case:
    """``function(*inputs, C)`` is metafast's, ``reference(*inputs, C)`` the plain one."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Mapping[str, Input]
    kernels_only: bool = True  # False: a part of it is composed of torch's operators
    promotes: bool = False  # half types give float32
    emulated: bool = True  # False: nothing of csrc/cuda is in it
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def make(
        self,
        lead: Sequence[int] = (2,),
        sizes: Mapping[str, int] = SMALL,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        requires_grad: bool = False,
    ) -> list[Tensor]:
        tensors = [spec.make(lead, sizes, dtype, device) for spec in self.inputs.values()]
        return [t.requires_grad_(requires_grad and t.is_floating_point()) for t in tensors]

    @property
    def differentiable(self) -> tuple[int, ...]:
        return tuple(k for k, spec in enumerate(self.inputs.values()) if spec.differentiable)

    def closed(self, function: Callable[..., Any], inputs: Sequence[Tensor], C: int) -> Callable[..., Any]:
        """``function`` of the differentiable inputs alone."""

        def of(*values: Tensor) -> Any:
            merged = list(inputs)
            for k, value in zip(self.differentiable, values, strict=True):
                merged[k] = value
            return function(*merged, C)

        return of

    def floats(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(inputs[k] for k in self.differentiable)

    def __str__(self) -> str:
        return self.name


def shuffled_labels(shape: Sequence[int], num_classes: int) -> Tensor:
    """Class numbers ``[..., rows]`` in random order, in which every class occurs if there are rows enough."""
    if num_classes == 0:
        return torch.zeros(shape, dtype=torch.int64)
    return torch.rand(shape).argsort(-1) % num_classes


def runs_cuda_sources(device: torch.device) -> bool:
    """Whether the kernels there are those of csrc/cuda, on a GPU or emulated; they make no error of a bad label."""
    return device.type == "cuda" or simt.active()


def outputs(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else value


def cotangents(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Fixed upstream gradients of every output, all entries different."""
    return tuple(
        torch.arange(1, o.numel() + 1, device=o.device).cos().view(o.shape).to(o.dtype)
        for o in outputs(value)
    )


def weighted_sum(values: Iterable[Tensor]) -> Tensor:
    """A scalar in which every entry of ``values`` has a weight of its own."""
    values = tuple(values)
    total = torch.zeros((), dtype=values[0].dtype, device=values[0].device)
    for value, weight in zip(values, cotangents(values), strict=True):
        total = total + (value * weight).sum()
    return total


def gradients(function: Callable[..., Any], inputs: Sequence[Tensor], C: int) -> tuple[Tensor, ...]:
    """The values, and the gradients for every floating input of a fixed upstream gradient."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    out = outputs(function(*leaves, C))
    floats = [t for t in leaves if t.is_floating_point()]
    return (*(o.detach() for o in out), *torch.autograd.grad(out, floats, cotangents(out)))


def check_operator(op: torch._ops.OpOverload, *arguments: Any) -> None:
    """Schema and fake kernel against the real one; and with gradients recorded registration of autograd and tracing."""
    for recorded in (False, True):
        own = [
            a.detach().clone().requires_grad_(recorded and a.is_floating_point())
            if isinstance(a, Tensor)
            else a
            for a in arguments
        ]
        # Tracing takes nearly all of the time, and what it records holds the forward.
        torch.library.opcheck(op, own, test_utils="ALL" if recorded else ("test_schema", "test_faketensor"))


def in_float64(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in inputs]


def moved(inputs: Sequence[Tensor], eps: float) -> list[Tensor]:
    """Each entry times 1 + eps or 1 - eps."""
    return [
        t * (1 + eps * (2 * torch.randint_like(t, 2) - 1)) if t.is_floating_point() else t for t in inputs
    ]


def assert_accurate(
    actual: Sequence[Tensor], plain: Callable[[Sequence[Tensor]], Sequence[Tensor]], inputs: Sequence[Tensor]
) -> None:
    """At most twice the error of the plain formula in the inputs' dtype, and a few roundings of 1 or the largest value.

    That formula's error may be a lucky one: what becomes of some roundings of the inputs is allowed too.

    One number per task (the loss, the gradient of a temperature) sums terms as large as the other results and as many,
    whose roundings add up like steps to either side.
    """
    dtype = next(t.dtype for t in inputs if t.is_floating_point())
    wide, eps = in_float64(inputs), torch.finfo(dtype).eps
    exact, rounded = plain(wide), plain(inputs)
    neighbours: list[Sequence[Tensor]] = []
    floor = eps * (32 if dtype == torch.float64 else 4)
    per_row = max(e.dim() for e in exact) - 1
    largest = max(largest_finite(e) * (e.numel() / max(1, len(e) if e.dim() else 1)) ** 0.5 for e in exact)
    for k, (a, p, e) in enumerate(zip(actual, rounded, exact, strict=True)):
        assert a.shape == e.shape, f"result {k}: shape {list(a.shape)}, expected {list(e.shape)}"
        if e.numel() == 0:
            continue
        e = e.double()
        finite = e.isfinite()
        torch.testing.assert_close(a.double()[~finite], e[~finite], equal_nan=True, rtol=0, atol=0)
        if not finite.any():
            continue
        error = (a.double() - e)[finite].abs().max()
        # Where the plain formula overflows in half it allows nothing.
        allowed = largest_finite((p.double() - e)[finite])
        bound = 2 * allowed + floor * max(1.0, largest_finite(e) if e.dim() >= per_row else largest)
        if error > bound:
            neighbours = neighbours or [plain(moved(wide, eps)) for _ in range(4)]
            bound += 32 * max(largest_finite((own[k].double() - e)[finite]) for own in neighbours)
        assert error <= bound, (
            f"result {k}: error {error:.3e}, allowed {bound:.3e} (plain formula: {allowed:.3e})"
        )


def largest_finite(value: Tensor) -> float:
    finite = value[value.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    """Equal structures of float64 tensors, up to ``tolerance`` relative to the largest entry of each."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor)
        assert actual.shape == expected.shape
        atol = tolerance * max(1.0, largest_finite(expected))
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)
    else:
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e, tolerance)


def assert_bad_label_spoils_its_task(
    function: Callable[..., Any], floats: Sequence[Tensor], labels: Tensor, label: int
) -> None:
    """``label`` in task 1 of ``labels`` makes its values and derivatives NaN, and leaves the bits of the others.

    ``function(labels, *floats)`` gives results that begin with the dimension of three tasks.
    """

    def derivatives(labels: Tensor) -> list[Tensor]:
        """Values, first and second gradients, and the tangents."""

        def run(*values: Tensor) -> tuple[Tensor, ...]:
            # Of the sine, so that class means have a second derivative too.
            return outputs(function(labels, *(v.sin() for v in values)))

        leaves = [v.detach().clone().requires_grad_() for v in floats]
        out = run(*leaves)
        first = torch.autograd.grad(sum(o.sum() for o in out), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        along = torch.func.jvp(run, tuple(floats), tuple(v.cos() for v in floats))[1]
        return [t.detach() for t in (*out, *first, *second, *along)]

    bad = labels.clone()
    bad[1, 2] = label
    for k, (actual, wanted) in enumerate(zip(derivatives(bad), derivatives(labels), strict=True)):
        assert actual[1].isnan().all(), f"result {k}"
        assert torch.equal(actual[[0, 2]], wanted[[0, 2]]), f"result {k}"


def _rows(metric: str) -> str:
    # A cosine's gradient is what is left of terms as large as 1 / |x|: of a short row, of one entry say, nothing.
    return "far" if metric == "cosine" else "features"


def _pairwise(metric: str) -> Case:
    return Case(
        f"pairwise_distance-{metric}",
        lambda x, y, C: metafast.pairwise_distance(x, y, metric),
        lambda x, y, C: reference.pairwise_distance(x, y, metric),
        {"x": Input("n d", _rows(metric)), "y": Input("m d", _rows(metric))},
    )


def _cdist(p: float, metric: str) -> Case:
    return Case(
        f"cdist-{p:g}",
        lambda x, y, C: metafast.cdist(x, y, p),
        lambda x, y, C: reference.pairwise_distance(x, y, metric),
        {"x1": Input("n d"), "x2": Input("m d")},
    )


def _loss(metric: str, temperature: float | Input) -> Case:
    inputs = {
        "support": Input("n d", _rows(metric)),
        "support_labels": Input("n", "labels"),
        "query": Input("m d", _rows(metric)),
        "query_labels": Input("m", "labels"),
    }
    if isinstance(temperature, Input):
        return Case(
            f"prototypical_loss-{metric}-" + ("task_temperature" if temperature.per_task else "temperature"),
            lambda s, sl, q, ql, tau, C: metafast.prototypical_loss(s, sl, q, ql, C, metric, tau),
            lambda s, sl, q, ql, tau, C: reference.prototypical_loss(s, sl, q, ql, C, metric, tau),
            {**inputs, "temperature": temperature},
            promotes=True,
        )
    return Case(
        f"prototypical_loss-{metric}",
        lambda s, sl, q, ql, C: metafast.prototypical_loss(s, sl, q, ql, C, metric, temperature),
        lambda s, sl, q, ql, C: reference.prototypical_loss(s, sl, q, ql, C, metric, temperature),
        inputs,
        promotes=True,
    )


def _head(name: str, inputs: Mapping[str, Input], **options: Any) -> Case:
    """``inputs`` name the arguments of adapted_logits; "rate" and "bias_rate" become its lr."""

    def run(function: Callable[..., Any], values: Sequence[Tensor]) -> Any:
        given = dict(zip(inputs, values, strict=True))
        # Small enough for steps that contract: others magnify every rounding.
        lr: Any = given.pop("rate", 1.0) * 0.05
        if "bias_rate" in given:
            lr = (lr, given.pop("bias_rate") * 0.05)
        given.setdefault("bias", None)
        if "query" in given:
            return function(**given, lr=lr, steps=STEPS, **options)
        given["features"] = given.pop("support")
        return function(**given, lr=lr, steps=STEPS, **options)

    public = metafast.adapted_logits if "query" in inputs else metafast.adapt_linear
    plain = reference.adapted_logits if "query" in inputs else reference.adapt_linear
    return Case(
        f"{public.__name__}-{name}",
        lambda *values: run(public, values[:-1]),
        lambda *values: run(plain, values[:-1]),
        inputs,
        kernels_only=False,
        promotes=True,
    )


def _ridge(labels: Input, **scalars: Input) -> Case:
    soft = labels.kind != "labels"

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        def of(s: Tensor, y: Tensor, q: Tensor, *rest: Any) -> Any:
            own = dict(zip(scalars, rest[:-1], strict=True))
            return function(s, y, q, own.pop("regularisation", 0.8), **own, num_classes=rest[-1])

        return of

    return Case(
        "ridge_logits" + ("-soft" if soft else "") + ("-scalars" if scalars else ""),
        call(metafast.ridge_logits),
        call(reference.ridge_logits),
        {"support": Input("n d"), "labels": labels, "query": Input("m d"), **scalars},
        kernels_only=False,
        promotes=True,
    )


def _matching() -> Case:
    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda s, y, q, scale, C: function(s, y, q, scale, num_classes=C)

    return Case(
        "matching_log_probs",
        call(metafast.matching_log_probs),
        call(reference.matching_log_probs),
        {
            "support": Input("n d"),
            "labels": Input("n", "labels"),
            "query": Input("m d"),
            "scale": Input("", "positive"),
        },
        kernels_only=False,
        promotes=True,
    )


def _reading() -> Case:
    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda s, q, ih, hh, bias, h, c, _: function(s, q, ih, hh, bias, STEPS, hidden=h, cell=c)

    return Case(
        "attention_lstm",
        call(metafast.attention_lstm),
        call(reference.attention_lstm),
        {
            "support": Input("n d", "unit"),
            "query": Input("m d"),
            "weight_ih": Input("4d 2d", "unit", per_task=False),
            "weight_hh": Input("4d d", "unit", per_task=False),
            "bias": Input("4d", per_task=False),
            "hidden": Input("m d"),
            "cell": Input("m d"),
        },
        kernels_only=False,
        promotes=True,
        emulated=False,
    )


def _update(name: str, rates: Mapping[str, Input], rate: float | None = None) -> Case:
    """Two parameters, then their gradients, then the rates."""

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        def of(*values: Any) -> Any:
            own = list(values[4:-1])
            return tuple(
                function(list(values[:2]), list(values[2:4]), rate or (own if len(own) == 2 else own[0]))
            )

        return of

    shapes = {"weight": Input("n d"), "bias": Input("m")}
    return Case(
        f"sgd_update-{name}",
        call(metafast.sgd_update),
        call(reference.sgd_update),
        {**shapes, **{f"{k}_grad": v for k, v in shapes.items()}, **rates},
        kernels_only=False,
        emulated=False,
    )


def _adapted(
    name: str,
    inputs: Mapping[str, Input],
    arguments: Callable[..., tuple[Any, Any, Any]],
    rows: Callable[[Tensor], Tensor] = lambda x: x,
    steps: int = STEPS,
    **options: Any,
) -> Case:
    """Steps of an MLP with three hidden units; ``arguments(x, *own)`` gives its weights, biases and rates.

    Rows, or initial weights and rates, shrink with the number of inputs, so that steps converge for any.
    """

    def function(module: Any) -> Callable[..., Any]:
        def of(x: Tensor, y: Tensor, query: Tensor, *rest: Any) -> Any:
            x, query = rows(x), rows(query)
            return module.adapted_mlp(x, y, query, *arguments(x, *rest[:-1]), steps, **options)

        return of

    data = {"inputs": Input("n d"), "targets": inputs["targets"], "query": Input("m d")}
    return Case(
        f"adapted_mlp-{name}",
        function(metafast),
        function(reference),
        {**data, **{k: v for k, v in inputs.items() if k != "targets"}},
        kernels_only=False,
        promotes=True,
    )


def _normalising(
    name: str, inputs: dict[str, Input], per_task: bool, given: bool, names: list[str], **options: Any
) -> Case:
    """The statistics are results in the dtype of the inputs, if they are results."""
    inputs |= {name: Input("d", per_task=per_task) for name in names}
    if given:
        inputs |= {"mean": Input("d"), "std": Input("d", per_task=per_task)}

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        def of(*values: Any) -> Any:
            own = list(values[:-1])
            if given:
                own[-1] = own[-1].square() + 0.5
            y, *statistics = function(*own, **options)
            return y if given else (y, *(s.to(y.dtype) for s in statistics))

        return of

    operator = name.partition("-")[0]
    return Case(
        name,
        call(getattr(metafast, operator)),
        call(getattr(reference, operator)),
        inputs,
        kernels_only=False,
    )


def _norm(name: str, x: Input, per_task: bool, given: bool = False, **options: Any) -> Case:
    return _normalising(f"norm_relu_pool-{name}", {"x": x}, per_task, given, ["weight", "bias"], **options)


def _conv_block(name: str, x: Input, per_task: bool, given: bool = False) -> Case:
    inputs = {"x": x, "conv_weight": Input(f"d {x.shape.split()[1]} 3 3", per_task=per_task)}
    return _normalising(
        f"conv_norm_relu_pool-{name}", inputs, per_task, given, ["conv_bias", "weight", "bias"]
    )


def _fan(x: Tensor) -> float:
    return 1 / (1 + x.shape[-1])


_MLPS = (
    _adapted(
        "relu-mse",
        {
            "targets": Input("n C"),
            "weight": Input("3 d", per_task=False),
            "bias": Input("3", per_task=False),
            "top": Input("C 3", per_task=False),
        },
        lambda x, weight, bias, top: ([weight, top], [bias, top.sum(-1)], 0.1),
        rows=lambda x: x * _fan(x) ** 0.5,
    ),
    _adapted(
        "tanh-cross_entropy-rate",
        {
            "targets": Input("n", "labels"),
            "weight": Input("3 d"),
            "top": Input("C 3"),
            "rate": Input("", "positive", per_task=False),
        },
        lambda x, weight, top, rate: (
            [weight * _fan(x) ** 0.5, top],
            [weight.mean(-1) if x.shape[-1] else weight.sum(-1), top.sum(-1)],
            rate * 0.5 * _fan(x),
        ),
        activation="tanh",
        loss="cross_entropy",
    ),
    _adapted(
        "tanh-soft-rates",
        {
            "targets": Input("n C", "positive"),
            "top": Input("C 3", per_task=False),
            "rates": Input("C", "positive", per_task=False),
        },
        lambda x, top, rates: (
            [x.new_ones(3, x.shape[-1]).cumsum(0).cos() * _fan(x) ** 0.5, top],
            [top.sum(0), top.sum(-1)],
            (
                [x.new_ones(3, x.shape[-1]) * 0.3 * _fan(x), rates.unsqueeze(-1) * top.square() * 0.1],
                [x.new_ones(3) * 0.1, 0.1 * rates],
            ),
        ),
        activation="tanh",
        loss="cross_entropy",
    ),
    # Steps and inputs enough that nearly all sizes make the first layer's steps on products of rows.
    _adapted(
        "tanh-mse-many",
        {
            "targets": Input("n C"),
            "weight": Input("3 d", per_task=False),
            "top": Input("C 3", per_task=False),
            "rate": Input("", "positive", per_task=False),
        },
        lambda x, weight, top, rate: (
            [torch.cat([weight, -0.5 * weight, weight.cos()], -1) * _fan(x) ** 0.5, top],
            [top.sum(0), top.sum(-1)],
            [rate * _fan(x), 0.1],
        ),
        rows=lambda x: torch.cat([x, -x, x.flip(-1)], -1),
        steps=4,
        activation="tanh",
    ),
)

_SHARED_TEMPERATURE = Input("", "positive", per_task=False)
_TASK_TEMPERATURE = Input("", "positive")

CASES = (
    _pairwise("sqeuclidean"),
    _pairwise("euclidean"),
    _pairwise("cityblock"),
    _pairwise("cosine"),
    _cdist(1.0, "cityblock"),
    _cdist(2.0, "euclidean"),
    Case(
        "prototypes",
        metafast.prototypes,
        reference.prototypes,
        {"features": Input("n d"), "labels": Input("n", "labels")},
    ),
    Case(
        "prototypes-soft",
        metafast.prototypes,
        reference.prototypes,
        {"features": Input("n d"), "labels": Input("n C", "positive")},
        kernels_only=False,
    ),
    _loss("sqeuclidean", 0.7),
    _loss("sqeuclidean", _SHARED_TEMPERATURE),
    _loss("sqeuclidean", _TASK_TEMPERATURE),
    _loss("euclidean", 0.7),
    _loss("cityblock", _SHARED_TEMPERATURE),
    _loss("cosine", _TASK_TEMPERATURE),
    _head(
        "rate_per_step",
        {
            "support": Input("n d"),
            "labels": Input("n", "labels"),
            "query": Input("m d"),
            "weight": Input("C d", per_task=False),
            "bias": Input("C", per_task=False),
            "rate": Input("K", "positive", per_task=False),
        },
    ),
    _head(
        "soft_labels-momentum-decay",
        {
            "support": Input("n d"),
            "labels": Input("n C", "positive"),
            "query": Input("m d"),
            "weight": Input("C d"),
            "rate": Input("K C", "positive", per_task=False),
        },
        momentum=0.9,
        weight_decay=0.1,
    ),
    _head(
        "rate_per_parameter",
        {
            "support": Input("n d"),
            "labels": Input("n", "labels"),
            "query": Input("m d"),
            "weight": Input("C d", per_task=False),
            "bias": Input("C", per_task=False),
            "rate": Input("C d", "positive", per_task=False),
            "bias_rate": Input("C", "positive", per_task=False),
        },
        momentum=0.9,
    ),
    _head(
        "mse",
        {
            "support": Input("n d"),
            "labels": Input("n C"),
            "weight": Input("C d"),
            "bias": Input("C"),
        },
        loss="mse",
        weight_decay=0.1,
    ),
    _ridge(Input("n", "labels")),
    _ridge(
        Input("n C"),
        regularisation=Input("", "positive"),
        scale=Input("", "positive", per_task=False),
        offset=Input(""),
    ),
    _matching(),
    _reading(),
    _norm("batch", Input("2 d 2 3"), per_task=False),
    _norm("batch-no_pool", Input("3 d 1 2"), per_task=True, pool=False),
    _conv_block("batch", Input("2 1 2 3"), per_task=False),
    _conv_block("given", Input("1 2 2 5"), per_task=True, given=True),
    _norm("given-no_relu", Input("1 d 2 5"), per_task=True, given=True, relu=False),
    _update("number", {}, 0.3),
    _update("shared", {"lr": Input("", "positive", per_task=False)}),
    _update("layers", {k: Input("", "positive", per_task=False) for k in ("weight_lr", "bias_lr")}),
    _update("elements", {"weight_lr": Input("n d"), "bias_lr": Input("m")}),
    *_MLPS,
)
