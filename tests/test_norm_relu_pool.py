"""What the operator suites do not see of norm_relu_pool: memory formats, patterns, offsets, wrong arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from metafast import norm_relu_pool, reference
from metafast.norm_relu_pool import NORM, NORM_VJP, NORM_VJP_VJP
from tests import simt
from tests.cases import DTYPES, assert_same, check_operator, outputs

# torch's own forward-mode formulas use it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
#: given, relu, pool
OPTIONS = list(itertools.product((False, True), repeat=3))
each_option = pytest.mark.parametrize(("given", "relu", "pool"), OPTIONS)
each_layout = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
#: [T, n, C, H, W]: odd sizes, channels and rows of part of a vector, of one and of several, and more than one slice.
SHAPES = [
    (2, 3, 4, 5, 7),
    (1, 2, 33, 4, 4),
    (3, 2, 16, 7, 7),
    (2, 1, 3, 2, 2),
    (1, 1, 130, 3, 35),
    (1, 3, 2, 64, 100),
    (2, 30, 3, 14, 14),
    (1, 7, 64, 29, 28),
    (1, 1, 1, 9, 200),
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def channels_last(x: Tensor) -> Tensor:
    """The same entries with the channels, which are third from last, side by side in memory."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


def arguments(
    shape: tuple[int, ...],
    given: bool,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    last: bool = False,
) -> list[Tensor]:
    """x, weight, bias, and the statistics if they are given."""
    x = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    own = [torch.randn(*shape[:-4], shape[-3], dtype=torch.float64).to(device, wide) for _ in range(4)]
    own[3] = own[3].square() + 0.5
    return [channels_last(x) if last else x, *own[: 4 if given else 2]]


def two_orders(
    function: Callable[..., Any], inputs: list[Tensor], given: bool, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Results, first gradients, and the gradients of these along fixed directions for all that they depend on.

    ``dtype``: the one, beside float32, to which the directions are rounded.
    """
    generator = torch.Generator().manual_seed(3)

    def along(like: Tensor) -> Tensor:
        values = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        if dtype is not None:
            values = values.to(dtype if like.dim() >= 4 else torch.promote_types(dtype, torch.float32))
        return values.to(like.device, like.dtype)

    leaves = [t.detach().requires_grad_() for t in inputs]
    out = list(function(*leaves))[: 1 if given else 3]
    upstream = [along(o).requires_grad_() for o in out]
    first = torch.autograd.grad(out, leaves, upstream, create_graph=True)
    directions = [along(g) for g in first]
    # The first gradients do not depend on the bias.
    others = [*upstream, leaves[0], leaves[1], *leaves[3:]]
    return [o.detach() for o in (*out, *first, *torch.autograd.grad(first, others, directions))]


@each_option
@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_option(
    shape: tuple[int, ...], last: bool, given: bool, relu: bool, pool: bool, vectors: torch.device
) -> None:
    """Values, and the first and second derivative, which are kernels too."""
    inputs = arguments(shape, given, device=vectors, last=last)
    results = [
        two_orders(lambda *a, f=f: f(*a, relu=relu, pool=pool), inputs, given)
        for f in (norm_relu_pool, reference.norm_relu_pool)
    ]
    assert_same(*results)


@each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(1, 7, 64, 29, 28), (2, 3, 5, 7, 6)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
def test_every_dtype(
    given: bool, shape: tuple[int, ...], dtype: torch.dtype, last: bool, vectors: torch.device
) -> None:
    """Half types are read, computed with in float32, and rounded once."""
    inputs = arguments(shape, given, dtype, vectors, last)
    actual = two_orders(norm_relu_pool, inputs, given)
    wide = torch.promote_types(dtype, torch.float32)
    expected = two_orders(norm_relu_pool, [t.double() for t in inputs], given, dtype)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == (dtype if a.dim() == 5 else wide)
        eps = torch.finfo(a.dtype).eps
        # A rounding of the result, and those of sums of some thousand terms.
        bound = (eps + 32 * torch.finfo(wide).eps) * e.abs().max().clamp(min=1)
        assert (a.double() - e).abs().max() <= bound


@each_option
@each_layout
def test_finite_differences(given: bool, relu: bool, pool: bool, last: bool, device: torch.device) -> None:
    shape = (2, 1, 2, 2, 5) if pool else (2, 2, 2, 3)
    inputs = [t.requires_grad_() for t in arguments(shape, given, device=device, last=last)]

    def run(*values: Tensor) -> Any:
        out = norm_relu_pool(*values, relu=relu, pool=pool)
        return out[0] if given else out

    fast = simt.active()
    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=fast)
    assert gradgradcheck(run, inputs, check_fwd_over_rev=True, fast_mode=fast)


@each_option
def test_opcheck(given: bool, relu: bool, pool: bool, hardware: torch.device) -> None:
    # Each layout meets each pair of options.
    last = (given + relu + pool) % 2 == 1
    x, *of_channels = arguments((2, 2, 3, 5, 4), given, device=hardware, last=last)
    flags = (1e-5, relu, pool)

    inputs = [x, *of_channels, *(() if given else (None, None))]
    check_operator(NORM, *inputs, *flags)
    y, mean, var, choice = NORM(*inputs, *flags)
    statistics = tuple(of_channels[2:]) if given else (mean, var)
    upstream = (y.cos(), *((None, None) if given else (mean.cos(), var.cos())))
    rest = (x, *of_channels[:2], *statistics, choice, given, *flags)
    check_operator(NORM_VJP, *upstream, *rest)
    directions = [torch.randn_like(v) for v in (x, *of_channels)]
    check_operator(NORM_VJP_VJP, *directions, *(() if given else (None, None)), *upstream, *rest)


def by_torch(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None = None, var: Tensor | None = None
) -> Tensor:
    return functional.max_pool2d(
        functional.batch_norm(x, mean, var, weight, bias, training=mean is None).relu(), 2
    )


@each_layout
@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
def test_the_pattern_is_torchs(given: bool, last: bool, kernels: torch.device) -> None:
    """Equal pixels in a window, values of 0 before ReLU, negative scales: torch's choices, in the gradient too."""
    x = torch.randint(-2, 3, (3, 18, 5, 38), device=kernels).double()
    x = channels_last(x) if last else x
    weight = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64, device=kernels).repeat(6)
    bias = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64, device=kernels).repeat_interleave(6)
    statistics = [torch.zeros_like(weight), torch.ones_like(weight)] if given else []
    results = []
    for function in (lambda *a: norm_relu_pool(*a)[0], by_torch):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves, *statistics)
        generator = torch.Generator().manual_seed(0)
        upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(kernels)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, upstream)))
    assert_same(*results)


