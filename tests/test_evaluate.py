import contextlib
import io
import json
import math
import sys
import time

import numpy
import pytest
import torch
from torch import nn

from metafast.backbones import Conv4
from metafast.data import Episodes, EpisodeSampler, FixedEpisodes, SinusoidSampler, glyphs
from metafast.learners import Outcome, ProtoNet
from metafast.training import Accuracies, SquaredError, episode_grid, evaluate
from metafast.training import evaluate as evaluate_function
from metafast.training.evaluate import VALUES_AT_ONCE, confidence_interval, fixed_episodes

EVALUATE = sys.modules[evaluate_function.__module__]


@pytest.fixture(scope="module")
def characters():
    return glyphs(8, per_class=6, size=16, first_class=20)


@pytest.fixture
def sampler(characters):
    return EpisodeSampler(characters, 4, 1, 2, tasks=5, seed=2)


def make_learner():
    torch.manual_seed(0)
    return ProtoNet(nn.Sequential(Conv4(channels=4), nn.Dropout(0.5)))


class Scripted(nn.Module):
    """Classifies the first `right` query rows of each task correctly; `right` is the first input value."""

    def forward(self, episodes):
        rows = torch.arange(episodes.query_y.shape[1])
        right = rows < episodes.support_x[:, 0, :1]
        predicted = torch.where(right, episodes.query_y, (episodes.query_y + 1) % episodes.ways)
        logits = nn.functional.one_hot(predicted, episodes.ways).double()
        return Outcome(episodes.support_x[:, 0, 0].mean(), logits)


