"""A module as a function of its parameters: what an inner loop calls in its place, and leaves as it was."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from metafast import _check
from metafast.backbones import MLP, Block, call_block, is_block, is_hooked
from metafast.norm_relu_pool import norm_relu_pool

BATCH_NORM_POLICIES = ("transductive", "running", "frozen")
OUTPUT_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "mse": functional.mse_loss,
}
_RUNNING_MEAN = "running_mean"
_ACTIVATIONS: Mapping[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}
#: Up to so many input planes a convolution with a task's own weights is cheaper as a product with the unfolded images
#: than as a group of a grouped convolution (forward and backward on two cores, 8 tasks of 5 images: 4 against 15 ms for
#: 1 to 64 planes of 28 x 28, 22 against 10 ms for 64 to 64 of 14 x 14).
FEW_PLANES = 4


class Form(NamedTuple):
    """A module that a fused operator computes: linear layers by their names, one kind of activation between them."""

    layers: tuple[str, ...]
    activation: str
    flattens: bool
    biased: bool

    @property
    def single(self) -> bool:
        return len(self.layers) == 1


def fused_form(module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor) -> Form | None:
    """The form of a linear layer or of a plain MLP, None for any other module."""
    if type(module) is nn.Linear:
        named: list[tuple[str, nn.Module]] = [("", module)]
    elif type(module) in (nn.Sequential, MLP):
        named = [(f"{name}.", child) for name, child in module.named_children()]
    else:
        return None
    if is_hooked(module) or any(is_hooked(child) for _, child in named):
        return None
    flattens = type(named[0][1]) is nn.Flatten if named else False
    if flattens:
        flatten: Any = named[0][1]
        if (flatten.start_dim, flatten.end_dim) != (1, -1):
            return None
        named = named[1:]
    linear, between = named[::2], [type(child) for _, child in named[1::2]]
    if len(named) % 2 == 0 or not all(type(child) is nn.Linear for _, child in linear):
        return None
    if any(kind not in _ACTIVATIONS for kind in between) or len(set(between)) > 1:
        return None
    layers = tuple(name for name, _ in linear)
    biased = [f"{name}bias" in parameters for name in layers]
    tensors = [*parameters.values(), x]
    if (
        not (all(biased) or (len(layers) == 1 and not any(biased)))
        or any(t.dtype not in (torch.float32, torch.float64) or t.dtype != x.dtype for t in tensors)
        or not (flattens or x.dim() == 3)
        or any(isinstance(child, nn.Linear) and child.out_features == 0 for _, child in linear)
    ):
        return None
    return Form(layers, _ACTIVATIONS[between[0]] if between else "relu", flattens, all(biased))


class FirstLayer:
    """A linear layer that sees the module's rows themselves, whose weight stays within reach of the support rows.

    Every step adds to the weight a combination of its input's rows, the same support rows X each time:
    :math:`W_t = W_0 + D_t^T X`, and :math:`W_t z = W_0 z + D_t^T (X z)` for any row z. So the layer is given the
    products with W_0 and with X, made once for all tasks and steps, and the n rows of D adapt in place of its weight:
    its derivative with respect to :math:`X D_t` is the step of D.

    Attributes:
        name: the weight's.
        flattens: whether rows are flattened before.
    """

    def __init__(self, name: str, flattens: bool) -> None:
        self.name, self.flattens = name, flattens
        self._change: Tensor | None = None

    def watch(self, tensors: Mapping[str, Tensor]) -> None:
        """Before a call with these tensors, in which the weight's place is taken by what its change adds."""
        self._change = tensors[self.name]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is not self._change:
            return functional.linear(x, weight, bias)
        return x + weight if bias is None else x + weight + bias


def first_layer(module: nn.Module, x: Tensor) -> FirstLayer | None:
    """A linear layer that ``x [T, n, ...]`` reach as they are, or flattened, if the module begins with one and it is
    cheaper to adapt as a :class:`FirstLayer`."""
    prefix, flattens, layer = "", False, module
    while type(layer) in (nn.Sequential, MLP):
        if is_hooked(layer):
            return None
        children = list(layer.named_children())
        if children and type(children[0][1]) is nn.Flatten and not flattens:
            flatten: Any = children.pop(0)[1]
            if (flatten.start_dim, flatten.end_dim) != (1, -1) or is_hooked(flatten):
                return None
            flattens = True
        if not children:
            return None
        prefix, layer = f"{prefix}{children[0][0]}.", children[0][1]
    if type(layer) is not nn.Linear or is_hooked(layer) or not prefix or not (flattens or x.dim() == 3):
        return None
    weight, rows = layer.weight, x.shape[1]
    others = [value for name, value in module.named_parameters(remove_duplicate=False) if value is weight]
    entries = weight.shape[0] * weight.shape[1]
    if len(others) > 1 or weight.dtype != x.dtype or x.shape[2:].numel() != weight.shape[1]:
        return None
    return FirstLayer(f"{prefix}weight", flattens) if rows * sum(weight.shape) < entries // 2 else None


