"""The attention LSTM of matching networks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metafast import _check
from metafast._autodiff import differentiable
from metafast._batching import fold_into_tasks, of_groups, of_tasks
from metafast._dual import Dual, tangent_of
from metafast._library import LIBRARY, call, operator

READING = operator("attention_lstm")


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

    Vinyals, Blundell, Lillicrap, Kavukcuoglu and Wierstra, *Matching Networks for One Shot Learning*, 2016. On the CPU
    one fused operator goes through all steps of some query rows, which do not depend on the others; on a GPU torch's
    operators serve. Differentiable to any order.

    Args:
        support: g, ``[..., n, d]`` features; half types are promoted to float32.
        query: f, ``[..., m, d]`` features of the dtype of ``support``.
        weight_ih: ``[4 d, 2 d]``, first of f, then of r, for torch's gates in their order.
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
    tasks = torch.Size(lead).numel()

    def fold(value: Tensor) -> Tensor:
        own = value.shape[-2:]
        return value if value.shape == (tasks, *own) else value.expand(*lead, *own).reshape(tasks, *own)

    weight = torch.cat((weight_ih, weight_hh), 1).T.unsqueeze(0)
    shift = weight.new_zeros(1, 4 * d) if bias is None else bias.unsqueeze(0)
    values = fold(support), fold(query), weight, shift, fold(hidden), fold(cell)
    out: Tensor = call(READING, *values, steps)
    return out if len(lead) == 1 else out.reshape(*lead, *out.shape[-2:])


# The closed form is written once, for tensors and for Dual numbers.
class _Step(NamedTuple):
    hidden: Any  # before
    cell: Any  # before
    attention: Any
    entered: Any
    kept: Any
    new: Any
    shown: Any
    state: Any  # tanh of the cell after
    cell_after: Any
    hidden_after: Any


def _parts(weight: Any, d: int) -> tuple[Any, Any, Any]:
    """The weights of query rows, support rows and states."""
    return weight[:, :d], weight[:, d : 2 * d], weight[:, 2 * d :]


def _read(
    support: Any, query: Any, weight: Any, bias: Any, hidden: Any, cell: Any, steps: int
) -> tuple[list[_Step], Any]:
    """All steps, and what each support row adds to the gates."""
    tasks, _, d = query.shape
    of_query, of_support, of_state = _parts(of_tasks(weight, tasks), d)
    # What the gates are given by a query row, and by a support row, is the same in every step.
    fixed, projected = query @ of_query + of_tasks(bias, tasks).unsqueeze(1), support @ of_support
    trail = []
    for _ in range(steps):
        attention = (hidden @ support.mT).softmax(-1)
        gates = fixed + attention @ projected + hidden @ of_state
        entered, kept = gates[..., :d].sigmoid(), gates[..., d : 2 * d].sigmoid()
        new, shown = gates[..., 2 * d : 3 * d].tanh(), gates[..., 3 * d :].sigmoid()
        after = kept * cell + entered * new
        state = after.tanh()
        trail.append(
            _Step(hidden, cell, attention, entered, kept, new, shown, state, after, shown * state + query)
        )
        hidden, cell = trail[-1].hidden_after, after
    return trail, projected


def _plain_reading(*args: Any) -> Any:
    """What READING computes, in plain PyTorch."""
    trail = _read(*args)[0]
    return trail[-1].hidden_after if trail else args[4] * 1


def _reading_vjp(
    need: Any,
    grads: Any,
    support: Tensor,
    query: Tensor,
    weight: Tensor,
    bias: Tensor,
    hidden: Tensor,
    cell: Tensor,
    steps: int,
) -> Any:
    with _check.without_autocast(support):
        tasks, m, d = query.shape
        of_query, of_support, of_state = _parts(of_tasks(weight, tasks), d)
        to_hidden, to_cell, to_query = grads[0], torch.zeros_like(cell), torch.zeros_like(query)
        trail, projected = _read(support, query, weight, bias, hidden, cell, steps)
        if not trail:
            return *map(torch.zeros_like, (support, query, weight, bias)), to_hidden, to_cell, None
        # Of all steps one below the other, so that what they share takes one product.
        rows: dict[str, list[Tensor]] = {"states": [], "attention": [], "gates": [], "scores": []}
        for at in reversed(trail):
            to_query = to_query + to_hidden
            to_cell = to_cell + to_hidden * at.shown * (1 - at.state * at.state)
            to_gates = torch.cat(
                [
                    to_cell * at.new * at.entered * (1 - at.entered),
                    to_cell * at.cell * at.kept * (1 - at.kept),
                    to_cell * at.entered * (1 - at.new * at.new),
                    to_hidden * at.state * at.shown * (1 - at.shown),
                ],
                -1,
            )
            to_attention = to_gates @ projected.mT
            to_scores = at.attention * (to_attention - (at.attention * to_attention).sum(-1, keepdim=True))
            for name, value in zip(rows, (at.hidden, at.attention, to_gates, to_scores), strict=True):
                rows[name].append(value)
            to_cell = to_cell * at.kept
            to_hidden = to_gates @ of_state.mT + to_scores @ support
        states, attention, gates, scores = (torch.cat(parts, 1) for parts in rows.values())
        to_fixed = gates.reshape(tasks, steps, m, 4 * d).sum(1)
        to_projected = attention.mT @ gates
        to_weight = torch.cat([query.mT @ to_fixed, support.mT @ to_projected, states.mT @ gates], 1)
        return (
            scores.mT @ states + to_projected @ of_support.mT,
            to_query + to_fixed @ of_query.mT,
            of_groups(to_weight, weight.shape[0]),
            of_groups(to_fixed.sum(1), bias.shape[0]),
            to_hidden,
            to_cell,
            None,
        )


def _reading_jvp(tangents: Any, *args: Any) -> Any:
    *values, steps = args
    with _check.without_autocast(values[0]):
        moving = [Dual(value, tangent) for value, tangent in zip(values, tangents, strict=False)]
        return tangent_of(_plain_reading(*moving, steps))


differentiable(READING, vjp=_reading_vjp, jvp=_reading_jvp)
fold_into_tasks(READING)
# On a GPU most of the time goes into products, which torch's kernels make.
LIBRARY.impl(READING, _plain_reading, "CompositeExplicitAutograd")


@torch.library.register_fake(READING)
def _(support: Tensor, query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape)
