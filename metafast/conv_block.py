"""The first convolutional block of an encoder, whose convolution is cheaper to compute again than to store."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from metafast import _check
from metafast._autodiff import differentiable
from metafast._batching import fold_into_tasks, of_groups, of_tasks
from metafast._library import call, fallback, operator
from metafast.norm_relu_pool import DEAD, check_images, in_dtype_of_images, of_channels

CONV_POOL = operator("conv_pool")
CONV_POOL_VJP = operator("conv_pool_vjp")
CONV_POOL_JVP = operator("conv_pool_jvp")
MOMENTS = operator("patch_moments")


def conv_norm_relu_pool(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""A 3 x 3 convolution with padding 1, batch normalisation, ReLU and 2 x 2 max-pooling in one.

    .. math:: z = W * x + b, \qquad
        y = \max_{2 \times 2} \, \max(0, \gamma (z - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta)

    For few input channels, as the first block of an encoder has. The output of the convolution is never stored. Nor is
    it needed for the statistics: with the patches p under the kernel, :math:`z = W p + b`, so mean and variance are
    :math:`W \bar p + b` and :math:`W \operatorname{Cov}(p) W^\top`, and normalisation is a scale and a shift of W. The
    gradients of all parameters are sums of :math:`p` over the pixels that the pooling chose. Differentiable to any
    order; in parameters by kernels, in ``x`` by plain PyTorch.

    Args:
        x: images ``[..., n, planes, H, W]``, the leading dimensions being tasks.
        conv_weight: ``[C, planes, 3, 3]``, or with leading dimensions, of which all arguments' broadcast.
        conv_bias: ``[..., C]`` or None. Batch statistics take it out again: its gradient is 0.
        weight: :math:`\gamma`, ``[..., C]``.
        bias: :math:`\beta`, ``[..., C]``.
        mean: given statistics ``[..., C]``; None for those of each task's images.
        var: the biased variance, as ``mean``.
        eps: :math:`\epsilon`.

    Returns:
        ``(y, mean, var)``: ``[..., n, C, H // 2, W // 2]`` in the dtype of ``x``, or autocast's, its channels last in
        memory; and the statistics, ``[..., C]`` in float32 or float64.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: shapes or devices do not fit; only one of ``mean`` and ``var`` is given; no pixel to take the
            statistics of; images below 2 x 2; ``eps`` is negative.
    """
    check_images(x, mean, var, eps, pool=True)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    kernel = in_dtype_of_images(conv_weight, "conv_weight", x, wide)
    if kernel.dim() < 4 or kernel.shape[-3:] != (x.shape[-3], 3, 3):
        raise ValueError(f"conv_weight: expected [..., C, {x.shape[-3]}, 3, 3], got {list(kernel.shape)}")
    channels = kernel.shape[-4]
    gamma, beta = (
        of_channels(value, name, x, channels, wide) for name, value in (("weight", weight), ("bias", bias))
    )
    optional = {"conv_bias": conv_bias, "mean": mean, "var": var}
    given = {
        name: of_channels(value, name, x, channels, wide)
        for name, value in optional.items()
        if value is not None
    }
    lead = _check.broadcast_tasks(
        ("x", x.shape[:-4]),
        ("conv_weight", kernel.shape[:-4]),
        *((name, value.shape[:-1]) for name, value in {"weight": gamma, "bias": beta, **given}.items()),
    )
    tasks = torch.Size(lead).numel()

    def fold(value: Tensor, own: int) -> Tensor:
        """``[T, ...]``, or ``[1, ...]`` where it is the same for all."""
        shape = value.shape[value.dim() - own :]
        if value.dim() == own:
            return value.unsqueeze(0)
        return value.expand((*lead, *shape)).reshape((tasks, *shape))

    images = x.expand((*lead, *x.shape[-4:])).reshape((tasks, *x.shape[-4:]))
    if _check.autocasts(x):
        images = images.to(torch.get_autocast_dtype(x.device.type))
    with _check.without_autocast(x):
        kernel = fold(kernel, 4).flatten(2)
        gamma, beta = fold(gamma, 1), fold(beta, 1)
        given = {name: fold(value, 1) for name, value in given.items()}
        shift = given.get("conv_bias", kernel.new_zeros(kernel.shape[:2]))
        if mean is None:
            patch, covariance = call(MOMENTS, images)
            # A product with broadcasting is another one, of other roundings, where gradients are recorded.
            double = of_tasks(kernel.double(), tasks)
            middle = torch.bmm(double, patch.unsqueeze(-1)).squeeze(-1) + shift
            spread = (torch.bmm(double, covariance) * double).sum(-1)
        else:
            middle, spread = given["mean"].double(), given["var"].double()
        scale = gamma * (spread + eps).rsqrt()
        folded, offset = (kernel * scale.unsqueeze(-1)).to(wide), (beta - scale * (middle - shift)).to(wide)
        groups = 1 if folded.shape[0] == offset.shape[0] == 1 else tasks
        y = call(CONV_POOL, images, of_tasks(folded, groups), of_tasks(offset, groups))[0]
    y = y.movedim(-1, 2).reshape((*lead, x.shape[-4], channels, x.shape[-2] // 2, x.shape[-1] // 2))
    statistics = (value.to(wide) for value in (middle, spread))
    return y, *(value.expand(tasks, channels).reshape(*lead, channels) for value in statistics)


# A window's value is linear in weight and bias, and in the image: with the choices fixed the derivatives of the
# operators are these again, and what is asked for the image is written in plain PyTorch.
def _windows(x: Tensor) -> Tensor:
    """The patches ``[T, n, rows, columns, 4, 9 planes]`` of each window's pixels."""
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    border = pad(x, (1, 1, 1, 1))
    pixels = []
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        shifted = [
            border[..., dy + ky : dy + ky + 2 * rows - 1 : 2, dx + kx : dx + kx + 2 * columns - 1 : 2]
            for ky in range(3)
            for kx in range(3)
        ]
        # [T, n, planes, 9, rows, columns]
        own = torch.stack(shifted, -3)
        pixels.append(own.reshape((*own.shape[:-4], -1, rows, columns)).movedim(-3, -1))
    return torch.stack(pixels, -2)


def _chosen(values: Tensor, choice: Tensor) -> Tensor:
    """``values [..., 4, C]`` at the choices ``[..., C]``, 0 at those of nothing."""
    kept = torch.where(choice == DEAD, 0, choice).long()
    return torch.where(choice == DEAD, 0.0, values.gather(-2, kept.unsqueeze(-2)).squeeze(-2))


def _spread(grad: Tensor, choice: Tensor) -> Tensor:
    """The adjoint of :func:`_chosen`."""
    places = torch.arange(4, dtype=torch.uint8, device=choice.device)[:, None]
    return torch.where(choice.unsqueeze(-2) == places, grad.unsqueeze(-2), 0.0)


def _to_images(grad: Tensor, choice: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient for ``x`` of ``<grad, CONV_POOL(x, weight, .)>``."""
    height, width = x.shape[-2:]
    rows, columns = height // 2, width // 2
    planes = x.shape[-3]
    own = of_tasks(weight, x.shape[0])[:, None, None, None].to(grad.dtype)
    # [T, n, rows, columns, 4, planes, 3, 3]
    of_patches = _spread(grad, choice) @ own
    of_patches = of_patches.reshape((*of_patches.shape[:-1], planes, 3, 3))
    total = torch.zeros((), dtype=grad.dtype, device=grad.device)
    for at, (dy, dx) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        for ky in range(3):
            for kx in range(3):
                # Every second pixel from (dy + ky, dx + kx) of the image with its border.
                part = of_patches[..., at, :, ky, kx].movedim(-1, -3)
                part = torch.stack([part, torch.zeros_like(part)], -1)
                part = torch.stack([part, torch.zeros_like(part)], -3)
                part = part.reshape((*part.shape[:-4], 2 * rows, 2 * columns))
                top, left = dy + ky, dx + kx
                below, right = height + 2 - top - 2 * rows, width + 2 - left - 2 * columns
                total = total + pad(part, (left, right, top, below))
    return total[..., 1:-1, 1:-1].to(x.dtype)


def _conv_pool(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What CONV_POOL computes, in plain PyTorch."""
    values = _convolved(x, weight, bias)
    best, kept = values.max(-2)
    nothing = best <= 0
    y = torch.where(nothing, 0.0, best).to(x.dtype)
    return y, torch.where(nothing, DEAD, kept).to(torch.uint8)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    tasks = x.shape[0]
    own, shift = of_tasks(weight, tasks), of_tasks(bias, tasks)
    with _check.without_autocast(x):
        values = _windows(x).to(own.dtype) @ own.mT[:, None, None, None]
    return values + shift[:, None, None, None, None]


def _conv_pool_jvp(choice: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What CONV_POOL_JVP computes, in plain PyTorch."""
    return _chosen(_convolved(x, weight, bias), choice).to(x.dtype)


def _conv_pool_vjp(grad: Tensor, choice: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """What CONV_POOL_VJP computes, in plain PyTorch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    of_pixels = _spread(grad.to(wide), choice)
    with _check.without_autocast(x):
        of_weight = of_pixels.flatten(1, -2).mT @ _windows(x).to(wide).flatten(1, -2)
    return of_weight, of_pixels.sum((1, 2, 3, 4))


def _patches(x: Tensor) -> Tensor:
    """``[T, n H W, 9 planes]`` in float64."""
    height, width = x.shape[-2:]
    border = pad(x.double(), (1, 1, 1, 1))
    shifted = [border[..., ky : ky + height, kx : kx + width] for ky in range(3) for kx in range(3)]
    n, planes = x.shape[1:3]
    pixels = torch.stack(shifted, -1).movedim(2, -2)
    return pixels.reshape((-1, n * height * width, 9 * planes))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """What MOMENTS computes, in plain PyTorch."""
    patches = _patches(x)
    mean = patches.mean(1)
    centred = patches - mean.unsqueeze(1)
    return mean, centred.mT @ centred / patches.shape[1]


def _pool_vjp_rule(need: Any, grads: Any, x: Tensor, weight: Tensor, bias: Tensor, choice: Tensor) -> Any:
    grad = grads[0]
    to_x = _to_images(grad, choice, x, weight) if need[0] else None
    to_weight = to_bias = None
    if need[1] or need[2]:
        to_weight, to_bias = (of_groups(g, weight.shape[0]) for g in CONV_POOL_VJP(grad, choice, x))
    return to_x, to_weight, to_bias


def _pool_jvp_rule(tangents: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    choice = CONV_POOL(x, weight, bias)[1]
    moved = CONV_POOL_JVP(choice, x, *tangents[1:])
    moved = moved + CONV_POOL_JVP(choice, tangents[0], weight, torch.zeros_like(bias))
    return moved, None


def _vjp_vjp_rule(need: Any, grads: Any, grad: Tensor, choice: Tensor, x: Tensor) -> Any:
    tasks, channels, patch = x.shape[0], grad.shape[-1], 9 * x.shape[2]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = grads
    if weight is None:
        weight = x.new_zeros((tasks, channels, patch), dtype=wide)
    if bias is None:
        bias = x.new_zeros((tasks, channels), dtype=wide)
    to_grad = CONV_POOL_JVP(choice, x, weight, bias) if need[0] else None
    return to_grad, None, _to_images(grad, choice, x, weight) if need[2] else None


def _vjp_jvp_rule(tangents: Any, grad: Tensor, choice: Tensor, x: Tensor) -> Any:
    weight, bias = CONV_POOL_VJP(tangents[0], choice, x)
    return weight + CONV_POOL_VJP(grad, choice, tangents[2])[0], bias


def _jvp_vjp_rule(need: Any, grad: Any, choice: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    to_x, to_weight, to_bias = _pool_vjp_rule(need[1:], grad, x, weight, bias, choice)
    return None, to_x, to_weight, to_bias


def _jvp_jvp_rule(tangents: Any, choice: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    moved = CONV_POOL_JVP(choice, x, *tangents[2:])
    return moved + CONV_POOL_JVP(choice, tangents[1], weight, torch.zeros_like(bias))


def _moments_vjp_rule(need: Any, grads: Any, x: Tensor) -> Any:
    to_mean, to_covariance = grads
    patches = _patches(x)
    total = torch.zeros_like(patches)
    if to_mean is not None:
        total = total + to_mean.unsqueeze(1)
    if to_covariance is not None:
        centred = patches - patches.mean(1, keepdim=True)
        total = total + centred @ (to_covariance + to_covariance.mT)
    n, planes, height, width = x.shape[1:]
    of_pixels = (total / patches.shape[1]).reshape((-1, n, height, width, planes, 3, 3)).movedim(4, 2)
    border = torch.zeros((), dtype=torch.float64, device=x.device)
    for ky in range(3):
        for kx in range(3):
            border = border + pad(of_pixels[..., ky, kx], (kx, 2 - kx, ky, 2 - ky))
    return (border[..., 1:-1, 1:-1].to(x.dtype),)


def _moments_jvp_rule(tangents: Any, x: Tensor) -> Any:
    patches, moved = _patches(x), _patches(tangents[0])
    centred = patches - patches.mean(1, keepdim=True)
    product = moved.mT @ centred / patches.shape[1]
    return moved.mean(1), product + product.mT


differentiable(CONV_POOL, vjp=_pool_vjp_rule, jvp=_pool_jvp_rule, save_outputs=(1,), constant_outputs=(1,))
differentiable(CONV_POOL_VJP, vjp=_vjp_vjp_rule, jvp=_vjp_jvp_rule)
differentiable(CONV_POOL_JVP, vjp=_jvp_vjp_rule, jvp=_jvp_jvp_rule)
differentiable(MOMENTS, vjp=_moments_vjp_rule, jvp=_moments_jvp_rule)
for _op in (CONV_POOL, CONV_POOL_VJP, CONV_POOL_JVP, MOMENTS):
    fold_into_tasks(_op)
fallback(CONV_POOL, _conv_pool, wide=(1,))
fallback(CONV_POOL_VJP, _conv_pool_vjp, wide=(0, 1))
fallback(CONV_POOL_JVP, _conv_pool_jvp)
fallback(MOMENTS, _moments, wide=(0, 1))


def _pooled_shape(x: Tensor, channels: Any) -> tuple[Any, ...]:
    return (*x.shape[:2], x.shape[3] // 2, x.shape[4] // 2, channels)


@torch.library.register_fake(CONV_POOL)
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = _pooled_shape(x, weight.shape[1])
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)


@torch.library.register_fake(CONV_POOL_JVP)
def _(choice: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(_pooled_shape(x, weight.shape[1]))


@torch.library.register_fake(CONV_POOL_VJP)
def _(grad: Tensor, choice: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    own = (x.shape[0], grad.shape[-1])
    return x.new_empty((*own, 9 * x.shape[2]), dtype=wide), x.new_empty(own, dtype=wide)


@torch.library.register_fake(MOMENTS)
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    tasks, patch = x.shape[0], 9 * x.shape[2]
    mean = x.new_empty((tasks, patch), dtype=torch.float64)
    return mean, x.new_empty((tasks, patch, patch), dtype=torch.float64)
