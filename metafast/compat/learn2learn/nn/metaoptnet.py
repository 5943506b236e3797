"""The support vector machine of MetaOptNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.compat import absent
from metafast.compat.learn2learn.nn.protonet import PrototypicalClassifier

__getattr__ = absent(__name__)

#: What is left of the conditions that the solution fulfils, relative to the largest entry there can be.
_TOLERANCE = 1e-9
_ROUNDS = 50


def svm_logits(
    query: Tensor,
    support: Tensor,
    labels: Tensor,
    ways: int,
    shots: int,
    C_reg: float = 0.1,
    max_iters: int = 15,
) -> Tensor:
    r"""Logits of a multi-class support vector machine (Crammer and Singer) that is fitted to the support rows.

    .. math:: \min_A \tfrac12 \sum_k a_k^\top (K + I) a_k - \sum_i A_{i y_i}, \qquad
        A_{ik} \le C\,[y_i = k], \quad \sum_k A_{ik} = 0, \qquad logits = Q S^\top A

    with :math:`K = S S^\top`; Lee, Maji, Ravichandran and Soatto, *Meta-Learning with Differentiable Convex
    Optimization*, 2019. An interior-point method in float64 finds which entries are at their bound; the solution is
    that of a linear system then, and differentiable to any order.

    Args:
        query: ``[m, d]``.
        support: ``[n, d]``.
        labels: ``[n]``, from 0 to ``ways - 1``.
        ways: the classes.
        shots: not used, the rows are those of ``support``.
        C_reg: C.
        max_iters: steps of the interior-point method.

    Returns:
        ``[m, ways]``.

    Raises:
        ValueError: labels out of range.
        RuntimeError: the solution was not found in ``max_iters`` steps.
    """
    return query @ (support.t() @ _dual_variables(support, labels, ways, C_reg, max_iters))


def _dual_variables(support: Tensor, labels: Tensor, ways: int, bound: float, iterations: int) -> Tensor:
    """A of :func:`svm_logits`, ``[n, ways]``."""
    _check.features(support, "support", "[n, d]")
    _check.sizes(ways=ways)
    _check.positive(bound, "C_reg")
    _check.same_size(labels, 0, "labels", support, 0, "support")
    if bool(((labels < 0) | (labels >= ways)).any()):
        raise ValueError(f"labels: expected numbers from 0 to {ways - 1}, got {labels.unique().tolist()}")
    rows = support.double()
    n = rows.shape[0]
    wanted = nn.functional.one_hot(labels.to(rows.device).long(), ways).double().flatten()
    identity = torch.eye(ways, dtype=rows.dtype, device=rows.device)
    quadratic = torch.kron((rows @ rows.t()).contiguous(), identity)
    quadratic = quadratic + torch.eye(n * ways, dtype=rows.dtype, device=rows.device)
    sums = torch.kron(torch.eye(n, dtype=rows.dtype, device=rows.device), torch.ones_like(identity[:1]))
    with torch.no_grad():
        at_bound = _active(quadratic, wanted, sums, bound * wanted, bound, iterations)
    solution = _equality_solution(quadratic, wanted, sums, bound * wanted, at_bound)[0]
    return solution.reshape(n, ways).to(support.dtype)


def _saddle(quadratic: Tensor, sums: Tensor) -> Tensor:
    """``[[G, A'], [A, 0]]``."""
    corner = sums.new_zeros(sums.shape[0], sums.shape[0])
    return torch.cat([torch.cat([quadratic, sums.t()], 1), torch.cat([sums, corner], 1)])


def _equality_solution(
    quadratic: Tensor, linear: Tensor, sums: Tensor, upper: Tensor, at_bound: Tensor
) -> tuple[Tensor, Tensor]:
    """The minimum with these entries at their bound and the others free; and minus its multipliers of the sums."""
    size = linear.shape[0]
    fixed = torch.cat([at_bound, at_bound.new_zeros(sums.shape[0])])
    system = _saddle(quadratic, sums)
    system = torch.where(
        fixed[:, None], torch.eye(len(system), dtype=system.dtype, device=system.device), system
    )
    right = torch.cat([torch.where(at_bound, upper, linear), sums.new_zeros(sums.shape[0])])
    found = torch.linalg.solve(system, right)
    return found[:size], found[size:]


def _active(
    quadratic: Tensor, linear: Tensor, sums: Tensor, upper: Tensor, scale: float, iterations: int
) -> Tensor:
    """Which entries of the solution are at their upper bound."""
    x, nu = torch.zeros_like(linear), linear.new_zeros(sums.shape[0])
    slack, multiplier = torch.full_like(linear, scale), torch.ones_like(linear)
    for _ in range(iterations):
        gap = slack @ multiplier / len(linear)
        if gap < _TOLERANCE * scale * scale:
            break
        off = x + slack - upper
        centred = slack * multiplier - 0.1 * gap
        slope = quadratic @ x - linear + sums.t() @ nu + multiplier
        right = torch.cat([-slope - (multiplier * off - centred) / slack, -sums @ x])
        step = torch.linalg.solve(_saddle(quadratic + torch.diag(multiplier / slack), sums), right)
        dx, dnu = step[: len(x)], step[len(x) :]
        dslack = -off - dx
        dmultiplier = (-centred - multiplier * dslack) / slack
        shrinks = torch.cat([-dslack / slack, -dmultiplier / multiplier]).amax()
        length = 1.0 if shrinks <= 0 else min(1.0, 0.995 / float(shrinks))
        x, nu = x + length * dx, nu + length * dnu
        slack, multiplier = slack + length * dslack, multiplier + length * dmultiplier
    at_bound = multiplier > slack
    # What is wrong near the bound is put right by the signs of the exact solution.
    for _ in range(_ROUNDS):
        # A row whose entries are all at their bound would not sum to 0.
        free = (sums @ (~at_bound).to(sums.dtype)) > 0
        at_bound = at_bound & ((sums.t() @ free.to(sums.dtype)) > 0)
        x, nu = _equality_solution(quadratic, linear, sums, upper, at_bound)
        multiplier = linear - quadratic @ x - sums.t() @ nu
        wrong = torch.where(at_bound, multiplier < -_TOLERANCE, x > upper + _TOLERANCE * scale)
        if not bool(wrong.any()):
            return at_bound
        at_bound = at_bound ^ wrong
    raise RuntimeError(f"max_iters: the support vector machine was not solved in {iterations} steps")


class SVClassifier(nn.Module):
    """Logits of a support vector machine that is fitted to a support set: see :func:`svm_logits`.

    Args:
        support: features ``[n, d]``, to fit at once.
        labels: ``[n]``, from 0 to the number of classes - 1.
        ways: classes; None: the labels there are.
        normalize: divide support and queries by their lengths.
        C_reg: see :func:`svm_logits`.
        max_iters: see :func:`svm_logits`.
    """

    def __init__(
        self,
        support: Tensor | None = None,
        labels: Tensor | None = None,
        ways: int | None = None,
        normalize: bool = False,
        C_reg: float = 0.1,
        max_iters: int = 15,
    ) -> None:
        super().__init__()
        self.C_reg = C_reg
        self.max_iters = max_iters
        self._normalize = normalize
        self._weight: Tensor | None = None
        if support is not None and labels is not None:
            self.fit_(support, labels, ways)

    normalize = staticmethod(PrototypicalClassifier.normalize)

    def fit_(
        self,
        support: Tensor,
        labels: Tensor,
        ways: int | None = None,
        C_reg: float | None = None,
        max_iters: int | None = None,
    ) -> None:
        """Fit to ``support [n, d]``; None: as the classifier was made."""
        if self._normalize:
            support = self.normalize(support)
        self.support = support
        self.num_support = support.shape[0]
        self.ways = len(labels.unique()) if ways is None else ways
        self.qp_solution = _dual_variables(
            support,
            labels,
            self.ways,
            self.C_reg if C_reg is None else C_reg,
            self.max_iters if max_iters is None else max_iters,
        )
        self._weight = support.t() @ self.qp_solution

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[m, ways]`` of features ``[m, d]``.

        Raises:
            AssertionError: there is no support set yet.
        """
        assert self._weight is not None, "no support set yet: call fit_(support, labels)"
        logits: Tensor = (self.normalize(x) if self._normalize else x) @ self._weight
        return logits
