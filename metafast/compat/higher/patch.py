"""Models as functions of their parameters: functional copies, whose parameters are plain tensors of a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from metafast.compat import absent
from metafast.compat.higher.utils import get_func_params

__all__ = ["buffer_sync", "make_functional", "monkeypatch"]

#: A dict or a list of a copy, a key, and which of the parameters belongs there.
_Place = tuple[Any, Any, int]
_NONE_YET = "params: expected tensors for the parameters, which this model has not been given yet"
#: What every module has of its own; the rest of its attributes are shared with its copy.
_OWN = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))


class _Weights:
    """What a functional copy and its submodules have in common: the parameters after each update, and their places."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.places: list[_Place] = []
        self.history: list[list[Tensor]] | None = None
        self.tracked = True

    def update(self, params: Iterable[Tensor]) -> None:
        params = list(params)
        if len(params) != self.count:
            raise ValueError(f"params: expected {self.count} tensors, as the module has, got {len(params)}")
        for value in params:
            if not isinstance(value, Tensor):
                raise TypeError(f"params: expected tensors, got {type(value).__name__}")
        if self.tracked and self.history is not None:
            self.history.append(params)
        else:
            self.history = [params]
        self.place()

    def given(self) -> list[list[Tensor]]:
        if not self.history:
            raise ValueError(_NONE_YET)
        return self.history

    def place(self) -> None:
        """Put the latest parameters where the copies of the modules look for theirs."""
        latest = self.given()[-1]
        for container, key, index in self.places:
            container[key] = latest[index]


class FunctionalModule(nn.Module):
    """A functional copy of a module or of a submodule: an instance of its class whose parameters can be replaced.

    A call is ``fmodel(*args, params=None, **kwargs)``; ``params`` replace all parameters of the model, in the order of
    ``module.parameters()``, from this call on. Any other method of the module, and every submodule, works with the
    latest parameters too. To assign a tensor to a parameter's attribute is to replace that one.
    """

    _metafast_weights: _Weights
    _metafast_root = False

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        if params is not None:
            self._metafast_weights.update(params)
        elif self._metafast_root:
            self._metafast_weights.place()
        return super().forward(*args, **kwargs)

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Replace all parameters of the model."""
        self._metafast_weights.update(params)

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Any]:
        """The latest parameters of the model, or those after ``time`` updates; of a submodule its own latest.

        Raises:
            ValueError: the model has none yet; ``time`` where it does not track them, or of a submodule.
            IndexError: there have been fewer updates.
        """
        if not self._metafast_root:
            if time is not None:
                raise ValueError("time: expected None for a submodule; the whole model keeps the parameters")
            return super().parameters(recurse)
        history = self._metafast_weights.given()
        if time is None:
            return iter(history[-1])
        if not self.track_higher_grads and time not in (-1, 0):
            raise ValueError(
                f"time: expected None, 0 or -1, since earlier parameters are not tracked, got {time}"
            )
        if not -len(history) <= time < len(history):
            raise IndexError(f"time: expected a number of updates up to {len(history) - 1}, got {time}")
        return iter(history[time])

    @property
    def _fast_params(self) -> list[list[Tensor]] | None:
        return self._metafast_weights.history

    @_fast_params.setter
    def _fast_params(self, value: list[list[Tensor]] | None) -> None:
        self._metafast_weights.history = value

    @_fast_params.deleter
    def _fast_params(self) -> None:
        self._metafast_weights.history = None

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The latest parameters of the model."""
        return self._metafast_weights.history[-1] if self._metafast_weights.history else None

    @fast_params.setter
    def fast_params(self, value: Iterable[Tensor]) -> None:
        self._metafast_weights.update(value)

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The parameters that the model began with."""
        if not self.track_higher_grads:
            raise RuntimeError("init_fast_params: the first parameters are not tracked")
        return self._metafast_weights.given()[0]

    @property
    def track_higher_grads(self) -> bool:
        """Whether the parameters of earlier updates, and so the graph, are kept."""
        return self._metafast_weights.tracked

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"track_higher_grads: expected a bool, got {type(value).__name__}")
        self._metafast_weights.tracked = value

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__.get("_parameters", {})
        if name in own and "_metafast_weights" in self.__dict__:
            weights = self._metafast_weights
            index = next((i for place, key, i in weights.places if place is own and key == name), None)
            if index is not None:
                latest = list(weights.given()[-1])
                latest[index] = value
                weights.update(latest)
                return
        super().__setattr__(name, value)


#: The original's name, which code has in its annotations.
_MonkeyPatchBase = FunctionalModule


class _FunctionalRNN(FunctionalModule):
    """cuDNN's recurrent layers have no second derivative, and want their weights side by side in memory."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=False):
            return super().forward(*args, **kwargs)

    def flatten_parameters(self) -> None:
        pass


class _ParameterPlaceholder:
    """Stands where a parameter will be, before there is one."""

    @classmethod
    def __torch_function__(cls, *args: Any) -> Any:
        raise ValueError(_NONE_YET)


