"""Model-agnostic meta-learning of fully connected networks, and Meta-SGD."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from metafast import _check
from metafast._inner_loss import LOSSES
from metafast.data import Episodes
from metafast.learners._base import classified, require_positive, require_sizes, require_ways
from metafast.learners.outcome import Outcome
from metafast.mlp import ACTIVATIONS, adapted_mlp

#: Where Meta-SGD draws the initial rate from.
INITIAL_RATES = (0.005, 0.1)


class MAML(nn.Module):
    r"""An MLP whose initial parameters adapt to a task in a few steps of gradient descent on its support rows.

    .. math:: \theta_{t+1} = \theta_t - \alpha \circ \nabla E_{support}(\theta_t), \qquad
        loss = mean_{tasks} E_{query}(\theta_K)

    A call is one call of :func:`metafast.adapted_mlp`, for all tasks, steps and layers, and its backward gives the
    exact gradient through the steps. In training and evaluation alike ``steps`` may be changed between calls.

    Regression (``"mse"``) takes episodes of 0 ways, and its ``Outcome.logits`` are the predictions ``[T, m, out]``.
    Classification (``"cross_entropy"``) takes episodes of as many ways as the network has outputs. Inputs of a row are
    flattened. The layers compute in the parameters' dtype, under autocast too.

    Sources: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (2017);
    ``first_order``: its section 5.2; ``learn_lr``: Li, Zhou, Chen, Li, "Meta-SGD" (2017).

    Args:
        widths: inputs, hidden layers and outputs, such as ``(1, 40, 40, 1)``.
        lr: the rate. None: 0.01, and with ``learn_lr`` one draw from 0.005 to 0.1 for all of them, as in Meta-SGD.
        steps: K, 0 or more.
        activation: ``"relu"`` or ``"tanh"``.
        loss: ``"mse"`` or ``"cross_entropy"``, of support and query rows.
        learn_lr: Meta-SGD: a rate for each parameter, trained with them and shared by the steps; it may change sign.
        first_order: take the gradients of the steps for constants.
        init_std: standard deviation of the initial weights, a normal distribution cut off at two of them. None: He's
            :math:`\sqrt{2 / in}`. (The code of the first source has 0.01 for sinusoids, from which training takes
            several times as long.) Biases begin at 0.

    Raises:
        TypeError: sizes that are no ints.
        ValueError: fewer than two widths, numbers out of range, an unknown activation or loss; in the call,
            episodes that do not suit the loss or the outputs, and what :func:`metafast.adapted_mlp` raises.
    """

    def __init__(
        self,
        widths: Sequence[int],
        lr: float | None = None,
        steps: int = 1,
        *,
        activation: str = "relu",
        loss: str = "mse",
        learn_lr: bool = False,
        first_order: bool = False,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths: expected those of the inputs and of each layer, got {list(widths)}")
        require_sizes(**{f"widths[{k}]": width for k, width in enumerate(widths)})
        _check.choice(activation, "activation", ACTIVATIONS)
        _check.choice(loss, "loss", LOSSES)
        _check.count(steps, "steps")
        if lr is None:
            low, high = INITIAL_RATES
            lr = low + (high - low) * float(torch.rand(())) if learn_lr else 0.01
        require_positive(lr, "lr")
        if init_std is not None:
            require_positive(init_std, "init_std")
        self.widths = tuple(widths)
        self.steps = steps
        self.activation = activation
        self.loss = loss
        self.first_order = first_order
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(widths):
            std = math.sqrt(2 / inputs) if init_std is None else init_std
            weight = nn.init.trunc_normal_(torch.empty(outputs, inputs), std=std, a=-2 * std, b=2 * std)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(outputs)))
        self._lr = float(lr)
        self.weight_rates = self.bias_rates = None
        if learn_lr:
            self.weight_rates, self.bias_rates = (
                nn.ParameterList(nn.Parameter(torch.full_like(value, lr)) for value in values)
                for values in (self.weights, self.biases)
            )

    @property
    def lr(self) -> float | tuple[list[Tensor], list[Tensor]]:
        """The rate: a number, or those of the weights and of the biases where they are learnt."""
        if self.weight_rates is None or self.bias_rates is None:
            return self._lr
        return list(self.weight_rates), list(self.bias_rates)

    @property
    def ways(self) -> int | None:
        """Classes of the episodes; None in regression."""
        return None if self.loss == "mse" else self.widths[-1]

    def forward(self, episodes: Episodes) -> Outcome:
        if self.ways is not None:
            require_ways(episodes, self.ways)
        elif not episodes.regression:
            raise ValueError(
                f"episodes: expected regression tasks for the loss 'mse', got {episodes.ways} ways"
            )
        targets, query_y = episodes.support_y, episodes.query_y
        if episodes.regression:
            targets, query_y = targets.flatten(2), query_y.flatten(2)
        with torch.autocast(episodes.device.type, enabled=False):
            outputs = adapted_mlp(
                episodes.support_x.flatten(2),
                targets,
                episodes.query_x.flatten(2),
                list(self.weights),
                list(self.biases),
                self.lr,
                self.steps,
                activation=self.activation,
                loss=self.loss,
                first_order=self.first_order,
            )
            return (
                Outcome(mse_loss(outputs, query_y), outputs)
                if episodes.regression
                else classified(outputs, query_y)
            )

    def extra_repr(self) -> str:
        options: dict[str, Any] = {
            "lr": self._lr,
            "steps": self.steps,
            "activation": self.activation,
            "loss": self.loss,
        }
        options |= {"learn_lr": self.weight_rates is not None, "first_order": self.first_order}
        return ", ".join([str(self.widths), *(f"{name}={value!r}" for name, value in options.items())])
