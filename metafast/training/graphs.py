"""A training step as a CUDA graph: captured once, then replayed without the cost of launching it from Python."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metafast.data import Episodes
from metafast.learners.outcome import Outcome
from metafast.training.fit import PRECISIONS

_FIELDS = ("support_x", "support_y", "query_x", "query_y")


class GraphedStep:
    """Trains ``learner`` by one step per call; from call ``warm_up + 1`` on, the step is one replayed CUDA graph.

    A call does what these lines do, and gives their result, detached:

    .. code-block:: python

        outcome = learner(episodes)  # Outcome(loss, logits)
        optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        optimizer.step()

    The first ``warm_up`` calls run them one by one, the next one captures them (forward, backward and update) with
    ``torch.cuda.graph``. Every call is exactly one training step on its own episodes, which are copied into buffers
    that the graph reads. Small networks and small batches gain most: their steps take longer to launch than to run.

    Args:
        learner: ``learner(episodes) -> Outcome``, all of it on one CUDA device; every call trains it in training mode.
        optimizer: made with ``capturable=True`` where its class has that option (Adam, AdamW, RMSprop ...); others,
            such as SGD, have to do without reading the device and without numbers that change from step to step.
        precision: ``"bfloat16"`` runs the learner under autocast, as in :func:`metafast.fit`.
        warm_up: calls before the capture, at least 1; they make the optimiser's state and choose algorithms.

    What a graph asks for:

    - Equal shapes and dtypes in every call, and the same ``ways``. The last batch of an epoch may not be smaller.
    - No read-back in the learner (``.item()``, a branch on a tensor, an index by a mask): the last call before the
      capture raises instead. metafast's operators have none; a wrong label makes its task's results NaN, so look at
      the first episodes with :func:`metafast.check`.
    - BatchNorm's running statistics are updated by every call; ``momentum=None`` reads back and cannot be captured.
    - Numbers in ``optimizer.param_groups`` are part of the graph, so a call after a change of one raises. A learning
      rate that changes is a tensor: ``Adam(..., lr=torch.tensor(1e-3, device="cuda"), capturable=True)``; torch's
      schedulers and a ``fill_`` of yours write into it. Likewise a call raises after ``optimizer.load_state_dict`` or
      ``learner.to``, which make tensors that the graph does not know; then make a new ``GraphedStep``.
    - Gradients stay in the graph's memory until the next call, and may be read there. What is computed outside,
      clipping say, belongs into the learner's ``forward`` or a hook, or the step cannot be graphed.
    - Random numbers on the device (dropout) go on from call to call, as without a graph.
    - float16 autocast needs a loss scaler, which reads back; use bfloat16.
    - Calls from one stream; no other thread may use the device during call ``warm_up + 1``.

    Raises:
        TypeError: a learner, optimiser or batch of another type.
        ValueError: parameters or buffers that are not on one CUDA device, an optimiser that is not capturable, bad
            ``precision`` or ``warm_up``; in a call, episodes unlike the first ones, or an optimiser that was changed.
        RuntimeError: the step waits for the device or does something else that cannot be captured; the message says
            what torch or CUDA said.

    Example:
        >>> learner = ProtoNet(Conv4()).cuda()
        >>> optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3, capturable=True)
        >>> step = GraphedStep(learner, optimizer)
        >>> sampler = EpisodeSampler(dataset.to("cuda"), ways=5, shots=1, queries=15, tasks=4)
        >>> for k in range(1000):
        ...     loss, logits = step(sampler(k))
    """

    def __init__(
        self, learner: nn.Module, optimizer: Optimizer, *, precision: str = "float32", warm_up: int = 3
    ) -> None:
        if not isinstance(learner, nn.Module):
            raise TypeError(f"learner: expected a torch.nn.Module, got {type(learner).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
        if not isinstance(warm_up, int) or isinstance(warm_up, bool) or warm_up < 1:
            raise ValueError(f"warm_up: expected a positive int, got {warm_up!r}")
        for index, group in enumerate(optimizer.param_groups):
            if not group.get("capturable", True):
                raise ValueError(
                    f"optimizer: expected {type(optimizer).__name__} with capturable=True, group {index} has "
                    "capturable=False"
                )
        self._learner = learner
        self._optimizer = optimizer
        self._precision = precision
        self._warm_up = warm_up
        self._device = _cuda_device(learner)
        self._stream = torch.cuda.Stream(self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._buffers: Episodes | None = None
        self._outcome: Outcome | None = None
        self._settings: list[dict[str, Any]] = []
        self._addresses: list[int] = []
        self._calls = 0

    @property
    def captured(self) -> bool:
        """Whether the next call is a replay."""
        return self._graph is not None

    def __call__(self, episodes: Episodes) -> Outcome:
        """One training step on ``episodes``; gives loss and logits, detached, that later calls do not change."""
        with torch.cuda.device(self._device):
            if self._buffers is None:
                self._buffers = _buffers_like(episodes, self._device)
            copy_into(self._buffers, episodes)
            if self._graph is None:
                if self._calls < self._warm_up:
                    return self._run_once(self._buffers)
                self._capture(self._buffers)
            else:
                require_unchanged(self._optimizer, self._settings, self._addresses)
            assert self._graph is not None and self._outcome is not None
            self._graph.replay()
            self._calls += 1
            return Outcome(self._outcome.loss.clone(), self._outcome.logits.clone())

    def _step(self, episodes: Episodes) -> Outcome:
        self._learner.train()
        # Without its cache of cast weights: the graph has to cast them anew in every replay.
        with torch.autocast(
            "cuda", torch.bfloat16, enabled=self._precision == "bfloat16", cache_enabled=False
        ):
            loss, logits = self._learner(episodes)
        # Gradients that are not there yet are written and not added to, in the graph as well.
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return Outcome(loss.detach(), logits.detach())

    def _run_once(self, episodes: Episodes) -> Outcome:
        """A step without a graph, on the stream of the capture: autograd's nodes remember their stream."""
        current = torch.cuda.current_stream()
        last = self._calls + 1 == self._warm_up
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _not_captured_yet():
            try:
                # A capture that fails leaves torch's random numbers unusable: find the usual cause before it.
                with no_read_back() if last else contextlib.nullcontext():
                    outcome = self._step(episodes)
            except RuntimeError as error:
                if "synchronizing" in str(error):
                    raise RuntimeError(_advice(error)) from error
                raise
        current.wait_stream(self._stream)
        for value in outcome:
            value.record_stream(current)
        self._calls += 1
        return outcome

    def _capture(self, episodes: Episodes) -> None:
        """Record a step; nothing is computed yet."""
        current = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        self._optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                outcome = self._step(episodes)
        except RuntimeError as error:
            # A capture that ends in an error leaves its stream the current one.
            torch.cuda.set_stream(current)
            raise RuntimeError(_advice(error.__context__ or error)) from error
        self._graph, self._outcome = graph, outcome
        self._settings, self._addresses = settings(self._optimizer), addresses(self._optimizer)