@each_layout
@pytest.mark.parametrize("pool", [False, True], ids=["no_pool", "pool"])
def test_not_finite(pool: bool, last: bool, kernels: torch.device) -> None:
    """NaN spoils its window, or with batch statistics its channel; infinities are the largest or the smallest."""
    x = torch.randn(2, 17, 4, 40, dtype=torch.float64, device=kernels)
    x[0, 3, 1, 5], x[0, 5, 2, 7], x[1, 5, 3, 8], x[1, 0, 0, 0] = torch.nan, torch.inf, -torch.inf, torch.nan
    x = channels_last(x) if last else x
    ones, zeros = torch.ones(17, dtype=torch.float64, device=kernels), torch.zeros(17, dtype=torch.float64)
    zeros = zeros.to(kernels)
    leaf = x.clone().requires_grad_()
    y, *_ = norm_relu_pool(leaf, ones, zeros, zeros, ones, pool=pool)
    expected = (x / (1 + 1e-5) ** 0.5).relu()
    expected = functional.max_pool2d(expected, 2) if pool else expected
    assert_same(y.detach(), expected)
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    assert gradient.isfinite().all()
    leaf = x.clone().requires_grad_()
    y, *_ = norm_relu_pool(leaf, ones, zeros, zeros, ones, relu=False, pool=pool)
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    assert (gradient[1, 5, 3, 8] == 0) == pool and gradient.sum().round() == y.numel()
    y, mean, _ = norm_relu_pool(x, ones, zeros, pool=pool)
    spoilt = torch.zeros(17, dtype=torch.bool, device=kernels)
    spoilt[[0, 3, 5]] = True
    assert mean.isfinite().eq(~spoilt).all()
    assert y[:, spoilt].isnan().all() and y[:, ~spoilt].isfinite().all()