def monkeypatch(
    module: nn.Module,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> FunctionalModule:
    """A functional copy of a module that begins with its parameters.

    The module stays as it is: buffers, such as running statistics, are copied, and all other attributes are shared.
    Parameters and modules that are registered twice are one in the copy as well.

    Args:
        module: any module.
        device: for parameters and buffers; None: where they are.
        copy_initial_weights: begin with constants; False: with the module's own parameters, which get their gradients.
        track_higher_grads: keep the parameters of each update; False: only the latest.

    Raises:
        TypeError: no module, or one that is compiled.
        ValueError: it is a functional copy already.
    """
    fmodule = _functional(module, device)
    if copy_initial_weights:
        fmodule.update_params(get_func_params(module, device))
    else:
        fmodule.update_params(
            p.clone() if device is None else p.clone().to(device) for p in module.parameters()
        )
    fmodule.track_higher_grads = track_higher_grads
    return fmodule


def make_functional(
    module: nn.Module, encapsulator: Callable[[FunctionalModule, nn.Module], None] | None = None
) -> FunctionalModule:
    """A functional copy of a module that has no parameters yet: the first call brings them, ``fmodel(x, params=...)``.

    Args:
        module: any module.
        encapsulator: called with the copy and the module at the end, such as to give it parameters.

    Raises:
        TypeError: no module, or one that is compiled.
        ValueError: it is a functional copy already.
    """
    fmodule = _functional(module, None)
    if encapsulator is not None:
        encapsulator(fmodule, module)
    return fmodule


def buffer_sync(module: nn.Module, fmodule: nn.Module, device: torch.device | str | None = None) -> None:
    """Copy the buffers of a module once more to its functional copy.

    Raises:
        KeyError: ``fmodule`` is no copy of it: it has not the same submodules.
    """
    for name, value in module._buffers.items():
        fmodule._buffers[name] = _copied_buffer(value, device)
    for name, child in module._modules.items():
        if name not in fmodule._modules:
            raise KeyError(f"fmodule: expected a submodule {name!r}, as module has")
        below = fmodule._modules[name]
        if child is not None and below is not None:
            buffer_sync(child, below, device)


def _copied_buffer(value: Tensor | None, device: torch.device | str | None) -> Tensor | None:
    if value is None:
        return None
    return value.detach().clone() if device is None else value.detach().clone().to(device)


def _functional(module: nn.Module, device: torch.device | str | None) -> FunctionalModule:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    index = {id(p): k for k, p in enumerate(module.parameters())}
    weights = _Weights(len(index))
    copies: dict[nn.Module, FunctionalModule] = {}
    fmodule = _copied(module, device, index, weights, copies)
    for copy in copies.values():
        _relink(copy, index, weights, copies)
    fmodule.__dict__["_metafast_root"] = True
    return fmodule


def _copied(
    module: nn.Module,
    device: torch.device | str | None,
    index: dict[int, int],
    weights: _Weights,
    copies: dict[nn.Module, FunctionalModule],
) -> FunctionalModule:
    """A module and all below it, each once."""
    if module in copies:
        return copies[module]
    if isinstance(module, FunctionalModule):
        raise ValueError("module: expected one that is not functional yet, got a functional copy")
    if isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules:
        raise TypeError(
            "module: expected one of Python, got one of torch.jit or torch.compile, which have no second derivative; "
            "pass the module that they were made from"
        )
    kind: Any = type(module)
    copy: FunctionalModule = object.__new__(_functional_class(kind))
    copies[module] = copy
    attributes = copy.__dict__
    attributes.update(vars(module))
    attributes.update((name, attributes[name].copy()) for name in _OWN)
    # What module.compile() made calls the module.
    attributes["_compiled_call_impl"] = None
    if isinstance(module, nn.RNNBase):
        attributes["_flat_weights"] = list(module._flat_weights)
    attributes["_metafast_weights"] = weights
    for name, parameter in module._parameters.items():
        if parameter is not None:
            attributes["_parameters"][name] = _ParameterPlaceholder()
            weights.places.append((attributes["_parameters"], name, index[id(parameter)]))
    for name, value in module._buffers.items():
        attributes["_buffers"][name] = _copied_buffer(value, device)
    for name, child in module._modules.items():
        if child is not None:
            attributes["_modules"][name] = _copied(child, device, index, weights, copies)
    return copy


def _relink(
    copy: FunctionalModule,
    index: dict[int, int],
    weights: _Weights,
    copies: dict[nn.Module, FunctionalModule],
) -> None:
    """Methods, lists and dicts among the attributes that lead to the module's parts lead to those of the copy."""
    for name, value in vars(copy).items():
        if isinstance(value, MethodType):
            if isinstance(value.__self__, nn.Module) and value.__self__ in copies:
                copy.__dict__[name] = MethodType(value.__func__, copies[value.__self__])
        elif type(value) in (list, dict) and name not in _OWN:
            # The first entry decides, since there may be many.
            first = next(iter(value.values() if isinstance(value, dict) else value), None)
            if isinstance(first, nn.Module) or id(first) in index:
                copy.__dict__[name] = linked = value.copy()
                for key, entry in list(linked.items() if isinstance(linked, dict) else enumerate(linked)):
                    if isinstance(entry, nn.Module):
                        linked[key] = copies.get(entry, entry)
                    elif id(entry) in index:
                        weights.places.append((linked, key, index[id(entry)]))


@lru_cache(maxsize=512)
def _functional_class(kind: Any) -> Any:
    base = _FunctionalRNN if issubclass(kind, nn.RNNBase) else FunctionalModule
    metaclass: Any = type(kind)
    return metaclass(f"Functional{kind.__name__}", (base, kind), {})


__getattr__ = absent(__name__)
