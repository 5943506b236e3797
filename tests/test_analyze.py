import dataclasses
import json
import math
import struct
import sys

import numpy
import pytest
import torch
from torch import nn

from metafast.data import EpisodeSampler, FixedEpisodes, glyphs, tensors
from metafast.learners import Outcome, ProtoNet
from metafast.training import analyze, evaluate, pictures
from metafast.training.analyze import BINS, TEMPERATURES, best_temperature, reliability
from metafast.training.distributed import Ranks


def scores(episodes=40, answers=30, classes=5, scale=2.0, seed=0):
    """Logits of that scale, and labels drawn from their softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(episodes, answers, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
    return logits, labels.view(episodes, answers)


class TestReliability:
    def test_against_a_loop_over_the_answers(self):
        logits, labels = scores()
        found = reliability(1.7 * logits, labels)
        probabilities = numpy.exp(1.7 * logits.numpy())
        probabilities /= probabilities.sum(-1, keepdims=True)
        confidence, answer = probabilities.max(-1), probabilities.argmax(-1)
        right = answer == labels.numpy()
        error = 0.0
        for b, part in enumerate(found.bins):
            inside = (confidence > b / BINS) & (confidence <= (b + 1) / BINS)
            assert (part.low, part.high, part.share) == (b / BINS, (b + 1) / BINS, inside.mean())
            if not inside.any():
                assert part.confidence is part.accuracy is part.interval is None
                continue
            assert part.confidence == pytest.approx(confidence[inside].mean(), rel=1e-12)
            assert part.accuracy == pytest.approx(right[inside].mean(), rel=1e-12)
            assert part.interval[0] <= part.accuracy <= part.interval[1]
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
        assert found.error.value == pytest.approx(error, rel=1e-12)
        loss = -numpy.log(numpy.take_along_axis(probabilities, labels.numpy()[..., None], -1))[..., 0].mean(1)
        assert found.loss.value == pytest.approx(loss.mean(), rel=1e-12)
        assert found.loss.interval == pytest.approx(1.96 * loss.std(ddof=1) / math.sqrt(40), rel=1e-12)
        assert found.confidence.value == pytest.approx(confidence.mean(), rel=1e-12)
        assert len([part for part in found.bins if part.share]) > 8

    def test_confidence_at_the_ends(self):
        logits = torch.tensor([[[0.0, 0.0], [40.0, 0.0]], [[0.0, 40.0], [-math.inf, 0.0]]])
        found = reliability(logits, torch.tensor([[0, 0], [1, 1]]))
        shares = {round(part.high, 3): part.share for part in found.bins if part.share}
        assert shares == {round(8 / 15, 3): 0.25, 1.0: 0.75}
        assert found.bins[-1].accuracy == 1.0
        # Wilson's interval for 3 of 3.
        assert found.bins[-1].interval == pytest.approx((3 / (3 + 1.96**2), 1.0), rel=1e-6)

    def test_the_interval_of_the_error_is_that_of_resampled_episodes(self):
        logits, labels = scores(200, 15)
        logits *= 3
        found = reliability(logits, labels)
        generator = torch.Generator().manual_seed(1)
        errors = []
        for _ in range(50):
            chosen = torch.randint(200, (200,), generator=generator)
            errors.append(reliability(logits[chosen], labels[chosen]).error.value)
        assert found.error.value > 5 * found.error.interval
        assert found.error.interval == pytest.approx(1.96 * numpy.std(errors), rel=0.3)

    def test_answers_that_come_in_episodes_widen_the_interval_of_a_bin(self):
        logits = torch.tensor([2.0, 0.0]).expand(20, 10, 2)
        alike = torch.zeros(20, 10, dtype=torch.int64)
        alike[:5] = 1
        mixed = alike.flatten()[torch.randperm(200, generator=torch.Generator().manual_seed(0))].view(20, 10)
        wide, narrow = (
            next(part.interval for part in reliability(logits, labels).bins if part.share)
            for labels in (alike, mixed)
        )
        assert wide[1] - wide[0] > 2.5 * (narrow[1] - narrow[0])


class TestTemperature:
    @pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
    def test_finds_the_temperature_of_the_labels(self, temperature):
        logits, labels = scores(150, 30)
        found = best_temperature(temperature * logits, labels)
        assert abs(found.value - temperature) < 1.5 * found.interval
        assert 0 < found.interval < 0.1 * temperature

    def test_is_the_minimum(self):
        logits, labels = scores(scale=6.0, seed=3)
        labels[:, 0] = 0
        found = best_temperature(logits, labels).value
        losses = [
            reliability(logits / value, labels).loss.value for value in (found * 0.99, found, found * 1.01)
        ]
        assert losses[1] < min(losses[0], losses[2])

    def test_the_interval_covers_19_times_in_20(self):
        covered = 0
        for seed in range(60):
            found = best_temperature(*scores(30, 10, 3, seed=seed))
            covered += abs(found.value - 1) <= found.interval
        assert 0.85 <= covered / 60 < 1

    def test_classes_that_are_absent(self):
        logits, labels = scores()
        wider = torch.cat([logits, torch.full((40, 30, 1), -math.inf)], dim=-1)
        assert best_temperature(wider, labels) == best_temperature(logits, labels)

    @pytest.mark.parametrize(("sign", "end"), [(1.0, TEMPERATURES[0]), (-1.0, TEMPERATURES[1])])
    def test_without_a_minimum_it_is_the_end_of_the_range(self, sign, end):
        labels = torch.arange(3).repeat(4, 2)
        logits = sign * nn.functional.one_hot(labels, 3).double()
        found = best_temperature(logits, labels)
        assert (found.value, found.interval) == (end, math.inf)
        assert found.as_dict() == {"value": end, "interval_95": None}


class Stepping(nn.Module):
    """Prototypes on the raw images, better with every step up to 3: noise of size 4 / (1 + steps)."""

    def __init__(self):
        super().__init__()
        self.net = ProtoNet(nn.Flatten(), temperature=0.1)
        self.steps = 2
        self.seen = []

    def forward(self, episodes):
        self.seen.append(self.steps)
        outcome = self.net(episodes)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(outcome.logits.shape[1:], generator=generator)
        return Outcome(outcome.loss, outcome.logits + 4 * noise / (1 + min(self.steps, 3)))


@pytest.fixture(scope="module")
def data():
    return {
        "train": glyphs(9, per_class=8, size=16),
        "validation": glyphs(7, per_class=8, size=16, first_class=20),
        "test": glyphs(8, per_class=8, size=16, first_class=40),
        "other": glyphs(6, per_class=8, size=16, first_class=60),
    }


OPTIONS = {"ways": 3, "queries": 3, "episodes": 12, "seed": 4}


@pytest.fixture(scope="module")
def report(data):
    return analyze(
        Stepping(),
        data["test"],
        train=data["train"],
        validation=data["validation"],
        others={"other": data["other"]},
        **OPTIONS,
    )


def png_size(path):
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return struct.unpack(">II", header[16:])


class TestReport:
    def test_every_number_is_that_of_evaluate(self, data, report):
        def accuracy(dataset, ways=3, shots=1, steps=2):
            learner = Stepping()
            learner.steps = steps
            return evaluate(learner, FixedEpisodes(EpisodeSampler(dataset, ways, shots, 3, seed=4), 12))

        def same(found, expected):
            assert torch.equal(found.per_episode, expected.per_episode)
            # The loss is summed in float32, in batches of another size.
            assert found.as_dict() == {**expected.as_dict(), "loss": pytest.approx(expected.loss)}

        assert list(report.by_shots) == [1, 2, 3, 5]
        assert list(report.by_ways) == [2, 3, 5, 8]
        assert list(report.by_steps) == [0, 1, 2, 3, 5, 10]
        same(report.by_shots[5], accuracy(data["test"], shots=5))
        same(report.by_ways[8], accuracy(data["test"], ways=8))
        same(report.by_steps[0], accuracy(data["test"], steps=0))
        same(report.by_steps[10], accuracy(data["test"], steps=10))
        for name in ("train", "validation", "test"):
            same(report.by_classes[name], accuracy(data[name]))
        same(report.by_data["other"], accuracy(data["other"]))
        assert report.by_steps[0].mean < report.by_steps[10].mean

    def test_differences_have_the_interval_of_independent_numbers(self, report):
        train, test, other = report.by_classes["train"], report.by_classes["test"], report.by_data["other"]
        assert report.gap.value == train.mean - test.mean
        assert report.gap.interval == pytest.approx(math.sqrt(train.interval**2 + test.interval**2))
        assert report.shifts["other"].value == other.mean - test.mean

    def test_calibration_takes_the_temperature_of_the_validation_classes(self, data, report):
        def kept(dataset):
            outcomes = []
            learner = Stepping()
            for episodes in FixedEpisodes(EpisodeSampler(dataset, 3, 1, 3, seed=4), 12, batch=12):
                outcomes.append((learner(episodes).logits.double(), episodes.query_y))
            return outcomes[0]

        calibration = report.calibration
        assert calibration.temperature == best_temperature(*kept(data["validation"]))
        logits, labels = kept(data["test"])
        assert calibration.before == reliability(logits, labels)
        assert calibration.after == reliability(logits / calibration.temperature.value, labels)
        assert calibration.after.loss.value < calibration.before.loss.value

    def test_what_is_left_out_is_said(self, report):
        assert report.notes == (
            "ways 10, 20 left out: there are 8 classes",
            "shots 10 left out: there are 5 images in the smallest class beside the queries",
        )

    def test_the_table_has_every_number_once(self, report):
        text = str(report)
        assert text.startswith(
            "3-way 1-shot 3-query where nothing else is said, 12 episodes each, no BatchNorm, seed 4"
        )
        lines = text.splitlines()
        for name, value in (
            ("5-shot", report.by_shots[5]),
            ("8-way", report.by_ways[8]),
            ("training classes (seen)", report.by_classes["train"]),
        ):
            (line,) = [line for line in lines if name in line]
            assert line.endswith(f"{100 * value.mean:.2f} % +- {100 * value.interval:.2f}")
        assert f"{100 * report.gap.value:+.2f} points +- {100 * report.gap.interval:.2f}" in text
        assert all(f"note: {note}" in lines for note in report.notes)
        assert max(map(len, lines)) < 120

    def test_plain_values_for_json(self, report):
        values = report.as_dict()
        assert json.loads(json.dumps(values, allow_nan=False)) == values
        assert values["setting"] == {
            **{"ways": 3, "shots": 1, "queries": 3, "episodes": 12, "seed": 4},
            **{"batch_norm": "none", "steps": 2},
        }
        assert [row["shots"] for row in values["by_shots"]] == [1, 2, 3, 5]
        assert values["by_steps"][0] == {"steps": 0, **report.by_steps[0].as_dict()}
        assert values["by_data"][0]["data"] == values["shifts"][0]["data"] == "other"
        assert len(values["calibration"]["before"]["bins"]) == BINS


class TestAnalyze:
    def test_a_learner_without_steps_and_the_test_classes_alone(self, data):
        found = analyze(ProtoNet(nn.Flatten()), data["test"], vary_ways=[2], vary_shots=[1], **OPTIONS)
        assert (found.steps, found.by_steps, found.gap, found.by_data) == (None, None, None, {})
        assert list(found.by_ways) == [2, 3]
        assert found.calibration.temperature is None and found.calibration.after is None
        assert "inner steps  ProtoNet has none" in str(found)
        assert found.notes == (
            "no temperature was fitted: there are no validation classes",
            "no gap: the training classes were not given",
        )
        values = found.as_dict()
        assert values["by_steps"] is values["gap"] is values["calibration"]["after"] is None
        json.dumps(values, allow_nan=False)

    def test_the_steps_are_put_back_also_after_an_error(self, data):
        learner = Stepping()
        analyze(learner, data["test"], vary_ways=[3], vary_shots=[1], vary_steps=[0, 4], **OPTIONS)
        assert learner.steps == 2 and set(learner.seen) == {0, 2, 4}

        class Broken(Stepping):
            def forward(self, episodes):
                if self.steps == 4:
                    raise RuntimeError("no memory")
                return super().forward(episodes)

        learner = Broken()
        with pytest.raises(RuntimeError, match="no memory"):
            analyze(learner, data["test"], vary_steps=[4], **OPTIONS)
        assert learner.steps == 2

    def test_several_data_sets_at_once(self, data):
        both = [data["test"], data["other"]]
        found = analyze(ProtoNet(nn.Flatten()), both, vary_shots=[1], **OPTIONS)
        assert list(found.by_ways) == [2, 3, 5, 6]
        expected = evaluate(ProtoNet(nn.Flatten()), FixedEpisodes(EpisodeSampler(both, 3, 1, 3, seed=4), 12))
        assert torch.equal(found.by_classes["test"].per_episode, expected.per_episode)

    def test_processes_share_the_work_and_get_the_same_report(self, data, monkeypatch, report):
        sums = []

        class Group(Ranks):
            """The first of two processes keeps what it has to be summed, and the second adds it."""

            def sum(self, values):
                if self.first:
                    sums.append(values)
                    return values
                return values + sums.pop(0)

        for rank in (0, 1):
            for module in (analyze, evaluate):
                monkeypatch.setattr(sys.modules[module.__module__], "ranks", lambda rank=rank: Group(rank, 2))
            learner = Stepping()
            found = analyze(
                learner,
                data["test"],
                train=data["train"],
                validation=data["validation"],
                others={"other": data["other"]},
                **OPTIONS,
            )
        assert not sums
        assert found.as_dict() == report.as_dict()

    def test_tables_of_features(self):
        table = tensors(
            torch.randn(60, 7) + 3 * torch.arange(6).repeat(10)[:, None], torch.arange(6).repeat(10)
        )
        assert analyze(ProtoNet(nn.Identity()), table, **OPTIONS).by_ways[2].mean > 0.9

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"vary_steps": [1]}, "vary_steps: ProtoNet has no inner steps"),
            ({"vary_ways": [3, 20]}, "ways must be at most the 8 classes"),
            ({"vary_shots": [6]}, "shots . queries must be at most the images of every class"),
            ({"ways": 9}, "ways must be at most the 8 classes"),
            ({"episodes": 1}, "episodes: expected at least 2 .an interval needs them., got 1"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )
    def test_impossible_wishes_are_refused_before_any_work(self, data, options, message):
        learner = ProtoNet(nn.Flatten())
        learner.forward = None
        with pytest.raises(ValueError, match=message):
            analyze(learner, data["test"], **{**OPTIONS, **options})

    def test_a_temperature_without_a_minimum_is_said(self, data):
        class Perfect(nn.Module):
            def forward(self, episodes):
                return Outcome(
                    torch.zeros(()), nn.functional.one_hot(episodes.query_y, episodes.ways).double()
                )

        found = analyze(Perfect(), data["test"], validation=data["validation"], **OPTIONS)
        assert "the temperature is at the end of its range, 0.01" in found.notes[-1]
        json.dumps(found.as_dict(), allow_nan=False)


class TestPage:
    @pytest.fixture(autouse=True)
    def matplotlib(self):
        pytest.importorskip("matplotlib")

    def test_with_everything(self, report, tmp_path):
        pictures.draw_report(report, tmp_path / "report.png", "title")
        width, height = png_size(tmp_path / "report.png")
        assert width > height > 1000

    def test_with_the_least(self, data, tmp_path):
        found = analyze(ProtoNet(nn.Flatten()), data["test"], vary_ways=[3], vary_shots=[1], **OPTIONS)
        pictures.draw_report(found, tmp_path / "report.png", "title")
        assert png_size(tmp_path / "report.png")[1] > 1000

    def test_with_very_many_notes_and_an_endless_interval(self, report, tmp_path):
        calibration = report.calibration
        endless = dataclasses.replace(calibration.temperature, interval=math.inf)
        crowded = dataclasses.replace(
            report,
            calibration=dataclasses.replace(calibration, temperature=endless),
            by_data={f"data set {number}": report.by_data["other"] for number in range(8)},
            notes=tuple(
                f"note {number} that takes more than a single line of the page" for number in range(9)
            ),
        )
        pictures.draw_report(crowded, tmp_path / "report.png", "title")
        assert png_size(tmp_path / "report.png")[1] > 1000
