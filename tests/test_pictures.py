"""The pictures of a training run."""

import math

import pytest
import torch
from torch import nn

from metafast.backbones import MLP
from metafast.data import Episodes, EpisodeSampler, FixedEpisodes, SinusoidSampler, glyphs
from metafast.learners import MAML, ProtoNet
from metafast.training import History, Row, pictures


@pytest.fixture(autouse=True)
def matplotlib():
    pytest.importorskip("matplotlib")


def size(path):
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


@pytest.mark.parametrize("steps", [1, 250])
@pytest.mark.parametrize("validated", [True, False])
def test_learning_curve(tmp_path, steps, validated):
    extra = [0.8, 0.01, 0.5] if validated else []
    rows = [Row(step, 3.0 / step, 1 - 0.9 / step, 1e-3, float(step), *extra) for step in range(1, steps + 1)]
    pictures.draw_learning_curve(
        History(rows, steps, 0.8 if validated else None), tmp_path / "curve.png", "title"
    )
    width, height = size(tmp_path / "curve.png")
    assert width > 2 * height > 800


@pytest.mark.parametrize("validated", [True, False])
def test_learning_curve_of_regression_has_one_panel(tmp_path, validated):
    extra = [math.nan, 0.01, 0.5] if validated else []
    rows = [Row(step, 3.0 / step, math.nan, 1e-3, float(step), *extra) for step in range(1, 60)]
    pictures.draw_learning_curve(History(rows, 7), tmp_path / "curve.png", "title")
    width, height = size(tmp_path / "curve.png")
    assert 400 < height < width < 2 * height


@pytest.mark.parametrize(("count", "steps"), [(1, (0,)), (2, (1, 0, 1)), (20, (0, 1, 5, 10))])
def test_adaptation(tmp_path, count, steps):
    torch.manual_seed(0)
    learner = MAML(MLP((1, 8, 1)), steps=3, loss="mse")
    waves = FixedEpisodes(SinusoidSampler(5, 5), count)
    pictures.draw_adaptation(learner, waves, tmp_path / "adaptation.png", "title", steps)
    width, height = size(tmp_path / "adaptation.png")
    assert width == pytest.approx(min(count, 3) * 546, abs=2) and height == 520
    assert learner.training and learner.steps == 3


def test_adaptation_is_drawn_on_the_true_wave(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    sampler = SinusoidSampler(5, 5)
    learner = MAML(MLP((1, 8, 1), init_std=0.5), loss="mse")
    pictures.draw_adaptation(learner, FixedEpisodes(sampler, 1), tmp_path / "a.png", "title", (0, 2))
    wave, before, after, points = figures[0].axes[0].lines
    plan, episode = sampler.single_plan(0), FixedEpisodes(sampler, 1)[0]
    x = torch.linspace(-5, 5, 201)
    expected = plan.amplitude[0] * torch.sin(plan.frequency[0] * x - plan.phase[0])
    torch.testing.assert_close(torch.as_tensor(wave.get_ydata()), expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.as_tensor(points.get_xdata()), episode.support_x[0, :, 0])
    torch.testing.assert_close(torch.as_tensor(points.get_ydata()), episode.support_y[0, :, 0])
    whole = Episodes(
        episode.support_x, episode.support_y, x[None, :, None], expected.float()[None, :, None], 0
    )
    for line, steps in ((before, 0), (after, 2)):
        learner.steps = steps
        with torch.no_grad():
            predicted = learner(whole).logits[0, :, 0]
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()), predicted, rtol=1e-4, atol=1e-5)
    assert [line.get_label() for line in (before, after)] == ["before adaptation", "after 2 steps"]


def test_adaptation_of_classes(tmp_path):
    episodes = FixedEpisodes(EpisodeSampler(glyphs(4), 2, 1, 1), 2)
    with pytest.raises(TypeError, match="waves: expected those of a SinusoidSampler, got EpisodeSampler"):
        pictures.draw_adaptation(
            MAML(MLP((1, 1)), loss="mse"), episodes, tmp_path / "adaptation.png", "title"
        )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("ways", "shots", "queries"), [(2, 1, 1), (5, 1, 15), (22, 6, 2)])
def test_episode(tmp_path, channels, ways, shots, queries):
    def inputs(rows):
        return torch.rand(2, ways * rows, channels, 16, 16), torch.arange(ways).repeat(2, rows)

    torch.manual_seed(0)
    batch = Episodes(*inputs(shots), *inputs(queries), ways)
    learner = ProtoNet(nn.Flatten())
    pictures.draw_episode(learner, batch, tmp_path / "episode.png", "title")
    width, height = size(tmp_path / "episode.png")
    assert min(width, height) > 200
    assert learner.training


@pytest.mark.parametrize("batch_norm", ["running", "transductive"])
def test_the_episode_is_predicted_as_in_the_test(tmp_path, batch_norm, monkeypatch):
    from matplotlib.figure import Figure

    from metafast.backbones import Conv4
    from metafast.data import EpisodeSampler, glyphs
    from metafast.training import evaluate

    torch.manual_seed(0)
    learner = ProtoNet(Conv4(channels=4))
    learner.encoder.train()
    for norm in (m for m in learner.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_var.fill_(0.01)  # far from those of any batch
    norm.eval()
    modes = [m.training for m in learner.modules()]
    batch = EpisodeSampler(glyphs(20, size=16), 5, 1, 5, tasks=6)(0)
    hardest = evaluate(learner, batch, batch_norm=batch_norm).per_episode.min()
    said = []
    write = Figure.text
    monkeypatch.setattr(
        Figure, "text", lambda self, x, y, s, **k: said.append(s) or write(self, x, y, s, **k)
    )
    pictures.draw_episode(learner, batch, tmp_path / "episode.png", "title", batch_norm)
    assert any(f"{round(float(hardest) * 25)} of 25" in text for text in said), said
    assert [m.training for m in learner.modules()] == modes


def test_episode_of_features(tmp_path):
    labels = torch.arange(2).repeat(2, 1)
    batch = Episodes(torch.zeros(2, 2, 1), labels, torch.zeros(2, 2, 1), labels, 2)
    with pytest.raises(ValueError, match=r"support_x: expected images \[T, n, C, H, W\], got \[2, 2, 1\]"):
        pictures.draw_episode(ProtoNet(nn.Identity()), batch, tmp_path / "episode.png", "title")
