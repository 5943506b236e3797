"""FEAT and its attention against their formulas."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cosine_similarity, cross_entropy

from metafast.data import Episodes
from metafast.learners import FEAT, ProtoNet, SetAttention
from tests.test_learners import episodes


def attended_by_hand(attention, queries, keys, values):
    """A row and a head at a time, without dropout."""
    q, k, v = (
        queries @ attention.w_qs.weight.T,
        keys @ attention.w_ks.weight.T,
        values @ attention.w_vs.weight.T,
    )
    rows = []
    for i in range(len(queries)):
        heads = []
        for a, b, c in zip(*(part.chunk(attention.heads, -1) for part in (q, k, v)), strict=True):
            scores = torch.stack([(a[i] * b[j]).sum() / math.sqrt(a.shape[-1]) for j in range(len(keys))])
            weights = scores.exp() / scores.exp().sum()
            heads.append(sum(weights[j] * c[j] for j in range(len(keys))))
        y = queries[i] + attention.fc.weight @ torch.cat(heads) + attention.fc.bias
        deviation = y - y.mean()
        norm = attention.layer_norm
        rows.append(deviation / (deviation.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias)
    return torch.stack(rows)


def with_random_parameters(module, dtype=torch.float64):
    """No parameter, such as a bias, is left at a value that hides it."""
    module = module.double()
    with torch.no_grad():
        for value in module.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return module.to(dtype)


def make(features=5, dtype=torch.float64, encoder=None, attention=None, **options):
    torch.manual_seed(1)
    options = {"temperature": 0.7, "balance": 0.3, "contrastive_temperature": 0.4, **options}
    attention = attention or SetAttention(features, 2, 3, 4, 0.0, 0.0)
    learner = FEAT(encoder or nn.Linear(features, features), attention, **options)
    return with_random_parameters(learner, dtype)


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_its_formula(heads):
    attention = with_random_parameters(SetAttention(6, heads, 2, 5, 0.0, 0.0))
    q, k, v = (torch.randn(2, n, 6, dtype=torch.float64) for n in (4, 7, 7))
    expected = torch.stack([attended_by_hand(attention, *rows) for rows in zip(q, k, v, strict=True)])
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-12, atol=1e-12)
    alone = torch.stack([attended_by_hand(attention, rows, rows, rows) for rows in q])
    torch.testing.assert_close(attention(q), alone, rtol=1e-12, atol=1e-12)
    # Any leading dimensions, none among them.
    torch.testing.assert_close(attention(q[0]), alone[0], rtol=1e-12, atol=1e-12)
    both = torch.stack([attended_by_hand(attention, *rows, rows[1]) for rows in zip(q, k, strict=True)])
    torch.testing.assert_close(attention(q, k), both, rtol=1e-12, atol=1e-12)


def test_a_mask_leaves_rows_out():
    attention = with_random_parameters(SetAttention(6, 2, 3, 4, 0.0, 0.0))
    rows = torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False])
    expected = torch.stack([attended_by_hand(attention, r, r[mask], r[mask]) for r in rows])
    torch.testing.assert_close(attention(rows, mask=mask.expand(1, 5)), expected, rtol=1e-12, atol=1e-12)


def test_attention_sees_a_set():
    attention = with_random_parameters(SetAttention(6, 2, 3, 4, 0.0, 0.0))
    rows, order = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(attention(rows[:, order]), attention(rows)[:, order], rtol=1e-12, atol=1e-12)


def test_initial_weights_and_names_of_the_source():
    torch.manual_seed(0)
    attention = SetAttention(64, 2, 48, 32)
    assert {name: tuple(value.shape) for name, value in attention.state_dict().items()} == {
        "w_qs.weight": (96, 64), "w_ks.weight": (96, 64), "w_vs.weight": (64, 64), "fc.weight": (64, 64),
        "fc.bias": (64,), "layer_norm.weight": (64,), "layer_norm.bias": (64,),
    }  # fmt: skip
    for layer, own in ((attention.w_qs, 48), (attention.w_ks, 48), (attention.w_vs, 32)):
        assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / (64 + own)), rel=0.05)
    assert float(attention.fc.weight.detach().std()) == pytest.approx(math.sqrt(2 / 128), rel=0.05)
    assert SetAttention(6).w_qs.out_features == SetAttention(6).w_vs.out_features == 6


def test_dropout_is_on_the_weights_and_on_what_is_added():
    rows = torch.randn(1, 40, 6)
    torch.manual_seed(0)
    on_weights, on_added = SetAttention(6, 1, 6, 6, 0.0, 0.5), SetAttention(6, 1, 6, 6, 0.5, 0.0)
    for attention in (on_weights, on_added):
        plain = attention.eval()(rows)
        assert not torch.allclose(attention.train()(rows), plain)
        assert torch.equal(attention.eval()(rows), plain)
    nn.init.eye_(on_added.fc.weight)
    dropped = []
    on_added.dropout.register_forward_hook(lambda module, inputs, output: dropped.append((inputs[0], output)))
    on_added.train()(rows)
    before, after = dropped[0]
    assert torch.equal(before, on_added.mixed(rows))
    kept = after != 0
    assert 0.3 < float(kept.float().mean()) < 0.7
    torch.testing.assert_close(after[kept], 2 * before[kept])


DISTANCES = {
    "sqeuclidean": lambda a, b: (a - b).square().sum(),
    "euclidean": lambda a, b: (a - b).square().sum().sqrt(),
    "cityblock": lambda a, b: (a - b).abs().sum(),
    "cosine": lambda a, b: 1 - cosine_similarity(a, b, 0),
}


def outcome_by_hand(learner, batch):
    """Logits, and the losses of the queries and of the contrast, a task at a time."""
    distance = DISTANCES[learner.metric]
    logits, contrasts, contrast_labels = [], [], []
    for t in range(batch.tasks):
        support, query = learner.encoder(batch.support_x[t]), learner.encoder(batch.query_x[t])
        y = batch.support_y[t]
        means = torch.stack([support[y == k].mean(0) for k in range(batch.ways)])
        adapted = attended_by_hand(learner.attention, means, means, means)
        logits.append(
            torch.stack(
                [-learner.temperature * torch.stack([distance(x, c) for c in adapted]) for x in query]
            )
        )
        rows, labels = torch.cat([support, query]), torch.cat([y, batch.query_y[t]])
        centres = []
        for k in range(batch.ways):
            own = rows[labels == k]
            centres.append(attended_by_hand(learner.attention, own, own, own).mean(0))
        contrasts += [
            -learner.contrastive_temperature * torch.stack([distance(x, c) for c in centres]) for x in rows
        ]
        contrast_labels.append(labels)
    logits = torch.stack(logits)
    loss = cross_entropy(logits.flatten(0, 1), batch.query_y.flatten())
    return logits, loss, cross_entropy(torch.stack(contrasts), torch.cat(contrast_labels))


def uneven(batch):
    """One class of the first task has another's row."""
    labels = batch.support_y.clone()
    labels[0, 0] = (labels[0, 0] + 1) % batch.ways
    queries = batch.query_y.clone()
    queries[1, 2] = (queries[1, 2] + 1) % batch.ways
    return Episodes(batch.support_x, labels, batch.query_x, queries, batch.ways)


