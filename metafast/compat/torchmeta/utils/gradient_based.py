"""Steps of gradient descent in the inner loop."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from metafast.compat import absent
from metafast.compat._steps import stepped
from metafast.compat.torchmeta.modules.module import MetaModule

__getattr__ = absent(__name__)


def gradient_update_parameters(
    model: MetaModule,
    loss: Tensor,
    params: Mapping[str, Tensor] | None = None,
    step_size: float | Tensor | Mapping[str, float | Tensor] = 0.5,
    first_order: bool = False,
) -> OrderedDict[str, Tensor]:
    r"""The parameters after a step along the gradient of the loss, :math:`\theta' = \theta - \alpha \nabla L(\theta)`.

    Finn, Abbeel and Levine, *Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks*, 2017. For all tasks at
    once see :func:`metafast.inner_loop`.

    Args:
        model: whose ``meta_named_parameters`` are meant where ``params`` is None.
        loss: a tensor of one number that depends on all of the parameters.
        params: the parameters, by name.
        step_size: :math:`\alpha`, a number, a tensor that gets its gradient, or one of these for each name.
        first_order: leave the gradient out of the graph; the parameter itself stays in it.

    Raises:
        ValueError: ``model`` is no ``MetaModule``; no step size for a parameter.
        RuntimeError: the loss does not depend on a parameter.
    """
    if not isinstance(model, MetaModule):
        raise ValueError(
            f"model: expected a torchmeta.modules.MetaModule, got {type(model).__module__}.{type(model).__qualname__}"
        )
    values = OrderedDict(model.meta_named_parameters() if params is None else params)
    if isinstance(step_size, Mapping):
        missing = [name for name in values if name not in step_size]
        if missing:
            raise ValueError(f"step_size: expected one for each parameter, got none for {', '.join(missing)}")
    grads = torch.autograd.grad(loss, list(values.values()), create_graph=not first_order)
    return OrderedDict(
        (name, stepped(value, grad, step_size[name] if isinstance(step_size, Mapping) else step_size))
        for (name, value), grad in zip(values.items(), grads, strict=True)
    )
