import csv
import math
import os
import random
import signal
import sys
from typing import ClassVar

import numpy
import pytest
import torch
from torch import nn

from metafast.backbones import Conv4
from metafast.data import Episodes, EpisodeSampler, glyphs
from metafast.learners import Outcome, ProtoNet
from metafast.training import (
    CheckpointError,
    History,
    Interrupted,
    NonFiniteError,
    Row,
    evaluate,
    fit,
    load_checkpoint,
    pictures,
    save_checkpoint,
)
from metafast.training import fit as fit_function
from metafast.training.files import write_atomically
from metafast.training.history import COLUMNS, read_history

FIT = sys.modules[fit_function.__module__]
CHECKPOINT = sys.modules[load_checkpoint.__module__]


@pytest.fixture(scope="module")
def characters():
    return glyphs(20, per_class=6, size=16)


@pytest.fixture
def train(characters):
    return EpisodeSampler(characters, ways=4, shots=1, queries=2, tasks=2, seed=1)


@pytest.fixture
def validation():
    return EpisodeSampler(glyphs(8, per_class=6, size=16, first_class=20), 4, 1, 2, tasks=5, seed=2)


def make_learner(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return ProtoNet(nn.Sequential(Conv4(channels=4), nn.Dropout(dropout)))


class Scripted(nn.Module):
    """Classifies the first `right` query rows of each task correctly; `right` is the first input value."""

    def forward(self, episodes):
        rows = torch.arange(episodes.query_y.shape[1])
        right = rows < episodes.support_x[:, 0, :1]
        predicted = torch.where(right, episodes.query_y, (episodes.query_y + 1) % episodes.ways)
        logits = nn.functional.one_hot(predicted, episodes.ways).double()
        return Outcome(episodes.support_x[:, 0, 0].mean(), logits)


def scripted_episodes(*rights, ways=2, queries=4):
    """One batch of a task for each number of right answers."""
    tasks = len(rights)
    support = torch.tensor(rights, dtype=torch.float64)[:, None, None].expand(tasks, ways, 1)
    labels = torch.arange(ways).repeat(tasks, 1)
    query_y = labels.repeat_interleave(queries // ways, 1)
    return Episodes(support, labels, torch.zeros(tasks, queries, 1, dtype=torch.float64), query_y, ways)


class TestEvaluate:
    def test_mean_and_interval_are_those_of_numpy(self):
        rights = numpy.random.default_rng(0).integers(0, 5, 700)
        result = evaluate(
            Scripted(), [scripted_episodes(*part) for part in rights.reshape(10, 70)], count=None
        )
        values = rights / 4
        assert result.per_episode.tolist() == values.tolist()
        assert result.mean == pytest.approx(values.mean(), rel=1e-12)
        assert result.interval == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(700), rel=1e-12)
        assert result.loss == pytest.approx(rights.mean(), rel=1e-12)
        assert (result.episodes, result.ways, result.shots, result.queries) == (700, 2, 1, 2)
        assert (result.batch_norm, result.seed) == ("none", None)

    def test_surplus_episodes_are_left_out(self):
        result = evaluate(Scripted(), [scripted_episodes(4, 4), scripted_episodes(0, 4, 4)], count=3)
        assert result.per_episode.tolist() == [1.0, 1.0, 0.0]
        assert result.loss == pytest.approx(8 / 3)

    def test_a_sampler_gives_its_first_steps(self, validation):
        learner = make_learner()
        result = evaluate(learner, validation, 12)
        again = evaluate(learner, [validation(0), validation(1), validation(2)], 12)
        assert torch.equal(result.per_episode, again.per_episode)
        assert (result.seed, again.seed) == (2, None)
        assert str(result).endswith("(12 episodes, 4-way 1-shot 2-query, running BatchNorm, seed 2)")

    def test_text(self):
        result = evaluate(Scripted(), [scripted_episodes(4, 4, 4, 2)], 4)
        assert str(result) == "87.50 % +- 24.50 (4 episodes, 2-way 1-shot 2-query, no BatchNorm)"
        assert result.as_dict() == {
            "accuracy": 0.875,
            "interval_95": pytest.approx(0.245),
            "episodes": 4,
            "ways": 2,
            "shots": 1,
            "queries": 2,
            "batch_norm": "none",
            "seed": None,
            "loss": 3.5,
        }

    def test_uneven_classes_have_no_number_of_shots(self):
        support, query = torch.tensor([[0, 0, 1]] * 2), torch.tensor([[0, 0, 1, 1]] * 2)
        batch = Episodes(torch.zeros(2, 3, 1), support, torch.zeros(2, 4, 1), query, 2)
        result = evaluate(ProtoNet(nn.Identity()), [batch], 2)
        assert (result.shots, result.queries) == (None, 2)
        assert "2-way 2-query" in str(result)

    @pytest.mark.parametrize("batch_norm", ["running", "transductive"])
    @pytest.mark.parametrize("training", [True, False])
    def test_the_learner_comes_back_as_it_was(self, validation, batch_norm, training):
        learner = make_learner().train(training)
        learner.encoder[1].train(not training)
        before = {name: value.clone() for name, value in learner.state_dict().items()}
        evaluate(learner, validation, 5, batch_norm=batch_norm)
        assert learner.training is training
        assert learner.encoder[1].training is not training
        assert learner.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
        learner.train()(validation(0)).loss.backward()

    def test_running_statistics_are_those_of_training(self, validation):
        learner = make_learner().eval()
        for module in learner.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
        hits = learner(validation(0)).logits.argmax(-1) == validation(0).query_y
        result = evaluate(learner, validation, 5)
        assert result.per_episode.tolist() == hits.double().mean(-1).tolist()
        assert result.batch_norm == "running"

    @pytest.mark.parametrize("tasks", [1, 2, 5])
    def test_transductive_statistics_are_those_of_each_episode(self, validation, tasks):
        learner = make_learner()
        whole = validation(0)

        def part(start, stop):
            fields = (whole.support_x, whole.support_y, whole.query_x, whole.query_y)
            return Episodes(*(field[start:stop] for field in fields), 4)

        expected = []
        for task in range(5):
            one = part(task, task + 1)
            logits = make_learner().train()(one).logits
            expected.append(float((logits.argmax(-1) == one.query_y).double().mean()))
        parts = [part(start, start + tasks) for start in range(0, 5, tasks)]
        result = evaluate(learner, parts, 5, batch_norm="transductive")
        assert result.per_episode.tolist() == expected
        assert result.batch_norm == "transductive"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"batch_norm": "batch"}, "batch_norm: expected 'running' or 'transductive', got 'batch'"),
            ({"count": 1}, "count: expected at least 2 episodes"),
            ({"count": 9}, "episodes: expected 9, got 4"),
        ],
        ids=["batch_norm", "count", "too few"],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            evaluate(Scripted(), [scripted_episodes(1, 2, 3, 4)], **arguments)

    def test_a_sampler_needs_a_count(self, validation):
        with pytest.raises(ValueError, match="count: a sampler has no end"):
            evaluate(make_learner(), validation, None)

    def test_ways_may_not_change(self):
        with pytest.raises(ValueError, match="episodes: expected 2 ways as in the first batch, got 4"):
            evaluate(Scripted(), [scripted_episodes(1, 2), scripted_episodes(1, 2, ways=4)], 4)

    def test_a_layer_without_running_statistics_is_named(self, validation):
        learner = make_learner()
        learner.encoder[0].encoder[2][1] = nn.BatchNorm2d(4, track_running_stats=False)
        with pytest.raises(ValueError, match=r"layer encoder\.0\.encoder\.2\.1 keeps no running statistics"):
            evaluate(learner, validation, 5)
        assert evaluate(learner, validation, 5, batch_norm="transductive").episodes == 5

    def test_nan_logits_are_no_accuracy(self, validation):
        batches = [validation(0), validation(1)]
        batches[1].query_x[2] = math.nan
        with pytest.raises(
            FloatingPointError, match="logits of 1 of 10 episodes hold NaN, those of episode 7 first"
        ):
            evaluate(make_learner(), batches, 10)


