"""One step of gradient descent for a whole list of parameters, as one differentiable operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from metafast import _check
from metafast._autodiff import differentiable
from metafast._batching import register_rule
from metafast._library import LIBRARY, operator

UPDATE = operator("sgd_update")
UPDATE_VJP = operator("sgd_update_vjp")

#: torch cuts a sum to one number among its threads from this many terms on.
_CUT = 32768
_BLOCK = 1024
_HALVES = (torch.bfloat16, torch.float16)

Container = TypeVar("Container", list[Tensor], tuple[Tensor, ...], dict[Any, Tensor])


def sgd_update(params: Container, grads: Any, lr: Any) -> Container:
    r"""The parameters after one step of gradient descent: :math:`\theta_k' = \theta_k - \alpha_k \odot g_k`.

    Nothing is changed in place. All tensors are one node of the graph, whose backward hands the upstream gradient to
    the parameters as it is, so an unrolled inner loop costs little to record. Differentiable to any order in
    parameters, gradients and rates: one learned rate is MAML's (Finn, Abbeel and Levine, 2017), one for each tensor
    LSLR (Antoniou, Edwards and Storkey, *How to train your MAML*, 2019), one for each element Meta-SGD (Li, Zhou,
    Chen and Li, 2017).

    Args:
        params: a list, a tuple or a dict of floating tensors, with any leading batch dimensions.
        grads: the same container of tensors, of the parameters' dtypes; None leaves a parameter as it is. Shapes
            broadcast: with the gradients of every task, shared parameters become every task's own.
        lr: a number or a 0-d tensor for all, or the same container of a number or a tensor for each; a tensor
            broadcasts with its parameter and gets its gradient.

    Returns:
        The container with the new parameters, in the dtypes of ``params``.

    Raises:
        TypeError: wrong kind or dtype of an argument or of an entry.
        ValueError: lengths, keys, shapes or devices do not fit.

    Example:
        >>> sgd_update({"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([1.0, 2.0])}, 0.5)
        {'weight': tensor([0.5000, 1.0000])}
    """
    if not isinstance(params, (list, tuple, dict)):
        raise TypeError(f"params: expected a list, a tuple or a dict, got {type(params).__name__}")
    names = list(params) if isinstance(params, dict) else range(len(params))
    values = [params[name] for name in names]
    slopes = _entries(grads, "grads", params)
    moving = [k for k, slope in enumerate(slopes) if slope is not None]
    for name, value, slope in zip(names, values, slopes, strict=True):
        _parameter(value, slope, name)
    number, rates = 0.0, []
    if isinstance(lr, (dict, list, tuple)):
        entries = _entries(lr, "lr", params)
        rates = [_rate(entries[k], f"lr[{names[k]!r}]", values[k], slopes[k]) for k in moving]
    elif isinstance(lr, Tensor):
        if lr.dim():
            raise ValueError(
                f"lr: expected a 0-d tensor, or an entry for each parameter, got {list(lr.shape)}"
            )
        rates = [_rate(lr, "lr", values[k], slopes[k]) for k in moving]
    else:
        number = _number(lr, "lr")
    if moving:
        stepped = UPDATE([values[k] for k in moving], [slopes[k] for k in moving], rates, number)
        for k, value in zip(moving, stepped, strict=True):
            values[k] = value
    if isinstance(params, dict):
        return dict(zip(names, values, strict=True))
    return values if isinstance(params, list) else tuple(values)


def _entries(values: Any, name: str, params: Any) -> list[Any]:
    """The entries that belong to those of ``params``, in their order."""
    if isinstance(params, dict):
        if not isinstance(values, dict):
            raise TypeError(f"{name}: expected a dict, as params is, got {type(values).__name__}")
        if values.keys() != params.keys():
            raise ValueError(f"{name}: expected the keys of params, {list(params)}, got {list(values)}")
        return [values[key] for key in params]
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name}: expected a list or a tuple, as params is, got {type(values).__name__}")
    if len(values) != len(params):
        raise ValueError(f"{name}: expected {len(params)} entries, as params has, got {len(values)}")
    return list(values)


def _parameter(value: Any, slope: Any, name: Any) -> None:
    here = f"params[{name!r}]"
    _check.is_tensor(value, here)
    if value.dtype not in _check.FLOATING:
        raise TypeError(f"{here}: expected float32, float64, bfloat16 or float16, got {value.dtype}")
    if slope is None:
        return
    there = f"grads[{name!r}]"
    _check.is_tensor(slope, there)
    if slope.dtype != value.dtype:
        raise TypeError(f"{there}: expected the dtype of {here}, {value.dtype}, got {slope.dtype}")
    if slope.shape != value.shape:
        _broadcast((here, value), (there, slope))
    _check.same_device(slope, there, value, here)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number or a floating tensor, got {type(value).__name__}")
    return float(value)


def _rate(rate: Any, name: str, param: Tensor, grad: Tensor) -> Tensor:
    """The rate of one parameter in its dtype."""
    if not isinstance(rate, Tensor):
        return param.new_full((), _number(rate, name))
    if rate.dtype not in _check.FLOATING:
        raise TypeError(f"{name}: expected a number or a floating tensor, got {rate.dtype}")
    if rate.device != param.device:
        raise ValueError(f"{name}: expected the device of its parameter, {param.device}, got {rate.device}")
    if rate.dim() and rate.shape != param.shape:
        _broadcast(("the parameter", param), ("its gradient", grad), (name, rate))
    return rate if rate.dtype == param.dtype else rate.to(param.dtype)


def _broadcast(*named: tuple[str, Tensor]) -> None:
    try:
        torch.broadcast_shapes(*(tensor.shape for _, tensor in named))
    except RuntimeError:
        text = ", ".join(f"{name} has {list(tensor.shape)}" for name, tensor in named)
        raise ValueError(f"{named[-1][0]}: expected a shape that broadcasts, but {text}") from None


# Where there is no kernel of ours torch's loops over the list serve: a step is bound by memory, and they are as fast.
# Arguments broadcast, so that a parameter may be one zero: UPDATE(0, x, y) = -x y is all its derivatives need.
def _update(params: list[Tensor], grads: list[Tensor], rates: list[Tensor], rate: float) -> list[Tensor]:
    if any(g.dtype in _HALVES for g in grads):
        # In half types torch rounds the product too, or not, by the layout.
        wide = _update(_floats(params), _floats(grads), _floats(rates), rate)
        return [w.to(g.dtype) for w, g in zip(wide, grads, strict=True)]
    if rates:
        return list(torch._foreach_addcmul(params, grads, rates, value=-1))
    return list(torch._foreach_add(params, grads, alpha=-rate))


def _products(upstream: list[Tensor], grads: list[Tensor], rates: list[Tensor], scaled: bool) -> list[Tensor]:
    """``-rates upstream``, if ``scaled``, then ``-upstream grads`` summed to the shapes of the rates."""
    if any(u.dtype in _HALVES for u in upstream):
        wide = _products(_floats(upstream), _floats(grads), _floats(rates), scaled)
        return [w.to(upstream[k % len(upstream)].dtype) for k, w in enumerate(wide)]
    zeros = [u.new_zeros(()) for u in upstream]
    products = _update(zeros, upstream, grads, 0.0)
    sums = [_sum_to(p, r.shape) for p, r in zip(products, rates, strict=True)]
    return [*_update(zeros, upstream, rates, 0.0), *sums] if scaled else sums


def _floats(values: list[Tensor]) -> list[Tensor]:
    return [value.float() if value.dtype in _HALVES else value for value in values]


def _sum_to(value: Tensor, shape: Sequence[int]) -> Tensor:
    """The sum to a shape that broadcasts to that of ``value``, in an order that no number of threads changes."""
    if value.shape == shape:
        return value
    if torch.Size(shape).numel() == 1 and value.numel() >= _CUT:
        flat = value.flatten()
        if rest := -flat.shape[0] % _BLOCK:
            flat = torch.nn.functional.pad(flat, (0, rest))
        blocks = flat.view(-1, _BLOCK)
        return _sum_to(blocks.sum(-1), shape)
    if len(shape) > 1 and value.mT.is_contiguous() and not value.is_contiguous():
        # torch sums planes that lie transposed one number at a time (30 times as slow).
        return value.mT.sum_to_size((*shape[:-2], shape[-1], shape[-2])).mT
    return value.sum_to_size(shape)


def _summable(rate: Tensor, shape: torch.Size) -> bool:
    """Whether the dimensions in which a rate is one for all of ``shape`` stand side by side."""
    sizes = (1,) * (len(shape) - rate.dim()) + tuple(rate.shape)
    kinds = [own == 1 for own, size in zip(sizes, shape, strict=True) if size != 1]
    return sum(k == 0 or not kinds[k - 1] for k, one in enumerate(kinds) if one) < 2


def _update_vjp(
    need: Any, upstream: Any, params: list[Tensor], grads: list[Tensor], rates: list[Tensor], rate: float
) -> Any:
    used = [k for k, u in enumerate(upstream) if u is not None]
    given = [upstream[k] for k in used]
    to_params: list[Any] = [None] * len(params)
    to_grads: list[Any] = [None] * len(params)
    to_rates: list[Any] = [None] * len(rates)
    for k, u in zip(used, given, strict=True):
        to_params[k] = _sum_to(u, params[k].shape)
    scaled: list[Tensor] = []
    if any(need[2]):
        spread = [
            rates[k] if _summable(rates[k], u.shape) else rates[k].expand(u.shape)
            for k, u in zip(used, given, strict=True)
        ]
        scaled = UPDATE_VJP(given, [grads[k] for k in used], spread, any(need[1]))
        for k, value in zip(used, scaled[-len(used) :], strict=True):
            to_rates[k] = _sum_to(value, rates[k].shape)
    elif any(need[1]):
        scaled = UPDATE(_zeros(given), given, [rates[k] for k in used] if rates else [], rate)
    if any(need[1]):
        for k, value in zip(used, scaled, strict=False):
            to_grads[k] = _sum_to(value, grads[k].shape)
    return to_params, to_grads, to_rates, None


def _zeros(values: Sequence[Tensor]) -> list[Tensor]:
    """A zero like each of ``values``, the same one for those of a kind."""
    of_kind: dict[Any, Tensor] = {}
    return [of_kind.setdefault((v.dtype, v.device), v.new_zeros(())) for v in values]


def _update_jvp(
    tangents: Any, params: list[Tensor], grads: list[Tensor], rates: list[Tensor], rate: float
) -> Any:
    to_params, to_grads, to_rates, _ = tangents
    out = UPDATE(to_params, to_grads, rates, rate)
    return tuple(UPDATE(out, grads, to_rates, 0.0) if rates else out)


def _products_vjp(
    need: Any, upstream: Any, values: list[Tensor], grads: list[Tensor], rates: list[Tensor], scaled: bool
) -> Any:
    """The derivative of ``(-rates values, -sum values grads)`` is made of the same products."""
    count = len(values)
    zeros = _zeros(values)
    to_scaled = upstream[:count] if scaled else [None] * count
    of_scaled = [
        z.expand(v.shape) if u is None else u for u, z, v in zip(to_scaled, zeros, values, strict=True)
    ]
    of_sums = [
        r.new_zeros(()).expand(r.shape) if u is None else u
        for u, r in zip(upstream[-count:], rates, strict=True)
    ]
    to_values = UPDATE(UPDATE(zeros, of_scaled, rates, 0.0), grads, of_sums, 0.0)
    out = UPDATE_VJP(values, of_scaled, of_sums, True)
    to_grads = [_sum_to(value, g.shape) for value, g in zip(out[:count], grads, strict=True)]
    return to_values, to_grads, out[count:], None


def _products_jvp(
    tangents: Any, values: list[Tensor], grads: list[Tensor], rates: list[Tensor], scaled: bool
) -> Any:
    to_values, to_grads, to_rates, _ = tangents
    first = UPDATE_VJP(to_values, grads, rates, scaled)
    second = UPDATE_VJP(values, to_grads, to_rates, scaled)
    return tuple(a + b for a, b in zip(first, second, strict=True))


def _fold_products(info: Any, in_dims: Any, *args: Any) -> Any:
    """A mapped dimension stands in front of every tensor but those of ``grads`` that have none."""
    values, grads, rates, scaled = args
    size = info.batch_size

    def lead(value: Tensor, dim: int | None, rank: int) -> Tensor:
        value = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
        return value.reshape(size, *(1,) * (rank + 1 - value.dim()), *value.shape[1:])

    folded: list[list[Tensor]] = [[], [], []]
    for k, value in enumerate(values):
        rank = value.dim() - (in_dims[0][k] is not None)
        folded[0].append(lead(value, in_dims[0][k], rank))
        folded[1].append(grads[k] if in_dims[1][k] is None else lead(grads[k], in_dims[1][k], rank))
        folded[2].append(lead(rates[k], in_dims[2][k], rank))
    out = UPDATE_VJP(*folded, scaled)
    for k, rate in enumerate(rates):
        at = k - len(rates)
        own = rate.shape if in_dims[2][k] is None else rate.movedim(in_dims[2][k], 0).shape[1:]
        out[at] = out[at].reshape(size, *own)
    return out, [0] * len(out)


def _fold(info: Any, in_dims: Any, *args: Any) -> Any:
    """A mapped dimension stands in front, and the others broadcast from behind."""
    *lists, rate = args
    count = len(lists[0])
    folded: list[list[Tensor]] = [[] for _ in lists]
    out_dims: list[int | None] = []
    for k in range(count):
        entries = [(values[k], dims[k]) for values, dims in zip(lists, in_dims, strict=False) if values]
        rank = max(value.dim() - (dim is not None) for value, dim in entries)
        for own, (value, dim) in zip(
            (f for f, values in zip(folded, lists, strict=True) if values), entries, strict=True
        ):
            if dim is not None:
                value = value.movedim(dim, 0)
                value = value.reshape(value.shape[0], *(1,) * (rank + 1 - value.dim()), *value.shape[1:])
            own.append(value)
        out_dims.append(0 if any(dim is not None for _, dim in entries) else None)
    return UPDATE(*folded, rate), out_dims


LIBRARY.impl(UPDATE, _update, "CompositeExplicitAutograd")
differentiable(UPDATE, vjp=_update_vjp, jvp=_update_jvp)
register_rule(UPDATE, _fold)
LIBRARY.impl(UPDATE_VJP, _products, "CompositeExplicitAutograd")
differentiable(UPDATE_VJP, vjp=_products_vjp, jvp=_products_jvp)
register_rule(UPDATE_VJP, _fold_products)


@torch.library.register_fake(UPDATE)
def _(params: list[Tensor], grads: list[Tensor], rates: list[Tensor], rate: float) -> list[Tensor]:
    sums = [p + g for p, g in zip(params, grads, strict=True)]
    sums = [s + r for s, r in zip(sums, rates, strict=True)] if rates else sums
    # The CPU's kernel makes contiguous results; torch's operators keep an order in memory that all arguments have.
    return [s.new_empty(s.shape) for s in sums] if sums and sums[0].device.type == "cpu" else sums


@torch.library.register_fake(UPDATE_VJP)
def _(upstream: list[Tensor], grads: list[Tensor], rates: list[Tensor], scaled: bool) -> list[Tensor]:
    sums = [torch.empty_like(r, memory_format=torch.contiguous_format) for r in rates]
    wide = [torch.empty_like(u, memory_format=torch.contiguous_format) for u in upstream]
    return [*wide, *sums] if scaled else sums
