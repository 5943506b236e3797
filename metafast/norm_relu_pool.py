"""Batch normalisation, ReLU and 2 x 2 max-pooling in one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from metafast import _check
from metafast._autodiff import differentiable
from metafast._batching import fold_into_tasks
from metafast._dual import Dual, linear, tangent_of, value_of
from metafast._library import call, fallback, operator
from metafast.reference import windows

NORM = operator("norm_relu_pool")
NORM_VJP = operator("norm_relu_pool_vjp")
NORM_VJP_VJP = operator("norm_relu_pool_vjp_vjp")

#: What stands in `choice` where ReLU leaves nothing of a window.
DEAD = 4
_HALVES = (torch.bfloat16, torch.float16)


def norm_relu_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
    pool: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Batch normalisation, ReLU and 2 x 2 max-pooling of images in one operator.

    .. math:: y = \mathrm{pool}\Big(\mathrm{relu}\Big(w \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + b\Big)\Big)

    The statistics are those of each task's images for each channel (batch statistics), or given ones. Nothing of the
    size of x is stored but y, and for the backward x itself and one byte for each pixel of y. Differentiable to any
    order; the first and the second derivative are fused operators too. Where ReLU's argument is 0 its derivative is,
    and of equal pixels the first of a window gets the gradient, as in torch. Odd sizes are rounded down: the last row
    or column counts for the statistics alone.

    Ioffe and Szegedy, *Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift*,
    2015.

    Args:
        x: ``[..., n, C, H, W]`` floating; the dimensions before n are tasks, with statistics of their own.
        weight: w, ``[..., C]``, shared by the tasks or one for each; the dtype of ``x``, or float32 beside half types.
            None: ones.
        bias: b, as ``weight``. None: zeros.
        mean: None for the statistics of the images, or ``[..., C]`` as ``weight``: the mean to normalise by.
        var: None, or the (biased) variance to normalise by, if ``mean`` is given.
        eps: :math:`\epsilon`, a number that is not negative.
        relu: without it the values stay negative where they are.
        pool: without it y has the size of x.

    Returns:
        y ``[..., n, C, H // 2, W // 2]`` (``[..., n, C, H, W]`` without pooling) in the dtype and the memory format of
        ``x``, also under autocast; the mean and the biased variance that were used, ``[..., C]``, in float32 where
        ``x`` has a half type. Given ones are returned as they are.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: shapes or devices do not fit; only one of ``mean`` and ``var`` is given; no pixel to take the
            statistics of; images below 2 x 2 to pool; ``eps`` is negative.

    Example:
        >>> images = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> y, mean, var = norm_relu_pool(images, torch.ones(1), torch.zeros(1))
        >>> y
        tensor([[[[0.0000, 0.0000],
                  [1.1931, 1.6270]]]])
        >>> mean, var
        (tensor([7.5000]), tensor([21.2500]))
    """
    for name, flag in (("relu", relu), ("pool", pool)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
    check_images(x, mean, var, eps, pool)
    channels = x.shape[-3]
    wide = torch.float32 if x.dtype in _HALVES else x.dtype
    own = [
        None if value is None else of_channels(value, name, x, channels, wide)
        for name, value in (("weight", weight), ("bias", bias), ("mean", mean), ("var", var))
    ]
    own[0] = x.new_ones(channels, dtype=wide) if own[0] is None else own[0]
    own[1] = x.new_zeros(channels, dtype=wide) if own[1] is None else own[1]
    lead = x.shape[:-4]
    if any(value is not None and value.dim() > 1 for value in own):
        lead = torch.Size(
            _check.broadcast_tasks(
                ("x", lead),
                *(
                    (name, value.shape[:-1])
                    for name, value in zip(("weight", "bias", "mean", "var"), own, strict=True)
                    if value is not None
                ),
            )
        )
    tasks = lead.numel()
    # A tensor that fits already is taken as it is: views cost, and forward mode wants a tangent to lie as its tensor.
    folded = x
    if x.shape[:-4] != lead or x.dim() != 5:
        folded = x.expand(*lead, *x.shape[-4:]).reshape(tasks, *x.shape[-4:])
    own = [
        value
        if value is None or value.shape == (tasks, channels)
        else value.expand(*lead, channels).reshape(tasks, channels)
        for value in own
    ]
    y, of_x, var_of_x, _ = call(NORM, folded, *own, float(eps), relu, pool)
    y = y.reshape(*lead, *y.shape[1:])
    if mean is not None and var is not None:
        return y, mean, var
    return y, of_x.reshape(*lead, channels), var_of_x.reshape(*lead, channels)


def norm_rows(
    x: Tensor, weight: Tensor, bias: Tensor, given: tuple[Tensor, Tensor] | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`norm_relu_pool` of rows ``[T, m, C]`` by ``[T, C]``: y, mean and variance, in float32 or float64."""
    mean, var = (None, None) if given is None else given
    y, *own, _ = call(NORM, _as_pixels(x), weight, bias, mean, var, float(eps), relu, False)
    return _as_rows(y), *(own if given is None else given)


def norm_rows_vjp(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Sequence[Tensor],
    given: bool,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`norm_rows` for x, weight and bias, ``statistics`` as it returns them."""
    choice = x.new_empty(x.shape[0], 0, dtype=torch.uint8)
    rows = _as_pixels(grad), None, None, _as_pixels(x)
    to_x, *to_own = NORM_VJP(*rows, weight, bias, *statistics, choice, given, float(eps), relu, False)[:3]
    return _as_rows(to_x), *to_own


def _as_pixels(x: Tensor) -> Tensor:
    """Rows ``[T, m, C]`` as the pixels of an image for each task, whose channels lie side by side."""
    return x.mT.unsqueeze(1).unsqueeze(-1)


def _as_rows(y: Tensor) -> Tensor:
    return y.squeeze(-1).squeeze(1).mT


def check_images(x: Any, mean: Any, var: Any, eps: Any, pool: bool) -> None:
    """Images to normalise, by their own statistics or by both of the given ones, and to pool."""
    _check.floating(x, "x")
    if x.dim() < 4:
        raise ValueError(f"x: expected shape [..., n, C, H, W], got {list(x.shape)}")
    images, _, height, width = x.shape[-4:]
    if (mean is None) != (var is None):
        missing, other = ("mean", "var") if mean is None else ("var", "mean")
        raise ValueError(f"{missing}: expected with {other}, got None")
    _check.number(eps, "eps")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number that is not negative, got {eps}")
    if pool and (height < 2 or width < 2):
        raise ValueError(f"x: expected images of at least 2 x 2 to pool, got shape {list(x.shape)}")
    if mean is None and images * height * width == 0:
        raise ValueError(f"x: expected a pixel to take the statistics of, got shape {list(x.shape)}")


def in_dtype_of_images(value: Any, name: str, x: Tensor, wide: torch.dtype) -> Tensor:
    """A parameter in the dtype to compute in."""
    _check.floating(value, name)
    _check.same_device(value, name, x, "x")
    if value.dtype not in (x.dtype, wide):
        want = f"{x.dtype}" if wide == x.dtype else f"{x.dtype} or {wide}"
        raise TypeError(f"{name}: expected the dtype of x, {want}, got {value.dtype}")
    return value.to(wide)


def of_channels(value: Any, name: str, x: Tensor, channels: int, wide: torch.dtype) -> Tensor:
    """``[..., C]`` in the dtype to compute in."""
    own = in_dtype_of_images(value, name, x, wide)
    if own.dim() < 1 or own.shape[-1] != channels:
        raise ValueError(f"{name}: expected shape [..., {channels}], got {list(own.shape)}")
    return own


# The closed forms are written once, for tensors and for Dual numbers. Which pixel of a window is the largest, and which
# values are positive, is constant.
def _wide(values: Any) -> Any:
    """``[T, C]`` to go with ``[T, n, C, H, W]``."""
    return values[:, None, :, None, None]


def _sum(x: Any) -> Any:
    return x.sum((1, 3, 4))


def _pixels(x: Any) -> int:
    return x.shape[1] * x.shape[3] * x.shape[4]


def _statistics(x: Any) -> tuple[Any, Any]:
    mean = _sum(x) / _pixels(x)
    centred = x - _wide(mean)
    return mean, _sum(centred * centred) / _pixels(x)


def _normalised(x: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float) -> Any:
    return (x - _wide(mean)) * _wide(weight * (var + eps).rsqrt()) + _wide(bias)


def _choice(z: Tensor, relu: bool, pool: bool) -> Tensor:
    """The largest pixel of each window, the first of equal ones, a NaN before all; without pooling nothing."""
    if not pool:
        return z.new_empty(z.shape[0], 0, dtype=torch.uint8)
    pixels = windows(z)
    largest, choice = pixels[..., 0], torch.zeros_like(pixels[..., 0], dtype=torch.uint8)
    for k in range(1, 4):
        better = (pixels[..., k] > largest) | pixels[..., k].isnan()
        largest, choice = torch.where(better, pixels[..., k], largest), torch.where(better, k, choice)
    return torch.where(largest <= 0, DEAD, choice) if relu else choice


class _Pattern:
    """Pooling and ReLU as the linear map that they are around a point, and its adjoint."""

    def __init__(self, choice: Tensor, z: Any, relu: bool, pool: bool) -> None:
        """``z`` is looked at without pooling only, where nothing of its pattern is stored."""
        self.pool = pool
        self.alive = None
        if pool:
            self.alive = choice.unsqueeze(-1) == torch.arange(4, dtype=torch.uint8, device=choice.device)
        elif relu:
            self.alive = ~(value_of(z) <= 0)

    def _masked(self, x: Tensor) -> Tensor:
        return x if self.alive is None else torch.where(self.alive, x, 0.0)

    def pooled(self, x: Any) -> Any:
        if not self.pool:
            return linear(self._masked, x)
        return linear(lambda v: self._masked(windows(v)).sum(-1), x)

    def spread(self, y: Any, height: int, width: int) -> Any:
        """Each pixel of ``y`` at the place that it came from, zeros elsewhere."""

        def of(v: Tensor) -> Tensor:
            rows, columns = v.shape[-2:]
            v = self._masked(v.unsqueeze(-1)).reshape(*v.shape, 2, 2).transpose(-3, -2)
            v = v.reshape(*v.shape[:-4], 2 * rows, 2 * columns)
            return pad(v, (0, width - 2 * columns, 0, height - 2 * rows))

        return linear(of if self.pool else self._masked, y)


def _forward(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, eps: float, relu: bool, pool: bool
) -> tuple[Any, Any, Any, Tensor]:
    """What NORM computes."""
    given = mean is not None
    if not given:
        mean, var = _statistics(x)
    z = _normalised(x, weight, bias, mean, var, eps)
    choice = _choice(value_of(z), relu, pool)
    y = _Pattern(choice, z, relu, pool).pooled(z)
    if given:
        mean, var = (value_of(weight).new_empty(x.shape[0], 0) for _ in range(2))
    return y, mean, var, choice


class _Point:
    """What both derivatives begin with: centred x, 1 / sqrt(var + eps), the gradient g of the normalised values and its
    sums s1 = sum g and s2 = sum g xhat."""

    def __init__(
        self,
        grad: Any,
        x: Any,
        weight: Any,
        bias: Any,
        mean: Any,
        var: Any,
        choice: Tensor,
        given: bool,
        eps: float,
        relu: bool,
        pool: bool,
    ) -> None:
        if not given:
            mean, var = _statistics(x)
        z = None
        if relu and not pool:
            z = value_of(_normalised(x, weight, bias, mean, var, eps))
        self.pattern = _Pattern(choice, z, relu, pool)
        self.rstd = (var + eps).rsqrt()
        self.scale = weight * self.rstd
        self.centred = x - _wide(mean)
        self.grad = self.pattern.spread(grad, x.shape[3], x.shape[4])
        self.s1 = _sum(self.grad)
        self.s2 = _sum(self.grad * self.centred) * self.rstd


def _added(a: Any, b: Any) -> Any:
    """``a + b``, where None is zero."""
    return b if a is None else a + b


def _backward(grad: Any, grad_mean: Any, grad_var: Any, *inputs: Any) -> tuple[Any, ...]:
    """What NORM_VJP computes: the gradients for x, weight and bias, and for given statistics or None."""
    x, given = inputs[0], inputs[6]
    at = _Point(grad, *inputs)
    to_mean = -(at.scale * at.s1)
    to_var = at.scale * at.rstd * at.s2 * -0.5
    to_x = at.grad * _wide(at.scale)
    if given:
        return to_x, at.s2, at.s1, to_mean, to_var
    # The statistics are x's own: d mean / dx = 1 / N, d var / dx = 2 (x - mean) / N.
    to_mean, to_var = _added(grad_mean, to_mean), _added(grad_var, to_var)
    to_x = to_x + _wide(to_mean / _pixels(x)) + at.centred * _wide(to_var * (2 / _pixels(x)))
    return to_x, at.s2, at.s1, None, None


def _second(
    u_x: Any, u_weight: Any, u_bias: Any, u_mean: Any, u_var: Any,
    grad: Any, grad_mean: Any, grad_var: Any, *inputs: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """What NORM_VJP_VJP computes: the gradients of <u, NORM_VJP> for its arguments but the bias.

    By the symmetry of second derivatives these are tangents along u: NORM's for the upstream gradients, and NORM_VJP's
    for the others. For the bias it is zero.
    """
    x, weight, given = inputs[0], inputs[1], inputs[6]
    count = _pixels(x)
    at = _Point(grad, *inputs)
    if not given:
        u_mean, u_var = _sum(u_x) / count, _sum(u_x * at.centred) * (2 / count)
    # d rstd = rstd turn
    turn = at.rstd * at.rstd * u_var * -0.5
    u_scale = (u_weight + weight * turn) * at.rstd
    moved = u_x - _wide(u_mean)
    to_grad = at.pattern.pooled(moved * _wide(at.scale) + at.centred * _wide(u_scale) + _wide(u_bias))
    to_weight = (_sum(at.grad * u_x) - u_mean * at.s1) * at.rstd + turn * at.s2
    to_x = at.grad * _wide(u_scale)
    to_mean = -(u_scale * at.s1)
    to_var = ((u_scale + at.scale * turn) * at.s2 + at.scale * to_weight) * at.rstd * -0.5
    if given:
        return to_grad, None, None, to_x, to_weight, to_mean, to_var
    slope = _added(grad_var, at.scale * at.rstd * at.s2 * -0.5)
    to_x = to_x + _wide(to_mean / count) + (at.centred * _wide(to_var) + moved * _wide(slope)) * (2 / count)
    return to_grad, u_mean, u_var, to_x, to_weight, None, None


def _computed(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value


def _duals(values: Any, tangents: Any) -> list[Any]:
    """Dual numbers of the floating tensors, in the dtype to compute in."""
    return [
        Dual(_computed(value), None if tangent is None else _computed(tangent))
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value, tangent in zip(values, tangents, strict=True)
    ]


def _results(numbers: Any, likes: Any) -> list[Any]:
    """The tangents, each in the dtype of its `like`; where there is no number, or no `like`, None."""
    return [
        None
        if number is None or like is None
        else torch.zeros_like(value_of(number), dtype=like.dtype)
        if tangent_of(number) is None
        else tangent_of(number).to(like.dtype)  # type: ignore[union-attr]
        for number, like in zip(numbers, likes, strict=True)
    ]


def _is_last(x: Tensor) -> bool:
    """Do the kernels take the channels of ``x`` to lie side by side in memory?"""
    return not x.is_contiguous() and x.shape[2] > 1 and x.stride(2) == 1


def _laid_as(x: Tensor, tangent: Tensor) -> Tensor:
    """``tangent`` in the order in memory of the results: torch makes views only of what lies as its tangent does."""
    if _is_last(x):
        return tangent.movedim(2, -1).contiguous().movedim(-1, 2)
    return tangent.contiguous()


def _norm_vjp(need: Any, grads: Any, *args: Any) -> Any:
    x, weight, bias, mean, var, eps, relu, pool, own_mean, own_var, choice = args
    given = mean is not None
    grad = grads[0]
    if grad is None:
        height, width = (x.shape[3] // 2, x.shape[4] // 2) if pool else x.shape[3:]
        grad = x.new_zeros(*x.shape[:3], height, width)
    of_statistics = (None, None) if given else grads[1:3]
    statistics = (mean, var) if given else (own_mean, own_var)
    out = NORM_VJP(grad, *of_statistics, x, weight, bias, *statistics, choice, given, eps, relu, pool)
    return *out[:3], *(out[3:] if given else (None, None)), None, None, None


def _norm_jvp(tangents: Any, *args: Any) -> Any:
    out = _forward(*_duals(args, tangents))
    y, mean, var = _results(out[:3], (args[0], args[1], args[1]))
    return _laid_as(args[0], y), mean, var, None


def _without_saved(values: Any, given: bool) -> list[Any]:
    """Statistics that NORM has computed are functions of x: they have no tangent of their own."""
    return list(values) if given else [*values[:3], None, None]


# The vjp of NORM_VJP, the gradient of <grad, NORM>, is NORM_VJP_VJP, in float32 for half types.
def _norm_vjp_vjp(need: Any, grads: Any, *args: Any) -> Any:
    x, weight, given = args[3], args[4], args[9]
    u = [
        torch.zeros_like(like) if direction is None else direction
        for direction, like in zip(grads[:3], (x, weight, weight), strict=True)
    ]
    u += [torch.zeros_like(weight) if d is None else d for d in grads[3:]] if given else [None, None]
    out = NORM_VJP_VJP(*map(_computed, (*u, *args)))
    of_statistics = (None, None) if given else out[1:3]
    given_statistics = out[5:] if given else (None, None)
    to_mean, to_var = (None if grad is None else o for grad, o in zip(args[1:3], of_statistics, strict=True))
    to_grad, to_x = out[0].to(x.dtype), out[3].to(x.dtype)
    return to_grad, to_mean, to_var, to_x, out[4], None, *given_statistics, *(None,) * 5


def _norm_vjp_jvp(tangents: Any, *args: Any) -> Any:
    given = args[9]
    along = [*tangents[:3], *_without_saved(tangents[3:8], given), *tangents[8:]]
    out = _backward(*_duals(args, along))
    to_x, *of_channels = _results(out, (args[3], *(args[4],) * 4))
    return _laid_as(args[3], to_x), *_filled(of_channels, args[4])


def _filled(values: Any, like: Tensor) -> tuple[Tensor, ...]:
    """Where there is nothing to give an operator returns something empty."""
    return tuple(like.new_empty(like.shape[0], 0) if v is None else v for v in values)


# NORM_VJP_VJP is the gradient of <u, NORM_VJP> for all but u, whose second derivative is symmetric: its vjp for them is
# its own tangent, and its vjp for u is the tangent of NORM_VJP.
def _norm_vjp_vjp_vjp(need: Any, grads: Any, *args: Any) -> Any:
    u, inputs, given = args[:5], args[5:], args[14]
    q = grads if given else (*grads[:5], None, None)
    q_statistics = (None, None) if given else q[1:3]
    along = [
        q[0],
        *(d if g is not None else None for d, g in zip(q_statistics, inputs[1:3], strict=True)),
        q[3],
        q[4],
        None,
        *q[5:],
        *(None,) * 5,
    ]
    weight = inputs[4]
    of_u: Any = (None,) * 5
    if any(need[:5]):
        of_u = _results(
            _backward(*_duals(inputs, along)), (u[0], *(weight if d is not None else None for d in u[1:]))
        )
    out = _second(*_duals(u, (None,) * 5), *_duals(inputs, along))
    likes = (
        inputs[0],
        inputs[1],
        inputs[2],
        inputs[3],
        weight,
        *((weight, weight) if given else (None, None)),
    )
    to_inputs = _results(out, likes)
    return *of_u, *to_inputs[:5], None, *to_inputs[5:], *(None,) * 5


def _norm_vjp_vjp_jvp(tangents: Any, *args: Any) -> Any:
    given = args[14]
    along = [*tangents[:8], *_without_saved(tangents[8:13], given), *tangents[13:]]
    out = _second(*_duals(args, along))
    own = _results(out, (args[5], *(args[9],) * 2, args[8], *(args[9],) * 3))
    own[0], own[3] = _laid_as(args[8], own[0]), _laid_as(args[8], own[3])
    return _filled(own, args[9])


def _plain_norm(*args: Any) -> Any:
    """What NORM computes, in plain PyTorch."""
    return _forward(*args)


def _plain_vjp(*args: Any) -> Any:
    """What NORM_VJP computes, in plain PyTorch."""
    return _filled(_backward(*args), args[4])


def _plain_vjp_vjp(*args: Any) -> Any:
    """What NORM_VJP_VJP computes, in plain PyTorch."""
    return _filled(_second(*args), args[9])


differentiable(NORM, vjp=_norm_vjp, jvp=_norm_jvp, save_outputs=(1, 2, 3), constant_outputs=(3,))
differentiable(NORM_VJP, vjp=_norm_vjp_vjp, jvp=_norm_vjp_jvp)
differentiable(NORM_VJP_VJP, vjp=_norm_vjp_vjp_vjp, jvp=_norm_vjp_vjp_jvp)
for _op in (NORM, NORM_VJP, NORM_VJP_VJP):
    fold_into_tasks(_op)
fallback(NORM, _plain_norm, wide=(1, 2, 3))
fallback(NORM_VJP, _plain_vjp, wide=(1, 2, 3, 4))
fallback(NORM_VJP_VJP, _plain_vjp_vjp)


def _maps(x: Tensor, *size: Any) -> Tensor:
    """As the kernels allocate ``[T, n, C, *size]``: channels-last where the channels of ``x`` lie side by side."""
    tasks, images, channels = x.shape[:3]
    if _is_last(x):
        return x.new_empty(tasks, images, *size, channels).movedim(-1, 2)
    return x.new_empty(tasks, images, channels, *size)


@torch.library.register_fake(NORM)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    relu: bool,
    pool: bool,
) -> tuple[Tensor, ...]:
    tasks, _, channels, height, width = x.shape
    own = (tasks, channels if mean is None else 0)
    pooled = (height // 2, width // 2)
    choice = _maps(x, *pooled).to(torch.uint8) if pool else x.new_empty(tasks, 0, dtype=torch.uint8)
    return (
        _maps(x, *(pooled if pool else (height, width))),
        weight.new_empty(own),
        weight.new_empty(own),
        choice,
    )


@torch.library.register_fake(NORM_VJP)
def _(
    grad: Tensor, grad_mean: Any, grad_var: Any, x: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    given = (x.shape[0], x.shape[2] if rest[4] else 0)
    of_channels = weight.shape, weight.shape, given, given
    return _maps(x, *x.shape[3:]), *(weight.new_empty(shape) for shape in of_channels)


@torch.library.register_fake(NORM_VJP_VJP)
def _(*args: Any) -> tuple[Tensor, ...]:
    grad, x, weight, is_given = args[5], args[8], args[9], args[14]
    nothing = (x.shape[0], 0)
    own, given = (nothing, weight.shape) if is_given else (weight.shape, nothing)
    return (
        _maps(x, *grad.shape[3:]),
        weight.new_empty(own),
        weight.new_empty(own),
        _maps(x, *x.shape[3:]),
        weight.new_empty(weight.shape),
        weight.new_empty(given),
        weight.new_empty(given),
    )