def weights(learner):
    return {name: value.clone() for name, value in learner.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def without_time(rows):
    return [[getattr(row, name) for name in COLUMNS if name != "seconds"] for row in rows]


def assert_same_rows(first, second):
    numpy.testing.assert_array_equal(without_time(first), without_time(second))


class Stop(Exception):
    pass


def stop_at(step, action=None):
    def on_step(row):
        if row.step == step:
            if action is None:
                raise Stop
            action()

    return on_step


class TestFit:
    def test_loss_falls_and_validation_rises(self, train, validation):
        learner = make_learner()
        before = evaluate(learner, validation, 100, batch_norm="transductive").mean
        history = fit(
            learner, train, 60, validation=validation, validation_episodes=100, validate_every=20,
            optimizer=torch.optim.Adam(learner.parameters(), lr=1e-2),
        )  # fmt: skip
        losses = [row.loss for row in history.rows]
        assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
        assert history.best_accuracy > before + 0.1
        assert [row.step for row in history.rows] == list(range(1, 61))
        assert [row.step for row in history.validations] == [20, 40, 60]
        assert not learner.training

    def test_the_first_step_is_that_of_the_formula(self, train):
        learner, twin = make_learner(), make_learner()
        history = fit(learner, train, 1)
        loss, logits = twin.train()(train(0))
        loss.backward()
        # Adam's first step has the size of the rate and the sign of the gradient.
        for parameter, moved in zip(twin.parameters(), learner.parameters(), strict=True):
            step = 1e-3 * parameter.grad / (parameter.grad.abs() + 1e-8)
            torch.testing.assert_close(moved, parameter - step, rtol=0, atol=1e-6)
        row = history.rows[0]
        assert row.loss == pytest.approx(loss.item(), rel=1e-6)
        assert row.accuracy == float((logits.argmax(-1) == train(0).query_y).double().mean())

    @pytest.mark.parametrize(
        ("schedule", "rates"),
        [
            ("halve", [1, 1, 0.5, 0.5, 0.25, 0.25]),
            ("constant", [1] * 6),
            ("cosine", [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]),
        ],
    )
    def test_schedules(self, train, schedule, rates):
        history = fit(make_learner(), train, 6, schedule=schedule, halve_every=2)
        assert [row.learning_rate for row in history.rows] == pytest.approx([1e-3 * rate for rate in rates])

    def test_own_optimizer_and_scheduler(self, train):
        learner = make_learner()
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        history = fit(learner, train, 3, optimizer=optimizer, schedule=scheduler)
        assert [row.learning_rate for row in history.rows] == pytest.approx([0.1, 0.05, 0.025])

    def test_the_learner_ends_with_the_best_weights(self, train, validation, tmp_path, monkeypatch):
        accuracies = iter([0.5, 0.9, 0.7])
        real = FIT.evaluate

        def scripted(*arguments, **options):
            result = real(*arguments, **options)
            object.__setattr__(result, "mean", next(accuracies))
            return result

        monkeypatch.setattr(FIT, "evaluate", scripted)
        kept = {}
        learner = make_learner()
        history = fit(
            learner, train, 6, validation=validation, validation_episodes=5, validate_every=2, out=tmp_path,
            on_step=lambda row: kept.update({row.step: weights(learner)}),
        )  # fmt: skip
        assert (history.best_step, history.best_accuracy) == (4, 0.9)
        assert_same(weights(learner), kept[4])
        best, last = (load_checkpoint(tmp_path / f"checkpoint-{name}.pt") for name in ("best", "last"))
        assert_same(best["model"], kept[4])
        assert_same(last["model"], kept[6])
        assert (best["step"], best["validation_accuracy"], last["step"]) == (4, 0.9, 6)

    def test_without_validation_the_last_weights_are_the_best(self, train, tmp_path):
        learner = make_learner()
        history = fit(learner, train, 3, out=tmp_path)
        assert (history.best_step, history.best_accuracy) == (3, None)
        assert_same(load_checkpoint(tmp_path / "checkpoint-best.pt")["model"], weights(learner))

    def test_metrics_file(self, train, validation, tmp_path):
        history = fit(
            make_learner(),
            train,
            5,
            validation=validation,
            validation_episodes=5,
            validate_every=2,
            out=tmp_path,
        )
        with open(tmp_path / "metrics.csv", newline="") as file:
            table = list(csv.DictReader(file))
        assert [row["step"] for row in table] == ["1", "2", "3", "4", "5"]
        assert [float(row["loss"]) for row in table] == [row.loss for row in history.rows]
        assert [bool(row["validation_accuracy"]) for row in table] == [False, True, False, True, True]
        assert_same_rows(read_history(tmp_path / "metrics.csv", 5), history.rows)

    def test_bfloat16_trains_float32_weights_close_to_those_of_float32(self, train):
        exact, rounded = make_learner(), make_learner()
        first = fit(exact, train, 5).rows
        second = fit(rounded, train, 5, precision="bfloat16").rows
        assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}
        losses = [[row.loss for row in rows] for rows in (first, second)]
        assert losses[0] != losses[1]
        assert losses[0] == pytest.approx(losses[1], rel=0.1)

    def test_one_line_for_each_validation_and_no_bar_in_a_pipe(self, train, validation, capsys):
        fit(make_learner(), train, 4, validation=validation, validation_episodes=5, validate_every=2)
        printed = capsys.readouterr()
        lines = printed.out.splitlines()
        assert printed.err == ""
        assert len(lines) == 2
        assert lines[0].startswith("step 2/4  loss ")
        assert "(5 episodes, 4-way 1-shot 2-query, running BatchNorm, seed 2)  best so far" in lines[0]

    def test_a_bar_on_a_terminal(self, train, capsys, monkeypatch):
        pytest.importorskip("tqdm")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        fit(make_learner(), train, 3)
        assert "3/3" in capsys.readouterr().err

    def test_allocator_keeps_its_pages(self, train, monkeypatch):
        calls = []
        monkeypatch.setattr(FIT, "keep_pages", lambda: calls.append(True))
        fit(make_learner(), train, 1)
        assert calls == [True]

    def test_the_first_episodes_are_checked(self, train):
        def wrong(step):
            episodes = train(step)
            episodes.support_y[1, 2] = 4
            return episodes

        with pytest.raises(ValueError, match=r"support_y must hold labels in 0\.\.3, got 4 at task 1, row 2"):
            fit(make_learner(), wrong, 3)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"steps": 0}, "steps: expected a positive int, got 0"),
            ({"validate_every": 2.5}, "validate_every: expected a positive int, got 2.5"),
            ({"validation_episodes": -1}, "validation_episodes: expected a positive int, got -1"),
            ({"halve_every": True}, "halve_every: expected a positive int, got True"),
            ({"precision": "float16"}, "precision: expected 'float32' or 'bfloat16', got 'float16'"),
            (
                {"schedule": "linear"},
                "schedule: expected halve, cosine, constant or a scheduler, got 'linear'",
            ),
            ({"resume": True}, "out: resume needs the folder of the run"),
            ({"resume": True, "overwrite": True}, "resume, overwrite: expected at most one of them"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_bad_arguments(self, train, arguments, message):
        with pytest.raises(ValueError, match=message):
            fit(make_learner(), train, **{"steps": 2, **arguments})

    def test_a_scheduler_of_another_optimizer(self, train):
        learner = make_learner()
        scheduler = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(learner.parameters(), lr=0.1))
        with pytest.raises(ValueError, match="schedule: expected a scheduler of the optimizer"):
            fit(learner, train, 2, schedule=scheduler)


