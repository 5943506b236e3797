"""Derivatives of operators that hold under torch.autograd, every torch.func transform and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from metafast._library import LIBRARY

_below_autograd = torch._C._after_autograd_keyset


def differentiable(
    op: torch._ops.OpOverload,
    *,
    vjp: Callable[..., Sequence[Tensor | None]],
    jvp: Callable[..., Any],
    save_outputs: bool = False,
) -> None:
    """Give ``op`` a vjp and a jvp, each written with differentiable operators only.

    ``vjp(need, grads, *inputs[, *outputs])`` returns a gradient or None for every input; ``need`` tells which are
    wanted, and a gradient in ``grads`` is None where its output was not used. ``jvp(tangents, *inputs)`` returns the
    tangent of every output; tangents of tensors are never None. Outputs are passed to the vjp if ``save_outputs``.
    """
    schema = op._schema.arguments
    of_tensors = [k for k, argument in enumerate(schema) if "Tensor" in str(argument.type)]
    of_others = [k for k in range(len(schema)) if k not in of_tensors]
    place = [([*of_tensors, *of_others]).index(k) for k in range(len(schema))]
    no_gradients = (None,) * (len(schema) + 1)

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if peek_interpreter_stack() is None:
                out = op.redispatch(keyset & _below_autograd, *args)
            else:
                # Function.forward runs with both AD modes off; the outer torch.func levels need them on.
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    out = op.redispatch(keyset & _below_autograd, *args)
        ctx.set_materialize_grads(False)
        ctx.others = [args[k] for k in of_others]
        tensors = [args[k] for k in of_tensors]
        if save_outputs:
            ctx.save_for_backward(*tensors, *(out if isinstance(out, tuple) else (out,)))
        else:
            ctx.save_for_backward(*tensors)
        ctx.saved_for_forward = tensors
        return out

    def inputs(ctx: Any, saved: Sequence[Tensor]) -> list[Any]:
        pool = (*saved[: len(of_tensors)], *ctx.others)
        return [pool[k] for k in place]

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if all(g is None for g in grads):
            return no_gradients
        saved = ctx.saved_tensors
        args = (ctx.needs_input_grad[1:], grads, *inputs(ctx, saved), *saved[len(of_tensors) :])
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
            return (None, *vjp(*args))
        # Nothing is recorded, so the operators of the rule need not look whether it is.
        with torch._C._AutoDispatchBelowAutograd():
            return (None, *vjp(*args))

    def forward_mode(ctx: Any, _: Any, *tangents: Tensor | None) -> Any:
        # torch calls this with forward mode off; outer torch.func levels need it on, without this level's tangents.
        with forward_ad._set_fwd_grad_enabled(True):
            args = [primal(a) for a in inputs(ctx, ctx.saved_for_forward)]
            filled = (
                torch.zeros_like(a) if v is None and isinstance(a, Tensor) else v
                for a, v in zip(args, tangents, strict=True)
            )
            return jvp(tuple(filled), *args)

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

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            if peek_interpreter_stack() is None:
                return node.apply(keyset, *args)
            with enable_single_level_autograd_function():
                return node.apply(keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _below_autograd, *args)

    LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)
