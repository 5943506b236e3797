"""The first convolutional block against torch's convolution, normalisation, ReLU and pooling, one task at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import conv2d, max_pool2d

import metafast
from metafast import conv_block
from metafast.conv_block import CONV_POOL, CONV_POOL_JVP, CONV_POOL_VJP, MOMENTS
from tests.cases import assert_same, weighted_sum

conv_norm_relu_pool = metafast.conv_norm_relu_pool

# torch's own forward-mode formulas use it.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")

#: Images, planes, height, width, channels: vectors with rests, odd sizes, one window, more images than one part.
SIZES = [(3, 1, 6, 6, 5), (2, 3, 7, 5, 20), (1, 2, 2, 9, 64), (9, 1, 4, 4, 33), (19, 1, 2, 3, 1)]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def arguments(size: Any, lead: tuple[int, ...] = (), given: bool = False, own: bool = True) -> list[Tensor]:
    """Everything but the options; parameters of each task where they are its ``own``."""
    n, planes, height, width, channels = size
    of = lead if own else ()
    values = [randn(*lead, n, planes, height, width) + 0.5, randn(*of, channels, planes, 3, 3)]
    values += [randn(*of, channels) for _ in range(3)]
    return values + ([randn(*of, channels), torch.rand(*of, channels).double() + 0.5] if given else [])


def of_one_task(x: Tensor, *rest: Any, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    kernel, shift, weight, bias, *given = rest
    z = conv2d(x, kernel, shift, padding=1)
    mean, var = given or (z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0))
    scale = weight / (var + eps).sqrt()
    z = (z - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]
    return max_pool2d(z.relu(), 2), mean, var


def plain(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """The loop over the tasks of one leading dimension."""
    if x.dim() == 4:
        return of_one_task(x, *rest)
    kernel = rest[0]
    tasks = [
        of_one_task(x[t], *(value[t] if kernel.dim() == 5 else value for value in rest))
        for t in range(x.shape[0])
    ]
    return tuple(torch.stack(values) for values in zip(*tasks, strict=True))


def both(values: list[Tensor], device: torch.device, order: int = 1) -> list[list[Tensor]]:
    """Results and gradients up to this order, of ours and of the plain form."""
    values, found = [value.to(device) for value in values], []
    for function in (conv_norm_relu_pool, plain):
        leaves = [value.detach().clone().requires_grad_() for value in values]
        out = list(function(*leaves))
        total = weighted_sum(out if len(values) == 5 else out[:1])
        for _ in range(order):
            grads = torch.autograd.grad(
                total, leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
            out += grads
            total = weighted_sum([g.sin() for g in grads])
        found.append(out)
    return found


@each_size
@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
@pytest.mark.parametrize(
    ("lead", "own"), [((), True), ((3,), True), ((3,), False)], ids=["one", "tasks", "shared"]
)
def test_values_and_gradients(
    size: Any, given: bool, lead: tuple[int, ...], own: bool, vectors: torch.device
) -> None:
    assert_same(*both(arguments(size, lead, given, own), vectors), 1e-11)


@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
@pytest.mark.parametrize(
    ("lead", "own"), [((), True), ((2,), True), ((2,), False)], ids=["one", "tasks", "shared"]
)
def test_second_gradients(given: bool, lead: tuple[int, ...], own: bool, device: torch.device) -> None:
    assert_same(*both(arguments((2, 2, 4, 5, 3), lead, given, own), device, order=2), 1e-10)


@pytest.mark.parametrize("given", [False, True], ids=["batch", "given"])
def test_derivatives_of_any_kind(given: bool) -> None:
    values = [value.requires_grad_() for value in arguments((2, 1, 4, 4, 2), (), given)]

    def call(*leaves: Tensor) -> Any:
        out = conv_norm_relu_pool(*leaves)
        return out[:1] if given else out

    assert gradcheck(
        call, values, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(call, values, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_third_gradients() -> None:
    x, kernel, *rest = arguments((2, 1, 4, 4, 2))

    def slope(value: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(
            weighted_sum(conv_norm_relu_pool(x, value, *rest)), value, create_graph=True
        )
        return torch.autograd.grad(g.sin().sum(), value, create_graph=True)[0]

    assert gradcheck(slope, [kernel.requires_grad_()])


def test_transforms() -> None:
    """A task at a time under vmap, with parameters of its own or shared, and the gradient inside."""
    x, kernel, *rest = arguments((2, 2, 4, 5, 3), (4,))

    def loss(kernel: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        return weighted_sum(conv_norm_relu_pool(x, kernel, *rest))

    def looped(own: bool) -> Tensor:
        tasks = zip(*((v if own else v[:1].expand_as(v)) for v in (kernel, *rest)), x, strict=True)
        return torch.stack([torch.func.grad(loss)(k, image, *others) for k, *others, image in tasks])

    every = torch.func.vmap(torch.func.grad(loss))
    assert_same(every(kernel, x, *rest), looped(True), 1e-11)
    shared = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None, None, None))
    assert_same(shared(kernel[0], x, *(value[0] for value in rest)), looped(False), 1e-11)
    twice = torch.func.vmap(torch.func.jacfwd(torch.func.grad(loss)))(kernel, x, *rest)
    assert_same(
        twice[0], torch.func.jacfwd(torch.func.grad(loss))(kernel[0], x[0], *(v[0] for v in rest)), 1e-11
    )


def test_leading_dimensions_broadcast() -> None:
    x, kernel, shift, weight, bias = arguments((2, 1, 4, 4, 3), (2, 3))
    out = conv_norm_relu_pool(x, kernel[:, :1], shift[0, 0], weight[1], bias)
    for a in range(2):
        for b in range(3):
            one = of_one_task(x[a, b], kernel[a, 0], shift[0, 0], weight[1, b], bias[a, b])
            assert_same([value[a, b] for value in out], one, 1e-12)


@pytest.mark.parametrize("channels", [0, 5])
def test_no_task_at_all(channels: int) -> None:
    """Each argument alone tells that there is none; the rest is shared."""
    values = [randn(*shape) for shape in ((1, 2, 4, 4), (channels, 2, 3, 3), *[(channels,)] * 5)]
    values[-1] = values[-1].exp()
    for none in range(len(values)):
        leaves = [
            (value.expand(0, *value.shape) if k == none else value).clone().requires_grad_()
            for k, value in enumerate(values)
        ]
        y, *statistics = conv_norm_relu_pool(*leaves[:5], mean=leaves[5], var=leaves[6])
        assert y.shape == (0, 1, channels, 2, 2)
        assert all(value.shape == (0, channels) for value in statistics)
        grads = torch.autograd.grad(y.sum(), leaves, allow_unused=True, materialize_grads=True)
        assert not any(g.any() for g in grads)


def test_the_bias_of_the_convolution_has_no_gradient_with_batch_statistics() -> None:
    """Exactly none: an optimiser that divides by the gradient's size would make steps of roundings."""
    values = [value.float().requires_grad_() for value in arguments((3, 1, 6, 6, 5))]
    y, mean, _ = conv_norm_relu_pool(*values)
    (found,) = torch.autograd.grad(weighted_sum([y]), values[2], retain_graph=True)
    assert not found.any()
    (of_mean,) = torch.autograd.grad(mean.sum(), values[2])
    assert torch.equal(of_mean, torch.ones(5))
    values[2] = None
    assert_same(
        [v.double() for v in conv_norm_relu_pool(*values)[::2]],
        [v.double() for v in of_one_task(*values)[::2]],
        1e-4,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_do_not_cancel(dtype: torch.dtype, offset: float, kernels: torch.device) -> None:
    """Of images far from 0, against float64 on the same rounded images; a kernel without a constant part."""
    x = (randn(8, 1, 12, 12) + offset).to(kernels, dtype)
    kernel = torch.randn(6, 1, 3, 3).to(kernels)
    kernel -= kernel.mean((-2, -1), keepdim=True)
    weight, bias = (torch.rand(6) + 0.5).to(kernels), torch.randn(6).to(kernels)
    y, mean, var = conv_norm_relu_pool(x, kernel, None, weight, bias)
    exact = of_one_task(x.double(), kernel.double(), None, weight.double(), bias.double())
    assert y.dtype == dtype and mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(var.double(), exact[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-5, atol=1e-4)
    eps = torch.finfo(dtype).eps + (2e-7 * offset if offset else 0)
    torch.testing.assert_close(y.double(), exact[0], rtol=4 * eps, atol=8 * eps)


def test_half_gradients(device: torch.device) -> None:
    values = [v.bfloat16().double().to(device).requires_grad_() for v in arguments((4, 1, 8, 8, 16))]
    exact = torch.autograd.grad(weighted_sum(plain(*values)[:1]), values[1:])
    halves = [values[0].detach().bfloat16(), *(v.detach().float().requires_grad_() for v in values[1:])]
    found = torch.autograd.grad(weighted_sum(conv_norm_relu_pool(*halves)[:1]), halves[1:])
    for f, e in zip(found, exact, strict=True):
        assert f.dtype == torch.float32
        assert float((f.double() - e).abs().max()) < 0.01 * max(1.0, float(e.abs().max()))


def test_autocast_and_memory_format() -> None:
    values = [value.float() for value in arguments((2, 3, 6, 6, 8))]
    with torch.autocast("cpu", torch.bfloat16):
        y, mean, _ = conv_norm_relu_pool(*values)
    assert y.dtype == torch.bfloat16 and mean.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last)
    last = conv_norm_relu_pool(values[0].contiguous(memory_format=torch.channels_last), *values[1:])[0]
    assert torch.equal(last, conv_norm_relu_pool(*values)[0])
    assert torch.equal(last.bfloat16(), y) or float((last - y.float()).abs().max()) < 0.05


def test_several_bands(kernels: torch.device) -> None:
    """Images larger than what a block of threads keeps, with a row more than windows."""
    assert_same(*both(arguments((1, 3, 41, 90, 2)), kernels), 1e-11)


def test_no_result_depends_on_the_threads() -> None:
    values = [value.float().requires_grad_() for value in arguments((21, 1, 10, 10, 24))]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = conv_norm_relu_pool(*values)
            found.append([*out, *torch.autograd.grad(weighted_sum(out), values[1:])])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_nan_and_infinity(kernels: torch.device) -> None:
    """As torch: NaN spreads over the channels with given statistics, and wins its windows."""
    values = [value.to(kernels) for value in arguments((2, 1, 6, 6, 3), given=True)]
    values[0][0, 0, 0, 0] = torch.nan
    values[0][1, 0, 5, 5] = torch.inf
    got, want = (function(*values)[0] for function in (conv_norm_relu_pool, plain))
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any() and not got.isnan().all()
    assert_same(torch.where(got.isfinite(), got, 0.0), torch.where(want.isfinite(), want, 0.0), 1e-12)
    assert conv_norm_relu_pool(*values[:5])[0].isnan().all()


def test_without_images_or_tasks(device: torch.device) -> None:
    values = [value.to(device) for value in arguments((0, 1, 4, 4, 3), given=True)]
    y, mean, _ = conv_norm_relu_pool(*(v.requires_grad_() for v in values))
    assert y.shape == (0, 3, 2, 2) and torch.equal(mean, values[5])
    assert all(
        not g.any()
        for g in torch.autograd.grad(y.sum(), values[1:], allow_unused=True, materialize_grads=True)
    )
    none = [value.to(device) for value in arguments((2, 1, 4, 4, 3), (0,))]
    assert conv_norm_relu_pool(*none)[0].shape == (0, 2, 3, 2, 2)


@pytest.mark.parametrize("own", [True, False])
def test_plain_forms_are_the_kernels(own: bool, kernels: torch.device) -> None:
    """What runs on a device without kernels."""
    groups = 3 if own else 1
    shapes = (3, 2, 2, 5, 6), (groups, 4, 18), (groups, 4)
    x, weight, bias = (randn(*shape).to(kernels) for shape in shapes)
    y, choice = CONV_POOL(x, weight, bias)
    found, kept = conv_block._conv_pool(x, weight, bias)
    assert_same(found, y, 1e-12)
    assert torch.equal(kept, choice) and kept.dtype == torch.uint8 and len(kept.unique()) == 5
    grad = randn(*y.shape).to(kernels)
    assert_same(conv_block._conv_pool_vjp(grad, choice, x), CONV_POOL_VJP(grad, choice, x), 1e-12)
    assert_same(
        conv_block._conv_pool_jvp(choice, x, weight, bias), CONV_POOL_JVP(choice, x, weight, bias), 1e-12
    )
    assert_same(conv_block._moments(x), MOMENTS(x), 1e-12)


def test_opcheck() -> None:
    x, weight, bias = randn(2, 1, 2, 4, 5), randn(2, 3, 18).requires_grad_(), randn(2, 3).requires_grad_()
    y, choice = CONV_POOL(x, weight, bias)
    torch.library.opcheck(CONV_POOL, (x, weight, bias))
    torch.library.opcheck(CONV_POOL_VJP, (y.detach().requires_grad_(), choice, x))
    torch.library.opcheck(CONV_POOL_JVP, (choice, x, weight, bias))
    torch.library.opcheck(MOMENTS, (x.requires_grad_(),))


def test_compiles_whole() -> None:
    values = [value.requires_grad_() for value in arguments((2, 1, 4, 4, 3))]

    def step(*leaves: Tensor) -> Any:
        return torch.func.grad(
            lambda kernel: weighted_sum(conv_norm_relu_pool(leaves[0], kernel, *leaves[2:]))
        )(leaves[1])

    assert_same(torch.compile(step, fullgraph=True, backend="aot_eager")(*values), step(*values), 1e-12)


X, KERNEL, OF = torch.zeros(2, 1, 4, 4), torch.zeros(3, 1, 3, 3), torch.zeros(3)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "x": (lambda: conv_norm_relu_pool(1, KERNEL, OF, OF, OF), TypeError, "x: expected a tensor, got int"),
    "x dim": (
        lambda: conv_norm_relu_pool(X[0], KERNEL, OF, OF, OF),
        ValueError,
        "x: expected shape [..., n, C, H, W], got [1, 4, 4]",
    ),
    "x dtype": (
        lambda: conv_norm_relu_pool(X.long(), KERNEL, OF, OF, OF),
        TypeError,
        "x: expected float32, float64, bfloat16 or float16, got torch.int64",
    ),
    "kernel": (
        lambda: conv_norm_relu_pool(X, torch.zeros(3, 2, 3, 3), OF, OF, OF),
        ValueError,
        "conv_weight: expected [..., C, 1, 3, 3], got [3, 2, 3, 3]",
    ),
    "weight": (
        lambda: conv_norm_relu_pool(X, KERNEL, OF, torch.zeros(2), OF),
        ValueError,
        "weight: expected shape [..., 3], got [2]",
    ),
    "weight none": (
        lambda: conv_norm_relu_pool(X, KERNEL, OF, None, OF),
        TypeError,
        "weight: expected a tensor, got NoneType",
    ),
    "bias device": (
        lambda: conv_norm_relu_pool(X, KERNEL, OF, OF, OF.to("meta")),
        ValueError,
        "bias: expected the device of x, cpu, got meta",
    ),
    "mean alone": (
        lambda: conv_norm_relu_pool(X, KERNEL, OF, OF, OF, OF),
        ValueError,
        "var: expected with mean, got None",
    ),
    "no pixels": (
        lambda: conv_norm_relu_pool(X[:0], KERNEL, OF, OF, OF),
        ValueError,
        "x: expected a pixel to take the statistics of, got shape [0, 1, 4, 4]",
    ),
    "small images": (
        lambda: conv_norm_relu_pool(X[..., :1], KERNEL, OF, OF, OF),
        ValueError,
        "x: expected images of at least 2 x 2 to pool, got shape [2, 1, 4, 1]",
    ),
    "kernel dtype": (
        lambda: conv_norm_relu_pool(X, KERNEL.double(), OF, OF, OF),
        TypeError,
        "conv_weight: expected the dtype of x, torch.float32, got torch.float64",
    ),
    "var dtype": (
        lambda: conv_norm_relu_pool(X.half(), KERNEL, OF, OF, OF, OF, OF.double()),
        TypeError,
        "var: expected the dtype of x, torch.float16 or torch.float32, got torch.float64",
    ),
    "eps": (
        lambda: conv_norm_relu_pool(X, KERNEL, OF, OF, OF, eps=-1),
        ValueError,
        "eps: expected a number that is not negative, got -1",
    ),
    "eps text": (
        lambda: conv_norm_relu_pool(X, KERNEL, OF, OF, OF, eps="1"),
        TypeError,
        "eps: expected a number, got str",
    ),
    "leading": (
        lambda: conv_norm_relu_pool(X.expand(2, 2, 1, 4, 4), KERNEL, OF, OF.expand(3, 3), OF),
        ValueError,
        "leading dimensions: expected shapes that broadcast, but x has [2], conv_weight has [], weight has [3], "
        "bias has [], conv_bias has []",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, kind, text = WRONG[name]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == text