@pytest.mark.parametrize("metric", DISTANCES)
def test_equals_the_formula_computed_by_hand(metric):
    batch = uneven(episodes())
    learner = make(metric=metric)
    logits, loss, contrast = outcome_by_hand(learner, batch)
    trained, tested = learner.train()(batch), learner.eval()(batch)
    for outcome, expected in ((trained, loss + 0.3 * contrast), (tested, loss)):
        torch.testing.assert_close(outcome.logits, logits, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(outcome.loss, expected, rtol=1e-12, atol=1e-12)
    parameters = list(learner.parameters())
    found = torch.autograd.grad(trained.loss, parameters)
    for value, expected in zip(found, torch.autograd.grad(loss + 0.3 * contrast, parameters), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-12)
        assert value.abs().sum() > 0


def test_float32_is_as_near_as_its_rounding():
    batch = episodes()
    exact, found = make().train()(batch), make(dtype=torch.float32).train()(batch.to(dtype=torch.float32))
    assert found.loss.dtype == found.logits.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logits.double(), exact.logits, rtol=1e-5, atol=5e-6)


def test_a_task_alone_equals_a_task_in_a_batch():
    batch, learner = episodes(tasks=3), make().train()
    together = learner(batch)
    alone = [learner(batch[t]) for t in range(3)]
    torch.testing.assert_close(
        together.logits, torch.cat([one.logits for one in alone]), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        together.loss, torch.stack([one.loss for one in alone]).mean(), rtol=1e-12, atol=1e-12
    )


def test_the_order_of_rows_and_of_classes_does_not_matter():
    batch, learner = episodes(), make().train()
    rows, names = torch.randperm(batch.support_x.shape[1]), torch.tensor([2, 0, 1])
    other = Episodes(
        batch.support_x[:, rows], names[batch.support_y[:, rows]], batch.query_x, names[batch.query_y], 3
    )
    expected, found = learner(batch), learner(other)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.logits[..., names], expected.logits, rtol=1e-12, atol=1e-12)


def test_without_an_adaptation_it_is_the_prototypical_network():
    class Unadapted(nn.Module):
        def forward(self, rows, mask=None):
            return rows

    batch = episodes()
    learner = FEAT(nn.Identity(), Unadapted(), temperature=0.7, balance=0.0).train()
    expected = ProtoNet(nn.Identity(), temperature=0.7)(batch)
    torch.testing.assert_close(tuple(learner(batch)), tuple(expected), rtol=1e-12, atol=1e-12)


def test_a_class_without_support_rows_is_seen_by_none():
    batch = episodes(ways=3)
    alone = Episodes(
        batch.support_x, batch.support_y.clamp(max=1), batch.query_x, batch.query_y.clamp(max=1), 3
    )
    learner = make().train()
    outcome = learner(alone)
    assert (outcome.logits[..., 2] == -torch.inf).all()
    two = learner(Episodes(alone.support_x, alone.support_y, alone.query_x, alone.query_y, 2))
    torch.testing.assert_close(outcome.logits[..., :2], two.logits, rtol=1e-12, atol=1e-12)
    learner(alone).loss.backward()
    assert all(value.grad.isfinite().all() for value in learner.parameters())


