"""Model-agnostic meta-learning of any module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from metafast import _check
from metafast._inner_loss import LOSSES
from metafast._stateless import BATCH_NORM_POLICIES
from metafast.data import Episodes
from metafast.inner_loop import Adapted, adapting, inner_loop
from metafast.learners._base import classified, require_ways
from metafast.learners.outcome import Outcome


class MAML(nn.Module):
    r"""A model whose initial parameters adapt to a task in a few steps of gradient descent on its support rows.

    .. math:: \theta_{t+1} = \theta_t - \alpha \nabla E_{support}(\theta_t), \qquad
        loss = mean_{tasks} E_{query}(\theta_K)

    A call is one :func:`metafast.inner_loop`, for all tasks: an MLP is a fused operator, any other model is called with
    the weights of all tasks at once; and its backward gives the exact gradient through the steps. In training and
    evaluation alike ``steps`` may be changed between calls.

    Regression (``"mse"``) takes episodes of 0 ways, and its ``Outcome.logits`` are the predictions ``[T, m, out]``.
    Classification (``"cross_entropy"``) takes episodes of as many ways as the model has outputs. Under autocast the
    layers of a model that is no MLP compute in its dtype; parameters, steps and losses do not.

    Sources: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (2017);
    ``first_order``: its section 5.2.

    Args:
        model: from rows ``[n, ...]`` to outputs ``[n, out]``, such as :class:`metafast.MLP`.
        lr: the rate.
        steps: K, 0 or more.
        loss: ``"cross_entropy"`` or ``"mse"``, of support and query rows.
        ways: classes of every episode, the outputs of the model; None: the outputs of its last linear layer.
        first_order: take the gradients of the steps for constants.
        adapt: names of the parameters that adapt, or of the submodules whose parameters do; None: all that require
            gradients.
        batch_norm: what BatchNorm layers normalise by: ``"transductive"``, the support rows or the query rows of a
            task, in training and evaluation alike; ``"running"``, the same in training, where running statistics
            follow, and those in evaluation; ``"frozen"``, running statistics, which stay as they are.
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
        lr: float = 0.01,
        steps: int = 1,
        *,
        loss: str = "cross_entropy",
        ways: int | None = None,
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
        _check.positive(lr, "lr")
        self.model = model
        self.steps = steps
        self.loss = loss
        self.first_order = first_order
        self.adapt = adapting(model, adapt)
        self.batch_norm = batch_norm
        self.recompute = recompute
        self.initial_lr = float(lr)
        self.ways = None if loss == "mse" else _ways(model, ways)

    @property
    def lr(self) -> Any:
        """The rates, as :func:`metafast.inner_loop` takes them."""
        return self.initial_lr

    def adapted(self, episodes: Episodes, **options: Any) -> Adapted:
        """The model after ``steps`` on the support rows of each task; ``options`` of :func:`metafast.inner_loop`."""
        regression = self.loss == "mse"
        if regression and not episodes.regression:
            raise ValueError(
                f"episodes: expected regression tasks for the loss 'mse', got {episodes.ways} ways"
            )
        if self.ways is not None:
            require_ways(episodes, self.ways)
        given = {
            "loss": self.loss,
            "adapt": self.adapt,
            "first_order": self.first_order,
            "batch_norm": self.batch_norm,
            "recompute": self.recompute,
        }
        targets = episodes.support_y.flatten(2) if regression else episodes.support_y
        return inner_loop(
            self.model, episodes.support_x, targets, self.lr, self.steps, **{**given, **options}
        )

    def outcome(self, adapted: Adapted, episodes: Episodes) -> Outcome:
        """The mean loss of the query rows of all tasks, and their outputs."""
        outputs: Tensor = adapted(episodes.query_x)
        with torch.autocast(episodes.device.type, enabled=False):
            if self.loss == "mse":
                return Outcome(mse_loss(outputs, episodes.query_y.flatten(2)), outputs)
            return classified(outputs, episodes.query_y)

    def forward(self, episodes: Episodes) -> Outcome:
        return self.outcome(self.adapted(episodes), episodes)

    def extra_repr(self) -> str:
        options: dict[str, Any] = {"lr": self.initial_lr, "steps": self.steps, "loss": self.loss}
        options |= {"first_order": self.first_order, "batch_norm": self.batch_norm}
        options |= {"recompute": self.recompute}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


def last_linear(model: nn.Module) -> tuple[str, nn.Linear] | None:
    """The model's last linear layer with its name, if it has one."""
    linear = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return linear[-1] if linear else None


def _ways(model: nn.Module, ways: int | None) -> int:
    if ways is None:
        head = last_linear(model)
        if head is None:
            raise ValueError("ways: expected a number, since the model has no linear layer to tell it")
        return head[1].out_features
    _check.sizes(ways=ways)
    return ways
