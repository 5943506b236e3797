"""Drop-in for higher 0.2.1: models as functions of their parameters, and optimisers that can be differentiated.

The numbers are the original's. What differs, and what is missing, stands in ``docs/migration/higher.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from metafast.compat import absent
from metafast.compat.higher import optim, patch, utils
from metafast.compat.higher.optim import (
    DifferentiableOptimizer,
    Override,
    create_diff_optim,
    get_diff_optim,
    register_optim,
)
from metafast.compat.higher.patch import FunctionalModule, monkeypatch

__all__ = [
    "create_diff_optim",
    "get_diff_optim",
    "innerloop_ctx",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[FunctionalModule, DifferentiableOptimizer]]:
    """A functional copy of a model, and an optimiser that steps it and can be differentiated through.

    Args:
        model: stays as it is.
        opt: of parameters of ``model``; the steps begin with its hyperparameters and its state, and leave it alone.
        device: for parameters, buffers and state; None: where they are.
        copy_initial_weights: begin with constants; False: with the model's own parameters, which get their gradients
            (MAML).
        override: hyperparameters in place of those of ``opt``, by their names: lists of one value for all parameter
            groups or of one for each. Tensors get their gradients.
        track_higher_grads: record the steps; False: every step begins with constants, and memory does not grow.

    Yields:
        The model, see :func:`metafast.compat.higher.patch.monkeypatch`, and the optimiser, see
        :class:`metafast.compat.higher.optim.DifferentiableOptimizer`.
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    yield (
        fmodel,
        get_diff_optim(opt, model.parameters(), fmodel, device, override, track_higher_grads),
    )


__getattr__ = absent(__name__)
