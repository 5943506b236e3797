"""One step of each optimiser for one parameter, as a function that can be differentiated to any order.

All take the parameter p, its gradient g, what the optimiser remembers of it, which they change, and hyperparameters,
any of which may be a tensor; they return the new parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


def acts(value: Any) -> bool:
    """Whether a hyperparameter changes anything: a tensor of 0 does, its gradient is not 0."""
    return isinstance(value, Tensor) or value != 0


def direction(p: Tensor, g: Tensor, state: State, group: State) -> Tensor:
    r"""What SGD descends along: :math:`g + \lambda p`, or its momentum."""
    g = _decayed(p, g, group)
    momentum = group["momentum"]
    if momentum == 0:
        return g
    buffer = state.get("momentum_buffer")
    buffer = g if buffer is None else momentum * buffer + (1 - group["dampening"]) * g
    state["momentum_buffer"] = buffer
    return g + momentum * buffer if group["nesterov"] else buffer


def adam(p: Tensor, g: Tensor, state: State, group: State) -> Tensor:
    r"""With :math:`c_i = 1 - \beta_i^t`: :math:`p - \alpha \sqrt{c_2} / c_1 \cdot m / (\sqrt v + \epsilon)`.

    With decoupled decay, as AdamW's, :math:`\epsilon \sqrt{c_2}` is in the place of :math:`\epsilon`: the original has
    Adam as torch had it before its version 1.3, and torch's AdamW is as in the paper.
    """
    beta1, beta2 = group["betas"]
    t = _tick(state)
    decoupled = group.get("decoupled_weight_decay", False)
    p, g = (_shrunk(p, group), g) if decoupled else (p, _decayed(p, g, group))
    m = state["exp_avg"] = _mean(state.get("exp_avg"), g, beta1)
    v = state["exp_avg_sq"] = _mean(state.get("exp_avg_sq"), g * g, beta2)
    if group["amsgrad"]:
        most = state.get("max_exp_avg_sq")
        v = state["max_exp_avg_sq"] = v if most is None else torch.maximum(most, v)
    scale = (1 - beta2**t) ** 0.5
    eps = group["eps"] * scale if decoupled else group["eps"]
    return _minus(p, group["lr"] * scale / (1 - beta1**t), m, _root(v) + eps)


def radam(p: Tensor, g: Tensor, state: State, group: State) -> Tensor:
    r"""With :math:`\rho_\infty = 2 / (1 - \beta_2) - 1` and :math:`\rho_t = \rho_\infty - 2 t \beta_2^t / c_2`:
    :math:`p - \alpha m / c_1`, and where :math:`\rho_t > 5` times :math:`r_t \sqrt{c_2} / (\sqrt v + \epsilon)`.
    """
    beta1, beta2 = group["betas"]
    t = _tick(state)
    p, g = (_shrunk(p, group), g) if group["decoupled_weight_decay"] else (p, _decayed(p, g, group))
    m = state["exp_avg"] = _mean(state.get("exp_avg"), g, beta1)
    v = state["exp_avg_sq"] = _mean(state.get("exp_avg_sq"), g * g, beta2)
    rate, correction = group["lr"] / (1 - beta1**t), 1 - beta2**t
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * t * beta2**t / correction
    if rho <= 5:
        return _minus(p, rate, m)
    rectified = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
    return _minus(p, rate * rectified * correction**0.5, m, _root(v) + group["eps"])


def nadam(p: Tensor, g: Tensor, state: State, group: State) -> Tensor:
    r"""With :math:`\mu_t = \beta_1 (1 - 0.96^{t \psi} / 2)` and :math:`M_t = \mu_1 \cdots \mu_t`:
    :math:`p - \alpha ((1 - \mu_t) / (1 - M_t) g + \mu_{t+1} / (1 - M_{t+1}) m) / (\sqrt{v / c_2} + \epsilon)`.
    """
    beta1, beta2 = group["betas"]
    t = _tick(state)
    p, g = (_shrunk(p, group), g) if group["decoupled_weight_decay"] else (p, _decayed(p, g, group))
    m = state["exp_avg"] = _mean(state.get("exp_avg"), g, beta1)
    v = state["exp_avg_sq"] = _mean(state.get("exp_avg_sq"), g * g, beta2)
    mu, following = (beta1 * (1 - 0.5 * 0.96 ** (k * group["momentum_decay"])) for k in (t, t + 1))
    product = state["mu_product"] = _number(state.get("mu_product", 1.0)) * mu
    ahead = (1 - mu) / (1 - product) * g + following / (1 - product * following) * m
    return _minus(p, group["lr"], ahead, _root(v / (1 - beta2**t)) + group["eps"])


def adadelta(p: Tensor, g: Tensor, state: State, group: State) -> Tensor:
    r""":math:`p - \alpha d`, with :math:`d = \sqrt{a + \epsilon} / \sqrt{v + \epsilon} \cdot g` and a the mean of
    former :math:`d^2`.
    """
    _tick(state)
    rho, eps = group["rho"], group["eps"]
    g = _decayed(p, g, group)
    v = state["square_avg"] = _mean(state.get("square_avg"), g * g, rho)
    former = state["acc_delta"] if "acc_delta" in state else torch.zeros_like(g)
    delta = (former + eps).sqrt() / (v + eps).sqrt() * g
    state["acc_delta"] = _mean(former, delta * delta, rho)
    return _minus(p, group["lr"], delta)


def adagrad(p: Tensor, g: Tensor, state: State, group: State) -> Tensor:
    r"""With s the sum of all :math:`g^2`: :math:`p - \alpha / (1 + (t - 1) \eta) \cdot g / (\sqrt s + \epsilon)`."""
    t = _tick(state)
    g = _decayed(p, g, group)
    total = state["sum"] = state["sum"] + g * g
    return _minus(p, group["lr"] / (1 + (t - 1) * group["lr_decay"]), g, _root(total) + group["eps"])


def adamax(p: Tensor, g: Tensor, state: State, group: State) -> Tensor:
    r"""With :math:`u = \max(\beta_2 u, |g| + \epsilon)`: :math:`p - \alpha / c_1 \cdot m / u`."""
    beta1, beta2 = group["betas"]
    t = _tick(state)
    g = _decayed(p, g, group)
    m = state["exp_avg"] = _mean(state.get("exp_avg"), g, beta1)
    size, former = g.abs() + group["eps"], state.get("exp_inf")
    u = state["exp_inf"] = size if former is None else torch.maximum(beta2 * former, size)
    return _minus(p, group["lr"] / (1 - beta1**t), m, u)


def asgd(p: Tensor, g: Tensor, state: State, group: State) -> Tensor:
    r""":math:`(1 - \lambda \eta_t) p - \eta_t g` with :math:`\eta_{t+1} = \alpha / (1 + \lambda \alpha t)^\kappa`."""
    t = _tick(state)
    g = _decayed(p, g, group)
    lr, decay = group["lr"], group["lambd"]
    eta, mu = _number(state.get("eta", lr)), _number(state.get("mu", 1))
    p = _minus(p * (1 - decay * eta), eta, g)
    state["ax"] = p if mu == 1 else state["ax"] + (p - state["ax"]) * mu
    state["eta"] = lr / (1 + decay * lr * t) ** group["alpha"]
    state["mu"] = 1 / max(1, t - group["t0"])
    return p


def rmsprop(p: Tensor, g: Tensor, state: State, group: State) -> Tensor:
    r""":math:`p - \alpha g / (\sqrt v + \epsilon)`; centred, :math:`v - \bar g^2` is in the place of v."""
    _tick(state)
    alpha, momentum = group["alpha"], group["momentum"]
    g = _decayed(p, g, group)
    v = state["square_avg"] = _mean(state.get("square_avg"), g * g, alpha)
    if group["centered"]:
        mean = state["grad_avg"] = _mean(state.get("grad_avg"), g, alpha)
        v = v - mean * mean
    scale = _root(v) + group["eps"]
    if not momentum > 0:
        return _minus(p, group["lr"], g, scale)
    former = state.get("momentum_buffer")
    buffer = state["momentum_buffer"] = g / scale if former is None else momentum * former + g / scale
    return _minus(p, group["lr"], buffer)


def rprop(p: Tensor, g: Tensor, state: State, group: State) -> Tensor:
    """A step as long as the parameter's own step size, which grows while the gradient keeps its sign and shrinks where
    it turns. Of the gradient only its sign matters, so no derivative passes through it.
    """
    _tick(state)
    shrink, grow = group["etas"]
    ones = torch.ones_like(g)
    size = state["step_size"] if "step_size" in state else group["lr"] * ones
    turn = g * state["prev"] if "prev" in state else torch.zeros_like(g)
    factor = torch.where(turn > 0, grow * ones, torch.where(turn < 0, shrink * ones, ones))
    size = state["step_size"] = (size * factor).clamp(*group["step_sizes"])
    g = state["prev"] = g.masked_fill(turn < 0, 0)
    return p - g.sign() * size


def adafactor(p: Tensor, g: Tensor, state: State, group: State) -> Tensor:
    r""":math:`p - \max(\epsilon_2, RMS(p)) \min(\alpha, t^{-1/2}) u / \max(1, RMS(u) / d)` with
    :math:`u = g / \sqrt v`. Of a matrix v is the product of the means over its rows and its columns.
    """
    t = _tick(state)
    lr, (eps1, eps2) = group["lr"], group["eps"]
    eps1 = torch.finfo(p.dtype).eps if eps1 is None else eps1
    kept = 1 - t ** group["beta2_decay"]
    most = 1 / t**0.5
    rate = lr.clamp(max=most) if isinstance(lr, Tensor) else min(lr, most)
    rate = rate * (torch.linalg.vector_norm(p) / p.numel() ** 0.5).clamp(min=eps2)
    p = _shrunk(p, group)
    square = g * g
    if g.dim() > 1:
        rows = state["row_var"] = _mean(state.get("row_var"), square.mean(-1, keepdim=True), kept)
        columns = state["col_var"] = _mean(state.get("col_var"), square.mean(-2, keepdim=True), kept)
        v = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=eps1)
    else:
        v = state["variance"] = _mean(state.get("variance"), square, kept)
    update = v.clamp(min=eps1 * eps1).rsqrt() * g
    size = torch.linalg.vector_norm(update) / (update.numel() ** 0.5 * group["d"])
    return p - rate / size.clamp(min=1) * update


def _tick(state: State) -> int:
    """The number of this step; torch counts in float32, in which the bias corrections would be less exact."""
    t = state["step"] = int(state.get("step", 0)) + 1
    return t


def _number(value: Any) -> Any:
    """What torch keeps in float32 goes on as a Python number, unless it has a gradient."""
    return value.item() if isinstance(value, Tensor) and not value.requires_grad else value


def _decayed(p: Tensor, g: Tensor, group: State) -> Tensor:
    decay = group["weight_decay"]
    if not acts(decay):
        return g
    return g + decay * p if isinstance(decay, Tensor) else g.add(p, alpha=decay)


def _shrunk(p: Tensor, group: State) -> Tensor:
    decay = group["weight_decay"]
    return p * (1 - group["lr"] * decay) if acts(decay) else p


def _mean(former: Tensor | None, new: Tensor, kept: Any) -> Tensor:
    """The running mean of which each step keeps so much."""
    if former is None:
        return (1 - kept) * new
    return kept * former + (1 - kept) * new if isinstance(kept, Tensor) else former.lerp(new, 1 - kept)


def _root(v: Tensor) -> Tensor:
    """The square root, with the derivative 0 at 0, where that of the squares in v is 0 too, and the root's infinite."""
    zero = v == 0
    return v.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _minus(p: Tensor, rate: Any, a: Tensor, b: Tensor | None = None) -> Tensor:
    """``p - rate a`` or ``p - rate a / b``."""
    if isinstance(rate, Tensor):
        return p - rate * (a if b is None else a / b)
    return p.add(a, alpha=-rate) if b is None else p.addcdiv(a, b, value=-rate)