class TestResume:
    OPTIONS: ClassVar = {"steps": 9, "validation_episodes": 5, "validate_every": 4, "halve_every": 3}

    @pytest.mark.parametrize("schedule", ["halve", "cosine"])
    @pytest.mark.parametrize("step", [2, 4, 7])
    def test_continues_bit_for_bit(self, train, validation, tmp_path, step, schedule):
        options = {**self.OPTIONS, "validation": validation, "schedule": schedule}
        whole = make_learner(dropout=0.3)
        expected = fit(whole, train, out=tmp_path / "whole", **options)

        # Killed in the middle: only what was saved at the last multiple of 4 is left.
        cut = tmp_path / "cut"
        with pytest.raises(Stop):
            fit(make_learner(dropout=0.3), train, out=cut, on_step=stop_at(step), **options)
        resumed = make_learner(seed=5, dropout=0.3)
        if step <= 4:
            # Nothing was saved yet, so the run starts again and needs the weights it started from.
            resumed = make_learner(dropout=0.3)
        history = fit(resumed, train, out=cut, resume=True, **options)

        assert_same(weights(resumed), weights(whole))
        assert_same_rows(history.rows, expected.rows)
        assert (history.best_step, history.best_accuracy) == (expected.best_step, expected.best_accuracy)
        first, second = (
            load_checkpoint(folder / "checkpoint-last.pt") for folder in (tmp_path / "whole", cut)
        )
        assert_same(first["model"], second["model"])
        assert torch.equal(first["random"]["torch"], second["random"]["torch"])
        for one, other in zip(
            first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True
        ):
            assert_same(one, other)
        assert_same_rows(read_history(cut / "metrics.csv", 9), expected.rows)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
    def test_a_signal_saves_the_step_and_resume_goes_on_there(
        self, train, validation, tmp_path, number, capfd
    ):
        options = {**self.OPTIONS, "validation": validation}
        whole = make_learner()
        fit(whole, train, **options)
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        interrupt = stop_at(6, lambda: signal.raise_signal(number))
        message = r"stopped after step 7 of 9; .*checkpoint-last.pt holds it and resume goes on from there"
        with pytest.raises(Interrupted, match=message):
            fit(make_learner(), train, out=tmp_path, on_step=interrupt, **options)
        assert "stopping after this step" in capfd.readouterr().err
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
        assert load_checkpoint(tmp_path / "checkpoint-last.pt")["step"] == 7
        resumed = make_learner(seed=3)
        fit(resumed, train, out=tmp_path, resume=True, **options)
        assert_same(weights(resumed), weights(whole))

    def test_a_second_signal_stops_at_once(self, train, tmp_path):
        def twice():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt) as caught:
            fit(make_learner(), train, 9, out=tmp_path, on_step=stop_at(3, twice))
        assert not isinstance(caught.value, Interrupted)
        assert not (tmp_path / "checkpoint-last.pt").exists()

    def test_of_a_complete_run_changes_nothing(self, train, validation, tmp_path):
        options = {**self.OPTIONS, "validation": validation, "out": tmp_path}
        learner, again = make_learner(), make_learner(seed=3)
        expected = fit(learner, train, **options)
        history = fit(again, train, resume=True, **options)
        assert_same(weights(again), weights(learner))
        assert_same_rows(history.rows, expected.rows)

    def test_more_steps_than_before(self, train, tmp_path):
        whole, parts = make_learner(), make_learner()
        fit(whole, train, 6)
        fit(parts, train, 4, out=tmp_path)
        fit(parts, train, 6, out=tmp_path, resume=True)
        assert_same(weights(parts), weights(whole))

    def test_numbers_of_the_global_generators_continue(self):
        random.seed(3)
        numpy.random.seed(4)
        torch.manual_seed(5)
        numpy.random.standard_normal()
        saved = CHECKPOINT.random_states()

        def draw():
            return random.random(), numpy.random.standard_normal(), numpy.random.rand(), float(torch.rand(()))

        expected = draw()
        draw()
        CHECKPOINT.restore_random_states(saved)
        assert draw() == expected

    def test_without_a_checkpoint_it_starts(self, train, tmp_path):
        assert len(fit(make_learner(), train, 2, out=tmp_path / "new", resume=True).rows) == 2

    def test_a_run_is_not_overwritten_by_accident(self, train, tmp_path):
        fit(make_learner(), train, 2, out=tmp_path)
        before = (tmp_path / "checkpoint-last.pt").read_bytes()
        with pytest.raises(
            FileExistsError, match="already holds a run; resume it, overwrite it or choose another"
        ):
            fit(make_learner(), train, 3, out=tmp_path)
        assert (tmp_path / "checkpoint-last.pt").read_bytes() == before
        assert len(fit(make_learner(), train, 3, out=tmp_path, overwrite=True).rows) == 3

    def test_other_settings_are_named(self, train, tmp_path):
        fit(make_learner(), train, 2, out=tmp_path, settings={"lr": 0.001, "seed": 0})
        with pytest.raises(
            CheckpointError, match=r"other settings: lr was 0.001, is 0.01; ways was None, is 5$"
        ):
            fit(
                make_learner(),
                train,
                4,
                out=tmp_path,
                resume=True,
                settings={"lr": 0.01, "seed": 0, "ways": 5},
            )

    def test_fewer_steps_than_done(self, train, tmp_path):
        fit(make_learner(), train, 4, out=tmp_path)
        with pytest.raises(CheckpointError, match=r"steps: .*checkpoint-last.pt is already at step 4, got 3"):
            fit(make_learner(), train, 3, out=tmp_path, resume=True)

    def test_another_network(self, train, tmp_path):
        fit(make_learner(), train, 2, out=tmp_path)
        with pytest.raises(CheckpointError, match="does not fit this learner and optimizer"):
            fit(ProtoNet(Conv4(channels=5)), train, 4, out=tmp_path, resume=True)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda path: path.unlink(), "expected the steps 1 to 4, found 0 rows"),
            (lambda path: path.write_text("a,b\n1,2\n"), "expected the columns step, loss"),
            (lambda path: path.write_text(path.read_text()[:-60]), "expected the steps 1 to 4, found 3 rows"),
        ],
        ids=["missing", "foreign", "truncated"],
    )
    def test_damaged_metrics(self, train, tmp_path, damage, message):
        fit(make_learner(), train, 4, out=tmp_path)
        damage(tmp_path / "metrics.csv")
        with pytest.raises(CheckpointError, match=message):
            fit(make_learner(), train, 5, out=tmp_path, resume=True)

    def test_rows_after_the_checkpoint_are_dropped(self, train, tmp_path):
        fit(make_learner(), train, 4, out=tmp_path)
        with open(tmp_path / "metrics.csv", "a") as file:
            file.write("5,0.5,0.5,0.001,1.0,,,\n6,0.4,0.")
        fit(make_learner(), train, 6, out=tmp_path, resume=True)
        assert [row.step for row in read_history(tmp_path / "metrics.csv", 6)] == [1, 2, 3, 4, 5, 6]
        assert (tmp_path / "metrics.csv").read_text().count("\n") == 7


