"""A new head for each task on features that were trained to classify the base classes: Baseline and Baseline++."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import one_hot

from metafast import _check
from metafast._inner_loss import loss_gradient
from metafast.data import Episodes
from metafast.learners._base import PretrainedLearner, classified
from metafast.learners.outcome import Outcome

#: Most classes of a head with the smaller scale, and the two scales, of the source's code.
FEW_CLASSES, SCALE_OF_FEW, SCALE_OF_MANY = 200, 2.0, 10.0
#: Added to the norm of features, of the source's code.
NORM_EPSILON = 1e-5


def _uniform(shape: tuple[int, ...], features: int, generator: torch.Generator | None) -> nn.Parameter:
    """The initial values of ``torch.nn.Linear``."""
    bound = 1 / math.sqrt(features)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


class LinearHead(nn.Module):
    """A linear layer, whose parameters may have leading dimensions of tasks: ``[.., n, d] -> [.., n, C]``.

    Args:
        features: d.
        classes: C.
        generator: of the initial values, which are those of ``torch.nn.Linear``.

    Raises:
        TypeError, ValueError: sizes that are no positive ints.
    """

    def __init__(self, features: int, classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        _check.sizes(features=features, classes=classes)
        self.weight = _uniform((classes, features), features, generator)
        self.bias = _uniform((classes,), features, generator)

    def forward(self, rows: Tensor) -> Tensor:
        return rows @ self.weight.mT + self.bias.unsqueeze(-2)

    def fitted(
        self,
        rows: Tensor,
        targets: Tensor,
        orders: Tensor,
        batch_size: int,
        sgd: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Its parameters ``[T, ...]`` after the steps of :func:`fit_directions` from those it has."""
        ones = rows.new_ones((*rows.shape[:-1], 1))
        initial = torch.cat([self.weight, self.bias.unsqueeze(-1)], -1)
        found, _ = fit_directions(
            torch.cat([rows, ones], -1), targets, initial, None, orders, batch_size, sgd
        )
        return {"weight": found[..., :-1], "bias": found[..., -1]}

    def extra_repr(self) -> str:
        return f"features={self.weight.shape[-1]}, classes={self.weight.shape[-2]}"


class CosineHead(nn.Module):
    r"""The cosines of rows and classes, as logits: ``[.., n, d] -> [.., n, C]``.

    .. math:: logits_k = s \, g_k \, \frac{v_k^\top x}{\|v_k\| (\|x\| + 10^{-5})}

    with a trained norm :math:`g_k` of each class, initially :math:`\|v_k\|`. The parameters, which may have leading
    dimensions of tasks, are called ``weight_g [C, 1]`` and ``weight_v [C, d]``, as the source's code has them.

    Args:
        features: d.
        classes: C.
        generator: of the initial v, which are those of a ``torch.nn.Linear``.
        scale: s; None: 2 for 200 classes or fewer, else 10, as in the source's code.

    Raises:
        TypeError, ValueError: sizes that are no positive ints, a scale that is not positive.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        generator: torch.Generator | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        _check.sizes(features=features, classes=classes)
        if scale is not None:
            _check.positive(scale, "scale")
        usual = SCALE_OF_FEW if classes <= FEW_CLASSES else SCALE_OF_MANY
        self.scale = usual if scale is None else float(scale)
        self.weight_v = _uniform((classes, features), features, generator)
        self.weight_g = nn.Parameter(self.weight_v.detach().norm(dim=-1, keepdim=True))

    def forward(self, rows: Tensor) -> Tensor:
        weight = self.weight_g * (self.weight_v / self.weight_v.norm(dim=-1, keepdim=True))
        return self.scale * (self._units(rows) @ weight.mT)

    @staticmethod
    def _units(rows: Tensor) -> Tensor:
        return rows / (rows.norm(dim=-1, keepdim=True) + NORM_EPSILON)

    def fitted(
        self,
        rows: Tensor,
        targets: Tensor,
        orders: Tensor,
        batch_size: int,
        sgd: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Its parameters ``[T, ...]`` after the steps of :func:`fit_directions` from those it has."""
        found, norms = fit_directions(
            self._units(rows), targets, self.weight_v, self.weight_g, orders, batch_size, sgd, self.scale
        )
        return {"weight_v": found, "weight_g": norms}

    def extra_repr(self) -> str:
        return (
            f"features={self.weight_v.shape[-1]}, classes={self.weight_v.shape[-2]}, scale={self.scale:.4g}"
        )


Head = LinearHead | CosineHead


