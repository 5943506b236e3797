"""Matching and relation networks against their formulas."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn.functional import cosine_similarity, cross_entropy, max_pool2d, one_hot, relu

from metafast.data import Episodes
from metafast.learners import MatchingNet, RelationEncoder, RelationHead, RelationNet
from tests.test_learners import episodes


def attention_by_hand(support, labels, query, ways, scale):
    """Probabilities ``[m, C]`` of a task."""
    rows = []
    for x in query:
        weights = torch.softmax(torch.stack([scale * cosine_similarity(x, g, 0) for g in support]), 0)
        rows.append(torch.stack([weights[labels == k].sum() for k in range(ways)]))
    return torch.stack(rows)


@pytest.mark.parametrize("scale", [1.0, 10.0, 500.0])
def test_matching_is_its_formula(scale):
    batch = episodes()
    loss, logits = MatchingNet(nn.Identity(), scale)(batch)
    expected = torch.stack(
        [
            attention_by_hand(*task, 3, scale)
            for task in zip(batch.support_x, batch.support_y, batch.query_x, strict=True)
        ]
    )
    torch.testing.assert_close(logits.exp(), expected, rtol=1e-9, atol=1e-14)
    chosen = expected.flatten(0, 1)[torch.arange(24), batch.query_y.flatten()]
    if scale < 500:
        torch.testing.assert_close(loss, -chosen.log().mean(), rtol=1e-10, atol=0)
    # A probability that float64 has not still has its logarithm.
    assert loss.isfinite()


def in_context_by_hand(learner, support, query):
    """Full context embeddings of a task, a row and a cell at a time."""
    n, d = support.shape
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    lstm, added = learner.support_reader, torch.zeros_like(support)
    for suffix, turn in (("", order), ("_reverse", order[::-1])):
        cell = nn.LSTMCell(d, d).double()
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, name).data = getattr(lstm, f"{name}_l0{suffix}").data
        state = None
        for row in turn:
            state = cell(support[row : row + 1], state)
            added[row] += state[0][0].detach()
    support = support + added
    outs = []
    for x in query:
        h = c = r = torch.zeros(1, d, dtype=torch.float64)
        for _ in range(learner.reading_steps):
            h, c = learner.query_reader(torch.cat([x[None], r], 1), (h, c))
            h = h + x
            weights = torch.softmax(torch.stack([(h[0] * g).sum() for g in support]), 0)
            r = sum(w * g for w, g in zip(weights, support, strict=True))[None]
        outs.append(h[0])
    return support, torch.stack(outs)


def test_matching_in_full_context_is_its_formula():
    torch.manual_seed(0)
    batch = episodes()
    learner = MatchingNet(nn.Identity(), 2.0, full_context=5, reading_steps=2).double()
    _, logits = learner(batch)
    for k in range(2):
        support, query = in_context_by_hand(learner, batch.support_x[k], batch.query_x[k])
        expected = attention_by_hand(support, batch.support_y[k], query, 3, 2.0)
        torch.testing.assert_close(logits[k].exp(), expected, rtol=1e-9, atol=1e-12)
    learner(batch).loss.backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in learner.parameters())


@pytest.mark.parametrize("full_context", [None, 5])
def test_a_class_without_support_rows_has_no_probability(full_context):
    batch = episodes()
    alone = Episodes(
        batch.support_x, batch.support_y.clamp(max=1), batch.query_x, batch.query_y.clamp(max=1), 3
    )
    learner = MatchingNet(nn.Linear(5, 5), full_context=full_context).double()
    loss, logits = learner(alone)
    assert (logits[..., 2] == -torch.inf).all() and logits[..., :2].isfinite().all()
    loss.backward()
    assert all(value.grad.isfinite().all() for value in learner.parameters())


def test_derivatives_of_matching():
    batch = episodes(tasks=1, queries=1)
    learner = MatchingNet(nn.Identity(), 3.0, learn_scale=True).double()
    assert [name for name, _ in learner.named_parameters()] == ["scale"]

    def loss(support, query, scale):
        learner.scale.data = scale.data
        own = Episodes(support, batch.support_y, query, batch.query_y, 3)
        return torch.func.functional_call(learner, {"scale": scale}, (own,)).loss

    inputs = (batch.support_x, batch.query_x, torch.tensor(3.0, dtype=torch.float64))
    assert gradcheck(loss, [value.clone().requires_grad_() for value in inputs])


def test_sizes_of_maps():
    encoder = RelationEncoder(3, 6)
    for size, side in ((28, 5), (84, 19), (22, 4)):
        assert encoder(torch.rand(2, 3, size, size)).shape == (2, 6, side, side)
        assert RelationEncoder.side(size) == side
    for side, left, padding in ((5, 1, 1), (4, 1, 1), (19, 3, 0), (10, 1, 0), (9, 2, 1)):
        head = RelationHead(side, 6)
        assert head.score[1].in_features == 6 * left**2 and head.convolution.padding == (padding, padding)
        assert head(torch.rand(2, 3, 6, side, side), torch.rand(2, 4, 6, side, side)).shape == (2, 4, 3)


@pytest.mark.parametrize("training", [True, False])
def test_fused_encoder_is_its_layers(training):
    """With and without padding and pooling: maps, gradients and running statistics."""
    torch.manual_seed(0)
    encoder = RelationEncoder(2, 5).double()
    for block in encoder:
        nn.init.normal_(block[1].weight)
        nn.init.uniform_(block[1].running_var, 0.5, 2)
    layers = deepcopy(nn.Sequential(*(nn.Sequential(*block) for block in encoder)))
    assert list(layers.state_dict()) == list(encoder.state_dict())
    images = torch.rand(3, 2, 24, 25, dtype=torch.float64)
    results = []
    for network in (encoder, layers):
        maps = network.train(training)(images)
        found = torch.autograd.grad(maps.sin().sum(), list(network.parameters()))
        results.append([maps, *found, *network.buffers()])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_initial_weights_of_the_source():
    torch.manual_seed(0)
    head = RelationHead(5, 64)
    assert float(head.convolution.weight.detach().std()) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.01)
    assert float(head.score[1].weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    assert (head.score[1].bias == 1).all() and (head.convolution.bias == 0).all()


def scores_by_hand(head, classes, queries):
    """Of a task: each pair stacked on its own, BatchNorm by all pairs of all tasks."""
    pairs = torch.stack(
        [
            torch.cat([c, q])
            for task_classes, task_queries in zip(classes, queries, strict=True)
            for q in task_queries
            for c in task_classes
        ]
    )
    y = head.convolution(pairs)
    for norm, after in ((head.first[0], head.second[0]), (head.second[1], None)):
        mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), correction=0, keepdim=True)
        y = (y - mean) / (var + norm.eps).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        y = max_pool2d(relu(y), 2)
        y = y if after is None else after(y)
    one, _, two = list(head.score)[1:]
    return (relu(y.flatten(1) @ one.weight.T + one.bias) @ two.weight.T + two.bias).view(
        queries.shape[0], queries.shape[1], -1
    )


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_relation_is_its_formula(loss):
    """The sum over the support rows of a class, also where classes have not as many; all pairs; the loss."""
    torch.manual_seed(0)
    batch = episodes(shape=(2, 6, 6))
    labels = batch.support_y.clone()
    labels[0, 0] = (labels[0, 0] + 1) % 3
    batch = Episodes(batch.support_x, labels, batch.query_x, batch.query_y, 3)
    learner = RelationNet(nn.Conv2d(2, 4, 3), RelationHead(4, 4), loss).double()
    plain = deepcopy(learner)
    got, logits = learner(batch)
    maps = plain.encoder(torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1)).unflatten(0, (2, 18))
    classes = torch.stack(
        [torch.stack([maps[t, :6][labels[t] == k].sum(0) for k in range(3)]) for t in range(2)]
    )
    expected = scores_by_hand(plain.head, classes, maps[:, 6:])
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    if loss == "mse":
        wanted = (expected.sigmoid() - one_hot(batch.query_y, 3)).square().mean()
    else:
        wanted = cross_entropy(expected.flatten(0, 1), batch.query_y.flatten())
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    found = torch.autograd.grad(got, list(learner.parameters()))
    other = torch.autograd.grad(wanted, list(plain.parameters()))
    for a, b in zip(found, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["matching", "relation"])
def test_under_autocast_the_loss_is_float32(kind):
    torch.manual_seed(0)
    batch = episodes(shape=(1, 22, 22), dtype=torch.float32)
    learner = (
        MatchingNet(nn.Sequential(nn.Flatten(), nn.Linear(484, 8)), full_context=8)
        if kind == "matching"
        else RelationNet(RelationEncoder(1, 8), RelationHead(4, 8))
    )
    exact = learner(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = learner(batch)
    assert loss.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(loss, exact.loss, rtol=0.05, atol=0.01)
    assert not torch.equal(logits, exact.logits)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: MatchingNet(nn.Identity(), -1.0),
            ValueError,
            "scale: expected a positive finite number, got -1",
        ),
        (
            lambda: MatchingNet(nn.Identity(), full_context=0),
            ValueError,
            "full_context: expected at least 1, got 0",
        ),
        (lambda: MatchingNet(nn.Identity(), reading_steps=1.5), TypeError, "reading_steps: expected an int"),
        (
            lambda: MatchingNet(nn.Identity(), full_context=4).double()(episodes()),
            ValueError,
            "encoder: expected 4 features, as full_context says, got 5",
        ),
        (lambda: RelationNet(nn.Identity(), 3), TypeError, r"head: expected a torch\.nn\.Module, got int"),
        (
            lambda: RelationNet(nn.Identity(), nn.Identity(), "l1"),
            ValueError,
            "loss: expected mse or cross_entropy",
        ),
        (
            lambda: RelationNet(nn.Identity(), RelationHead(4))(episodes()),
            ValueError,
            r"encoder: expected maps \[36, c, h, w\], got \[36, 5\]",
        ),
        (lambda: RelationHead(3), ValueError, "side: expected at least 4, got 3"),
        (lambda: RelationEncoder(0), ValueError, "in_channels: expected at least 1, got 0"),
        (lambda: RelationEncoder.side(21), ValueError, "images: expected at least 22 x 22, got 21 x 21"),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