def copy_into(buffers: Episodes, episodes: Episodes) -> None:
    """Write ``episodes``, which may lie on another device, into ``buffers`` of the same shapes.

    Raises:
        TypeError: no :class:`Episodes`, or inputs of another dtype.
        ValueError: other shapes or another number of ways.
    """
    _require_episodes(episodes)
    if episodes.ways != buffers.ways:
        raise ValueError(f"episodes: expected {buffers.ways} ways as in the first call, got {episodes.ways}")
    for name in _FIELDS:
        buffer, value = getattr(buffers, name), getattr(episodes, name)
        if value.shape != buffer.shape:
            raise ValueError(
                f"episodes.{name}: expected shape {list(buffer.shape)} as in the first call, got {list(value.shape)}"
            )
        if value.dtype != buffer.dtype:
            raise TypeError(
                f"episodes.{name}: expected {buffer.dtype} as in the first call, got {value.dtype}"
            )
        buffer.copy_(value, non_blocking=True)


def _require_episodes(value: Any) -> None:
    if not isinstance(value, Episodes):
        raise TypeError(f"episodes: expected metafast.Episodes, got {type(value).__name__}")


def _buffers_like(episodes: Episodes, device: torch.device) -> Episodes:
    _require_episodes(episodes)
    fields: dict[str, Any] = {
        name: torch.empty_like(getattr(episodes, name), device=device) for name in _FIELDS
    }
    return replace(episodes, **fields)


def _cuda_device(learner: nn.Module) -> torch.device:
    """The CUDA device of all of the learner's tensors."""
    devices: dict[torch.device, str] = {}
    for name, value in (*learner.named_parameters(), *learner.named_buffers()):
        devices.setdefault(value.device, name)
    if not devices:
        raise ValueError("learner: expected parameters to train, got none")
    for device, name in devices.items():
        if device.type != "cuda":
            raise ValueError(f"learner: a CUDA graph needs it on a CUDA device, {name} is on {device}")
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(f"learner: expected one device, got {where}")
    return next(iter(devices))


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What a graph of the optimiser's step takes from the host: numbers, and where its tensors are."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return f"a tensor at {value.data_ptr():#x}" if isinstance(value, Tensor) else value

    return [
        {key: plain(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def addresses(optimizer: Optimizer) -> list[int]:
    """Where the parameters are, and the state of the first of them: all states are loaded together."""
    first: dict[str, Any] = next(iter(optimizer.state.values()), {})
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    return [t.data_ptr() for t in (*tensors, *first.values()) if isinstance(t, Tensor)]


def require_unchanged(optimizer: Optimizer, captured: list[dict[str, Any]], places: list[int]) -> None:
    """Raise if a replayed step would not be the step of this optimiser any more.

    Raises:
        ValueError: naming the setting that differs from the ``captured`` ones, or tensors that left their ``places``.
    """
    now = settings(optimizer)
    if now != captured or addresses(optimizer) != places:
        for index, (old, new) in enumerate(zip(captured, now, strict=False)):
            for key in new:
                if old.get(key) != new[key]:
                    raise ValueError(
                        f"optimizer: {key} of group {index} was {old.get(key)!r} when the step was captured, got "
                        f"{new[key]!r}; a learning rate that changes has to be one tensor on the device"
                    )
        raise ValueError(
            "optimizer: its parameters or its state are not the tensors of the captured step (load_state_dict, "
            "learner.to, add_param_group); make a new GraphedStep"
        )


def _advice(error: BaseException) -> str:
    return (
        f"the step cannot be captured: {error}. Something in the learner or the optimizer waits for the device "
        "(.item(), a branch on a tensor, an index by a mask, a tensor made on the CPU) or uses another stream"
    )


@contextlib.contextmanager
def no_read_back() -> Iterator[None]:
    """Within, an operation that waits for the device raises RuntimeError instead, in any thread."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def _not_captured_yet() -> Iterator[None]:
    """Without torch's warning that a capturable optimiser is used before any capture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
        yield
