"""GraphedStep without a GPU: what it refuses, and its calls with a stand-in for the graph (see also test_cuda.py)."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from metafast.data import Episodes
from metafast.learners import ProtoNet
from metafast.training import graphs
from metafast.training.graphs import GraphedStep, addresses, copy_into, require_unchanged, settings


def network() -> ProtoNet:
    return ProtoNet(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)))


def episodes(seed: int = 0, tasks: int = 2, ways: int = 3) -> Episodes:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(ways).expand(tasks, ways)
    x = torch.randn(tasks, 4 * ways, 6, generator=random)
    return Episodes(x[:, :ways], labels, x[:, ways:], labels.repeat(1, 3), ways)


def adam(learner: nn.Module, **options: Any) -> torch.optim.Adam:
    return torch.optim.Adam(learner.parameters(), **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            lambda: (network, adam(network())),
            TypeError,
            "learner: expected a torch.nn.Module, got function",
            id="learner",
        ),
        pytest.param(
            lambda: (network(), 0.1),
            TypeError,
            "optimizer: expected a torch.optim.Optimizer, got float",
            id="optimizer",
        ),
        pytest.param(
            lambda: (network(), adam(network())),
            ValueError,
            "optimizer: expected Adam with capturable=True, group 0 has capturable=False",
            id="not capturable",
        ),
        pytest.param(
            lambda: (net := network(), torch.optim.SGD(net.parameters(), lr=0.1)),
            ValueError,
            "learner: a CUDA graph needs it on a CUDA device, encoder.0.weight is on cpu",
            id="CPU",
        ),
        pytest.param(
            lambda: (nn.Identity(), torch.optim.SGD(network().parameters(), lr=0.1)),
            ValueError,
            "learner: expected parameters to train, got none",
            id="nothing to train",
        ),
    ],
)
def test_refuses(arguments: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        GraphedStep(*arguments())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float16"}, "precision: expected 'float32' or 'bfloat16', got 'float16'"),
        ({"warm_up": 0}, "warm_up: expected a positive int, got 0"),
        ({"warm_up": True}, "warm_up: expected a positive int, got True"),
    ],
)
def test_refuses_options(options: dict[str, Any], message: str) -> None:
    net = network()
    with pytest.raises(ValueError, match=message):
        GraphedStep(net, torch.optim.SGD(net.parameters(), lr=0.1), **options)


def test_copies_into_the_buffers() -> None:
    other = episodes()
    buffers = graphs._buffers_like(other, torch.device("cpu"))
    address = buffers.support_x.data_ptr()
    copy_into(buffers, other)
    for name in ("support_x", "support_y", "query_x", "query_y"):
        assert torch.equal(getattr(buffers, name), getattr(other, name)), name
    assert buffers.support_x.data_ptr() == address


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (lambda: 3, TypeError, "episodes: expected metafast.Episodes, got int"),
        (lambda: episodes(ways=4), ValueError, "episodes: expected 3 ways as in the first call, got 4"),
        (
            lambda: episodes(tasks=1),
            ValueError,
            "episodes.support_x: expected shape [2, 3, 6] as in the first call, got [1, 3, 6]",
        ),
        (
            lambda: episodes().to(dtype=torch.float64),
            TypeError,
            "episodes.support_x: expected torch.float32 as in the first call, got torch.float64",
        ),
    ],
    ids=["type", "ways", "shape", "dtype"],
)
def test_refuses_other_episodes(other: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        copy_into(episodes(), other())


def halve(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] /= 2


def replace_rate(optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)


def load(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def move(optimizer: Any) -> None:
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.data = parameter.data.clone()


def add_group(optimizer: Any) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize(
    ("change", "rate", "message"),
    [
        pytest.param(halve, 0.5, "lr of group 0 was 0.5 when the step was captured, got 0.25", id="rate"),
        pytest.param(
            replace_rate, torch.tensor(0.5), "lr of group 0 was 'a tensor at .*, got 'a tensor", id="new rate"
        ),
        pytest.param(load, 0.5, "not the tensors of the captured step", id="loaded"),
        pytest.param(move, 0.5, "not the tensors of the captured step", id="moved"),
        pytest.param(add_group, 0.5, "not the tensors of the captured step", id="new group"),
    ],
)
def test_notices_a_changed_optimizer(change: Callable[[Any], None], rate: Any, message: str) -> None:
    net = network()
    optimizer = adam(net, lr=rate, foreach=False)
    net(episodes()).loss.backward()
    optimizer.step()
    captured, places = settings(optimizer), addresses(optimizer)
    require_unchanged(optimizer, captured, places)
    change(optimizer)
    with pytest.raises(ValueError, match=message):
        require_unchanged(optimizer, captured, places)


def test_a_rate_written_in_place_is_no_change() -> None:
    net = network()
    optimizer = adam(net, lr=torch.tensor(0.5), foreach=False)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    captured, places = settings(optimizer), addresses(optimizer)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    require_unchanged(optimizer, captured, places)


class StandIn:
    """A graph on the CPU: the capture computes nothing that stays, a replay runs the step on the same buffers."""

    def __init__(self) -> None:
        self.replays = 0
        self.step: Any = None

    @contextlib.contextmanager
    def capture(self, graph: StandIn, stream: Any) -> Iterator[None]:
        learner, optimizer = self.step._learner, self.step._optimizer
        values = [*learner.parameters(), *learner.buffers()]
        values += [v for state in optimizer.state.values() for v in state.values()]
        before = [value.detach().clone() for value in values]
        yield
        with torch.no_grad():
            for value, old in zip(values, before, strict=True):
                value.copy_(old)

    def replay(self) -> None:
        self.replays += 1
        for static, value in zip(self.step._outcome, self.step._step(self.step._buffers), strict=True):
            static.copy_(value)


class NoStream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    graph = StandIn()
    monkeypatch.setattr(graphs, "_cuda_device", lambda learner: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: NoStream())
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", graph.capture)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return graph


def test_every_call_is_one_step(stand_in: StandIn) -> None:
    eager, graphed = network(), network()
    graphed.load_state_dict(eager.state_dict())
    optimizer = torch.optim.SGD(graphed.parameters(), lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(eager.parameters(), lr=0.1, momentum=0.9)
    step = stand_in.step = GraphedStep(graphed, optimizer, warm_up=2)
    kept = []
    for k in range(5):
        assert step.captured == (k > 2)
        loss, logits = step(episodes(k))
        expected = eager(episodes(k))
        plain.zero_grad()
        expected.loss.backward()
        plain.step()
        assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
        assert not loss.requires_grad and not logits.requires_grad
        kept.append((loss, float(loss)))
    assert stand_in.replays == 3
    assert all(float(loss) == value for loss, value in kept)
    for name, value in eager.state_dict().items():
        assert torch.equal(graphed.state_dict()[name], value), name
    optimizer.param_groups[0]["lr"] = 0.2
    with pytest.raises(ValueError, match=r"lr of group 0 was 0\.1 "):
        step(episodes())


def test_failed_capture_says_why(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def failing(graph: Any, stream: Any) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    net = network()
    step = GraphedStep(net, torch.optim.SGD(net.parameters(), lr=0.1), warm_up=1)
    step(episodes())
    with pytest.raises(RuntimeError, match=r"cannot be captured: operation not permitted .* waits for"):
        step(episodes())
    assert not step.captured


def test_waiting_for_the_device_is_found_before_the_capture(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    class Reading(ProtoNet):
        def forward(self, batch: Episodes) -> Any:
            if modes[-1] == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            return super().forward(batch)

    net = Reading(nn.Linear(6, 4))
    step = GraphedStep(net, torch.optim.SGD(net.parameters(), lr=0.1), warm_up=2)
    step(episodes())
    assert modes == [0]
    with pytest.raises(
        RuntimeError, match=r"cannot be captured: called a synchronizing .* \(\.item\(\), a branch"
    ):
        step(episodes())
    assert modes == [0, "error", 0]