def fit_directions(
    rows: Tensor,
    targets: Tensor,
    initial: Tensor,
    norms: Tensor | None,
    orders: Tensor,
    batch_size: int,
    sgd: Mapping[str, Any],
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Vectors v of classes after steps of SGD on the mean cross-entropy of mini-batches, for all tasks at once.

    The logits are :math:`v_k^\top x`, or :math:`s \, g_k \, v_k^\top x / \|v_k\|` where there are norms g, which
    are fitted too. With e the gradients for the logits of a mini-batch, :math:`u_k = \sum_i e_{ik} x_i` and
    :math:`h_k = s \, g_k / \|v_k\|` (1 without norms), the gradients are

    .. math:: \nabla v_k = h_k \Big(u_k - \frac{u_k^\top v_k}{\|v_k\|^2} v_k\Big), \qquad
              \nabla g_k = \frac{s \, u_k^\top v_k}{\|v_k\|}

    (:math:`u_k` without norms). They lie in the span of the rows and of v: the steps are made on the coordinates of v
    in an orthonormal basis of the rows, and on the factor of what is left of the initial v. That is the same, for SGD
    does not depend on the basis, and less work for few rows of many features. They are float64 for any dtype.

    Args:
        rows: ``[T, n, d]``.
        targets: ``[T, n, C]``, one-hot.
        initial: ``[C, d]``.
        norms: ``[C, 1]`` or None.
        orders: ``[epochs, n]`` int64, of each pass the order of the rows.
        batch_size: rows of a step; the last of a pass has what is left.
        sgd: the options of ``torch.optim.SGD``.
        scale: s.

    Returns:
        v ``[T, C, d]`` and g ``[T, C, 1]``, or ``[T, C, 0]`` without norms.
    """
    dtype = rows.dtype
    # The coordinates are few, and hundreds of small steps from a factor of 1 would all be rounded one way.
    rows, targets, initial = rows.double(), targets.double(), initial.double()
    basis, coordinates = torch.linalg.qr(rows.mT)
    rows, inside = coordinates.mT.contiguous(), initial @ basis
    outside = initial - inside @ basis.mT
    tasks, width, classes = len(rows), rows.shape[2], len(initial)
    # Of each task and class a column: the coordinates, the factor of what is outside, the norm.
    parts = [inside.mT, rows.new_ones(tasks, 1, classes)]
    if norms is not None:
        parts.append(norms.double().mT.expand(tasks, 1, classes))
    state = torch.cat(parts, 1)
    state.grad = torch.zeros_like(state)
    optimizer = torch.optim.SGD([state], **sgd)
    sizes = (width, 1, state.shape[1] - width - 1)
    v, factor, norm = state.split(sizes, 1)
    gradient, factor_gradient, norm_gradient = state.grad.split(sizes, 1)
    square_outside = outside.square().sum(-1).unsqueeze(1)
    for order in orders:
        for x, y in zip(
            rows[:, order].split(batch_size, 1), targets[:, order].split(batch_size, 1), strict=True
        ):
            products = x @ v
            if norms is None:
                gradient.copy_(x.mT @ loss_gradient(products, y, 0))
            else:
                length = (v.square().sum(1, keepdim=True) + factor.square() * square_outside).sqrt()
                height = scale * norm / length
                error = loss_gradient(height * products, y, 0)
                along = (error * products).sum(1, keepdim=True) / length
                shrink = height * along / length
                gradient.copy_(height * (x.mT @ error) - shrink * v)
                factor_gradient.copy_(-shrink * factor)
                norm_gradient.copy_(scale * along)
            optimizer.step()
    found = v.mT @ basis.mT + factor.mT * outside
    return found.to(dtype), norm.mT.to(dtype)


class Baseline(PretrainedLearner):
    r"""Baseline: an encoder that classifies the base classes, and a new linear head for each task.

    With f the encoder, the head :math:`W, b` minimises the mean cross-entropy of :math:`W f(x_i) + b` over the support
    rows of a task, by SGD in ``epochs`` passes over them in mini-batches; ``logits`` of a query are
    :math:`W f(x) + b`, and ``loss`` is their mean cross-entropy. The heads of all tasks are fitted at once. f is a
    constant of the fit, through which no gradient flows. All tasks begin with one head and see the rows in one order,
    drawn from ``seed``, so that what becomes of a task does not depend on the others.

    The encoder is trained to classify the base classes: for batches without support rows, such as those of
    :class:`metafast.data.RowSampler`, the learner gives the logits of ``head``, a linear layer for all base classes,
    and their mean cross-entropy.

    All images go through the encoder in one call (see :class:`ProtoNet` for what that means for BatchNorm), under
    autocast if it is on; all else is float32 or float64. Ways and shots may differ from call to call.

    Source: Chen, Liu, Kira, Wang, Huang, "A Closer Look at Few-shot Classification" (2019), and its code.

    Args:
        encoder: ``[n, ...] -> [n, d]``.
        features: d.
        base_classes: number of base classes; None: no head for them, for an encoder that is trained already.
        lr, momentum, dampening, weight_decay: those of ``torch.optim.SGD``, for the heads of tasks.
        epochs: passes over the support rows, 0 or more.
        batch_size: support rows of a step; the last step of a pass has what is left.
        seed: of the initial heads of tasks and of the order of rows, 0 or more.
        make_head: from features, classes and a generator of its initial values to a :class:`LinearHead` or
            :class:`CosineHead`.

    Raises:
        TypeError, ValueError: numbers out of range; in the call, regression tasks, features that are not
            ``[T * (n + m), d]``, and rows of other base classes than those of the head.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        base_classes: int | None = None,
        *,
        lr: float = 0.01,
        momentum: float = 0.9,
        dampening: float = 0.9,
        weight_decay: float = 1e-3,
        epochs: int = 100,
        batch_size: int = 4,
        seed: int = 0,
        make_head: Callable[[int, int, torch.Generator | None], Head] = LinearHead,
    ) -> None:
        _check.sizes(features=features, batch_size=batch_size)
        _check.positive(lr, "lr")
        for name, value in (("momentum", momentum), ("dampening", dampening), ("weight_decay", weight_decay)):
            _check.number(value, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number that is not negative, got {value}")
        _check.count(epochs, "epochs")
        _check.count(seed, "seed")
        head = None
        if base_classes is not None:
            _check.sizes(base_classes=base_classes)
            head = make_head(features, base_classes, None)
            if isinstance(head, LinearHead):
                nn.init.zeros_(head.bias)
        super().__init__(encoder, features, head, base_classes)
        self.make_head = make_head
        self.sgd: dict[str, Any] = {
            "lr": float(lr),
            "momentum": float(momentum),
            "dampening": float(dampening),
            "weight_decay": float(weight_decay),
        }
        self.epochs = epochs
        self.batch_size = batch_size
        self.seed = seed

    def classify(self, episodes: Episodes) -> Outcome:
        support, query = self.embed(episodes)
        with torch.autocast(support.device.type, enabled=False):
            head, parameters = self.fitted(support, episodes.support_y, episodes.ways)
            return classified(functional_call(head, parameters, (query,)), episodes.query_y)

    def start(self, rows: int, ways: int) -> tuple[Head, Tensor]:
        """What every task begins with: a head, in float32, and of each pass the order of rows; both on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        head = self.make_head(self.features, ways, generator)
        orders = torch.empty(self.epochs, rows, dtype=torch.int64)
        for order in orders:
            torch.randperm(rows, generator=generator, out=order)
        return head, orders

    @torch.no_grad()
    def fitted(self, support: Tensor, labels: Tensor, ways: int) -> tuple[Head, dict[str, Tensor]]:
        """A head, and its parameters ``[T, ...]`` after the fit to ``support [T, n, d]`` and ``labels [T, n]``."""
        head, orders = self.start(support.shape[1], ways)
        targets = one_hot(labels, ways).to(support.dtype)
        head = head.to(support)
        return head, head.fitted(support, targets, orders.to(support.device), self.batch_size, self.sgd)

    def extra_repr(self) -> str:
        options: dict[str, Any] = {**self.sgd, "epochs": self.epochs, "batch_size": self.batch_size}
        return ", ".join(f"{name}={value}" for name, value in options.items())


class BaselinePlusPlus(Baseline):
    r"""Baseline++: :class:`Baseline` with cosines for logits, of the base classes and of each task.

    Its heads are :class:`CosineHead`:

    .. math:: logits_k = s \, g_k \, \frac{v_k^\top f(x)}{\|v_k\| (\|f(x)\| + 10^{-5})}

    Args:
        encoder, features, base_classes: as of :class:`Baseline`.
        scale: s of all heads; None: by their number of classes, as in the source's code.
        options: the others of :class:`Baseline`, but for ``make_head``.

    Raises:
        TypeError, ValueError: as :class:`Baseline`; a scale that is not positive.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        base_classes: int | None = None,
        scale: float | None = None,
        **options: Any,
    ) -> None:
        if scale is not None:
            _check.positive(scale, "scale")
        super().__init__(
            encoder, features, base_classes, make_head=partial(CosineHead, scale=scale), **options
        )
