"""What only a GPU can show: streams, devices, CUDA graphs, waiting for the device, equal bits, large grids."""

from __future__ import annotations

import copy
import fcntl
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metafast
from metafast import reference
from metafast.data import Episodes
from metafast.distance import METRICS
from metafast.learners import ProtoNet
from metafast.training.graphs import GraphedStep, no_read_back
from tests.cases import (
    CASES,
    ODD,
    SMALL,
    Case,
    assert_accurate,
    assert_same,
    cotangents,
    gradients,
    outputs,
    shuffled_labels,
    weighted_sum,
)
from tests.test_values import check, results

DEVICE = torch.device("cuda")

LABELLED = tuple(case for case in CASES if any(spec.kind == "labels" for spec in case.inputs.values()))

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
    # torch's own forward-mode formulas use it.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def two_orders(case: Case, inputs: list[Tensor], C: int) -> list[Tensor]:
    """Values, first gradients, and gradients of a weighted sum of these."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    values = outputs(case.function(*leaves, C))
    floats = [t for t in leaves if t.is_floating_point()]
    first = torch.autograd.grad(values, floats, cotangents(values), create_graph=True)
    total = weighted_sum(first)
    second = torch.autograd.grad(total, floats, materialize_grads=True) if total.requires_grad else ()
    return [t.detach() for t in (*values, *first, *second)]


def assert_equal(case: Case, actual: Any, expected: Any) -> None:
    """Bitwise, or closely where a part of the operator is torch's."""
    for a, e in zip(actual, expected, strict=True):
        if case.kernels_only:
            assert torch.equal(a.nan_to_num(7.0), e.nan_to_num(7.0))
        else:
            torch.testing.assert_close(a, e)


