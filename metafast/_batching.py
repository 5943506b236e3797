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

        first = next(k for k, arg in enumerate(args) if isinstance(arg, Tensor))
        tasks = args[first].shape[1 if in_dims[first] == 0 else 0]

        def fold(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            return value.flatten(0, 1)

        def unfold(value: Tensor) -> Tensor:
            return value.reshape(size, value.shape[0] // size if size else tasks, *value.shape[1:])

        out = op(*(fold(value, dim) for value, dim in zip(args, in_dims, strict=True)))
        if isinstance(out, Tensor):
            return unfold(out), 0
        return tuple(unfold(o) for o in out), (0,) * len(out)

    torch.library.register_vmap(op, rule)
