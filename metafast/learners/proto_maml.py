"""ProtoMAML: MAML whose head begins with the class prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from metafast import _check
from metafast._stateless import BATCH_NORM_POLICIES
from metafast.data import Episodes
from metafast.inner_loop import Adapted, inner_loop
from metafast.learners._base import classified, require_classes
from metafast.learners.outcome import Outcome
from metafast.prototype import prototypes


class ProtoMAML(nn.Module):
    r"""An encoder and a linear head that adapt together, the head from the prototypes of the task's support rows.

    With the class means c of the encoder's features, the head begins with

    .. math:: w_n = 2 c_n, \qquad b_n = -|c_n|^2,

    whose logits are those of a prototypical network up to a term that all classes share; the gradient goes through
    them to the encoder. Then encoder and head take K steps of gradient descent on the support rows, in one
    :func:`metafast.inner_loop`. There is no learnt head, and so any number of ways, in training and evaluation alike.
    All of it computes in the parameters' dtype, under autocast too.
    To be compiled whole it is called once before, with as many classes.

    Source: Triantafillou et al., "Meta-Dataset: A Dataset of Datasets for Learning to Learn from Few Examples" (2020).

    Args:
        encoder: from rows ``[n, ...]`` to features ``[n, d]``.
        lr: the rate.
        steps: K, 0 or more; may be changed between calls.
        first_order: take the gradients of the steps for constants; those of the prototypes remain.
        batch_norm, recompute: see :class:`MAML`.

    Raises:
        TypeError: wrong kind of an argument.
        ValueError: numbers out of range; in the call, regression tasks, or features of another rank.
    """

    #: Rows of other episodes have no part in an episode's statistics.
    episode_statistics = True

    def __init__(
        self,
        encoder: nn.Module,
        lr: float = 0.01,
        steps: int = 5,
        *,
        first_order: bool = False,
        batch_norm: str = "transductive",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: expected a torch.nn.Module, got {type(encoder).__name__}")
        _check.choice(batch_norm, "batch_norm", BATCH_NORM_POLICIES)
        _check.positive(lr, "lr")
        _check.count(steps, "steps")
        self.encoder = encoder
        self.lr = float(lr)
        self.steps = steps
        self.first_order = first_order
        self.batch_norm = batch_norm
        self.recompute = recompute
        # A learner compiled whole finds them made: torch.compile makes no parameters.
        self._models: dict[tuple[int, int, torch.dtype], nn.Sequential] = {}

    def adapted(self, episodes: Episodes) -> Adapted:
        """Encoder and head after ``steps`` on the support rows of each task."""
        require_classes(episodes)
        rows = episodes.support_x, episodes.support_y
        with torch.autocast(episodes.device.type, enabled=False):
            features = self._features(*rows)
            if features.dim() != 3:
                raise ValueError(f"encoder: expected features [T, n, d], got {list(features.shape)}")
            means = prototypes(features, rows[1], episodes.ways)
            return inner_loop(
                self._model(features.shape[2], episodes.ways, features.dtype),
                *rows,
                self.lr,
                self.steps,
                parameters={"1.weight": 2 * means, "1.bias": -means.square().sum(-1)},
                first_order=self.first_order,
                batch_norm=self.batch_norm,
                recompute=self.recompute,
            )

    def _model(self, features: int, ways: int, dtype: torch.dtype) -> nn.Sequential:
        """The encoder and a head whose weights are given in the call."""
        model = self._models.get((features, ways, dtype))
        if model is None or model[0] is not self.encoder:
            head = nn.Linear(features, ways, device="meta", dtype=dtype)
            model = self._models[features, ways, dtype] = nn.Sequential(self.encoder, head)
        return model

    def _features(self, support_x: Tensor, support_y: Tensor) -> Tensor:
        """Those that the first step begins with, ``[T, n, d]``."""
        names = [name for name, _ in self.encoder.named_parameters()]
        if not names:
            found: Tensor = torch.vmap(self.encoder, randomness="different")(support_x)
            return found
        # The steps see them again, and running statistics would follow twice.
        again = self.training and self.batch_norm == "running"
        policy = "transductive" if again else self.batch_norm
        # A loss by name would compare the features with the labels.
        adapted = inner_loop(
            self.encoder, support_x, support_y, self.lr, 0, loss=cross_entropy, adapt=names, batch_norm=policy
        )
        return adapted(support_x)

    def forward(self, episodes: Episodes) -> Outcome:
        adapted = self.adapted(episodes)
        with torch.autocast(episodes.device.type, enabled=False):
            logits: Tensor = adapted(episodes.query_x)
            return classified(logits, episodes.query_y)

    def extra_repr(self) -> str:
        options: dict[str, Any] = {"lr": self.lr, "steps": self.steps, "first_order": self.first_order}
        options |= {"batch_norm": self.batch_norm, "recompute": self.recompute}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())
