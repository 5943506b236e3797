"""The one vmap rule: a mapped dimension is folded into the leading task dimension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from metafast._library import LIBRARY


def of_tasks(value: Any, tasks: int) -> Any:
    """``[G, ...]`` as ``[T, ...]``, a tensor or a Dual number: each group's value for its T / G consecutive tasks."""
    groups, own = value.shape[0], tuple(value.shape[1:])
    if groups == tasks:
        return value
    return value.unsqueeze(1).expand((groups, tasks // groups, *own)).reshape((tasks, *own))


def of_groups(value: Any, groups: int) -> Any:
    """The adjoint of :func:`of_tasks`: the sum over the tasks of each group."""
    tasks, own = value.shape[0], tuple(value.shape[1:])
    return value if groups == tasks else value.reshape((groups, tasks // groups, *own)).sum(1)


def fold_into_tasks(op: torch._ops.OpOverload) -> None:
    """Give ``op``, whose tensors all begin with the task dimension T, its vmap rule."""
    register_rule(op, folding_rule(op))


def folding_rule(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The vmap rule of ``op``, whose tensors all begin with the task dimension T.

    A tensor that is not mapped is expanded without a copy where its T is 1.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        size = info.batch_size

        def fold(value: Any, dim: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [fold(v, of) for v, of in zip(value, dim, strict=True)] if value else value
            if not isinstance(value, Tensor):
                return value
            if dim is None:
                return value.unsqueeze(0).expand(max(size, 1), *value.shape).flatten(0, 1)
            value = value.movedim(dim, 0)
            # With nothing to map over, one element of zeros tells the shapes.
            return (value if size else value.new_zeros(1, *value.shape[1:])).flatten(0, 1)

        def unfold(value: Tensor) -> Tensor:
            value = value.reshape(max(size, 1), value.shape[0] // max(size, 1), *value.shape[1:])
            return value if size else value[:0]

        out = op(*(fold(value, dim) for value, dim in zip(args, in_dims, strict=True)))
        if isinstance(out, Tensor):
            return unfold(out), 0
        if isinstance(out, list):
            return [unfold(o) for o in out], [0] * len(out)
        return tuple(unfold(o) for o in out), (0,) * len(out)

    return rule


class _Info(NamedTuple):
    """What a rule wants to know."""

    batch_size: int


def _mapped_size(values: Sequence[Any], dims: Sequence[Any]) -> int:
    """The size of the mapped dimension of the first tensor that has one, 0 if there is none."""
    for value, dim in zip(values, dims, strict=True):
        if isinstance(dim, list):
            if size := _mapped_size(value, dim):
                return size
        elif dim is not None:
            return int(value.shape[dim])
    return 0


def register_rule(op: torch._ops.OpOverload, rule: Callable[..., Any]) -> None:
    """Make ``rule`` the vmap rule of ``op``.

    ``torch.autograd.grad(is_grads_batched=True)`` has a vmap of its own, which knows no rules: it takes operators of
    lists only where they have a kernel for its tensors.
    """
    torch.library.register_vmap(op, rule)
    if not any("List[Tensor]" in str(a.type) for a in (*op._schema.arguments, *op._schema.returns)):
        return

    def kernel(*args: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()

        def unwrap(value: Any) -> Any:
            """The value, and the dimension along which it is mapped."""
            if isinstance(value, (list, tuple)):
                pairs = [unwrap(v) for v in value]
                return [v for v, _ in pairs], [dim for _, dim in pairs]
            if not isinstance(value, Tensor) or not is_legacy_batchedtensor(value):
                return value, None
            return torch._remove_batch_dim(value, level, 1, 0), 0

        def wrap(value: Any, dim: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(wrap(v, of) for v, of in zip(value, dim, strict=True))
            return value if dim is None else torch._add_batch_dim(value, dim, level)

        pairs = [unwrap(value) for value in args]
        values, dims = [v for v, _ in pairs], tuple(dim for _, dim in pairs)
        return wrap(*rule(_Info(_mapped_size(values, dims)), dims, *values))

    LIBRARY.impl(op, kernel, "Batched")
