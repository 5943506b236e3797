"""Optimisers whose steps can be differentiated, in place of those of ``torch.optim``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metafast.compat import absent
from metafast.compat.higher import _steps
from metafast.compat.higher.patch import FunctionalModule
from metafast.compat.higher.utils import _recursive_copy_and_cast, _recursive_map, flatten

#: Hyperparameters by their names: lists of one value for all parameter groups, or of one for each.
Override = Mapping[str, Sequence[Any]]
#: From the gradients of all parameters, None where there is none, to those that the step takes.
GradCallback = Callable[[Any], Sequence[Any]]
# The original's names, which code has in its annotations.
_OverrideType = Override
_GradCallbackType = GradCallback
_GroupedGradsType = list[list[Tensor]]
_StateType = list[defaultdict[int, Any]]

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdafactor",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableNAdam",
    "DifferentiableOptimizer",
    "DifferentiableRAdam",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableSGD",
    "apply_trainable_opt_params",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "register_optim",
]


class DifferentiableOptimizer(ABC):
    """Makes the steps of an optimiser of torch as functions of parameters, gradients and hyperparameters.

    A subclass implements ``_update(grouped_grads, **kwargs)``: for each of ``self.param_groups`` it puts new tensors
    into ``group["params"]``, given their gradients (None leaves a parameter as it is) and what it remembers of them in
    ``self.state[k_of_group][k_of_parameter]``.

    Args:
        other: the optimiser whose hyperparameters and state the steps begin with. It is left alone.
        reference_params: the parameters of the model in its own order, of which ``other`` has some or all.
        fmodel: the functional copy that the steps are made for; None: every step is told its parameters.
        device: for the state; None: where it is.
        override: hyperparameters in place of those of ``other``.
        grad_callback: applied to the gradients of every step.
        track_higher_grads: record the steps; False: what a step returns is constants.

    Raises:
        ValueError: ``other`` has parameters besides ``reference_params``; a wrong number of values in ``override``.
    """

    def __init__(
        self,
        other: Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: FunctionalModule | None = None,
        device: torch.device | str | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
        **kwargs: Any,
    ) -> None:
        places = {id(p): place for place, p in enumerate(reference_params)}
        self.param_groups: list[dict[str, Any]] = []
        self.state: _StateType = []
        self._group_to_param_list: list[list[int]] = []
        for group in other.param_groups:
            params = group["params"]
            for p in params:
                if id(p) not in places:
                    raise ValueError(
                        f"reference_params: expected all parameters of the optimiser, got none of shape {list(p.shape)}"
                    )
            self._group_to_param_list.append([places[id(p)] for p in params])
            values = {name: _copied(value) for name, value in group.items() if name != "params"}
            self.param_groups.append({"params": [None] * len(params), **values})
            state: defaultdict[int, Any] = defaultdict(dict)
            for place, p in enumerate(params):
                if p in other.state:
                    state[place] = _recursive_copy_and_cast(dict(other.state[p]), device)
            self.state.append(state)
        if override is not None:
            self._apply_override(override)
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads

    def _apply_override(self, override: Override) -> None:
        for name, values in override.items():
            for group, value in zip(
                self.param_groups, _by_group(name, values, self.param_groups), strict=True
            ):
                group[name] = value

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """One step down the gradient of a loss.

        Args:
            loss: ``[]``.
            params: that the loss is of, in the order of ``reference_params``; None: the latest of ``fmodel``.
            override: hyperparameters from this step on.
            grad_callback: applied to the gradients of all parameters, in this step instead of the optimiser's own.
            kwargs: for ``_update``.

        Returns:
            All parameters, new ones where the optimiser has them; ``fmodel`` goes on with them.

        Raises:
            ValueError: no parameters, or not as many as there have to be.
        """
        if override is not None:
            self._apply_override(override)
        if params is None:
            params = None if self._fmodel is None else self._fmodel.fast_params
            if params is None:
                raise ValueError("params: expected tensors, since the optimiser has no model with parameters")
        params = list(params)
        grads: Sequence[Tensor | None] = self._gradients(loss, params)
        callback = self._grad_callback if grad_callback is None else grad_callback
        if callback is not None:
            grads = callback(grads)
            if len(grads) != len(params):
                raise ValueError(f"grad_callback: expected {len(params)} gradients back, got {len(grads)}")
        for group, places in zip(self.param_groups, self._group_to_param_list, strict=True):
            if max(places, default=0) >= len(params):
                raise ValueError(f"params: expected all of reference_params, got {len(params)}")
            group["params"] = [params[place] for place in places]
        self._update([[grads[place] for place in places] for places in self._group_to_param_list], **kwargs)
        updated = list(params)
        for group, places in zip(self.param_groups, self._group_to_param_list, strict=True):
            for place, p in zip(places, group["params"], strict=True):
                constant = not self._track_higher_grads
                updated[place] = p.detach().requires_grad_(params[place].requires_grad) if constant else p
        if self._fmodel is not None:
            self._fmodel.update_params(updated)
        return updated

    def _gradients(self, loss: Tensor, params: list[Tensor]) -> tuple[Tensor | None, ...]:
        """None of what is frozen or has no part in the loss."""
        wanted = [p for p in params if p.requires_grad]
        if not wanted:
            return (None,) * len(params)
        found = torch.autograd.grad(loss, wanted, create_graph=self._track_higher_grads, allow_unused=True)
        if len(wanted) == len(params):
            return found
        rest = iter(found)
        return tuple(next(rest) if p.requires_grad else None for p in params)

    @abstractmethod
    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        """Put new tensors into the ``"params"`` of each group."""


class _ByParameter(DifferentiableOptimizer):
    """An optimiser that looks at one parameter at a time."""

    #: One step of one parameter.
    _moved: Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any]], Tensor]

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        # What the state remembers keeps no graph either.
        with torch.set_grad_enabled(self._track_higher_grads):
            for group, states, grads in zip(self.param_groups, self.state, grouped_grads, strict=True):
                for place, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                    if g is None:
                        continue
                    if g.is_sparse:
                        raise RuntimeError(
                            f"{type(self).__name__}: expected dense gradients, got sparse ones"
                        )
                    g = -g if group.get("maximize", False) else g
                    group["params"][place] = self._moved(p, g, states[place], group)


class DifferentiableSGD(DifferentiableOptimizer):
    """``torch.optim.SGD``."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        with torch.set_grad_enabled(self._track_higher_grads):
            for group, states, grads in zip(self.param_groups, self.state, grouped_grads, strict=True):
                moving = [place for place, g in enumerate(grads) if g is not None]
                if not moving:
                    continue
                params = [group["params"][place] for place in moving]
                slopes = [
                    grads[place].to_dense() if grads[place].is_sparse else grads[place] for place in moving
                ]
                if group.get("maximize", False):
                    slopes = [-g for g in slopes]
                slopes = [
                    _steps.direction(p, g, states[place], group)
                    for p, g, place in zip(params, slopes, moving, strict=True)
                ]
                for place, value in zip(moving, _descended(params, slopes, group["lr"]), strict=True):
                    group["params"][place] = value