class TestFailures:
    def broken(self, train, step):
        def sampler(number):
            episodes = train(number)
            if number == step:
                episodes.query_x[0, 0] = math.inf
            return episodes

        return sampler

    @pytest.mark.parametrize("read_every", [1, 4])
    def test_a_non_finite_loss_stops_and_keeps_the_checkpoint(self, train, tmp_path, monkeypatch, read_every):
        monkeypatch.setitem(FIT.READ_EVERY, "cpu", read_every)
        message = (
            r"the loss is nan at step 6; the checkpoints in .* are from before that. A smaller learning rate"
        )
        with pytest.raises(NonFiniteError, match=message):
            fit(make_learner(), self.broken(train, 5), 9, out=tmp_path, validate_every=3)
        assert [row.step for row in read_history(tmp_path / "metrics.csv", 5)] == [1, 2, 3, 4, 5]
        checkpoint = load_checkpoint(tmp_path / "checkpoint-last.pt")
        assert checkpoint["step"] == 3
        assert all(bool(value.isfinite().all()) for value in checkpoint["model"].values())
        assert fit(make_learner(), train, 9, out=tmp_path, resume=True, validate_every=3).rows[-1].step == 9

    def test_reading_in_blocks_gives_the_same_rows(self, train, validation, monkeypatch):
        options = {"validation": validation, "validation_episodes": 5, "validate_every": 5}
        expected = fit(make_learner(), train, 9, **options).rows
        monkeypatch.setitem(FIT.READ_EVERY, "cpu", 4)
        seen = []
        history = fit(make_learner(), train, 9, on_step=seen.append, **options)
        assert_same_rows(history.rows, expected)
        assert_same_rows(seen, expected)

    def test_non_finite_weights_never_replace_a_checkpoint(self, train, tmp_path):
        learner = make_learner()

        def spoil(row):
            if row.step == 4:
                with torch.no_grad():
                    learner.encoder[0].encoder[1][0].weight[0] = math.nan

        with pytest.raises(
            NonFiniteError, match=r"encoder.0.encoder.1.0.weight holds NaN or infinite values after step 4"
        ):
            fit(learner, train, 9, out=tmp_path, validate_every=2, on_step=spoil)
        assert load_checkpoint(tmp_path / "checkpoint-last.pt")["step"] == 2

    def test_without_a_folder_the_message_says_so(self, train):
        with pytest.raises(NonFiniteError, match="at step 1; no checkpoint was saved yet"):
            fit(make_learner(), self.broken(train, 0), 2)

    @pytest.mark.parametrize("moment", ["write", "replace"])
    def test_a_full_disk_leaves_the_last_checkpoint(self, train, tmp_path, monkeypatch, moment):
        fit(make_learner(), train, 2, out=tmp_path)
        before = (tmp_path / "checkpoint-last.pt").read_bytes()

        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, {"write": "fsync", "replace": "replace"}[moment], full)
        message = r"write .*last.pt \(No space left on device\); the file that was there is unchanged"
        with pytest.raises(OSError, match=message) as caught:
            save_checkpoint(tmp_path / "checkpoint-last.pt", {"step": 3, "model": {}, "settings": {}})
        assert caught.value.errno == 28
        monkeypatch.undo()
        assert (tmp_path / "checkpoint-last.pt").read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "checkpoint-best.pt",
            "checkpoint-last.pt",
            "metrics.csv",
        ]

    def test_a_file_in_the_place_of_the_folder(self, train, tmp_path):
        (tmp_path / "taken").write_text("")
        with pytest.raises(NotADirectoryError, match="out: expected a folder, got the file"):
            fit(make_learner(), train, 2, out=tmp_path / "taken")

    def test_files_get_ordinary_permissions(self, tmp_path):
        write_atomically(tmp_path / "ours", b"a")
        (tmp_path / "plain").write_bytes(b"a")
        assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode

    @pytest.mark.parametrize(
        "content",
        [
            lambda good: good[: len(good) // 2],
            lambda good: good[:-20],
            lambda good: b"",
            lambda good: b"no checkpoint at all",
        ],
        ids=["half", "almost whole", "empty", "text"],
    )
    def test_a_truncated_or_foreign_file(self, train, tmp_path, content):
        fit(make_learner(), train, 1, out=tmp_path)
        path = tmp_path / "checkpoint-last.pt"
        path.write_bytes(content(path.read_bytes()))
        with pytest.raises(
            CheckpointError, match=r"checkpoint-last.pt is truncated, damaged or not a checkpoint"
        ):
            load_checkpoint(path)
        with pytest.raises(CheckpointError, match=r"checkpoint-last\.pt"):
            fit(make_learner(), train, 2, out=tmp_path, resume=True)

    @pytest.mark.parametrize(
        "content", [{"weight": torch.zeros(2)}, [1, 2], {"format": "metafast-checkpoint-1"}]
    )
    def test_a_torch_file_of_something_else(self, tmp_path, content):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(CheckpointError, match="holds something else than a checkpoint of metafast"):
            load_checkpoint(tmp_path / "other.pt")

    def test_code_in_a_checkpoint_does_not_run(self, tmp_path):
        class Attack:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "broken-in"),)

        torch.save(
            {"format": "metafast-checkpoint-1", "step": 1, "settings": {}, "model": Attack()},
            tmp_path / "bad.pt",
        )
        with pytest.raises(CheckpointError, match=r"bad\.pt"):
            load_checkpoint(tmp_path / "bad.pt")
        assert not (tmp_path / "broken-in").exists()

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="checkpoint: there is no file"):
            load_checkpoint(tmp_path / "none.pt")