def test_derivatives_of_second_order():
    batch = episodes(tasks=1, ways=2, shots=1, queries=1, shape=(3,))
    learner = make(3).train()

    def loss(support, query, *weights):
        own = Episodes(support, batch.support_y, query, batch.query_y, 2)
        names = [name for name, _ in learner.named_parameters()]
        return torch.func.functional_call(learner, dict(zip(names, weights, strict=True)), (own,)).loss

    inputs = [batch.support_x, batch.query_x, *learner.parameters()]
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


def test_under_autocast_only_the_encoder_is_bfloat16():
    batch = episodes(dtype=torch.float32)
    learner = make(dtype=torch.float32).train()
    exact = learner(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = learner(batch)
        flat = make(dtype=torch.float32, encoder=nn.Identity())(batch)
    assert loss.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact.logits, rtol=0.1, atol=0.2)
    assert not torch.equal(logits, exact.logits)
    assert torch.equal(flat.logits, make(dtype=torch.float32, encoder=nn.Identity())(batch).logits)


def test_a_training_step_compiles_whole():
    batch = episodes()
    learner = make().train()

    def loss(own):
        return learner(own).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    parameters = list(learner.parameters())
    expected = torch.autograd.grad(loss(batch), parameters)
    found = torch.autograd.grad(compiled(batch), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_it_learns():
    random = torch.Generator().manual_seed(0)

    def tasks():
        centres = torch.randn(32, 2, 4, generator=random)
        x = torch.cat([centres + 0.5 * torch.randn(32, 2, 4, generator=random) for _ in range(6)], 1)
        y = torch.arange(2).repeat(6).expand(32, -1)
        return Episodes(x[:, :2], y[:, :2], x[:, 2:], y[:, 2:], 2)

    torch.manual_seed(0)
    learner = FEAT(nn.Linear(4, 8), SetAttention(8), temperature=1.0, balance=0.1).train()
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = learner(tasks()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_state_dicts_and_copies():
    learner = make()
    other = FEAT(nn.Linear(5, 5), SetAttention(5, 2, 3, 4, 0.0, 0.0), temperature=0.7).double()
    other.load_state_dict(learner.state_dict())
    batch = episodes()
    assert torch.equal(other.eval()(batch).logits, learner.eval()(batch).logits)
    assert torch.equal(deepcopy(learner)(batch).logits, learner(batch).logits)
    assert "metric='sqeuclidean', temperature=0.7, balance=0.3, contrastive_temperature=0.4" in repr(learner)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SetAttention(0), ValueError, "features: expected at least 1, got 0"),
        (lambda: SetAttention(4, 0), ValueError, "heads: expected at least 1, got 0"),
        (lambda: SetAttention(4, 1, 2.5), TypeError, "key_features: expected an int, got float"),
        (
            lambda: SetAttention(4, dropout=1.0),
            ValueError,
            "dropout: expected a number from 0 to below 1, got 1",
        ),
        (
            lambda: SetAttention(4, attention_dropout="a"),
            TypeError,
            "attention_dropout: expected a number, got str",
        ),
        (
            lambda: SetAttention(4)(torch.rand(2, 3, 5)),
            ValueError,
            r"queries: expected 4 features, got \[2, 3, 5\]",
        ),
        (
            lambda: SetAttention(4)(torch.rand(3, 4), torch.rand(3, 2)),
            ValueError,
            r"keys: expected 4 features, got \[3, 2\]",
        ),
        (lambda: FEAT(nn.Identity(), 3), TypeError, r"attention: expected a torch\.nn\.Module, got int"),
        (lambda: make(metric="l2"), ValueError, "metric: expected sqeuclidean or euclidean or cityblock"),
        (lambda: make(temperature=0.0), ValueError, "temperature: expected a positive finite number, got 0"),
        (
            lambda: make(contrastive_temperature=-1.0),
            ValueError,
            "contrastive_temperature: expected a positive",
        ),
        (
            lambda: make(balance=-1.0),
            ValueError,
            "balance: expected a finite number that is not negative, got -1",
        ),
        (
            lambda: make(balance=math.nan),
            ValueError,
            "balance: expected a finite number that is not negative",
        ),
        (
            lambda: make(encoder=nn.Flatten())(episodes(shape=(2, 2))),
            ValueError,
            r"queries: expected 5 features, got \[2, 3, 4\]",
        ),
        (
            lambda: make(encoder=nn.Identity())(episodes(shape=(2, 2))),
            ValueError,
            r"encoder: expected features \[36, d\], got \[36, 2, 2\]",
        ),
        (
            lambda: make()(
                Episodes(
                    torch.rand(1, 2, 5), torch.rand(1, 2, 1), torch.rand(1, 2, 5), torch.rand(1, 2, 1), 0
                )
            ),
            ValueError,
            "episodes: expected classes, got regression tasks",
        ),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