def _descended(params: list[Tensor], grads: list[Tensor], lr: Any) -> Iterable[Tensor]:
    if not isinstance(lr, Tensor):
        return torch._foreach_add(params, grads, alpha=-lr)
    return torch._foreach_addcmul(params, grads, [lr.to(p) for p in params], value=-1)


class DifferentiableAdam(_ByParameter):
    """``torch.optim.Adam``; the small epsilon is not scaled by the bias correction, as in the original."""

    _moved = staticmethod(_steps.adam)


class DifferentiableAdamW(_ByParameter):
    """``torch.optim.AdamW``."""

    _moved = staticmethod(_steps.adam)


class DifferentiableAdadelta(_ByParameter):
    """``torch.optim.Adadelta``."""

    _moved = staticmethod(_steps.adadelta)


class DifferentiableAdafactor(_ByParameter):
    """``torch.optim.Adafactor``."""

    _moved = staticmethod(_steps.adafactor)


class DifferentiableAdagrad(_ByParameter):
    """``torch.optim.Adagrad``."""

    _moved = staticmethod(_steps.adagrad)


class DifferentiableAdamax(_ByParameter):
    """``torch.optim.Adamax``."""

    _moved = staticmethod(_steps.adamax)


class DifferentiableASGD(_ByParameter):
    """``torch.optim.ASGD``."""

    _moved = staticmethod(_steps.asgd)


