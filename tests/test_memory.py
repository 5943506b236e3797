"""What a step keeps is predicted from one and two tasks, and steps in parts are those of all tasks at once."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metafast import MLP, Conv4, Episodes, EpisodeSampler, cli, fit, inner_loop, predicted_memory
from metafast.data import glyphs
from metafast.learners import ANIL, MAML, MAMLPlusPlus, Outcome, ProtoMAML, ProtoNet, Reptile
from metafast.memory import Memory, Peak


def sampler(tasks: int = 6) -> EpisodeSampler:
    return EpisodeSampler(glyphs(8, per_class=8, size=16), ways=4, shots=1, queries=3, tasks=tasks, seed=3)


def conv_model() -> nn.Module:
    return nn.Sequential(Conv4(1, 4), nn.Linear(4, 4))


def test_the_peak_of_the_tensors_that_live() -> None:
    x = torch.randn(100, 50)
    with Peak() as live:
        y = x.exp()
        for _ in range(5):
            y = y.sin()
        # Two of them lived at one time, and a view is none of its own.
        z = y.view(50, 100)[:3]
    assert live.peak == 40000 and z.shape == (3, 100)
    del y, z
    with Peak() as live:
        y = x.exp()
        del y
        # The freed one counts no more, and its place is not taken for it.
        y = torch.cat([x, x])
    assert live.peak == 40000 and y.shape == (200, 50)
    with Peak() as live:
        x.add_(1.0).mul_(2.0)
    assert live.peak == 0
    weight = torch.randn(50, requires_grad=True)
    with Peak() as live:
        kept = (x * weight).exp().exp()
        kept.sum().backward()
    # Both exponentials are kept, and the gradients of the way back are as large.
    assert 60000 <= live.peak <= 100500


LEARNERS: dict[str, Callable[[], nn.Module]] = {
    "maml": lambda: MAML(conv_model(), 0.1, 3),
    "maml, recomputed": lambda: MAML(conv_model(), 0.1, 3, recompute=True),
    "mlp": lambda: MAML(MLP((256, 20, 4)), 0.1, 3),
    "maml++": lambda: MAMLPlusPlus(conv_model(), 0.1, 2, batch_norm="per_step"),
    "protomaml": lambda: ProtoMAML(Conv4(1, 4), 0.1, 2),
    "reptile": lambda: Reptile(conv_model(), 0.01, 3, batch_size=2),
    "first order": lambda: MAML(conv_model(), 0.1, 3, first_order=True),
    "protonet": lambda: ProtoNet(Conv4(1, 4), episode_statistics=True),
    "anil": lambda: ANIL(Conv4(1, 4), 4, 4, episode_statistics=True),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_prediction_from_two_tasks(name: str) -> None:
    """Within a tenth of what the graph of all of them keeps; the learner stays as it was."""
    torch.manual_seed(0)
    learner = LEARNERS[name]().train()
    before, random = deepcopy(learner.state_dict()), torch.get_rng_state()
    episodes = sampler()(0)
    memory = predicted_memory(learner, episodes)
    assert all(torch.equal(value, before[key]) for key, value in learner.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(value.grad is None for value in learner.parameters())
    with Peak() as live:
        own = [value for value in learner.parameters() if value.requires_grad]
        torch.autograd.grad(learner(episodes).loss, own, allow_unused=True)
    assert memory.per_task > 0
    assert memory.tensors(episodes.tasks) == pytest.approx(live.peak, rel=0.1)
    assert predicted_memory(learner.eval(), episodes[:1]).tensors(6) == pytest.approx(live.peak, rel=0.1)
    assert not learner.training
    with pytest.raises(ValueError, match="episodes: expected at least one task, got none"):
        predicted_memory(learner, episodes[:0])


def test_steps_that_are_recomputed_count_once() -> None:
    """Beside the parameters of each step, the graph of one of them, however many there are."""
    model = nn.Sequential(Conv4(1, 8), nn.Linear(8, 4))
    plain, again = (
        [predicted_memory(MAML(model, 0.1, k, recompute=r), sampler()(0)).per_task for k in (2, 6)]
        for r in (False, True)
    )
    assert plain[1] - plain[0] > 3 * (again[1] - again[0]) and again[0] < plain[0]


def test_a_step_that_fails_leaves_the_learner() -> None:
    class Fails(ProtoNet):
        def forward(self, episodes: Episodes) -> Outcome:
            super().forward(episodes)
            raise torch.OutOfMemoryError("on purpose")

    learner = Fails(Conv4(1, 4)).eval()
    before = deepcopy(learner.state_dict())
    with pytest.raises(torch.OutOfMemoryError, match="on purpose"):
        predicted_memory(learner, sampler()(0))
    assert not learner.training
    assert all(torch.equal(value, before[key]) for key, value in learner.state_dict().items())


def test_tasks_within_a_budget() -> None:
    memory = Memory(1000, 300)
    assert memory.tensors(4) == 2200 and memory.peak(4) == 4400
    assert memory.tasks(4400) == 4 and memory.tasks(4399) == 3 and memory.tasks(0) == 1
    assert Memory(0, 0).tasks(10) >= 1


class Weighed(nn.Module):
    """Counts the tasks of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.learner = ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(256, 8)))
        self.calls: list[int] = []

    def forward(self, episodes: Episodes) -> Outcome:
        self.calls.append(episodes.tasks)
        found: Outcome = self.learner(episodes)
        return found


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.05}, {"precision": "bfloat16"}])
def test_steps_in_parts_are_those_of_all_tasks(options: dict[str, Any]) -> None:
    """Gradients, losses and accuracies, also with a last part that is smaller."""
    torch.manual_seed(0)
    begin = Weighed()
    found = []
    for at_once in (None, 4, 1, 100):
        learner = deepcopy(begin)
        optimizer = torch.optim.SGD(learner.parameters(), 0.05)
        rows = fit(learner, sampler(), 3, optimizer=optimizer, tasks_at_once=at_once, **options).rows
        found.append(([(row.loss, row.accuracy) for row in rows], list(learner.parameters())))
        assert learner.calls == {None: [6], 4: [4, 2], 1: [1] * 6, 100: [6]}[at_once] * 3
    tolerance = 2e-2 if options.get("precision") else 1e-5
    for rows, parameters in found[1:]:
        torch.testing.assert_close(
            torch.tensor(rows), torch.tensor(found[0][0]), rtol=tolerance, atol=tolerance
        )
        for value, wanted in zip(parameters, found[0][1], strict=True):
            torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)
    # A part that is all of them is the same to the bit.
    assert all(torch.equal(a, b) for a, b in zip(found[3][1], found[0][1], strict=True))