@each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", [(25, 18, 28, 28), (400, 3, 6, 7), (1, 2, 2, 5)], ids=str)
def test_statistics_do_not_cancel(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, kernels: torch.device
) -> None:
    """Far from zero, and with the first pixels far from the others."""
    for offset, outlier in ((1000.0, 0.0), (1000.0, 300.0), (0.0, 1000.0)):
        x = torch.randn(shape, dtype=torch.float64) + offset
        x[0, :, 0, 0] += outlier
        x = x.to(kernels, dtype)
        x = channels_last(x) if last else x
        ones, zeros = torch.ones(shape[1], device=kernels), torch.zeros(shape[1], device=kernels)
        wide = torch.promote_types(dtype, torch.float32)
        _, mean, var = norm_relu_pool(x, ones.to(wide), zeros.to(wide))
        exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        assert (var.double() - exact_var).abs().le(5e-5 * exact_var).all()
        assert (mean.double() - exact_mean).abs().max() < 2e-7 * (offset + outlier + 1)


@each_layout
@pytest.mark.parametrize("shape", [(1, 40, 3, 17, 18), (1, 9, 64, 28, 28), (5, 4, 2, 6, 6)], ids=str)
def test_same_bits_for_any_number_of_threads(
    shape: tuple[int, ...], last: bool, threads: Callable[[int], None]
) -> None:
    for given in (False, True):
        inputs = arguments(shape, given, torch.float32, last=last)
        threads(1)
        expected = two_orders(norm_relu_pool, inputs, given)
        for count in (2, 3):
            threads(count)
            for a, e in zip(two_orders(norm_relu_pool, inputs, given), expected, strict=True):
                assert torch.equal(a, e)


