"""Derivatives of operators that hold under torch.autograd, every torch.func transform and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from metafast._library import LIBRARY

_below_autograd = torch._C._after_autograd_keyset


def _picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """The function that takes the entries at ``positions``; itemgetter gives no tuple for fewer than two."""
    return (
        itemgetter(*positions) if len(positions) > 1 else lambda values: tuple(values[k] for k in positions)
    )


class _Layout:
    """Where the arguments of a call stand among those of its node: the entries of a list stand there one by one."""

    def __init__(self, op: torch._ops.OpOverload, lengths: Sequence[int | None]) -> None:
        of_tensors: list[int] = []
        of_others: list[int] = []
        self._starts: list[tuple[int, int | None]] = []
        size = 0
        for argument, length in zip(op._schema.arguments, lengths, strict=True):
            self._starts.append((size, length))
            place = range(size, size + (1 if length is None else length))
            (of_tensors if "Tensor" in str(argument.type) else of_others).extend(place)
            size = place.stop
        self.size = size
        self.tensors = len(of_tensors)
        self.tensors_of, self.others_of = _picker(of_tensors), _picker(of_others)
        # From the tensors followed by the others back to the order of the node's arguments.
        self.in_order = _picker([[*of_tensors, *of_others].index(k) for k in range(size)])
        self._lists = any(length is not None for length in lengths)

    def join(self, flat: Sequence[Any]) -> Sequence[Any]:
        """The operator's arguments, from those of its node."""
        if not self._lists:
            return flat
        return [
            flat[begin] if length is None else list(flat[begin : begin + length])
            for begin, length in self._starts
        ]

    def split(self, args: Sequence[Any]) -> Sequence[Any]:
        """The node's arguments, from those of its operator; None stands for a list of Nones."""
        if not self._lists:
            return args
        flat: list[Any] = []
        for arg, (_, length) in zip(args, self._starts, strict=True):
            if length is None:
                flat.append(arg)
            else:
                flat.extend([None] * length if arg is None else arg)
        return flat


def differentiable(
    op: torch._ops.OpOverload,
    *,
    vjp: Callable[..., Sequence[Any]],
    jvp: Callable[..., Any],
    save_outputs: Sequence[int] = (),
    constant_outputs: Sequence[int] = (),
) -> None:
    """Give ``op`` a vjp and a jvp, each written with differentiable operators only.

    ``vjp(need, grads, *inputs[, *outputs])`` returns a gradient or None for every input; ``need`` tells which are
    wanted, and a gradient in ``grads`` is None where its output was not used. ``jvp(tangents, *inputs)`` returns the
    tangent of every output; tangents of tensors are never None. The outputs at the positions ``save_outputs`` are
    passed to the vjp too. Those at ``constant_outputs`` are for the vjp alone and have no derivative: they never
    require one. What stands for a list of tensors is a list.
    """
    lists = [k for k, argument in enumerate(op._schema.arguments) if "List[Tensor]" in str(argument.type)]
    layouts: dict[tuple[int, ...], _Layout] = {}
    saved_of = _picker(save_outputs)

    def layout_of(args: Sequence[Any]) -> _Layout:
        lengths = tuple(len(args[k]) for k in lists)
        if lengths not in layouts:
            of_argument = dict(zip(lists, lengths, strict=True))
            layouts[lengths] = _Layout(op, [of_argument.get(k) for k in range(len(args))])
        return layouts[lengths]

    def forward(ctx: Any, keyset: Any, layout: _Layout, *flat: Any) -> Any:
        args = layout.join(flat)
        # Function.forward runs with both AD modes off; outer torch.func levels need them on.
        if peek_interpreter_stack() is None:
            out = op.redispatch(keyset & _below_autograd, *args)
        else:
            with (
                torch._C._AutoDispatchBelowAutograd(),
                torch.enable_grad(),
                forward_ad._set_fwd_grad_enabled(True),
            ):
                out = op.redispatch(keyset & _below_autograd, *args)
        ctx.set_materialize_grads(False)
        ctx.layout = layout
        ctx.others = layout.others_of(flat)
        tensors = layout.tensors_of(flat)
        ctx.save_for_backward(*tensors, *saved_of(out))
        ctx.saved_for_forward = tensors
        if constant_outputs:
            ctx.mark_non_differentiable(*(out[k] for k in constant_outputs))
        return tuple(out) if isinstance(out, list) else out

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        layout = ctx.layout
        if grads[0] is None and all(g is None for g in grads):
            return (None,) * (layout.size + 2)
        saved = ctx.saved_tensors
        inputs = layout.join(layout.in_order((*saved[: layout.tensors], *ctx.others)))
        args = (layout.join(ctx.needs_input_grad[2:]), grads, *inputs, *saved[layout.tensors :])
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
            return (None, None, *layout.split(vjp(*args)))
        # Nothing is recorded, so the operators of the rule need not look whether it is.
        with torch._C._AutoDispatchBelowAutograd():
            return (None, None, *layout.split(vjp(*args)))

    def forward_mode(ctx: Any, _keyset: Any, _layout: Any, *tangents: Tensor | None) -> Any:
        # torch calls this with forward mode off; outer torch.func levels need it on, without this level's tangents.
        with forward_ad._set_fwd_grad_enabled(True):
            layout = ctx.layout
            inputs = [primal(a) for a in layout.in_order((*ctx.saved_for_forward, *ctx.others))]
            filled = [
                torch.zeros_like(a) if v is None and isinstance(a, Tensor) else v
                for a, v in zip(inputs, tangents, strict=True)
            ]
            out = jvp(tuple(layout.join(filled)), *layout.join(inputs))
            return tuple(out) if isinstance(out, list) else out

    def primal(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return torch._VF._unpack_dual(value, level=0)[0]

    name = op._schema.name.split("::")[1]
    node: Any = type(
        name,
        (_SingleLevelFunction,),
        {
            "forward": staticmethod(forward),
            "backward": staticmethod(backward),
            "jvp": staticmethod(forward_mode),
        },
    )

    def record(keyset: Any, args: Sequence[Any]) -> Any:
        layout = layout_of(args)
        if peek_interpreter_stack() is None:
            return node.apply(keyset, layout, *layout.split(args))
        with enable_single_level_autograd_function():
            return node.apply(keyset, layout, *layout.split(args))

    gives_list = "List" in str(op._schema.returns[0].type)

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            out = record(keyset, args)
            return list(out) if gives_list else out
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _below_autograd, *args)

    LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)