def test_parts_need_statistics_of_each_task() -> None:
    with pytest.raises(
        ValueError, match="tasks_at_once: the learner's BatchNorm layers normalise by the images"
    ):
        fit(ProtoNet(Conv4(1, 4)), sampler(), 1, tasks_at_once=2)
    fit(ProtoNet(Conv4(1, 4), episode_statistics=True), sampler(), 1, tasks_at_once=2)
    with pytest.raises(ValueError, match="tasks_at_once: expected a positive int, got 0"):
        fit(ProtoNet(nn.Flatten()), sampler(), 1, tasks_at_once=0)


def test_a_step_in_parts_is_one_step_of_maml_plus_plus() -> None:
    torch.manual_seed(0)
    learner = MAMLPlusPlus(conv_model(), 0.1, 2, multi_step=100)
    fit(learner, sampler(), 3, tasks_at_once=2)
    assert int(learner.iterations) == 3


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = "train --method maml --data glyphs --size 16 --hidden 256 --tasks 8 --steps 2 --episodes 4 --threads 1"
    arguments = [*train.split(), "--validation-episodes", "4", "--overwrite", "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, "--memory", "0.0005"]) == 0
    printed = capsys.readouterr().out
    said = re.search(
        r"(\d) of 8 tasks at a time: a step is predicted to need (\d+) MiB, (\d+) with all", printed
    )
    assert said is not None
    number, part, whole = map(int, said.groups())
    assert 1 <= number < 8 and part <= 1 <= whole
    assert cli.main([*arguments, "--tasks-at-once", "3"]) == 0
    assert cli.main([*arguments, "--memory", "100"]) == 0
    assert "8 of 8 tasks at a time" in capsys.readouterr().out
    assert cli.main([*arguments, "--memory", "1", "--tasks-at-once", "3"]) == 2
    assert "--memory finds the number of --tasks-at-once; give one of them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["maml", "maml, recomputed", "reptile"])
def test_two_hundred_meta_steps_leak_nothing(name: str) -> None:
    """No tensor is left behind by a step, and none by a graph that no backward pass went through."""
    torch.manual_seed(0)
    make: dict[str, Callable[[], nn.Module]] = {
        "maml": lambda: MAML(MLP((256, 8, 4), batch_norm=True), 0.1, 2),
        "maml, recomputed": lambda: MAML(MLP((256, 8, 4), batch_norm=True), 0.1, 2, recompute=True),
        "reptile": lambda: Reptile(MLP((256, 8, 4), batch_norm=True), 0.01, 2),
    }
    learner = make[name]().train()
    optimizer = torch.optim.Adam(learner.parameters())
    draw = sampler(tasks=2)

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    counts = []
    for step in range(200):
        loss = learner(draw(step % 5)).loss
        if step % 3:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        del loss
        if step in (20, 199):
            counts.append(tensors())
    assert counts[0] == counts[1]


def test_evaluation_keeps_no_graph() -> None:
    """Nor the parameters of the steps before."""
    model = conv_model()
    batch = sampler()(0)
    with torch.no_grad():
        adapted = inner_loop(model, batch.support_x, batch.support_y, 0.1, 5)
        outputs = adapted(batch.query_x)
    assert not any(value.requires_grad for value in (outputs, *adapted.parameters.values()))
    trace: Any = adapted
    assert len(trace._trace) == 1