class Captured:
    """A CUDA graph of ``work()``, after two runs without one."""

    def __init__(self, work: Callable[[], Any]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.result = work()

    def replay(self) -> Any:
        self.graph.replay()
        return self.result


@each_case
@pytest.mark.parametrize(
    "sizes",
    [
        ODD,
        {"n": 25, "m": 30, "d": 400, "C": 5},
        {"n": 40, "m": 21, "d": 129, "C": 21},
        {"n": 1, "m": 1, "d": 1, "C": 1},
    ],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_kernel(case: Case, sizes: dict[str, int], dtype: torch.dtype) -> None:
    """Values, gradients and tangents; compute-sanitizer watches this one, so the reference stays on the CPU."""
    inputs = case.make((3,), sizes, dtype)
    actual = results(case.function, [t.to(DEVICE) for t in inputs], sizes["C"])
    assert_accurate(
        [t.cpu() for t in actual], lambda values: results(case.reference, values, sizes["C"]), inputs
    )


@pytest.mark.parametrize("case", LABELLED, ids=str)
@pytest.mark.parametrize("label", [-1, 3, 2**31, -(2**40)])
def test_every_kernel_with_a_bad_label(case: Case, label: int) -> None:
    """The task's results are NaN and those of the others what they were."""
    sizes = {"n": 6, "m": 7, "d": 37, "C": 3}
    good = case.make((3,), sizes, torch.float32, DEVICE)
    expected = gradients(case.function, good, 3)
    # The gradient of a temperature that the tasks share is a sum over them.
    shared = any(not spec.per_task for spec in case.inputs.values())
    per_task = len(expected) - shared
    for k, spec in enumerate(case.inputs.values()):
        if spec.kind != "labels":
            continue
        bad = [t.clone() for t in good]
        bad[k][1, 2] = label
        actual = gradients(case.function, bad, 3)
        for a, e in zip(actual[:per_task], expected[:per_task], strict=True):
            assert a[1].isnan().all()
            assert torch.equal(a[[0, 2]], e[[0, 2]])
        assert all(a.isnan() for a in actual[per_task:])


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_same_bits_ten_times(case: Case, dtype: torch.dtype) -> None:
    sizes = {"n": 50, "m": 61, "d": 300, "C": 7}
    inputs = case.make((9,), sizes, dtype, DEVICE)
    first, held = two_orders(case, inputs, 7), []
    for k in range(9):
        # Other addresses every time.
        held.append(torch.empty(1000 * (k + 1), device=DEVICE))
        assert_equal(case, two_orders(case, inputs, 7), first)


@each_case
def test_deterministic_mode_changes_nothing(case: Case) -> None:
    inputs = case.make((4,), ODD, torch.float32, DEVICE)
    with_it = two_orders(case, inputs, ODD["C"])
    # The fixture that turned it on restores it.
    torch.use_deterministic_algorithms(False)
    assert_equal(case, two_orders(case, inputs, ODD["C"]), with_it)


@each_case
def test_nothing_waits_for_the_device(case: Case) -> None:
    inputs = case.make((2,), ODD, torch.float32, DEVICE)
    two_orders(case, inputs, ODD["C"])
    with no_read_back():
        two_orders(case, inputs, ODD["C"])


def test_waiting_for_the_device_would_be_noticed() -> None:
    number = torch.ones((), device=DEVICE)
    with no_read_back(), pytest.raises(RuntimeError, match="synchronizing"):
        number.item()
    assert number.item() == 1


@each_case
def test_runs_on_the_current_stream(case: Case) -> None:
    """The inputs arrive late on a side stream: a kernel on another one would not see them."""
    inputs = case.make((3,), ODD, torch.float32, DEVICE)
    expected = two_orders(case, inputs, ODD["C"])
    late = [torch.full_like(t, 0 if t.dtype == torch.int64 else 5) for t in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for to, value in zip(late, inputs, strict=True):
            to.copy_(value)
        actual = [t.clone() for t in two_orders(case, late, ODD["C"])]
    stream.synchronize()
    assert_equal(case, actual, expected)


@each_case
def test_does_not_wait_for_the_default_stream(case: Case) -> None:
    inputs = case.make((3,), ODD, torch.float32, DEVICE)
    stream, end_of_default = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        two_orders(case, inputs, ODD["C"])
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    end_of_default.record()
    with torch.cuda.stream(stream):
        actual = two_orders(case, inputs, ODD["C"])
    stream.synchronize()
    assert not end_of_default.query()
    torch.cuda.synchronize()
    assert_equal(case, actual, two_orders(case, inputs, ODD["C"]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one CUDA device")
@each_case
def test_second_device(case: Case) -> None:
    inputs = case.make((3,), ODD, torch.float32, "cuda:0")
    expected = two_orders(case, inputs, ODD["C"])
    assert torch.cuda.current_device() == 0
    actual = two_orders(case, [t.to("cuda:1") for t in inputs], ODD["C"])
    assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in actual)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.to("cuda:0"), e)


@each_case
def test_more_tasks_than_a_grid_dimension(case: Case) -> None:
    """A grid has at most 65,535 blocks in its second and third dimension."""
    check(case, case.make((65_539,), {**SMALL, "d": 5}, torch.float32, DEVICE), SMALL["C"])


def needs_memory(gigabytes: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


class TestMoreThan31Bits:
    """Tensors of more than 2**31 numbers, looked at where they end."""

    @pytest.fixture(autouse=True)
    def _one_at_a_time(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        """Test processes share the device's memory."""
        lock = tmp_path_factory.getbasetemp().parent / "large-tensors.lock"
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
            torch.cuda.empty_cache()

    @pytest.mark.parametrize("metric", METRICS)
    def test_pairs(self, metric: str) -> None:
        needs_memory(32)
        n = 46_500
        options: dict[str, Any] = {"device": DEVICE, "dtype": torch.float16, "requires_grad": True}
        x, y = torch.rand(1, n, 4, **options), torch.rand(1, n, 4, **options)
        distance = metafast.pairwise_distance(x, y, metric)
        assert distance.numel() > 2**31
        ends = x.detach()[:, -3:].float(), y.detach()[:, -5:].float()
        expected = reference.pairwise_distance(*ends, metric)
        torch.testing.assert_close(distance[:, -3:, -5:].float(), expected, rtol=2e-3, atol=2e-3)
        upstream = torch.zeros_like(distance)
        upstream[:, -3:, -5:] = 1
        grad_x, grad_y = torch.autograd.grad(distance, (x, y), upstream)
        wanted = reference.pairwise_distance_vjp(torch.ones(1, 3, 5, device=DEVICE), *ends, metric)
        torch.testing.assert_close(grad_x[:, -3:].float(), wanted[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(grad_y[:, -5:].float(), wanted[1], rtol=1e-2, atol=1e-2)
        assert not grad_x[:, :-3].any() and not grad_y[:, :-5].any()

    def test_prototypes(self) -> None:
        needs_memory(32)
        tasks, d = 66_000, 8200
        features = torch.rand(tasks, 4, d, device=DEVICE, dtype=torch.float16, requires_grad=True)
        assert features.numel() > 2**31
        labels = torch.tensor([1, 0, 1, 1], device=DEVICE).repeat(tasks, 1)
        means = metafast.prototypes(features, labels, 2)
        last = features.detach()[-2:].float().requires_grad_()
        expected = reference.prototypes(last, labels[-2:], 2)
        torch.testing.assert_close(means[-2:].float(), expected, rtol=2e-3, atol=2e-3)
        (gradient,) = torch.autograd.grad(means, features, means.detach())
        (wanted,) = torch.autograd.grad(expected, last, expected.detach())
        torch.testing.assert_close(gradient[-2:].float(), wanted, rtol=2e-3, atol=2e-3)

    def test_loss(self) -> None:
        needs_memory(40)
        tasks, d = 34_000, 8000
        query = torch.rand(tasks, 8, d, device=DEVICE, requires_grad=True)
        assert query.numel() > 2**31
        support = torch.rand(tasks, 2, d, device=DEVICE)
        labels = torch.tensor([0, 1], device=DEVICE).repeat(tasks, 1)
        arguments = (support, labels, query, labels.repeat(1, 4), 2)
        loss, logits = metafast.prototypical_loss(*arguments, temperature=0.01)
        last = query.detach()[-2:].clone().requires_grad_()
        ends = (support[-2:], labels[-2:], last, labels[-2:].repeat(1, 4), 2)
        loss_end, logits_end = reference.prototypical_loss(*ends, temperature=0.01)
        torch.testing.assert_close(loss[-2:], loss_end, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[-2:], logits_end, rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(loss.sum(), query)
        (wanted,) = torch.autograd.grad(loss_end.sum(), last)
        torch.testing.assert_close(gradient[-2:], wanted, rtol=1e-3, atol=1e-6)


class TestGraphs:
    @each_case
    def test_operator(self, case: Case) -> None:
        """Replays on inputs that were not there when the graph was made."""
        static = case.make((3,), ODD, torch.float32, DEVICE)
        captured = Captured(lambda: two_orders(case, static, ODD["C"]))
        for _ in range(3):
            new = case.make((3,), ODD, torch.float32, DEVICE)
            for to, value in zip(static, new, strict=True):
                to.copy_(value)
            assert_equal(case, captured.replay(), two_orders(case, new, ODD["C"]))

    @pytest.mark.parametrize("metric", METRICS)
    @pytest.mark.parametrize("route", ["autograd", "func"])
    def test_meta_step(self, metric: str, route: str) -> None:
        """An inner gradient step of a linear embedding, and its derivative: a double backward inside the graph."""

        def inner(heads: Any, weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
            embedded = x @ weight
            loss: Tensor = heads.prototypical_loss(embedded, y, embedded.flip(1), y.flip(1), 3, metric)[0]
            return loss.mean()

        def meta_gradients(heads: Any, weight: Tensor, x: Tensor, y: Tensor, q: Tensor, qy: Tensor) -> Any:
            weight, x = weight.detach().requires_grad_(), x.detach().requires_grad_()
            if route == "autograd":
                (step,) = torch.autograd.grad(inner(heads, weight, x, y), weight, create_graph=True)
            else:
                step = torch.func.grad(lambda w: inner(heads, w, x, y))(weight)
            adapted = weight - 0.1 * step
            loss = heads.prototypical_loss(x @ adapted, y, q @ adapted, qy, 3, metric)[0].mean()
            loss = loss + 0.01 * heads.pairwise_distance(q @ adapted, x @ adapted, metric).mean()
            return loss.detach(), *torch.autograd.grad(loss, (weight, x))

        def inputs() -> list[Tensor]:
            x, q, weight = (
                torch.randn(shape, dtype=torch.float64, device=DEVICE)
                for shape in ((4, 6, 5), (4, 7, 5), (5, 4))
            )
            y, qy = (shuffled_labels((4, rows), 3).to(DEVICE) for rows in (6, 7))
            return [weight, x, y, q, qy]

        static = inputs()
        captured = Captured(lambda: meta_gradients(metafast, *static))
        for _ in range(3):
            new = inputs()
            for to, value in zip(static, new, strict=True):
                to.copy_(value)
            assert_same(list(captured.replay()), list(meta_gradients(reference, *new)))


def network(dropout: float = 0.0, **options: Any) -> ProtoNet:
    torch.manual_seed(1)
    layers = nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 16)
    return ProtoNet(nn.Sequential(*layers), **options).to(DEVICE)


def batch(seed: int, device: torch.device = DEVICE) -> Episodes:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).expand(4, 3)
    x = torch.randn(4, 12, 12, generator=random) + labels.repeat(1, 4).unsqueeze(-1)
    return Episodes(x[:, :3], labels, x[:, 3:], labels.repeat(1, 3), 3).to(device)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, graphed: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p, graphed: torch.optim.Adam(p, lr=1e-2, eps=1e-4, capturable=graphed),
    "fused AdamW": lambda p, graphed: torch.optim.AdamW(p, lr=1e-2, eps=1e-4, fused=True, capturable=graphed),
}


def eager_step(learner: nn.Module, optimizer: torch.optim.Optimizer, episodes: Episodes) -> Tensor:
    learner.train()
    loss: Tensor = learner(episodes).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


class TestGraphedStep:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
    def test_trains_as_without_a_graph(self, name: str, metric: str) -> None:
        eager = network(metric=metric, temperature=2.0, learn_temperature=True)
        graphed = copy.deepcopy(eager)
        optimizer = OPTIMIZERS[name](eager.parameters(), False)
        step = GraphedStep(graphed, OPTIMIZERS[name](graphed.parameters(), True))
        losses = []
        for k in range(8):
            assert step.captured == (k > 3)
            loss, logits = step(batch(k))
            assert not loss.requires_grad and logits.shape == (4, 9, 3)
            losses.append((loss, eager_step(eager, optimizer, batch(k))))
        for actual, expected in losses:
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        state = graphed.state_dict()
        assert state["encoder.1.num_batches_tracked"] == 8
        for key, value in eager.state_dict().items():
            torch.testing.assert_close(
                state[key], value, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
            )
        for own, other in zip(graphed.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-2, atol=1e-4)

    def test_same_bits_again(self) -> None:
        def train() -> list[Tensor]:
            learner = network()
            step = GraphedStep(learner, torch.optim.SGD(learner.parameters(), lr=0.1), warm_up=1)
            return [*(step(batch(k)).loss for k in range(6)), *learner.state_dict().values()]

        for first, second in zip(train(), train(), strict=True):
            assert torch.equal(first, second)

    def test_rate_in_a_tensor_follows_its_schedule(self) -> None:
        eager = network()
        graphed = copy.deepcopy(eager)
        plain = torch.optim.Adam(eager.parameters(), lr=0.02, eps=1e-4)
        rate = torch.tensor(0.02, device=DEVICE)
        optimizer = torch.optim.Adam(graphed.parameters(), lr=rate, eps=1e-4, capturable=True)
        schedules = [torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5) for o in (plain, optimizer)]
        step = GraphedStep(graphed, optimizer)
        for k in range(8):
            step(batch(k))
            eager_step(eager, plain, batch(k))
            for schedule in schedules:
                schedule.step()
        assert float(rate) == pytest.approx(plain.param_groups[0]["lr"]) == 0.02 / 16
        for own, other in zip(graphed.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)

    def test_dropout_goes_on(self) -> None:
        learner = network(dropout=0.5)
        step = GraphedStep(learner, torch.optim.SGD(learner.parameters(), lr=0.0))
        losses = {float(step(batch(0)).loss) for _ in range(8)}
        assert step.captured and len(losses) == 8

    def test_bfloat16(self) -> None:
        eager = network()
        graphed = copy.deepcopy(eager)
        optimizer = torch.optim.SGD(eager.parameters(), lr=0.05)
        step = GraphedStep(
            graphed, torch.optim.SGD(graphed.parameters(), lr=0.05), precision="bfloat16", warm_up=1
        )
        for k in range(5):
            loss = step(batch(k)).loss
            with torch.autocast("cuda", torch.bfloat16):
                expected = eager_step(eager, optimizer, batch(k))
            torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.02)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in graphed.parameters())

    def test_takes_episodes_from_the_host(self) -> None:
        losses = []
        for source in (
            batch,
            lambda k: batch(k, torch.device("cpu")),
            lambda k: batch(k, torch.device("cpu")).pin_memory(),
        ):
            learner = network()
            step = GraphedStep(learner, torch.optim.SGD(learner.parameters(), lr=0.1), warm_up=1)
            losses.append([float(step(source(k)).loss) for k in range(4)])
        assert losses[0] == losses[1] == losses[2]

    def test_on_a_side_stream(self) -> None:
        losses = []
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                learner = network()
                step = GraphedStep(learner, torch.optim.SGD(learner.parameters(), lr=0.1))
                losses.append([float(step(batch(k)).loss) for k in range(6)])
            torch.cuda.synchronize()
        assert losses[0] == losses[1]

    def test_refuses_what_the_graph_cannot_follow(self) -> None:
        learner = network()
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        step = GraphedStep(learner, optimizer, warm_up=1)
        for k in range(3):
            step(batch(k))
        small = batch(0)
        small = Episodes(small.support_x[:2], small.support_y[:2], small.query_x[:2], small.query_y[:2], 3)
        with pytest.raises(ValueError, match=r"episodes.support_x: expected shape \[4, 3, 12\]"):
            step(small)
        optimizer.param_groups[0]["lr"] = 0.2
        with pytest.raises(ValueError, match=r"lr of group 0 was 0\.1 .* got 0\.2"):
            step(batch(0))
        optimizer.param_groups[0]["lr"] = 0.1
        step(batch(0))

    def test_a_learner_that_waits_for_the_device(self) -> None:
        class Reading(ProtoNet):
            def forward(self, episodes: Episodes) -> Any:
                outcome = super().forward(episodes)
                assert outcome.loss.item() > 0
                return outcome

        learner = Reading(nn.Linear(12, 4)).to(DEVICE)
        step = GraphedStep(learner, torch.optim.SGD(learner.parameters(), lr=0.1), warm_up=2)
        step(batch(0))
        with pytest.raises(RuntimeError, match="the step cannot be captured: called a synchronizing"):
            step(batch(1))
        # Nothing of it is left behind.
        torch.manual_seed(0)
        assert torch.rand(3, device=DEVICE).sum().item() > 0
