"""BOIL: the body adapts and the head does not."""

from __future__ import annotations

from typing import Any

from torch import nn

from metafast.learners.maml import MAML, last_linear


class BOIL(MAML):
    r"""MAML whose inner loop changes all parameters but those of the last linear layer; which train in the outer loop.

    Source: Oh, Yoo, Kim, Yun, "BOIL: Towards Representation Change for Few-shot Learning" (2021).

    Args:
        model: see :class:`MAML`.
        lr: the rate.
        steps: K, 0 or more.
        head: name of the submodule that does not adapt; None: the last linear layer.
        options: the others of :class:`MAML`, but for ``adapt``.

    Raises:
        TypeError, ValueError: as of :class:`MAML`; no such submodule, or nothing beside it.
    """

    def __init__(
        self, model: nn.Module, lr: float = 0.01, steps: int = 1, *, head: str | None = None, **options: Any
    ) -> None:
        if head is None and isinstance(model, nn.Module):
            found = last_linear(model)
            if found is None:
                raise ValueError("head: expected a name, since the model has no linear layer to be it")
            head = found[0]
        prefix = f"{head}."
        names = [name for name, _ in model.named_parameters()] if isinstance(model, nn.Module) else []
        body = [name for name in names if not name.startswith(prefix)]
        if names and (not body or len(body) == len(names)):
            raise ValueError(f"head: expected the name of a part of the model, got {head!r}")
        super().__init__(model, lr, steps, adapt=body, **options)
