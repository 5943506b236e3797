"""MAML++: MAML with a loss after each step, rates and BatchNorm of each step, and a first-order beginning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metafast import _check
from metafast.data import Episodes
from metafast.inner_loop import Adapted
from metafast.learners.maml import MAML
from metafast.learners.outcome import Outcome

#: What becomes of a step's weight in the multi-step loss, as a share of 1 / K.
SMALLEST_SHARE = 0.03


class MAMLPlusPlus(MAML):
    r"""MAML with the changes that made it stable, each of which can be switched off.

    - **Multi-step loss**: for the first ``multi_step`` steps of training the loss is
      :math:`\sum_t v_t E_{query}(\theta_t)`, t = 1 ... K. The weights are 1 / K at first; all but the last fall in
      proportion to the steps, to 0.03 / K at least, and the last takes what they lose. Then the last step counts alone.
    - **Rates** of each parameter tensor and each step, learnt.
    - **BatchNorm of each step**: scale and shift are learnt for each call after t steps, t = 0 ... K, and do not adapt
      (``step_scales``); with ``batch_norm="per_step"`` so are running statistics kept: training normalises by the rows
      at hand and evaluation by the running statistics of the step. (The released code normalises by the rows at hand
      in both, which is the default, ``"transductive"``.)
    - **First order** for the first ``first_order_steps`` steps of training.

    The outer rate's cosine is ``fit(schedule="cosine")``. With more ``steps`` in evaluation than in training the last
    step's values serve for those beyond. The steps of training are counted by :meth:`after_step`, which ``fit`` calls;
    call it after each step of an optimiser of your own. The count is a buffer, and so part of a checkpoint.

    Source: Antoniou, Edwards, Storkey, "How to train your MAML" (2019), and the weights of its released code.

    Args:
        model: see :class:`MAML`.
        lr: the initial rate.
        steps: K, at least 1.
        multi_step: steps of training with the multi-step loss; 0: none. 5,000 are the paper's 10 epochs on Omniglot.
        learn_lr: learn the rates.
        step_scales: see above; without BatchNorm layers with scale and shift it changes nothing.
        first_order_steps: see above.
        batch_norm: ``"per_step"``, or as of :class:`MAML`.
        options: the others of :class:`MAML`.

    Raises:
        TypeError, ValueError: as of :class:`MAML`; in training, more ``steps`` than K.
    """

    iterations: Tensor

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        steps: int = 5,
        *,
        multi_step: int = 5000,
        learn_lr: bool = True,
        step_scales: bool = True,
        first_order_steps: int = 0,
        batch_norm: str = "transductive",
        **options: Any,
    ) -> None:
        for name, value in (("multi_step", multi_step), ("first_order_steps", first_order_steps)):
            _check.count(value, name)
        _check.sizes(steps=steps)
        per_step = batch_norm == "per_step"
        norms = _norms(model)
        own = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
        scales = [f"{name}.{kind}" for name, norm in norms for kind in ("weight", "bias") if norm.affine]
        # Those that train, whose rows for each step stand in their place.
        scales = [name for name in scales if step_scales and own[name].requires_grad]
        if options.get("adapt") is None and scales:
            options["adapt"] = [n for n, value in own.items() if value.requires_grad and n not in scales]
        super().__init__(model, lr, steps, batch_norm="running" if per_step else batch_norm, **options)
        twice = [name for name in scales if name in self.adapt]
        if twice:
            raise ValueError(
                f"adapt: expected nothing that step_scales learns for each step, got {twice[0]!r}"
            )
        for name in scales:
            own[name].requires_grad_(False)
        self.batch_norm = batch_norm
        self.multi_step = multi_step
        self.first_order_steps = first_order_steps
        self.trained_steps = steps
        like = own[self.adapt[0]]
        rates = torch.full((len(self.adapt), steps), float(lr), dtype=like.dtype, device=like.device)
        self.rates = nn.Parameter(rates, requires_grad=learn_lr)
        self.scale_names = scales
        self.scales = nn.ParameterList(self._rows(own[name]) for name in scales)
        self.running_names: list[str] = []
        for name, norm in norms if per_step else ():
            for kind in ("running_mean", "running_var", "num_batches_tracked"):
                value = getattr(norm, kind)
                if value is not None:
                    self.register_buffer(f"running_{len(self.running_names)}", self._rows(value))
                    self.running_names.append(f"{name}.{kind}")
        self.register_buffer("iterations", torch.zeros((), dtype=torch.int64))

    def _rows(self, value: Tensor) -> Tensor:
        return value.detach().clone().expand(self.trained_steps + 1, *value.shape).clone()

    def running_statistics(self) -> list[Tensor]:
        """Tensors that follow the data in training: several processes make them the mean of theirs."""
        return [table for table in self._running() if table.is_floating_point()]

    def _running(self) -> list[Tensor]:
        return [self.get_buffer(f"running_{k}") for k in range(len(self.running_names))]

    def after_step(self) -> None:
        """Count a step of training."""
        self.iterations += 1

    @property
    def lr(self) -> Any:
        """For each step the rates of the parameter tensors by their names."""
        last = self.trained_steps - 1
        return [
            dict(zip(self.adapt, self.rates[:, min(t, last)].unbind(), strict=True))
            for t in range(self.steps)
        ]

    def step_weights(self) -> list[float]:
        """Those of the losses after 1 ... K inner steps, in the training step that comes next."""
        k, done = self.steps, int(self.iterations)
        if done >= self.multi_step or k == 0:
            return [0.0] * (k - 1) + [1.0]
        part = done / self.multi_step
        other = max((1 - part) / k, SMALLEST_SHARE / k)
        return [other] * (k - 1) + [1 - (k - 1) * other]

    def adapted(self, episodes: Episodes, **options: Any) -> Adapted:
        if self.training and self.steps > self.trained_steps:
            raise ValueError(
                f"steps: expected at most {self.trained_steps} in training, which there are rates for, got {self.steps}"
            )
        rows = [*self.scales, *self._running()]
        table = dict(zip([*self.scale_names, *self.running_names], rows, strict=True))
        if self.steps != self.trained_steps:
            # A part of the rows is a view, whose running statistics can follow; rows beyond are copies.
            beyond = max(0, self.steps - self.trained_steps)
            table = {
                name: torch.cat([value, value[-1:].expand(beyond, *value.shape[1:])])
                if beyond
                else value[: self.steps + 1]
                for name, value in table.items()
            }
        early = self.training and int(self.iterations) < self.first_order_steps
        return super().adapted(
            episodes,
            **{
                "per_step": table,
                "batch_norm": "running" if self.batch_norm == "per_step" else self.batch_norm,
                "first_order": self.first_order or early,
                **options,
            },
        )

    def forward(self, episodes: Episodes) -> Outcome:
        adapted = self.adapted(episodes)
        if not self.training:
            return self.outcome(adapted, episodes)
        weights = self.step_weights()
        last = self.outcome(adapted, episodes)
        if weights[-1] == 1:
            return last
        earlier = [
            weight * self.outcome(adapted.after(t + 1), episodes).loss
            for t, weight in enumerate(weights[:-1])
        ]
        return Outcome(sum(earlier, weights[-1] * last.loss), last.logits)


def _norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    if not isinstance(model, nn.Module):
        return []
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
