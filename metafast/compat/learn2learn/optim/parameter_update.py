"""Transformed gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from metafast.compat.learn2learn._steps import gradients


class ParameterUpdate(nn.Module):
    """The gradients of a loss, each through a module of its own.

    Args:
        parameters: those of the model, in the order of the later calls.
        transform: from a parameter to its module, or to None for the gradient as it is.

    Raises:
        ValueError: a transform gives something else.
    """

    def __init__(self, parameters: Iterable[Tensor], transform: Callable[[Tensor], nn.Module | None]) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        self.transforms_indices: list[int | None] = []
        for parameter in parameters:
            made = transform(parameter)
            if made is not None and not isinstance(made, nn.Module):
                raise ValueError(f"transform: expected a torch.nn.Module or None, got {type(made).__name__}")
            self.transforms_indices.append(None if made is None else len(modules))
            if made is not None:
                modules.append(made)
        self.transforms_modules = nn.ModuleList(modules)

    def forward(
        self,
        loss: Tensor,
        parameters: Iterable[Tensor],
        create_graph: bool = False,
        retain_graph: bool = False,
        allow_unused: bool = False,
        allow_nograd: bool = False,
    ) -> list[Tensor | None]:
        """The transformed gradients of ``loss``; None for parameters without one, where they are allowed.

        Raises:
            RuntimeError: parameters without a gradient that are not allowed.
        """
        found = gradients(
            loss,
            list(parameters),
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=allow_unused,
            allow_nograd=allow_nograd,
        )
        return [
            grad if grad is None or k is None else self.transforms_modules[k](grad)
            for grad, k in zip(found, self.transforms_indices, strict=False)
        ]