class TestPictures:
    @pytest.fixture(autouse=True)
    def matplotlib(self):
        pytest.importorskip("matplotlib")

    def size(self, path):
        header = path.read_bytes()[:24]
        assert header.startswith(b"\x89PNG")
        return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")

    @pytest.mark.parametrize("steps", [1, 250])
    @pytest.mark.parametrize("validated", [True, False])
    def test_learning_curve(self, tmp_path, steps, validated):
        extra = [0.8, 0.01, 0.5] if validated else []
        rows = [
            Row(step, 3.0 / step, 1 - 0.9 / step, 1e-3, float(step), *extra) for step in range(1, steps + 1)
        ]
        pictures.draw_learning_curve(
            History(rows, steps, 0.8 if validated else None), tmp_path / "curve.png", "title"
        )
        width, height = self.size(tmp_path / "curve.png")
        assert width > 2 * height > 800

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize(("ways", "shots", "queries"), [(2, 1, 1), (5, 1, 15), (22, 6, 2)])
    def test_episode(self, tmp_path, channels, ways, shots, queries):
        def inputs(rows):
            return torch.rand(2, ways * rows, channels, 16, 16), torch.arange(ways).repeat(2, rows)

        torch.manual_seed(0)
        batch = Episodes(*inputs(shots), *inputs(queries), ways)
        learner = ProtoNet(nn.Flatten())
        pictures.draw_episode(learner, batch, tmp_path / "episode.png", "title")
        width, height = self.size(tmp_path / "episode.png")
        assert min(width, height) > 200
        assert learner.training

    def test_episode_of_features(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"support_x: expected images \[T, n, C, H, W\], got \[2, 2, 1\]"
        ):
            pictures.draw_episode(Scripted(), scripted_episodes(1, 2), tmp_path / "episode.png", "title")
