"""The attention LSTM of matching networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn.functional import linear

from metafast import _check
from metafast._library import LIBRARY, fallback, operator
from metafast.backbones import is_hooked

READING = operator("attention_lstm")
#: Of rows with more features torch's products take all of the time.
WIDEST = 1024


def attention_lstm(
    support: Tensor,
    query: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    steps: int,
    *,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
) -> Tensor:
    r"""Query features in the context of the support rows, which an LSTM reads with attention, step by step.

    With support rows g, a query row f and the parameters of an ``LSTMCell``, from the states h and c,

    .. math:: r = \sum_i softmax_i(h \cdot g_i) \, g_i, \qquad h', c = LSTM([f, r], (h, c)), \qquad h = h' + f

    Vinyals, Blundell, Lillicrap, Kavukcuoglu and Wierstra, *Matching Networks for One Shot Learning*, 2016. On the CPU,
    where nothing is to be differentiated, one fused operator goes through all steps of some query rows, which do not
    depend on the others; else torch's operators serve. Differentiable to any order.

    Args:
        support: g, ``[..., n, d]`` features; half types are promoted to float32.
        query: f, ``[..., m, d]`` features of the dtype of ``support``.
        weight_ih: ``[4 d, 2 d]``, first of f, then of r, for torch's gates in their order; it and all that follow of
            the dtype of ``support``.
        weight_hh: ``[4 d, d]``.
        bias: ``[4 d]``, the sum of both of the cell's, or None.
        steps: how often the support rows are read.
        hidden: h before the first step, ``[..., m, d]``; None: the query features.
        cell: c before the first step, ``[..., m, d]``; None: zeros.

    Returns:
        The last h, ``[..., m, d]`` in float32 or float64.

    Raises:
        TypeError: wrong kind or dtype of an argument.
        ValueError: shapes or devices do not fit; negative ``steps``.

    Example:
        >>> support, cell = torch.eye(2), torch.nn.LSTMCell(4, 2)
        >>> weights = cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh
        >>> attention_lstm(support, torch.ones(3, 2), *weights, steps=5).shape
        torch.Size([3, 2])
    """
    _check.features(support, "support", "[..., n, d]")
    _check.features(query, "query", "[..., m, d]")
    _check.same_kind(query, "query", support, "support")
    _check.same_size(query, -1, "query", support, -1, "support")
    _check.count(steps, "steps")
    d = support.shape[-1]
    weights = {"weight_ih": (weight_ih, [4 * d, 2 * d]), "weight_hh": (weight_hh, [4 * d, d])}
    if bias is not None:
        weights["bias"] = bias, [4 * d]
    for name, (value, shape) in weights.items():
        _check.floating(value, name)
        _check.same_kind(value, name, support, "support")
        if list(value.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")
    for state, name in ((hidden, "hidden"), (cell, "cell")):
        if state is not None:
            _check.features(state, name, "[..., m, d]")
            _check.same_kind(state, name, support, "support")
            _check.same_size(state, -2, name, query, -2, "query")
            _check.same_size(state, -1, name, query, -1, "query")
    if _check.autocasts(support) or support.dtype in (torch.bfloat16, torch.float16):
        support, query, weight_ih, weight_hh = (
            value.float() for value in (support, query, weight_ih, weight_hh)
        )
        bias, hidden, cell = (None if value is None else value.float() for value in (bias, hidden, cell))
    hidden = query if hidden is None else hidden
    cell = torch.zeros_like(query) if cell is None else cell
    lead = _check.broadcast_tasks(
        ("support", support.shape[:-2]),
        ("query", query.shape[:-2]),
        ("hidden", hidden.shape[:-2]),
        ("cell", cell.shape[:-2]),
    )
    bias = weight_hh.new_zeros(4 * d) if bias is None else bias
    values = support, query, weight_ih, weight_hh, bias, hidden, cell
    if not support.is_cpu or d > WIDEST or _recorded(values):
        with _check.without_autocast(support):
            return _read(*values, steps).expand(*lead, *query.shape[-2:])
    tasks = torch.Size(lead).numel()

    def fold(value: Tensor) -> Tensor:
        own = value.shape[-2:]
        return value if value.shape == (tasks, *own) else value.expand(*lead, *own).reshape(tasks, *own)

    weight = torch.cat((weight_ih.T, weight_hh.T))
    out: Tensor = READING(fold(support), fold(query), weight, bias, fold(hidden), fold(cell), steps)
    return out if len(lead) == 1 else out.reshape(*lead, *out.shape[-2:])


def read_with(
    reader: nn.Module,
    support: Tensor,
    query: Tensor,
    steps: int,
    *,
    hidden: Tensor | None = None,
    cell: Tensor | None = None,
) -> Tensor:
    """:func:`attention_lstm` with the parameters of an ``LSTMCell``; another module, or one with hooks, is called."""
    if type(reader) is nn.LSTMCell and not is_hooked(reader):
        bias = reader.bias_ih + reader.bias_hh if reader.bias else None
        weights = reader.weight_ih, reader.weight_hh, bias
        return attention_lstm(support, query, *weights, steps, hidden=hidden, cell=cell)
    hidden = query if hidden is None else hidden
    cell = torch.zeros_like(query) if cell is None else cell
    for _ in range(steps):
        read = (hidden @ support.mT).softmax(-1) @ support
        rows = torch.cat((query, read), -1).flatten(0, -2)
        found, state = reader(rows, (hidden.flatten(0, -2), cell.flatten(0, -2)))
        hidden, cell = found.view_as(query) + query, state.view_as(query)
    return hidden


def _recorded(values: Sequence[Tensor]) -> bool:
    """Is a derivative or a graph made of what is computed with these, or are they mapped over?"""
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or peek_interpreter_stack() is not None
    ):
        return True
    return torch.is_grad_enabled() and any(value.requires_grad for value in values)


def _read(
    support: Tensor,
    query: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor,
    hidden: Tensor,
    cell: Tensor,
    steps: int,
) -> Tensor:
    # What the gates are given by a query row, and by a support row, is the same in every step.
    of_query, of_support = weight_ih.tensor_split(2, dim=1)
    fixed, projected, of_state = linear(query, of_query, bias), linear(support, of_support), weight_hh.mT
    for _ in range(steps):
        attention = (hidden @ support.mT).softmax(-1)
        entered, kept, new, shown = (fixed + attention @ projected + hidden @ of_state).chunk(4, -1)
        cell = torch.addcmul(kept.sigmoid() * cell, entered.sigmoid(), new.tanh())
        hidden = torch.addcmul(query, shown.sigmoid(), cell.tanh())
    return hidden


def _plain_reading(
    support: Tensor, query: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, cell: Tensor, steps: int
) -> Tensor:
    """What READING computes, in plain PyTorch."""
    weight_ih, weight_hh = weight.T.tensor_split((2 * query.shape[2],), dim=1)
    with _check.without_autocast(support):
        read = _read(support, query, weight_ih, weight_hh, bias, hidden, cell, steps)
        return read.clone(memory_format=torch.contiguous_format)


fallback(READING, _plain_reading)


def _refuse_to_record(keyset: Any, *args: Any) -> Tensor:
    """The operator has no derivative: what is recorded is an error, not a constant."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    dual = forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(value).tangent is not None for value in tensors
    )
    if dual or (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)):
        raise RuntimeError(f"{READING} has no derivative; metafast.attention_lstm is differentiable")
    return READING.redispatch(keyset & torch._C._after_autograd_keyset, *args)


LIBRARY.impl(READING, _refuse_to_record, "Autograd", with_keyset=True)


@torch.library.register_fake(READING)
def _(support: Tensor, query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape)