@each_option
def test_memory_formats(given: bool, relu: bool, pool: bool, vectors: torch.device) -> None:
    """Results lie as x does; strides that are neither format's give the same as these, whatever those of the others."""
    inputs = arguments((2, 3, 5, 6, 9), given, torch.float32, vectors)

    def run(x: Tensor) -> list[Tensor]:
        return two_orders(lambda *a: norm_relu_pool(*a, relu=relu, pool=pool), [x, *inputs[1:]], given)

    x = inputs[0]
    expected = run(x)
    turned = channels_last(x)
    formats = {True: (0, 1, 4, 2, 3), False: (0, 1, 2, 3, 4)}
    for own, is_last in (
        (x, False),
        (turned, True),
        (torch.cat([x, x], -1)[..., :9], False),
        (channels_last(torch.cat([x, x], -3))[..., :5, :, :], True),
        (x.transpose(-1, -2).contiguous().transpose(-1, -2), False),
        (x.transpose(0, 1).contiguous().transpose(0, 1), False),
        (channels_last(x.transpose(0, 1)).transpose(0, 1), True),
    ):
        for a, e in zip(run(own), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
        y, *_ = norm_relu_pool(own, *inputs[1:], relu=relu, pool=pool)
        assert y.permute(formats[False] if not is_last else (0, 1, 3, 4, 2)).is_contiguous()
        leaf = own.detach().requires_grad_()
        y, *_ = norm_relu_pool(leaf, *inputs[1:], relu=relu, pool=pool)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
        assert gradient.permute(formats[False] if not is_last else (0, 1, 3, 4, 2)).is_contiguous()


def test_tasks_have_their_own_statistics(device: torch.device) -> None:
    """T tasks at once, T calls, and vmap over them are one."""
    x, weight, bias = arguments((4, 3, 5, 6, 6), False, device=device)
    together = norm_relu_pool(x, weight, bias)
    apart = [torch.stack(o) for o in zip(*map(norm_relu_pool, x, weight, bias), strict=True)]
    assert_same(list(together), apart)
    assert_same(list(torch.vmap(norm_relu_pool)(x, weight, bias)), apart)
    shared = norm_relu_pool(x, weight[0], bias[0])
    assert_same(list(torch.vmap(norm_relu_pool, (0, None, None))(x, weight[0], bias[0])), list(shared))


def test_without_weight_and_bias(device: torch.device) -> None:
    x, weight, bias = arguments((3, 5, 6, 6), False, device=device)
    assert_same(
        norm_relu_pool(x, None, None)[0],
        norm_relu_pool(x, torch.ones_like(weight), torch.zeros_like(bias))[0],
    )


def test_given_statistics_are_returned(device: torch.device) -> None:
    inputs = arguments((3, 5, 6, 6), True, device=device)
    _, mean, var = norm_relu_pool(*inputs)
    assert mean is inputs[3] and var is inputs[4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype(dtype: torch.dtype, device: torch.device) -> None:
    inputs = [t.requires_grad_() for t in arguments((3, 5, 6, 6), False, dtype, device)]
    expected = norm_relu_pool(*inputs)
    gradients = torch.autograd.grad(expected[0].sum(), inputs)
    with torch.autocast(device.type, torch.bfloat16):
        out = norm_relu_pool(*inputs)
        again = torch.autograd.grad(out[0].sum(), inputs)
    assert out[0].dtype == dtype
    assert [o.dtype for o in out[1:]] == [torch.float32] * 2
    for a, e in zip((*out, *again), (*expected, *gradients), strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


def test_parameters_may_have_the_half_type_too(device: torch.device) -> None:
    x, weight, bias = (t.bfloat16().requires_grad_() for t in arguments((3, 5, 6, 6), False, device=device))
    y, mean, var = norm_relu_pool(x, weight, bias)
    assert (y.dtype, mean.dtype, var.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(y, norm_relu_pool(x, weight.float(), bias.float())[0])
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, weight, bias))] == [torch.bfloat16] * 3


def test_little_is_saved(device: torch.device) -> None:
    """The input, a byte for each pixel of the result, and numbers of channels."""
    x, weight, bias = (t.requires_grad_() for t in arguments((2, 5, 6, 6), False, torch.float32, device))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_relu_pool(x, weight, bias)
    large = sorted(
        (t.numel() * t.element_size(), t.data_ptr() == x.data_ptr()) for t in kept if t.numel() > 5
    )
    assert large == [(2 * 5 * 3 * 3, False), (2 * 5 * 6 * 6 * 4, True)]


X = torch.zeros(2, 3, 4, 4)
ONES = torch.ones(3)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "x list": (lambda: norm_relu_pool([1.0], ONES, ONES), TypeError, "x: expected a tensor, got list"),
    "x int": (
        lambda: norm_relu_pool(X.long(), ONES, ONES),
        TypeError,
        "x: expected float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "x rank": (
        lambda: norm_relu_pool(X[0], ONES, ONES),
        ValueError,
        "x: expected shape [..., n, C, H, W], got [3, 4, 4]",
    ),
    "weight size": (
        lambda: norm_relu_pool(X, ONES[:2], ONES),
        ValueError,
        "weight: expected shape [..., 3], got [2]",
    ),
    "bias number": (lambda: norm_relu_pool(X, ONES, 0.0), TypeError, "bias: expected a tensor, got float"),
    "bias dtype": (
        lambda: norm_relu_pool(X, ONES, ONES.double()),
        TypeError,
        "bias: expected the dtype of x, torch.float32, got torch.float64",
    ),
    "weight dtype beside half": (
        lambda: norm_relu_pool(X.half(), ONES.double(), ONES),
        TypeError,
        "weight: expected the dtype of x, torch.float16 or torch.float32, got torch.float64",
    ),
    "weight device": (
        lambda: norm_relu_pool(X, ONES.to("meta"), ONES),
        ValueError,
        "weight: expected the device of x, cpu, got meta",
    ),
    "mean alone": (
        lambda: norm_relu_pool(X, ONES, ONES, mean=ONES),
        ValueError,
        "var: expected with mean, got None",
    ),
    "var alone": (
        lambda: norm_relu_pool(X, ONES, ONES, var=ONES),
        ValueError,
        "mean: expected with var, got None",
    ),
    "tasks": (
        lambda: norm_relu_pool(X[None].expand(2, 2, 3, 4, 4), ONES.expand(3, 3), ONES),
        ValueError,
        "leading dimensions: expected shapes that broadcast, but x has [2], weight has [3], bias has []",
    ),
    "no images": (
        lambda: norm_relu_pool(X[:0], ONES, ONES),
        ValueError,
        "x: expected a pixel to take the statistics of, got shape [0, 3, 4, 4]",
    ),
    "too small to pool": (
        lambda: norm_relu_pool(X[..., :1], ONES, ONES),
        ValueError,
        "x: expected images of at least 2 x 2 to pool, got shape [2, 3, 4, 1]",
    ),
    "eps": (
        lambda: norm_relu_pool(X, ONES, ONES, eps=-1),
        ValueError,
        "eps: expected a number that is not negative, got -1",
    ),
    "eps text": (
        lambda: norm_relu_pool(X, ONES, ONES, eps="1"),
        TypeError,
        "eps: expected a number, got str",
    ),
    "relu": (lambda: norm_relu_pool(X, ONES, ONES, relu=1), TypeError, "relu: expected a bool, got int"),
    "pool": (lambda: norm_relu_pool(X, ONES, ONES, pool=2), TypeError, "pool: expected a bool, got int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, error, message = WRONG[name]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


OF = torch.ones(1, 3)
MAPS, Y, CHOICE = torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 3, 2, 2), torch.zeros(1, 2, 3, 2, 2).byte()
RIGHT: dict[torch._ops.OpOverload, tuple[Any, ...]] = {
    NORM: (MAPS, OF, OF, None, None, 1e-5, True, True),
    NORM_VJP: (Y, None, None, MAPS, OF, OF, OF, OF, CHOICE, False, 1e-5, True, True),
    NORM_VJP_VJP: (
        MAPS,
        OF,
        OF,
        None,
        None,
        Y,
        None,
        None,
        MAPS,
        OF,
        OF,
        OF,
        OF,
        CHOICE,
        False,
        1e-5,
        True,
        True,
    ),
}
WRONG_DIRECTLY: list[tuple[torch._ops.OpOverload, int, Any, str]] = [
    (NORM, 0, MAPS[0], "x: expected shape [T, n, C, H, W], got [2, 3, 4, 4]"),
    (NORM, 0, MAPS[:, :0], "x: expected pixels, got shape [1, 0, 3, 4, 4]"),
    (NORM, 0, MAPS[..., :1], "x: expected at least 2 x 2 pixels, got shape [1, 2, 3, 4, 1]"),
    (NORM, 1, OF[:, :2], "weight: expected shape [1, 3], got [1, 2]"),
    (NORM, 2, OF.double(), "bias: expected Float, got Double"),
    (NORM, 3, OF, "mean: expected with var, and var with mean"),
    (NORM_VJP, 0, Y[..., :1], "grad: expected shape [1, 2, 3, 2, 2], got [1, 2, 3, 2, 1]"),
    (NORM_VJP, 0, Y.double(), "grad: expected Float, got Double"),
    (NORM_VJP, 1, OF[0], "grad_mean: expected shape [1, 3], got [3]"),
    (NORM_VJP, 2, OF[0], "grad_var: expected shape [1, 3], got [3]"),
    (NORM_VJP, 6, OF[0], "mean: expected shape [1, 3], got [3]"),
    (NORM_VJP, 8, CHOICE[..., :1], "choice: expected shape [1, 2, 3, 2, 2], got [1, 2, 3, 2, 1]"),
    (NORM_VJP, 8, Y, "choice: expected Byte, got Float"),
    (NORM_VJP_VJP, 0, Y, "u_x: expected shape [1, 2, 3, 4, 4], got [1, 2, 3, 2, 2]"),
    (NORM_VJP_VJP, 1, OF[0], "u_weight: expected shape [1, 3], got [3]"),
    (NORM_VJP_VJP, 2, OF[0], "u_bias: expected shape [1, 3], got [3]"),
    (NORM_VJP_VJP, 3, OF, "u_mean, u_var: expected where statistics are given"),
]


@pytest.mark.parametrize(
    ("op", "position", "value", "message"),
    WRONG_DIRECTLY,
    ids=[f"{w[0]._schema.name[10:]}-{w[3][:12]}" for w in WRONG_DIRECTLY],
)
def test_wrong_direct_call(
    op: torch._ops.OpOverload, position: int, value: Any, message: str, device: torch.device
) -> None:
    right = [a.to(device) if isinstance(a, Tensor) else a for a in RIGHT[op]]
    assert all(isinstance(o, Tensor) for o in outputs(op(*right)))
    right[position] = value.to(device)
    with pytest.raises(RuntimeError) as caught:
        op(*right)
    assert str(caught.value).startswith(f"metafast: {message}")
