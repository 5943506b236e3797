"""Model-agnostic meta-learning of any module, and Meta-SGD."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from metafast import _check
from metafast._inner_loss import LOSSES
from metafast._stateless import BATCH_NORM_POLICIES
from metafast.data import Episodes
from metafast.inner_loop import adapting, inner_loop
from metafast.learners._base import classified, require_ways
from metafast.learners.outcome import Outcome

#: Where Meta-SGD draws the initial rate from.
INITIAL_RATES = (0.005, 0.1)


class MAML(nn.Module):
    r"""A model whose initial parameters adapt to a task in a few steps of gradient descent on its support rows.

    .. math:: \theta_{t+1} = \theta_t - \alpha \circ \nabla E_{support}(\theta_t), \qquad
        loss = mean_{tasks} E_{query}(\theta_K)

    A call is one :func:`metafast.inner_loop`, for all tasks: an MLP is a fused operator, any other model is called with
    the weights of all tasks at once; and its backward gives the exact gradient through the steps. In training and
    evaluation alike ``steps`` may be changed between calls.

    Regression (``"mse"``) takes episodes of 0 ways, and its ``Outcome.logits`` are the predictions ``[T, m, out]``.
    Classification (``"cross_entropy"``) takes episodes of as many ways as the model has outputs. The model computes in
    its parameters' dtype, under autocast too.

    Sources: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (2017);
    ``first_order``: its section 5.2; ``learn_lr``: Li, Zhou, Chen, Li, "Meta-SGD" (2017); ``adapt``, the body alone:
    Oh, Yoo, Kim, Yun, "BOIL: Towards Representation Change for Few-shot Learning" (2021).

    Args:
        model: from rows ``[n, ...]`` to outputs ``[n, out]``, such as :class:`metafast.MLP`.
        lr: the rate. None: 0.01, and with ``learn_lr`` one draw from 0.005 to 0.1 for all of them, as in Meta-SGD.
        steps: K, 0 or more.
        loss: ``"cross_entropy"`` or ``"mse"``, of support and query rows.
        ways: classes of every episode, the outputs of the model; None: the outputs of its last linear layer.
        learn_lr: Meta-SGD: a rate for each parameter, trained with them and shared by the steps; it may change sign.
        first_order: take the gradients of the steps for constants.
        adapt: names of the parameters that adapt, or of the submodules whose parameters do; None: all.
        batch_norm: what BatchNorm layers normalise by, in training and evaluation alike: ``"transductive"``, the
            support rows or the query rows of a task, or ``"running"``, their running statistics, which stay as they
            are. Evaluate with the same.
        recompute: see :func:`metafast.inner_loop`; less memory for more time.

    Raises:
        TypeError: wrong kind of an argument.
        ValueError: numbers out of range, an unknown loss or name; in the call, episodes that do not suit the loss or
            the outputs.
    """

    #: Rows of other episodes have no part in an episode's statistics.
    episode_statistics = True

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        steps: int = 1,
        *,
        loss: str = "cross_entropy",
        ways: int | None = None,
        learn_lr: bool = False,
        first_order: bool = False,
        adapt: Iterable[str] | None = None,
        batch_norm: str = "transductive",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        _check.choice(loss, "loss", LOSSES)
        _check.choice(batch_norm, "batch_norm", BATCH_NORM_POLICIES)
        _check.count(steps, "steps")
        if lr is None:
            low, high = INITIAL_RATES
            lr = low + (high - low) * float(torch.rand(())) if learn_lr else 0.01
        _check.positive(lr, "lr")
        self.model = model
        self.steps = steps
        self.loss = loss
        self.first_order = first_order
        self.adapt = adapting(model, adapt)
        self.batch_norm = batch_norm
        self.recompute = recompute
        self._lr = float(lr)
        self.ways = None if loss == "mse" else _ways(model, ways)
        parameters = dict(model.named_parameters())
        self.rates = (
            nn.ParameterList(nn.Parameter(torch.full_like(parameters[name], lr)) for name in self.adapt)
            if learn_lr
            else None
        )

    @property
    def lr(self) -> float | Mapping[str, Tensor]:
        """The rate: a number, or those of the parameters that adapt where they are learnt."""
        if self.rates is None:
            return self._lr
        return dict(zip(self.adapt, self.rates, strict=True))

    def forward(self, episodes: Episodes) -> Outcome:
        regression = self.loss == "mse"
        if regression and not episodes.regression:
            raise ValueError(
                f"episodes: expected regression tasks for the loss 'mse', got {episodes.ways} ways"
            )
        if self.ways is not None:
            require_ways(episodes, self.ways)
        targets, query_y = episodes.support_y, episodes.query_y
        if regression:
            targets, query_y = targets.flatten(2), query_y.flatten(2)
        with torch.autocast(episodes.device.type, enabled=False):
            adapted = inner_loop(
                self.model,
                episodes.support_x,
                targets,
                self.lr,
                self.steps,
                loss=self.loss,
                adapt=self.adapt,
                first_order=self.first_order,
                batch_norm=self.batch_norm,
                recompute=self.recompute,
            )
            outputs = adapted(episodes.query_x)
            return (
                Outcome(mse_loss(outputs, query_y), outputs) if regression else classified(outputs, query_y)
            )

    def extra_repr(self) -> str:
        options: dict[str, Any] = {"lr": self._lr, "steps": self.steps, "loss": self.loss}
        options |= {"learn_lr": self.rates is not None, "first_order": self.first_order}
        options |= {"batch_norm": self.batch_norm, "recompute": self.recompute}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


def _ways(model: nn.Module, ways: int | None) -> int:
    if ways is None:
        linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise ValueError("ways: expected a number, since the model has no linear layer to tell it")
        return linear[-1].out_features
    _check.sizes(ways=ways)
    return ways
