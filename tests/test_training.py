import csv
import importlib.util
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import replace
from typing import ClassVar

import numpy
import pytest
import torch
from torch import nn

from metafast.backbones import Conv4
from metafast.data import EpisodeSampler, FixedEpisodes, SinusoidSampler, glyphs
from metafast.learners import Outcome, ProtoNet
from metafast.training import (
    CheckpointError,
    Interrupted,
    NonFiniteError,
    evaluate,
    fit,
    load_checkpoint,
    save_checkpoint,
)
from metafast.training import fit as fit_function
from metafast.training.files import write_atomically
from metafast.training.history import COLUMNS, read_history
from metafast.training.progress import Speed

FIT = sys.modules[fit_function.__module__]
CHECKPOINT = sys.modules[load_checkpoint.__module__]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


class Line(nn.Module):
    """Regression by one slope for all tasks."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))

    def forward(self, episodes):
        predicted = self.slope * episodes.query_x
        return Outcome((predicted - episodes.query_y).square().mean(), predicted)


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
        ("options", "rates"),
        [
            ({"decay_every": 2}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
            ({"decay_every": 4, "decay": 0.1}, [1, 1, 1, 1, 0.1, 0.1]),
            ({"schedule": "constant"}, [1] * 6),
            ({"schedule": "cosine"}, [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]),
            ({"schedule": "linear"}, [1 - step / 6 for step in range(6)]),
            ({"schedule": "linear", "warm_up": 2}, [0.5, 1, 1, 0.75, 0.5, 0.25]),
            ({"schedule": "constant", "warm_up": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
            ({"decay_every": 3, "warm_up": 4}, [0.25, 0.5, 0.75, 0.5, 0.5, 0.5]),
            (
                {"schedule": "cosine", "warm_up": 2},
                [0.5, 1, *((1 + math.cos(math.pi * step / 4)) / 2 for step in range(4))],
            ),
        ],
        ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
    )
    def test_schedules(self, train, options, rates):
        history = fit(make_learner(), train, 6, **options)
        assert [row.learning_rate for row in history.rows] == pytest.approx([1e-3 * rate for rate in rates])

    def test_own_optimizer_and_scheduler(self, train):
        learner = make_learner()
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        history = fit(learner, train, 3, optimizer=optimizer, schedule=scheduler)
        assert [row.learning_rate for row in history.rows] == pytest.approx([0.1, 0.05, 0.025])

    @pytest.fixture
    def accuracies(self, monkeypatch):
        """Validation accuracies to be measured, as many as a test appends."""
        values, real = [], FIT.evaluate

        def scripted(*arguments, **options):
            result = real(*arguments, **options)
            object.__setattr__(result, "mean", values.pop(0))
            return result

        monkeypatch.setattr(FIT, "evaluate", scripted)
        return values

    def test_the_learner_ends_with_the_best_weights(self, train, validation, tmp_path, accuracies):
        accuracies += [0.5, 0.9, 0.7]
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

    def test_early_stopping(self, train, validation, tmp_path, accuracies, capsys):
        options = {"validation": validation, "validation_episodes": 5, "validate_every": 2, "out": tmp_path}
        accuracies += [0.5, 0.9, 0.9, 0.8]
        learner = make_learner()
        history = fit(learner, train, 20, patience=2, **options)
        assert (len(history.rows), history.best_step, history.stopped_early) == (8, 4, True)
        line = "stopped early after step 8 of 20: 2 validations were no better than that of step 4"
        assert line in capsys.readouterr().out
        assert_same(weights(learner), load_checkpoint(tmp_path / "checkpoint-best.pt")["model"])
        assert json.loads((tmp_path / "result.json").read_text())["stopped_early"] is True

        # A resumed run has as little patience, unless it is given more.
        again = fit(make_learner(), train, 20, patience=2, resume=True, **options)
        assert (len(again.rows), again.stopped_early) == (8, True)
        accuracies += [0.95, 0.9, 0.9, 0.9]
        more = fit(make_learner(), train, 20, patience=3, resume=True, **options)
        assert (len(more.rows), more.best_step, more.stopped_early) == (16, 10, True)
        accuracies += [0.96, 0.96]
        assert not fit(make_learner(), train, 20, patience=9, resume=True, **options).stopped_early

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

    @pytest.mark.parametrize("clip_norm", [1e-3, 0.05])
    def test_clipping(self, train, clip_norm):
        learner, free = make_learner(), make_learner()
        before = weights(learner)
        for net, norm in ((learner, clip_norm), (free, None)):
            fit(net, train, 1, optimizer=torch.optim.SGD(net.parameters(), lr=1.0), clip_norm=norm)

        def moved(net):
            return torch.cat(
                [(before[name] - value.detach()).flatten() for name, value in net.named_parameters()]
            )

        assert float(moved(learner).norm()) == pytest.approx(clip_norm, rel=1e-4)
        direction = torch.nn.functional.cosine_similarity(moved(learner), moved(free), dim=0)
        assert float(direction) == pytest.approx(1, abs=1e-5)
        # What is short enough stays as it is.
        large = make_learner()
        fit(large, train, 1, optimizer=torch.optim.SGD(large.parameters(), lr=1.0), clip_norm=1e3)
        assert_same(weights(large), weights(free))

    def test_float16_scales_the_loss(self, train, tmp_path):
        scaled, exact = make_learner(), make_learner()
        fit(exact, train, 3)
        fit(scaled, train, 3, precision="float16", out=tmp_path)
        assert {parameter.dtype for parameter in scaled.parameters()} == {torch.float32}
        for name, value in weights(exact).items():
            torch.testing.assert_close(weights(scaled)[name], value, rtol=0.05, atol=5e-3)
        assert load_checkpoint(tmp_path / "checkpoint-last.pt")["scaler"]["scale"] > 1

    def test_a_step_whose_float16_gradients_overflow_is_left_out(self, train, tmp_path):
        class Steep(ProtoNet):
            def forward(self, episodes):
                loss, logits = super().forward(episodes)
                return Outcome(100 * loss, logits)

        torch.manual_seed(0)
        learner = Steep(Conv4(channels=4))
        parameters = {name: value.detach().clone() for name, value in learner.named_parameters()}
        fit(learner, train, 1, precision="float16", schedule="cosine", out=tmp_path)
        assert_same(dict(learner.named_parameters()), parameters)
        scale = load_checkpoint(tmp_path / "checkpoint-last.pt")["scaler"]["scale"]
        history = fit(learner, train, 25, precision="float16", schedule="constant")
        assert scale == 2**15
        assert len(history.rows) == 25
        assert not torch.equal(learner.encoder.encoder[0][0].weight, parameters["encoder.encoder.0.0.weight"])

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
        shown = capsys.readouterr().err
        assert "3/3" in shown
        assert " episodes/s, loss " in shown
        assert "accuracy " in shown

    def test_speed_forgets_and_leaves_pauses_out(self, monkeypatch):
        clock = [0.0]
        monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
        speed = Speed()
        assert str(speed) == "-- episodes/s"
        for seconds, pause in ((2.0, 0), (2.0, 100), (2.0, 0)):
            clock[0] += pause
            speed.pause()
            clock[0] += seconds
            speed.add(1)
        assert str(speed) == "0.5 episodes/s"
        for _ in range(100):
            clock[0] += 1
            speed.add(40)
        assert str(speed) == "40 episodes/s"

    def test_regression_has_no_accuracy(self, tmp_path):
        history = fit(Line(), SinusoidSampler(5, 5, tasks=2), 3, out=tmp_path)
        assert all(math.isnan(row.accuracy) and row.loss > 0 for row in history.rows)
        assert read_history(tmp_path / "metrics.csv", 3)[2].loss == history.rows[2].loss

    def test_regression_is_validated_by_its_squared_error(self, tmp_path, capsys):
        waves = FixedEpisodes(SinusoidSampler(5, 5, seed=9), 20)

        def run(folder, steps, **options):
            # A rate so large that it gets worse again.
            learner = Line()
            optimizer = torch.optim.SGD(learner.parameters(), lr=0.2)
            options |= {"validation": waves, "validate_every": 1, "out": folder, "schedule": "constant"}
            options["validation_episodes"] = 20
            train = SinusoidSampler(5, 5, tasks=2)
            return learner, fit(learner, train, steps, optimizer=optimizer, **options)

        learner, history = run(tmp_path / "whole", 8)
        losses = [row.validation_loss for row in history.validations]
        assert len(losses) == 8 and history.best_step == 1 + losses.index(min(losses)) < 8
        best = history.best_validation
        score = evaluate(learner, waves)
        assert (score.mean, score.interval) == (best.validation_loss, best.validation_interval)
        assert math.isnan(best.validation_accuracy) and history.best_accuracy is None
        result = json.loads((tmp_path / "whole" / "result.json").read_text())
        assert result["best_validation_loss"] == min(losses)
        assert result["best_validation_accuracy"] is None
        assert f"validation MSE {losses[0]:.4f} +- " in capsys.readouterr().out
        run(tmp_path / "parts", 5)
        resumed, again = run(tmp_path / "parts", 8, resume=True)
        assert str(without_time(again.rows)) == str(without_time(history.rows))
        assert again.best_step == history.best_step
        assert_same(weights(learner), weights(resumed))

    def test_early_stop_in_regression(self):
        waves = FixedEpisodes(SinusoidSampler(5, 5, seed=9), 20)
        learner = Line()
        optimizer = torch.optim.SGD(learner.parameters(), lr=1e-12)
        history = fit(
            learner, lambda step: SinusoidSampler(5, 5)(0), 9, validation=waves, validation_episodes=20,
            validate_every=1, patience=2,
            optimizer=optimizer, schedule="constant",
        )  # fmt: skip
        assert history.stopped_early and len(history.rows) < 9

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
            ({"decay_every": True}, "decay_every: expected a positive int, got True"),
            ({"decay": 1}, "decay: expected a number between 0 and 1, got 1"),
            ({"warm_up": -1}, "warm_up: expected an int from 0, got -1"),
            (
                {"warm_up": 2, "schedule": "cosine"},
                "warm_up: expected fewer than the 2 steps of schedule 'cosine', got 2",
            ),
            (
                {"warm_up": 3, "schedule": "linear"},
                "warm_up: expected fewer than the 2 steps of schedule 'linear', got 3",
            ),
            ({"clip_norm": 0.0}, "clip_norm: expected a positive number or None, got 0.0"),
            ({"patience": 0}, "patience: expected a positive int, got 0"),
            ({"patience": 2}, "patience: early stopping needs validation episodes"),
            (
                {"precision": "double"},
                "precision: expected 'float32', 'bfloat16' or 'float16', got 'double'",
            ),
            (
                {"schedule": "square"},
                "schedule: expected step, cosine, linear, constant or a scheduler, got 'square'",
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

    def test_schedulers_that_cannot_be_used(self, train):
        learner = make_learner()
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        with pytest.raises(ValueError, match="a scheduler that goes by the step, got ReduceLROnPlateau"):
            fit(learner, train, 2, optimizer=optimizer, schedule=plateau)
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer)
        with pytest.raises(ValueError, match="warm_up: expected 0 with a scheduler"):
            fit(learner, train, 2, optimizer=optimizer, schedule=constant, warm_up=1)


class TestResult:
    def test_everything_is_in_it(self, train, validation, tmp_path):
        learner = make_learner()
        optimizer = torch.optim.Adam(learner.parameters(), lr=torch.tensor(0.01), betas=(0.8, 0.9))
        history = fit(
            learner, train, 4, validation=validation, validation_episodes=5, validate_every=2, warm_up=2,
            optimizer=optimizer, out=tmp_path, settings={"data": "glyphs", "root": tmp_path.name},
        )  # fmt: skip
        result = json.loads((tmp_path / "result.json").read_text())
        assert result == history.result
        assert result["settings"] == {"data": "glyphs", "root": tmp_path.name}
        wanted = {
            "optimizer": "Adam", "lr": pytest.approx(0.01), "betas": [0.8, 0.9], "schedule": "step",
            "decay_every": 2000, "decay": 0.5, "warm_up": 2, "clip_norm": None, "precision": "float32",
            "validate_every": 2, "validation_episodes": 5, "batch_norm": "running", "seed": 1, "steps": 4,
            "patience": None,
        }  # fmt: skip
        assert {name: result["fit"][name] for name in wanted} == wanted
        environment = result["environment"]
        assert (environment["torch"], environment["numpy"]) == (torch.__version__, numpy.__version__)
        assert (environment["processes"], environment["threads"]) == (1, 1)
        best = history.validations[[row.step for row in history.validations].index(history.best_step)]
        assert result["best_validation_accuracy"] == best.validation_accuracy
        assert result["best_validation_interval"] == best.validation_interval
        assert (result["seed"], result["steps"], result["best_step"]) == (1, 4, history.best_step)
        assert result["train_seconds"] == round(history.seconds, 1)

    def test_groups_of_parameters(self, train):
        learner = make_learner()
        halves = list(learner.parameters())[:3], list(learner.parameters())[3:]
        optimizer = torch.optim.SGD([{"params": halves[0]}, {"params": halves[1], "lr": 0.5}], lr=0.1)
        found = fit(learner, train, 2, optimizer=optimizer, decay_every=1).result["fit"]
        assert (found["lr"], [group["lr"] for group in found["groups"]]) == (0.1, [0.1, 0.5])

    def test_without_folder_and_validation(self, train):
        result = fit(make_learner(), train, 2).result
        assert (result["best_validation_accuracy"], result["best_validation_interval"]) == (None, None)
        assert json.loads(json.dumps(result)) == result

    def test_that_of_another_run_does_not_stay(self, train, tmp_path):
        fit(make_learner(), train, 2, out=tmp_path)
        with pytest.raises(Stop):
            fit(make_learner(), train, 4, out=tmp_path, overwrite=True, on_step=stop_at(1))
        assert not (tmp_path / "result.json").exists()


class TestTensorBoard:
    @pytest.fixture
    def curves(self):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        def read(folder):
            events = EventAccumulator(str(folder))
            events.Reload()
            return {
                name: [(event.step, event.value) for event in events.Scalars(name)]
                for name in events.Tags()["scalars"]
            }

        return read

    def test_curves_are_those_of_the_rows(self, train, validation, tmp_path, curves):
        options = {"validation": validation, "validation_episodes": 5, "validate_every": 2}
        rows = fit(make_learner(), train, 5, out=tmp_path, **options).rows
        found = curves(tmp_path / "tensorboard")
        assert found["training/loss"] == [(row.step, pytest.approx(row.loss)) for row in rows]
        assert len(found["training/accuracy"]) == len(found["training/learning_rate"]) == 5
        assert [step for step, _ in found["validation/accuracy"]] == [2, 4, 5]

    def test_a_resumed_run_goes_on_where_it_was_saved(self, train, tmp_path, curves):
        with pytest.raises(Stop):
            fit(make_learner(), train, 6, validate_every=2, out=tmp_path, on_step=stop_at(3))
        rows = fit(make_learner(), train, 6, validate_every=2, out=tmp_path, resume=True).rows
        found = curves(tmp_path / "tensorboard")["training/loss"]
        assert found == [(row.step, pytest.approx(row.loss)) for row in rows]

    def test_the_rows_before_a_non_finite_loss(self, train, tmp_path, curves):
        def spoilt(step):
            episodes = train(step)
            return episodes if step < 3 else replace(episodes, support_x=episodes.support_x * math.nan)

        with pytest.raises(NonFiniteError):
            fit(make_learner(), spoilt, 9, validate_every=2, out=tmp_path)
        assert [step for step, _ in curves(tmp_path / "tensorboard")["training/loss"]] == [1, 2, 3]

    def test_without_it_there_is_no_folder(self, train, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        fit(make_learner(), train, 2, out=tmp_path)
        assert not (tmp_path / "tensorboard").exists()

    def test_a_full_disk_is_named(self, train, tmp_path, monkeypatch):
        pytest.importorskip("tensorboard")

        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.flush", full)
        with pytest.raises(OSError, match=r"could not write .*tensorboard \(No space left on device\)"):
            fit(make_learner(), train, 2, out=tmp_path)
        assert load_checkpoint(tmp_path / "checkpoint-last.pt")["step"] == 2


class TestResume:
    OPTIONS: ClassVar = {"steps": 9, "validation_episodes": 5, "validate_every": 4, "decay_every": 3}

    @pytest.mark.parametrize(
        "more",
        [{}, {"schedule": "cosine", "warm_up": 6}, {"precision": "float16"}, {"precision": "bfloat16"}],
        ids=["float32", "cosine", "float16", "bfloat16"],
    )
    @pytest.mark.parametrize("step", [2, 4, 7])
    def test_continues_bit_for_bit(self, train, validation, tmp_path, step, more):
        options = {**self.OPTIONS, "validation": validation, "clip_norm": 1.0, **more}
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
        assert torch.equal(first["random"][0]["torch"], second["random"][0]["torch"])
        assert first["scaler"] == second["scaler"]
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

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"schedule": "constant"}, "schedule was 'cosine', is 'constant'$"),
            ({"steps": 8}, "steps was 4, is 8$"),
            ({"clip_norm": 2.0}, r"clip_norm was 1\.0, is 2\.0$"),
            ({"precision": "bfloat16"}, "precision was 'float32', is 'bfloat16'$"),
            ({"validate_every": 1}, "validate_every was 2, is 1$"),
            ({"rate": 0.5}, r"lr was 0\.001, is 0\.5$"),
            ({"seed": 5}, "seed was 1, is 5$"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_other_arguments_are_named(self, train, characters, tmp_path, other, message):
        def run(steps=4, rate=1e-3, seed=1, **options):
            learner = make_learner()
            sampler = EpisodeSampler(characters, ways=4, shots=1, queries=2, tasks=2, seed=seed)
            optimizer = torch.optim.Adam(learner.parameters(), lr=rate)
            options = {"schedule": "cosine", "clip_norm": 1.0, "validate_every": 2, **options}
            fit(learner, sampler, steps, optimizer=optimizer, out=tmp_path, **options)

        run()
        with pytest.raises(CheckpointError, match="made with other settings: " + message):
            run(**other, resume=True)

    def test_own_scheduler(self, train, tmp_path):
        def run(steps, **options):
            learner = make_learner()
            optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
            first = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1, 3)
            then = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, then], [3])
            history = fit(learner, train, steps, optimizer=optimizer, schedule=schedule, **options)
            return weights(learner), history.rows

        whole, rows = run(6)
        run(4, out=tmp_path)
        parts, again = run(6, out=tmp_path, resume=True)
        assert_same(parts, whole)
        assert_same_rows(again, rows)

    def test_a_best_checkpoint_of_another_step(self, train, validation, tmp_path):
        options = {"validation": validation, "validation_episodes": 5, "validate_every": 1, "out": tmp_path}
        with pytest.raises(Stop):
            fit(make_learner(), train, 6, on_step=stop_at(6), **options)
        last = load_checkpoint(tmp_path / "checkpoint-last.pt")
        assert last["step"] == 5
        save_checkpoint(tmp_path / "checkpoint-last.pt", {**last, "best_step": 4, "best_accuracy": 0.5})
        best = load_checkpoint(tmp_path / "checkpoint-best.pt")
        save_checkpoint(tmp_path / "checkpoint-best.pt", {**best, "step": 2})
        with pytest.raises(
            CheckpointError, match=r"best\.pt is of step 2, .*last\.pt belongs to one of step 4"
        ):
            fit(make_learner(), train, 6, resume=True, **options)

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
        assert not list(tmp_path.glob(".*"))

    def test_a_disk_that_fills_up_in_the_middle(self, train, tmp_path):
        """A real limit, on the size of a file: some of the checkpoint is written, and then no more."""
        resource = pytest.importorskip("resource")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        whole = make_learner()
        fit(whole, train, 9)

        def limit(row):
            if row.step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))

        try:
            with pytest.raises(
                OSError, match=r"could not write .*last\.pt \(File too large\); the file that was"
            ):
                fit(make_learner(), train, 9, validate_every=3, out=tmp_path, on_step=limit)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert load_checkpoint(tmp_path / "checkpoint-last.pt")["step"] == 3
        assert not list(tmp_path.glob(".*"))
        resumed = make_learner(seed=3)
        fit(resumed, train, 9, validate_every=3, out=tmp_path, resume=True)
        assert_same(weights(resumed), weights(whole))

    def test_a_full_disk_for_the_metrics(self, train, tmp_path, monkeypatch):
        def full(*arguments):
            raise OSError(28, "No space left on device")

        def fill(row):
            monkeypatch.setattr(os, "fsync", full)

        with pytest.raises(OSError, match=r"could not write .*metrics\.csv \(No space left on device\)"):
            fit(make_learner(), train, 2, out=tmp_path, on_step=fill)

    @pytest.mark.parametrize("name", ["", "new"], ids=["folder", "parent"])
    def test_a_folder_that_may_not_be_written(self, train, name):
        # Not in pytest's folders, which only their owner may look into; and root may write everywhere.
        root = os.geteuid() == 0
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o555)
            if root:
                os.seteuid(65534)
            try:
                what = r"make the folder .*new" if name else r"write .*metrics\.csv"
                with pytest.raises(PermissionError, match=rf"could not {what} \(Permission denied\)"):
                    fit(make_learner(), train, 2, out=os.path.join(folder, name))
            finally:
                if root:
                    os.seteuid(0)
                os.chmod(folder, 0o755)

    def test_settings_that_cannot_be_saved(self, train, tmp_path):
        with pytest.raises(TypeError, match=r"settings: expected tensors and plain values .*, got pathlib"):
            fit(make_learner(), train, 2, out=tmp_path, settings={"root": tmp_path})

    def test_a_scheduler_that_cannot_be_saved(self, train, tmp_path):
        class FromFile:
            def __init__(self):
                self.path = tmp_path

            def __call__(self, step):
                return 1.0

        learner = make_learner()
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, FromFile())
        with pytest.raises(TypeError, match=r"schedule: expected tensors and plain values .*, got pathlib"):
            fit(learner, train, 2, optimizer=optimizer, schedule=schedule, out=tmp_path)

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
            CheckpointError,
            match=r"checkpoint-last.pt is truncated, damaged or not a checkpoint .* \((?!Weights)",
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


class Signalling:
    """Validation episodes; making the first of the given validation sends a signal."""

    def __init__(self, sampler, when=1):
        self.sampler, self.when, self.count = sampler, when, 0

    def __call__(self, step):
        self.count += step == 0
        if step == 0 and self.count == self.when:
            signal.raise_signal(signal.SIGTERM)
        return self.sampler(step)


class TestStops:
    @pytest.mark.parametrize(
        ("when", "options"),
        [(1, {"steps": 4}), (2, {"steps": 50, "validate_every": 1, "patience": 1})],
        ids=["last validation", "validation that exhausts patience"],
    )
    def test_a_signal_in_a_validation_is_heeded(self, train, validation, tmp_path, when, options):
        with pytest.raises(Interrupted, match="resume goes on from there"):
            fit(
                make_learner(),
                train,
                validation=Signalling(validation, when),
                validation_episodes=10,
                out=tmp_path,
                **options,
            )
        assert (tmp_path / "checkpoint-last.pt").exists()

    def test_a_run_resumed_at_its_last_step_is_validated(self, train, validation, tmp_path):
        options = {"validation": validation, "validation_episodes": 10, "validate_every": 10, "out": tmp_path}
        with pytest.raises(Interrupted):
            fit(
                make_learner(),
                train,
                20,
                on_step=stop_at(6, lambda: signal.raise_signal(signal.SIGTERM)),
                **options,
            )
        done = load_checkpoint(tmp_path / "checkpoint-last.pt")["step"]
        history = fit(make_learner(seed=3), train, done, resume=True, **options)
        assert history.best_step == done
        assert load_checkpoint(tmp_path / "checkpoint-best.pt")["step"] == done
        assert not math.isnan(read_history(tmp_path / "metrics.csv", done)[-1].validation_accuracy)

    def test_two_runs_in_one_folder(self, train, tmp_path, monkeypatch):
        monkeypatch.setattr(FIT, "LOCK_SECONDS", 0)
        met = []

        def second(row):
            if row.step == 2:
                with pytest.raises(BlockingIOError, match="another process trains in"):
                    fit(make_learner(), train, 3, out=tmp_path, overwrite=True)
                met.append(row.step)

        fit(make_learner(), train, 3, out=tmp_path, on_step=second)
        assert met == [2]
        fit(make_learner(), train, 4, out=tmp_path, resume=True)


class TestBeforeTheFirstStep:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_norm": "none"}, "batch_norm: expected 'running' or 'transductive', got 'none'"),
            ({"validation_episodes": 1}, "validation_episodes: expected an int from 2, got 1"),
        ],
    )
    def test_validation_is_checked(self, train, validation, options, message):
        steps = []
        with pytest.raises(ValueError, match=message):
            fit(make_learner(), train, 3, validation=validation, on_step=steps.append, **options)
        assert not steps

    def test_layers_without_running_statistics(self, train, validation):
        encoder = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten()
        )
        steps = []
        with pytest.raises(ValueError, match=r"encoder\.1 keeps no running statistics"):
            fit(ProtoNet(encoder), train, 3, validation=validation, on_step=steps.append)
        assert not steps

    def test_a_validated_run_is_not_resumed_without(self, train, validation, tmp_path):
        fit(make_learner(), train, 2, validation=validation, validation_episodes=10, out=tmp_path)
        with pytest.raises(CheckpointError, match="validation_episodes was 10, is None"):
            fit(make_learner(), train, 3, out=tmp_path, resume=True)

    def test_settings_that_hold_tensors(self, train, tmp_path):
        fit(make_learner(), train, 1, out=tmp_path, settings={"prior": torch.ones(3)})
        fit(make_learner(), train, 2, out=tmp_path, resume=True, settings={"prior": torch.ones(3)})
        with pytest.raises(CheckpointError, match="prior was"):
            fit(make_learner(), train, 3, out=tmp_path, resume=True, settings={"prior": torch.zeros(3)})


def test_buffers_that_are_infinite_on_purpose(train):
    """Attention masks are; weights that become so are another matter."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(256, 8)
            self.register_buffer("mask", torch.full((3,), -torch.inf))

        def forward(self, x):
            return self.layer(x.flatten(1))

    assert len(fit(ProtoNet(Masked()), train, 2).rows) == 2


def test_writing_to_what_is_no_file(tmp_path):
    """A pipe is written to, and a link leads to its file."""
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