class DifferentiableNAdam(_ByParameter):
    """``torch.optim.NAdam``."""

    _moved = staticmethod(_steps.nadam)


class DifferentiableRAdam(_ByParameter):
    """``torch.optim.RAdam``."""

    _moved = staticmethod(_steps.radam)


class DifferentiableRMSprop(_ByParameter):
    """``torch.optim.RMSprop``."""

    _moved = staticmethod(_steps.rmsprop)


class DifferentiableRprop(_ByParameter):
    """``torch.optim.Rprop``, which only looks at signs: its second-order gradients are those of the identity."""

    _moved = staticmethod(_steps.rprop)


_opt_mapping: dict[type[Optimizer], type[DifferentiableOptimizer]] = {
    torch.optim.Adadelta: DifferentiableAdadelta,
    torch.optim.Adafactor: DifferentiableAdafactor,
    torch.optim.Adagrad: DifferentiableAdagrad,
    torch.optim.Adam: DifferentiableAdam,
    torch.optim.AdamW: DifferentiableAdamW,
    torch.optim.Adamax: DifferentiableAdamax,
    torch.optim.ASGD: DifferentiableASGD,
    torch.optim.NAdam: DifferentiableNAdam,
    torch.optim.RAdam: DifferentiableRAdam,
    torch.optim.RMSprop: DifferentiableRMSprop,
    torch.optim.Rprop: DifferentiableRprop,
    torch.optim.SGD: DifferentiableSGD,
}


