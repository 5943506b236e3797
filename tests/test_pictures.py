"""The pictures of a training run."""

import pytest
import torch
from torch import nn

from metafast.data import Episodes
from metafast.learners import ProtoNet
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
