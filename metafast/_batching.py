"""The one vmap rule: a mapped dimension is folded into the leading task dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def fold_into_tasks(op: torch._ops.OpOverload) -> None:
    """Give ``op``, whose tensors all begin with the task dimension T, its vmap rule.

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

    torch.library.register_vmap(op, rule)