def scripted_episodes(*rights, ways=2, shots=1, queries=4):
    """One batch of a task for each number of right answers."""
    tasks = len(rights)
    support = torch.tensor(rights, dtype=torch.float64)[:, None, None].expand(tasks, ways * shots, 1)
    labels = torch.arange(ways).repeat_interleave(shots).repeat(tasks, 1)
    query_y = torch.arange(ways).repeat_interleave(queries // ways).repeat(tasks, 1)
    return Episodes(support, labels, torch.zeros(tasks, queries, 1, dtype=torch.float64), query_y, ways)


class TestNumbers:
    def test_mean_and_interval_are_those_of_numpy(self):
        rights = numpy.random.default_rng(0).integers(0, 5, 700)
        result = evaluate(Scripted(), [scripted_episodes(*part) for part in rights.reshape(10, 70)])
        values = rights / 4
        assert result.per_episode.tolist() == values.tolist()
        assert result.mean == pytest.approx(values.mean(), rel=1e-12)
        assert result.interval == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(700), rel=1e-12)
        assert result.loss == pytest.approx(rights.mean(), rel=1e-12)
        assert (result.episodes, result.ways, result.shots, result.queries) == (700, 2, 1, 2)
        assert (result.batch_norm, result.seed) == ("none", None)

    def test_the_interval_covers_the_mean_19_times_in_20(self):
        values = torch.distributions.Beta(8.0, 2.0).sample((4000, 60)).double()
        covered = sum(abs(float(row.mean()) - 0.8) <= confidence_interval(row) for row in values)
        assert 0.935 < covered / 4000 < 0.96

    def test_surplus_episodes_are_left_out(self):
        result = evaluate(Scripted(), [scripted_episodes(4, 4), scripted_episodes(0, 4, 4)], count=3)
        assert result.per_episode.tolist() == [1.0, 1.0, 0.0]
        assert result.loss == pytest.approx(8 / 3)

    def test_text_and_plain_values(self):
        result = evaluate(Scripted(), [scripted_episodes(4, 4, 4, 2)], 4)
        assert str(result) == "87.50 % +- 24.50 (4 episodes, 2-way 1-shot 2-query, no BatchNorm)"
        plain = {
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
        assert result.as_dict() == plain
        assert result.as_dict(per_episode=True) == {**plain, "per_episode": [1.0, 1.0, 1.0, 0.5]}
        json.dumps(result.as_dict(per_episode=True))

    def test_nan_logits_are_no_accuracy(self, sampler):
        batches = [sampler(0), sampler(1)]
        batches[1].query_x[2] = math.nan
        with pytest.raises(
            FloatingPointError, match="logits of 1 of 10 episodes hold NaN, those of episode 7 first"
        ):
            evaluate(make_learner(), batches, 10)


class TestSources:
    def test_a_sampler_gives_its_first_steps(self, sampler):
        learner = make_learner()
        result = evaluate(learner, sampler, 12)
        again = evaluate(learner, [sampler(0), sampler(1), sampler(2)], 12)
        assert torch.equal(result.per_episode, again.per_episode)
        assert (result.seed, again.seed) == (2, None)
        assert str(result).endswith("(12 episodes, 4-way 1-shot 2-query, running BatchNorm, seed 2)")

    @pytest.mark.parametrize(
        "source",
        [
            lambda sampler: lambda step: sampler(step),
            lambda sampler: [sampler(0), sampler(1)],
            lambda sampler: (sampler(step) for step in range(2)),
            lambda sampler: iter(sampler),
        ],
        ids=["function", "list", "generator", "endless iterator"],
    )
    def test_any_kind_of_source(self, sampler, source):
        learner = make_learner()
        expected = evaluate(learner, sampler, 10).per_episode
        assert torch.equal(evaluate(learner, source(sampler), 10).per_episode, expected)

    def test_without_a_count_all_of_a_list_and_a_thousand_of_a_sampler(self, sampler, monkeypatch):
        learner = make_learner()
        assert EVALUATE.DEFAULT_EPISODES == 1000
        monkeypatch.setattr(EVALUATE, "DEFAULT_EPISODES", 7)
        assert evaluate(learner, sampler).episodes == 7
        assert evaluate(learner, FixedEpisodes(sampler, 9)).episodes == 9
        assert evaluate(learner, (sampler(step) for step in range(2))).episodes == 10
        assert evaluate(learner, sampler(3)).episodes == 5

    @pytest.mark.parametrize("batch", [1, 4, 11])
    def test_fixed_episodes_do_not_depend_on_the_batch(self, sampler, batch):
        result = evaluate(make_learner(), FixedEpisodes(sampler, 11, batch))
        expected = evaluate(make_learner(), FixedEpisodes(sampler, 11, 3))
        assert torch.equal(result.per_episode, expected.per_episode)
        assert (result.episodes, result.seed) == (11, 2)

    def test_ways_and_shots_may_vary(self, characters):
        batches = [scripted_episodes(1, 2), scripted_episodes(3, ways=3, queries=6), scripted_episodes(0)]
        result = evaluate(Scripted(), batches)
        assert result.per_episode.tolist() == [0.25, 0.5, 0.5, 0.0]
        assert (result.ways, result.shots, result.queries) == (None, 1, 2)
        assert "(4 episodes, 1-shot 2-query, no BatchNorm)" in str(result)
        result = evaluate(Scripted(), [scripted_episodes(1, 2), scripted_episodes(1, shots=3)])
        assert (result.ways, result.shots, result.queries) == (2, None, 2)
        varying = EpisodeSampler(characters, (2, 5), (1, 2), 1, tasks=2)
        assert evaluate(make_learner(), varying, 20).ways is None

    def test_shots_that_differ_from_batch_to_batch_have_no_number(self):
        """Three rows of two classes: two and one in the second batch."""
        even = make_episodes(0, (2, 2))
        uneven = make_episodes(1, (3, 1))
        assert evaluate(ProtoNet(nn.Flatten()), [even, even]).shots == 2
        assert evaluate(ProtoNet(nn.Flatten()), [even, uneven]).shots is None

    def test_uneven_classes_have_no_number_of_shots(self):
        support, query = torch.tensor([[0, 0, 1]] * 2), torch.tensor([[0, 0, 1, 1]] * 2)
        batch = Episodes(torch.zeros(2, 3, 1), support, torch.zeros(2, 4, 1), query, 2)
        result = evaluate(ProtoNet(nn.Identity()), [batch], 2)
        assert (result.shots, result.queries) == (None, 2)
        assert "2-way 2-query" in str(result)

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

    def test_a_source_of_another_kind(self):
        with pytest.raises(TypeError, match=r"episodes: expected a sampler, batches of Episodes .*, got int"):
            evaluate(Scripted(), 3)
        with pytest.raises(ValueError, match="episodes: expected at least 2, got 0"):
            evaluate(Scripted(), [])

    def test_classes_and_regression_in_one_source(self):
        wave = SinusoidSampler(5, 5, 2)(0)

        class Either(nn.Module):
            def forward(self, episodes):
                return Outcome(torch.tensor(0.0), torch.zeros(2, episodes.query_y.shape[1], 2))

        with pytest.raises(
            ValueError, match="episodes: expected either classes or regression tasks, got both"
        ):
            evaluate(Either(), [scripted_episodes(1, 2), wave])


class TestRegression:
    class Zero(nn.Module):
        """Predicts 0, or NaN for the wave of this number."""

        wrong = -1

        def forward(self, episodes):
            predicted = torch.zeros_like(episodes.query_y)
            if self.wrong >= 0:
                predicted[self.wrong, 1] = math.nan
            return Outcome((predicted - episodes.query_y).square().mean(), predicted)

    def test_mean_and_interval_of_the_squared_error(self):
        waves = FixedEpisodes(SinusoidSampler(5, 7, seed=3), 40, batch=16)
        score = evaluate(self.Zero(), waves)
        errors = numpy.concatenate([(batch.query_y.numpy() ** 2).mean((1, 2)) for batch in waves])
        assert score.per_episode.tolist() == pytest.approx(errors.tolist(), rel=1e-6)
        assert score.mean == pytest.approx(errors.mean(), rel=1e-6) == score.loss
        assert score.interval == pytest.approx(1.96 * errors.std(ddof=1) / 40**0.5, rel=1e-6)
        assert isinstance(score, SquaredError)
        text = f"MSE {score.mean:.4f} +- {score.interval:.4f} (40 episodes, 5-shot 7-query, no BatchNorm, seed 3)"
        assert str(score) == text
        values = score.as_dict(per_episode=True)
        assert values["mse"] == score.mean and "accuracy" not in values and values["ways"] is None
        assert len(values["per_episode"]) == 40

    def test_shots_that_differ(self):
        score = evaluate(self.Zero(), SinusoidSampler((2, 9), 7, 2, seed=1), 20)
        assert (score.ways, score.shots, score.queries) == (None, None, 7)

    def test_nan_is_an_error(self):
        learner = self.Zero()
        learner.wrong = 2
        with pytest.raises(FloatingPointError, match="1 of 5 episodes hold NaN, those of episode 2 first"):
            evaluate(learner, SinusoidSampler(5, 5, 5), 5)


class TestSeveral:
    def test_ways_and_shots_in_one_call(self, characters):
        grid = episode_grid(characters, ways=(2, 4), shots=(1, 3), queries=2, count=6, seed=5)
        learner = make_learner()
        results = evaluate(learner, grid)
        assert isinstance(results, Accuracies)
        assert list(results) == [(2, 1), (2, 3), (4, 1), (4, 3)]
        for (ways, shots), result in results.items():
            assert (result.ways, result.shots, result.queries, result.seed) == (ways, shots, 2, 5)
            alone = FixedEpisodes(EpisodeSampler(characters, ways, shots, 2, seed=5), 6)
            assert torch.equal(result.per_episode, evaluate(learner, alone).per_episode)
        lines = str(results).splitlines()
        assert [line.split("  ")[0] for line in lines] == [
            "2-way 1-shot",
            "2-way 3-shot",
            "4-way 1-shot",
            "4-way 3-shot",
        ]
        assert results.as_dict()["4-way 3-shot"] == results[4, 3].as_dict()
        assert len(results.as_dict(per_episode=True)["2-way 1-shot"]["per_episode"]) == 6

    def test_names_and_a_count_for_all(self, sampler):
        results = evaluate(make_learner(), {"easy": sampler, "hard": [sampler(7)]}, 4)
        assert [(name, result.episodes) for name, result in results.items()] == [("easy", 4), ("hard", 4)]
        assert str(results).startswith("easy  ")

    def test_impossible_episodes_are_refused_before_any_work(self, characters):
        with pytest.raises(ValueError, match="ways must be at most the 8 classes of the data set, got 20"):
            episode_grid(characters, ways=(5, 20), queries=2)

    def test_batches_hold_about_as_many_numbers_whatever_the_episodes(self, characters):
        small = fixed_episodes(characters, 2, 1, 1, 10_000, 0).batch
        assert small == VALUES_AT_ONCE // (2 * 2 * 256)
        assert fixed_episodes(glyphs(3, per_class=20, size=300), 3, 1, 15, 2, 0).batch == 1


class TestState:
    @pytest.mark.parametrize("batch_norm", ["running", "transductive"])
    @pytest.mark.parametrize("training", [True, False])
    def test_the_learner_comes_back_as_it_was(self, sampler, batch_norm, training):
        learner = make_learner().train(training)
        learner.encoder[1].train(not training)
        before = {name: value.clone() for name, value in learner.state_dict().items()}
        evaluate(learner, sampler, 5, batch_norm=batch_norm)
        assert learner.training is training
        assert learner.encoder[1].training is not training
        assert learner.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
        assert torch.is_grad_enabled()
        learner.train()(sampler(0)).loss.backward()

    def test_also_after_an_error(self, sampler):
        learner = make_learner().train()

        def broken(step):
            if step == 1:
                raise OSError("gone")
            return sampler(step)

        with pytest.raises(OSError, match="gone"):
            evaluate(learner, broken, 10, batch_norm="transductive")
        norm = learner.encoder[0].encoder[0][1]
        assert learner.training and norm.training and norm.running_mean is not None

    @pytest.mark.parametrize("functional", [True, False], ids=["torch.func", "autograd"])
    def test_an_inner_loop_gets_its_gradients(self, functional):
        class Adapting(nn.Module):
            """Logistic regression by ten gradient steps on the support rows."""

            def forward(self, episodes):
                assert not torch.is_grad_enabled()
                outcomes = [self.task(episodes[task]) for task in range(episodes.tasks)]
                return Outcome(
                    torch.stack([loss for loss, _ in outcomes]).mean(), torch.cat([x for _, x in outcomes])
                )

            def task(self, episodes):
                def loss_of(weight):
                    return nn.functional.cross_entropy(episodes.support_x[0] @ weight, episodes.support_y[0])

                weight = torch.zeros(episodes.support_x.shape[2], episodes.ways)
                for _ in range(10):
                    if functional:
                        gradient = torch.func.grad(loss_of)(weight)
                    else:
                        with torch.enable_grad():
                            leaf = weight.requires_grad_()
                            (gradient,) = torch.autograd.grad(loss_of(leaf), leaf)
                    weight = weight.detach() - gradient
                logits = episodes.query_x @ weight
                return nn.functional.cross_entropy(logits[0], episodes.query_y[0]), logits

        torch.manual_seed(0)
        centres = 3 * torch.randn(6, 3, 8)
        labels = torch.arange(3).repeat(6, 2)
        x = centres.gather(1, labels[..., None].expand(-1, -1, 8)) + 0.1 * torch.randn(6, 6, 8)
        result = evaluate(Adapting(), Episodes(x, labels, x + 0.1 * torch.randn(6, 6, 8), labels, 3))
        assert result.mean == 1.0

    def test_running_statistics_are_those_of_training(self, sampler):
        learner = make_learner().eval()
        for module in learner.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
        hits = learner(sampler(0)).logits.argmax(-1) == sampler(0).query_y
        result = evaluate(learner, sampler, 5)
        assert result.per_episode.tolist() == hits.double().mean(-1).tolist()
        assert result.batch_norm == "running"

    @pytest.mark.parametrize("own", [False, True])
    @pytest.mark.parametrize("tasks", [1, 2, 5])
    def test_transductive_statistics_are_those_of_each_episode(self, sampler, tasks, own):
        """Also where the learner takes them so itself, and gets its batches undivided."""
        whole = sampler(0)

        def learner(own=False):
            torch.manual_seed(0)
            return ProtoNet(Conv4(channels=4), episode_statistics=own)

        expected = []
        for task in range(5):
            logits = learner().train()(whole[task]).logits
            expected.append(float((logits.argmax(-1) == whole[task].query_y).double().mean()))
        parts = [whole[start : start + tasks] for start in range(0, 5, tasks)]
        result = evaluate(learner(own), parts, 5, batch_norm="transductive")
        assert result.per_episode.tolist() == expected
        assert result.batch_norm == "transductive"

    def test_a_layer_without_running_statistics_is_named(self, sampler):
        learner = make_learner()
        learner.encoder[0].encoder[2][1] = nn.BatchNorm2d(4, track_running_stats=False)
        with pytest.raises(ValueError, match=r"layer encoder\.0\.encoder\.2\.1 keeps no running statistics"):
            evaluate(learner, sampler, 5)
        assert evaluate(learner, sampler, 5, batch_norm="transductive").episodes == 5


class Slow(Scripted):
    def forward(self, episodes):
        time.sleep(0.02)
        return super().forward(episodes)


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


class TestProgress:
    def shown(self, terminal, monkeypatch):
        monkeypatch.setattr(EVALUATE, "LOOK_EVERY", 0.01)
        with contextlib.redirect_stderr(Screen(terminal)) as screen:
            evaluate(Slow(), [scripted_episodes(4, 2)] * 10, 20, progress="5-way")
        return screen.getvalue()

    def test_on_a_terminal(self, monkeypatch):
        pytest.importorskip("tqdm")
        shown = self.shown(True, monkeypatch)
        assert "5-way" in shown and "/20" in shown
        assert " episodes/s" in shown and "loss 3.0000, accuracy 75.0 %" in shown
        # Time gone and time left.
        assert "00:00<00:0" in shown

    def test_silent_elsewhere(self, monkeypatch):
        assert self.shown(False, monkeypatch) == ""


def make_episodes(seed, rows):
    """One episode of two classes, with so many support rows of each."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(2).repeat_interleave(torch.tensor(rows)).unsqueeze(0)
    query = torch.arange(2).repeat(1, 3)
    return Episodes(
        torch.randn(1, labels.shape[1], 4, generator=g), labels, torch.randn(1, 6, 4, generator=g), query, 2
    )