def get_diff_optim(
    opt: Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: FunctionalModule | None = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable version of an optimiser, which begins with its hyperparameters and its state.

    The arguments are those of :class:`DifferentiableOptimizer`.

    Raises:
        ValueError: there is none for its type.
    """
    kind = _differentiable(type(opt), "opt")
    return kind(
        opt, reference_params, fmodel, device, override, track_higher_grads=track_higher_grads, **kwargs
    )


def create_diff_optim(
    opt_type: type[Optimizer],
    opt_kwargs: Mapping[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: FunctionalModule | None = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable version of an optimiser that is not there yet.

    Args:
        opt_type: such as ``torch.optim.SGD``.
        opt_kwargs: for its constructor.
        params: tensors, or parameter groups of them; only shapes, dtypes and devices matter. None: those of ``fmodel``.
        fmodel, device, override, track_higher_grads, kwargs: of :class:`DifferentiableOptimizer`.

    Raises:
        ValueError: no differentiable version of the type; neither ``params`` nor ``fmodel``.
    """
    kind = _differentiable(opt_type, "opt_type")
    if params is None:
        if fmodel is None:
            raise ValueError("params: expected tensors or parameter groups, or a model as fmodel")
        params = fmodel.parameters()
    given = list(params)
    flat: list[Tensor] = []

    def like(tensors: Any) -> list[Tensor]:
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        new = [torch.zeros_like(p, requires_grad=True) for p in tensors]
        flat.extend(new)
        return new

    if given and isinstance(given[0], dict):
        opt = opt_type([{**group, "params": like(group["params"])} for group in given], **(opt_kwargs or {}))
    else:
        opt = opt_type(like(given), **(opt_kwargs or {}))
    return kind(opt, flat, fmodel, device, override, track_higher_grads=track_higher_grads, **kwargs)


def register_optim(optim_type: type[Optimizer], diff_optim_type: type[DifferentiableOptimizer]) -> None:
    """Make ``diff_optim_type`` the differentiable version of a type of optimisers, for all functions here."""
    _opt_mapping[optim_type] = diff_optim_type


def get_trainable_opt_params(
    opt: Optimizer, device: torch.device | str | None = None
) -> dict[str, list[Any]]:
    """The numbers among an optimiser's hyperparameters as tensors that require gradients, to pass as ``override``.

    Switches, and containers of anything but numbers, are left out.
    """
    override: dict[str, list[Any]] = {}
    for group in opt.param_groups:
        for name, value in group.items():
            leaves = flatten(value)
            if name != "params" and leaves and all(type(leaf) in (int, float) for leaf in leaves):
                trainable = _recursive_map(
                    value, lambda x: torch.tensor(float(x), device=device, requires_grad=True)
                )
                override.setdefault(name, []).append(trainable)
    return override


def apply_trainable_opt_params(opt: Optimizer, override: Override) -> None:
    """Put learned hyperparameters into an optimiser: numbers, where it has numbers.

    Raises:
        ValueError: a wrong number of values, or containers that do not fit those of the optimiser.
    """
    for name, values in override.items():
        for group, value in zip(opt.param_groups, _by_group(name, values, opt.param_groups), strict=True):
            group[name] = _applied(value, group[name], name)


def _applied(value: Any, target: Any, name: str) -> Any:
    if isinstance(target, Tensor) and isinstance(value, Tensor):
        with torch.no_grad():
            return target.copy_(value)
    if isinstance(target, dict) and isinstance(value, dict) and target.keys() == value.keys():
        return {key: _applied(value[key], entry, name) for key, entry in target.items()}
    if isinstance(target, (list, tuple)) and isinstance(value, (list, tuple)) and len(target) == len(value):
        return type(target)(_applied(v, t, name) for v, t in zip(value, target, strict=True))
    if isinstance(target, (bool, int, float)) and isinstance(value, Tensor):
        return type(target)(value.item())
    raise ValueError(f"override[{name!r}]: expected values like {target!r}, got {value!r}")


def _by_group(name: str, values: Any, groups: Sequence[Any]) -> Sequence[Any]:
    """One value of an override for each parameter group."""
    scalar = isinstance(values, Tensor) and values.dim() == 0
    if scalar or not hasattr(values, "__len__"):
        raise TypeError(f"override[{name!r}]: expected a list of values, got {type(values).__name__}")
    if len(values) not in (1, len(groups)):
        raise ValueError(
            f"override[{name!r}]: expected one value, or {len(groups)} for the parameter groups, got {len(values)}"
        )
    return [values[0 if len(values) == 1 else k] for k in range(len(groups))]


def _differentiable(kind: type[Optimizer], name: str) -> type[DifferentiableOptimizer]:
    if kind not in _opt_mapping:
        known = ", ".join(sorted(k.__name__ for k in _opt_mapping))
        raise ValueError(
            f"{name}: expected {known} or a type known to register_optim, got {getattr(kind, '__name__', kind)}"
        )
    return _opt_mapping[kind]


def _copied(value: Any) -> Any:
    return _recursive_map(
        value, lambda x: _recursive_copy_and_cast(x, None) if isinstance(x, Tensor) else deepcopy(x)
    )


# For optimisers of one's own, which are often made of these.
def _add(tensor: Tensor, a1: Any, a2: Any = None) -> Tensor:
    """``tensor + a1``, or ``tensor + a1 a2``."""
    return tensor + (a1 if a2 is None else a1 * a2)


def _addcmul(tensor: Tensor, a1: Any, a2: Any, a3: Any = None) -> Tensor:
    """``tensor + a1 a2``, or ``tensor + a1 a2 a3``."""
    return tensor + (a1 * a2 if a3 is None else a1 * a2 * a3)


def _addcdiv(tensor: Tensor, a1: Any, a2: Any, a3: Any = None) -> Tensor:
    """``tensor + a1 / a2``, or ``tensor + a1 a2 / a3``."""
    return tensor + (a1 / a2 if a3 is None else a1 * (a2 / a3))


def _maybe_mask(tensor: Tensor, mask: Tensor) -> None:
    """From now on the gradient of ``tensor`` is 0 where ``mask`` is True."""
    if tensor.requires_grad:
        tensor.register_hook(lambda grad: grad.masked_fill(mask, 0))


__getattr__ = absent(__name__)