class Statistics:
    """What the BatchNorm layers of a call normalised by, where their running statistics are to follow it."""

    def __init__(self) -> None:
        self._layers: list[tuple[str, Tensor]] = []
        self._found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def watch(self, tensors: Mapping[str, Tensor]) -> None:
        """Before a call with these tensors."""
        self._layers = [(name, value) for name, value in tensors.items() if name.endswith(_RUNNING_MEAN)]
        self._found = {}

    def add(self, running_mean: Tensor | None, mean: Tensor, variance: Tensor) -> None:
        for name, known in self._layers:
            if known is running_mean:
                self._found.setdefault(name[: -len(_RUNNING_MEAN)], []).append((mean, variance))

    def take(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """After it: for each layer by its prefix, such as ``"encoder.0.1."``, mean and variance of its calls."""
        return self._found


@contextlib.contextmanager
def stateless(
    module: nn.Module, batch_norm: str, own_weights: bool, statistics: Statistics, first: FirstLayer | None
) -> Iterator[None]:
    """Inside, calls of ``module`` change no running statistics, and know none if they are transductive; its
    convolutional blocks are computed as those of :class:`metafast.Conv4`, and :class:`_Forms` stand in for torch's
    functions. ``statistics`` sees what the running ones would have followed, ``first`` stands for the first layer.

    ``own_weights``: it is called by vmap, with other weights for each task.
    """
    hidden: list[tuple[nn.Module, str, Any]] = []
    blocks: list[nn.Module] = []

    def put(layer: nn.Module, name: str, value: Any) -> None:
        hidden.append((layer, name, getattr(layer, name)))
        setattr(layer, name, value)

    try:
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                if batch_norm == "transductive" or layer.running_mean is None:
                    for name in ("running_mean", "running_var", "num_batches_tracked"):
                        put(layer, name, None)
                elif batch_norm == "frozen":
                    put(layer, "training", False)
            # The compiler does not follow a method that comes and goes; there the block's layers stay on their own.
            elif _computes_block(layer) and not torch.compiler.is_compiling():
                layer.forward = partial(  # type: ignore[method-assign]
                    call_block, layer, update=lambda norm, *found: statistics.add(norm.running_mean, *found)
                )
                blocks.append(layer)
        with _Forms(own_weights, statistics, first):
            yield
    finally:
        for block in blocks:
            del block.forward
        for layer, name, value in reversed(hidden):
            setattr(layer, name, value)


def _computes_block(layer: nn.Module) -> TypeGuard[nn.Sequential]:
    return "forward" not in vars(layer) and (type(layer) is Block or is_block(layer))


class _Forms(TorchFunctionMode):
    """Functions whose derivative under vmap of grad torch has wrong, in forms of which it is right; and convolutions
    with a task's own weights in the form that is faster.

    Layer, batch and instance normalisation: https://github.com/pytorch/functorch/issues/534, open since 2022.
    """

    def __init__(self, own_weights: bool, statistics: Statistics, first: FirstLayer | None) -> None:
        super().__init__()
        batch_norm = partial(_batch_norm, statistics=statistics)
        self.forms: dict[Any, Callable[..., Tensor]] = {
            functional.layer_norm: _layer_norm,
            torch.layer_norm: _layer_norm,
            functional.instance_norm: _instance_norm,
            torch.instance_norm: _instance_norm,
            functional.batch_norm: batch_norm,
            torch.batch_norm: batch_norm,
        }
        if own_weights:
            self.forms[functional.conv2d] = _conv2d
        if first is not None:
            self.forms[functional.linear] = first.linear

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _AUTOCAST:
            args, kwargs = tree_map(_in_autocast_dtype, (args, kwargs))
        form = self.forms.get(function)
        return function(*args, **(kwargs or {})) if form is None else form(*args, **(kwargs or {}))


#: What autocast does not see under vmap, which has them in other operators by then.
_AUTOCAST = frozenset(
    (
        functional.linear,
        functional.conv1d,
        functional.conv2d,
        functional.conv3d,
        functional.conv_transpose1d,
        functional.conv_transpose2d,
        functional.conv_transpose3d,
    )
)


def _in_autocast_dtype(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and _check.autocasts(value):
        return value.to(torch.get_autocast_dtype(value.device.type))
    return value


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    size = math.prod(normalized_shape)
    if size == 0 or tuple(x.shape[x.dim() - len(normalized_shape) :]) != tuple(normalized_shape):
        return functional.layer_norm(x, normalized_shape, weight, bias, eps)
    scale, shift = (None if value is None else value.reshape(-1) for value in (weight, bias))
    return functional.group_norm(x.reshape(-1, size), 1, scale, shift, eps).reshape(x.shape)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    if use_input_stats:
        return functional.group_norm(x, x.shape[1], weight, bias, eps)
    return _batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
    statistics: Statistics | None = None,
) -> Tensor:
    given = (None, None) if training else (running_mean, running_var)
    maps = x.reshape(*x.shape[:2], -1, x.shape[-1] if x.dim() > 3 else 1)
    y, mean, var = norm_relu_pool(maps, weight, bias, *given, eps=eps, relu=False, pool=False)
    if training and statistics is not None:
        count = x.numel() // max(x.shape[1], 1)
        statistics.add(running_mean, mean.detach(), var.detach() * (count / max(count - 1, 1)))
    return y.reshape(x.shape)


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    few = x.dim() == 4 and groups == 1 and weight.shape[1] <= FEW_PLANES and not isinstance(padding, str)
    if not few:
        return functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    steps, borders, spaces = (_pair(value) for value in (stride, padding, dilation))
    kernel = tuple(weight.shape[-2:])
    sides = [
        (size + 2 * border - space * (length - 1) - 1) // step + 1
        for size, length, step, border, space in zip(
            x.shape[-2:], kernel, steps, borders, spaces, strict=True
        )
    ]
    y = weight.flatten(1) @ functional.unfold(x, kernel, spaces, borders, steps)
    if bias is not None:
        y = y + bias[:, None]
    return y.reshape(*y.shape[:-1], *sides)


def _pair(value: Any) -> tuple[int, int]:
    first, *others = value if isinstance(value, (tuple, list)) else (value,)
    return first, others[0] if others else first
