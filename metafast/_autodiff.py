"""Derivatives of operators that hold under torch.autograd, every torch.func transform and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
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

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        # Function.forward runs with both AD modes off; the outer torch.func levels need them on.
        with (
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            out = op.redispatch(keyset & _below_autograd, *args)
        ctx.set_materialize_grads(False)
        ctx.is_tensor = tuple(isinstance(a, Tensor) for a in args)
        ctx.others = tuple(a for a, tensor in zip(args, ctx.is_tensor, strict=True) if not tensor)
        tensors = [a for a, tensor in zip(args, ctx.is_tensor, strict=True) if tensor]
        outputs = (out if isinstance(out, tuple) else (out,)) if save_outputs else ()
        ctx.save_for_backward(*tensors, *outputs)
        ctx.save_for_forward(*tensors)
        return out

    def inputs(ctx: Any, saved: Sequence[Tensor]) -> list[Any]:
        tensors, others = iter(saved), iter(ctx.others)
        merged = [next(tensors) if tensor else next(others) for tensor in ctx.is_tensor]
        return [*merged, *tensors]

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if all(g is None for g in grads):
            return (None,) * (len(ctx.is_tensor) + 1)
        return (None, *vjp(ctx.needs_input_grad[1:], grads, *inputs(ctx, ctx.saved_tensors)))

    def forward_mode(ctx: Any, _: Any, *tangents: Tensor | None) -> Any:
        args = inputs(ctx, ctx.saved_for_forward)
        filled = (
            torch.zeros_like(a) if v is None and tensor else v
            for a, v, tensor in zip(args, tangents, ctx.is_tensor, strict=True)
        )
        return jvp(tuple(filled), *args)

    name = op._schema.name.split("::")[1]
    node = type(
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
            with enable_single_level_autograd_function():
                return node.apply(keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & _below_autograd, *args)

    LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)
