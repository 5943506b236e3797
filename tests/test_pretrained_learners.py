"""SimpleShot, Baseline and Baseline++ against their formulas, and the rows that they are pre-trained on."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.nn.utils.parametrizations import weight_norm

from metafast.backbones import Conv4
from metafast.data import Episodes, EpisodeSampler, ImageClasses, RowSampler, check, glyphs
from metafast.learners import Baseline, BaselinePlusPlus, CosineHead, LinearHead, ProtoNet, SimpleShot
from metafast.learners.baseline import fit_directions
from metafast.training import evaluate, fit, load_checkpoint
from tests.test_feat import uneven, with_random_parameters
from tests.test_learners import episodes

KINDS = {"simpleshot": SimpleShot, "baseline": Baseline, "baseline++": BaselinePlusPlus}


def base_rows(count=7, classes=6, features=5, dtype=torch.float64):
    """Labelled rows of base classes, as a RowSampler gives them."""
    x = torch.randn(count, 1, features, dtype=dtype)
    y = torch.randint(classes, (count, 1))
    return Episodes(x[:, :0], y[:, :0], x, y, classes)


def make(kind, encoder=None, features=5, base_classes=6, dtype=torch.float64, **options):
    torch.manual_seed(1)
    return with_random_parameters(
        KINDS[kind](encoder or nn.Linear(5, features), features, base_classes, **options), dtype
    )


# Rows of base classes.


def tiny(rotations=False, sizes=(2, 3, 1), first=0):
    """Images whose first pixel is their number."""
    count = sum(sizes)
    images = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(first, first + count) + 1
    sizes = torch.tensor(sizes)
    return ImageClasses(
        images, sizes.cumsum(0) - sizes, sizes, tuple(f"{first}-{k}" for k in range(len(sizes))), rotations
    )


def seen(batch):
    """(number of the image, its quarter turns, its label) of each row."""
    corners = [(0, 0), (1, 0), (1, 1), (0, 1)]
    found = []
    for image, label in zip(batch.query_x[:, 0, 0], batch.query_y[:, 0].tolist(), strict=True):
        (turn,) = [k for k, (i, j) in enumerate(corners) if image[i, j] > 0]
        found.append((round(image.max().item() * 255), turn, label))
    return found


def test_a_pass_takes_every_row_once():
    data, own = [tiny(), tiny(rotations=True, sizes=(1, 2), first=20)], []
    labels = {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2}
    own += [(number, 0, label) for number, label in labels.items()]
    own += [(number, k, 3 + c + 2 * k) for number, c in ((21, 0), (22, 1), (23, 1)) for k in range(4)]
    sampler = RowSampler(data, 5, seed=3)
    assert (sampler.rows, sampler.ways) == (18, 11)
    assert sorted(entry for batch in sampler.once() for entry in seen(batch)) == sorted(own)
    rows = [entry for step in range(18) for entry in seen(sampler(step))]
    passes = [rows[k : k + 18] for k in range(0, 90, 18)]
    assert all(sorted(part) == sorted(own) for part in passes)
    assert len({tuple(part) for part in passes}) == 5
    assert all(batch.tasks == 5 and batch.ways == 11 for batch in (sampler(0), sampler(3)))
    assert [len(batch) for batch in RowSampler(tiny(sizes=(100,) * 3), 5).once()] == [256, 44]


def test_a_step_is_a_function_of_seed_and_step():
    data = tiny()
    sampler = RowSampler(data, 4, seed=2)
    steps = [sampler(step) for step in (7, 0, 3, 7)]
    again = [RowSampler(data, 4, seed=2)(step) for step in (7, 0, 3, 7)]
    for one, other in zip(steps, again, strict=True):
        assert torch.equal(one.query_x, other.query_x) and torch.equal(one.query_y, other.query_y)
    assert any(seen(RowSampler(data, 4, seed=1)(k)) != seen(sampler(k)) for k in range(3))
    first = iter(sampler)
    assert [seen(next(first)) for _ in range(3)] == [seen(sampler(k)) for k in range(3)]
    # A batch may be larger than a pass.
    assert sorted(seen(RowSampler(data, 12)(1))) == sorted(2 * [e for b in sampler.once() for e in seen(b)])


def test_a_batch_without_support_rows_is_no_error():
    check(RowSampler(tiny(), 4)(0))
    batch = base_rows()
    with pytest.raises(ValueError, match=r"query_y must hold labels in 0\.\.1, got"):
        check(Episodes(batch.support_x, batch.support_y, batch.query_x, batch.query_y, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, 4), TypeError, "dataset must be"),
        ((tiny(), 0), ValueError, "batch must be at least 1, got 0"),
        ((tiny(), 2.0), TypeError, "batch must be an integer"),
        ((tiny(), 2, -1), ValueError, "seed must be"),
    ],
)
def test_wrong_rows_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        RowSampler(*arguments)
    with pytest.raises(ValueError, match="step must be at least 0"):
        RowSampler(tiny(), 1)(-1)


# Pre-training.


def base_logits_by_hand(kind, head, features):
    if kind != "baseline++":
        return features @ head.weight.T + head.bias
    rows = []
    for x in features:
        x = x / (x.norm() + 1e-5)
        rows.append(
            torch.stack(
                [
                    head.scale * g * (v @ x) / v.norm()
                    for g, v in zip(head.weight_g, head.weight_v, strict=True)
                ]
            )[:, 0]
        )
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_base_classes_are_classified_by_the_head(kind):
    learner, batch = make(kind), base_rows()
    features = learner.encoder(batch.query_x[:, 0])
    logits = base_logits_by_hand(kind, learner.head, features)
    loss = cross_entropy(logits, batch.query_y[:, 0])
    for mode in (True, False):
        outcome = learner.train(mode)(batch)
        torch.testing.assert_close(outcome.logits[:, 0], logits, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(outcome.loss, loss, rtol=1e-12, atol=1e-12)
    parameters = list(learner.parameters())
    found = torch.autograd.grad(outcome.loss, parameters)
    for value, expected in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
    single = make(kind, dtype=torch.float32)(batch.to(dtype=torch.float32))
    torch.testing.assert_close(single.loss.double(), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_pretraining_compiles_whole(kind):
    learner, batch = make(kind), base_rows()

    def loss(rows):
        return learner(rows).loss

    parameters = list(learner.parameters())
    expected = torch.autograd.grad(loss(batch), parameters)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(batch), parameters), expected, rtol=1e-11, atol=1e-13
    )


def test_batch_norm_of_pretraining_takes_the_batch():
    norm = nn.BatchNorm1d(5, affine=False, eps=1e-14)
    learner = SimpleShot(norm, 5, 6).double().train()
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    learner(base_rows(9))
    assert seen[0].shape == (9, 5)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_initial_heads():
    torch.manual_seed(0)
    linear, cosine = Baseline(nn.Identity(), 100, 300).head, BaselinePlusPlus(nn.Identity(), 100, 300).head
    assert (linear.bias == 0).all() and SimpleShot(nn.Identity(), 100, 300).head.weight.shape == (300, 100)
    for weight in (linear.weight, cosine.weight_v):
        assert float(weight.detach().abs().max()) == pytest.approx(0.1, rel=0.01)
        assert float(weight.detach().std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.02)
    assert float(LinearHead(100, 50).bias.detach().abs().max()) == pytest.approx(0.1, rel=0.1)
    torch.testing.assert_close(cosine.weight_g, cosine.weight_v.norm(dim=1, keepdim=True))
    assert [CosineHead(4, classes).scale for classes in (200, 201)] == [2.0, 10.0]
    assert CosineHead(4, 201, scale=3).scale == BaselinePlusPlus(nn.Identity(), 4, 201, 3).head.scale == 3.0
    assert {name for name, _ in cosine.named_parameters()} == {"weight_v", "weight_g"}


# SimpleShot.


def simpleshot_by_hand(learner, batch, distance):
    logits = []
    for t in range(batch.tasks):
        features = []
        for images in (batch.support_x[t], batch.query_x[t]):
            centred = [x - learner.feature_mean for x in learner.encoder(images)]
            features.append([z / z.norm() for z in centred] if learner.normalise else centred)
        support, query = (torch.stack(rows) for rows in features)
        means = [support[batch.support_y[t] == k].mean(0) for k in range(batch.ways)]
        logits.append(
            torch.stack([torch.stack([-learner.temperature * distance(x, c) for c in means]) for x in query])
        )
    logits = torch.stack(logits)
    return logits, cross_entropy(logits.flatten(0, 1), batch.query_y.flatten())


DISTANCES = {
    "sqeuclidean": lambda a, b: (a - b).square().sum(),
    "euclidean": lambda a, b: (a - b).square().sum().sqrt(),
    "cityblock": lambda a, b: (a - b).abs().sum(),
    "cosine": lambda a, b: 1 - cosine_similarity(a, b, 0),
}


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("metric", DISTANCES)
def test_simpleshot_is_its_formula(metric, normalise):
    batch = uneven(episodes())
    learner = make("simpleshot", metric=metric, temperature=1.7, normalise=normalise)
    learner.centre_on(torch.randn(11, 5, dtype=torch.float64))
    logits, loss = simpleshot_by_hand(learner, batch, DISTANCES[metric])
    outcome = learner(batch)
    torch.testing.assert_close(tuple(outcome), (loss, logits), rtol=1e-12, atol=1e-12)
    parameters = list(learner.encoder.parameters())
    found = torch.autograd.grad(outcome.loss, parameters)
    torch.testing.assert_close(found, torch.autograd.grad(loss, parameters), rtol=1e-10, atol=1e-12)
    single = make("simpleshot", metric=metric, temperature=1.7, normalise=normalise, dtype=torch.float32)
    single.load_state_dict(learner.state_dict())
    found = single(batch.to(dtype=torch.float32))
    assert found.loss.dtype == found.logits.dtype == torch.float32
    torch.testing.assert_close(found.logits.double(), logits, rtol=1e-6, atol=3e-6)


def test_simpleshot_has_derivatives_of_second_order():
    batch = episodes(tasks=1, ways=2, shots=1, queries=1, shape=(3,))
    learner = SimpleShot(nn.Identity(), 3).double()
    learner.centre_on(torch.full((1, 3), 0.3, dtype=torch.float64))

    def loss(support, query):
        return learner(Episodes(support, batch.support_y, query, batch.query_y, 2)).loss

    inputs = [value.clone().requires_grad_() for value in (batch.support_x, batch.query_x)]
    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs)


def test_without_mean_and_norm_simpleshot_is_the_prototypical_network():
    batch = episodes()
    found = SimpleShot(nn.Identity(), 5, normalise=False).double()(batch)
    assert torch.equal(found.logits, ProtoNet(nn.Identity())(batch).logits)
    assert torch.equal(found.loss, ProtoNet(nn.Identity())(batch).loss)


def test_the_mean_of_features():
    torch.manual_seed(0)
    learner = SimpleShot(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), 4).train()
    learner.encoder[0].eval()
    x = torch.randn(10, 5) + 3
    before = {name: value.clone() for name, value in learner.encoder.state_dict().items()}
    given = learner.centre_on(x)
    norm = learner.encoder[1]
    expected = learner.encoder[0](x).detach() / (1 + norm.eps) ** 0.5
    torch.testing.assert_close(learner.feature_mean, expected.mean(0), rtol=1e-6, atol=1e-6)
    assert given is learner.feature_mean and not given.requires_grad
    # In evaluation mode, and as it was again after it.
    assert all(torch.equal(value, before[name]) for name, value in learner.encoder.state_dict().items())
    assert [module.training for module in learner.modules()] == [True, True, False, True, True]
    # Batches of any sizes have the mean of all their rows.
    torch.testing.assert_close(learner.centre_on(part for part in x.split([1, 6, 3])), given)
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        learner.centre_on([])
    with pytest.raises(TypeError, match="images: expected a tensor, got int"):
        learner.centre_on([3])
    with pytest.raises(ValueError, match=r"encoder: expected features \[10, 3\], got \[10, 5\]"):
        SimpleShot(nn.Identity(), 3).centre_on(x)


def test_checkpoints_of_simpleshot_hold_the_mean(tmp_path):
    """It is that of the weights of each checkpoint, on every row of the base classes."""
    torch.manual_seed(0)
    base, others = glyphs(4, size=16), glyphs(5, first_class=20, size=16)

    def learner():
        torch.manual_seed(0)
        return SimpleShot(Conv4(channels=4), 4, 4)

    def mean_of(own):
        batches = [rows.query_x.flatten(0, 1) for rows in RowSampler(base, 7).once()]
        with torch.no_grad():
            return own.eval().encoder(torch.cat(batches)).mean(0)

    train = RowSampler(base, 8, seed=1)
    trained = learner()
    fit(
        trained, train, 5, validation=EpisodeSampler(others, 3, 1, 2), validation_episodes=4, validate_every=2,
        out=tmp_path,
    )  # fmt: skip
    for name in ("best", "last"):
        saved = learner()
        saved.load_state_dict(load_checkpoint(tmp_path / f"checkpoint-{name}.pt")["model"])
        assert saved.feature_mean.abs().sum() > 0
        torch.testing.assert_close(saved.feature_mean, mean_of(saved), rtol=1e-5, atol=1e-6)
    # Without validation too; and a sampler of episodes has no rows to centre on.
    alone = learner()
    fit(alone, train, 2)
    torch.testing.assert_close(alone.feature_mean, mean_of(alone), rtol=1e-5, atol=1e-6)
    episodic = learner()
    fit(episodic, EpisodeSampler(base, 3, 1, 2), 2)
    assert (episodic.feature_mean == 0).all()


# Baseline and Baseline++.


class Cosines(nn.Module):
    """The source's head, on torch's own weight norm."""

    def __init__(self, features, classes, scale):
        super().__init__()
        self.layer = weight_norm(nn.Linear(features, classes, bias=False), dim=0)
        self.scale = scale

    def forward(self, x):
        return self.scale * self.layer(x / (x.norm(dim=1, keepdim=True) + 1e-5))


def fitted_by_hand(learner, support, labels, ways):
    """A task's head: torch's own layers, loss and optimiser, a mini-batch after the other."""
    random = torch.Generator().manual_seed(learner.seed)
    bound = 1 / math.sqrt(support.shape[1])
    weight = torch.empty(ways, support.shape[1]).uniform_(-bound, bound, generator=random)
    if isinstance(learner, BaselinePlusPlus):
        scale = learner.make_head(1, ways, None).scale
        head = Cosines(support.shape[1], ways, scale).double()
        norm, direction = (
            head.layer.parametrizations.weight.original0,
            head.layer.parametrizations.weight.original1,
        )
        norm.data, direction.data = weight.norm(dim=1, keepdim=True).double(), weight.double()
    else:
        head = nn.Linear(support.shape[1], ways).double()
        bias = torch.empty(ways).uniform_(-bound, bound, generator=random)
        head.weight.data, head.bias.data = weight.double(), bias.double()
    optimizer = torch.optim.SGD(head.parameters(), **learner.sgd)
    for order in [torch.randperm(len(support), generator=random) for _ in range(learner.epochs)]:
        for k in range(0, len(support), learner.batch_size):
            rows = order[k : k + learner.batch_size]
            optimizer.zero_grad()
            cross_entropy(head(support[rows]), labels[rows]).backward()
            optimizer.step()
    return head


def outcome_by_hand(learner, batch):
    logits = []
    for t in range(batch.tasks):
        support = learner.encoder(batch.support_x[t]).detach()
        head = fitted_by_hand(learner, support, batch.support_y[t], batch.ways)
        logits.append(head(learner.encoder(batch.query_x[t])))
    logits = torch.stack(logits)
    return logits, cross_entropy(logits.flatten(0, 1), batch.query_y.flatten())


#: Fewer rows than features and more, a last mini-batch of one row and a full one, a scale and no momentum.
FITS = {
    "usual": {"features": 20, "epochs": 20},
    "more rows than features": {"features": 3, "epochs": 15, "batch_size": 3, "seed": 5},
    "one row": {"features": 12, "batch_size": 1, "lr": 0.3, "epochs": 5, "weight_decay": 0.2},
    "all rows": {"features": 4, "batch_size": 99, "lr": 0.5, "epochs": 7, "momentum": 0.0},
    "undamped": {"features": 7, "lr": 0.2, "epochs": 4, "dampening": 0.0, "momentum": 0.5},
}


@pytest.mark.parametrize("fit_options", FITS.values(), ids=FITS)
@pytest.mark.parametrize("kind", ["baseline", "baseline++"])
def test_a_head_for_each_task_is_the_loop_over_tasks(kind, fit_options):
    batch = uneven(episodes(shots=3))
    scale = {"scale": 5.0} if kind == "baseline++" and fit_options["features"] == 7 else {}
    learner = make(kind, **fit_options, **scale)
    logits, loss = outcome_by_hand(learner, batch)
    outcome = learner(batch)
    torch.testing.assert_close(tuple(outcome), (loss, logits), rtol=1e-12, atol=1e-12)
    # Through the queries' features; the fit is a constant.
    parameters = list(learner.encoder.parameters())
    found = torch.autograd.grad(outcome.loss, parameters)
    torch.testing.assert_close(found, torch.autograd.grad(loss, parameters), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["baseline", "baseline++"])
def test_a_long_fit_in_float32(kind):
    batch = episodes(shots=5)
    exact = make(kind)(batch)
    found = make(kind, dtype=torch.float32)(batch.to(dtype=torch.float32))
    assert found.loss.dtype == found.logits.dtype == torch.float32
    torch.testing.assert_close(found.logits.double(), exact.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["baseline", "baseline++"])
def test_directions_outside_the_rows_and_rows_that_coincide(kind):
    """Rows that span less than they could, and a zero row among them."""
    learner = make(kind, encoder=nn.Identity(), features=5, epochs=10)
    x = torch.randn(1, 4, 5, dtype=torch.float64)
    x[:, 1], x[:, 3] = x[:, 0], 0
    batch = Episodes(
        x,
        torch.tensor([[0, 1, 1, 0]]),
        torch.randn(1, 3, 5, dtype=torch.float64),
        torch.zeros(1, 3, dtype=torch.int64),
        2,
    )
    logits, _ = outcome_by_hand(learner, batch)
    torch.testing.assert_close(learner(batch).logits, logits, rtol=1e-12, atol=1e-12)


def test_no_epochs_leave_the_initial_head():
    batch = episodes()
    learner = make("baseline", encoder=nn.Identity(), epochs=0)
    weight = fitted_by_hand(learner, batch.support_x[0], batch.support_y[0], 3)
    torch.testing.assert_close(
        learner(batch).logits[1], weight(batch.query_x[1]).detach(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_alone_equals_a_task_in_a_batch(kind):
    batch, learner = episodes(tasks=3), make(kind)
    together = learner(batch)
    alone = [learner(batch[t]) for t in range(3)]
    torch.testing.assert_close(
        together.logits, torch.cat([one.logits for one in alone]), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        together.loss, torch.stack([one.loss for one in alone]).mean(), rtol=1e-12, atol=1e-12
    )


def test_the_order_of_rows_and_of_classes_does_not_matter_to_simpleshot():
    batch, learner = episodes(), make("simpleshot")
    rows, names = torch.randperm(batch.support_x.shape[1]), torch.tensor([2, 0, 1])
    other = Episodes(
        batch.support_x[:, rows], names[batch.support_y[:, rows]], batch.query_x, names[batch.query_y], 3
    )
    torch.testing.assert_close(
        learner(other).logits[..., names], learner(batch).logits, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["baseline", "baseline++"])
def test_a_seed_tells_the_fit(kind):
    batch, learner = episodes(), make(kind, epochs=3)
    before = torch.get_rng_state()
    assert torch.equal(learner(batch).logits, learner(batch).logits)
    assert torch.equal(torch.get_rng_state(), before)
    other = make(kind, epochs=3, seed=1)
    assert not torch.allclose(other(batch).logits, learner(batch).logits)
    # What varies is the head, and the order of the rows too.
    late = [make(kind, epochs=60, lr=0.5, seed=seed)(batch).logits for seed in (0, 1)]
    assert not torch.allclose(*late, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["baseline", "baseline++"])
def test_the_fit_needs_no_gradients_and_leaves_none(kind):
    batch, learner = episodes(), make(kind, epochs=3)
    with torch.no_grad():
        found = learner(batch)
    assert not found.loss.requires_grad
    assert torch.equal(found.logits, learner(batch).logits.detach())
    with torch.inference_mode():
        assert torch.equal(learner(batch).logits, found.logits)
    assert all(value.grad is None for value in learner.parameters())
    head, parameters = learner.fitted(batch.support_x, batch.support_y, 3)
    assert {name: value.shape for name, value in parameters.items()} == {
        name: (2, *value.shape) for name, value in head.named_parameters()
    }
    assert not any(value.requires_grad for value in parameters.values())


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_only_the_encoder_is_bfloat16(kind):
    learner = make(kind, dtype=torch.float32)
    for batch in (episodes(dtype=torch.float32), base_rows(dtype=torch.float32)):
        exact = learner(batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss, logits = learner(batch)
        assert loss.dtype == logits.dtype == torch.float32
        torch.testing.assert_close(logits, exact.logits, rtol=0.1, atol=0.1)
        assert not torch.equal(logits, exact.logits)
        flat = make(kind, encoder=nn.Identity(), dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = flat(batch).logits
        assert torch.equal(found, flat(batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_learns_and_goes_on_exactly(kind, tmp_path):
    """A run that was stopped ends as one that was not, and its features tell unseen classes apart."""
    base, others = glyphs(12, size=16), glyphs(6, first_class=40, size=16)
    options = {"epochs": 5, "lr": 0.1} if kind != "simpleshot" else {}

    def learner():
        torch.manual_seed(0)
        return KINDS[kind](Conv4(channels=8), 8, 12, **options)

    def train(own, steps, name, **more):
        history = fit(
            own,
            RowSampler(base, 24, seed=1),
            steps,
            validation=EpisodeSampler(others, 5, 1, 5),
            validation_episodes=8,
            validate_every=15,
            schedule="constant",
            optimizer=torch.optim.Adam(own.parameters(), lr=3e-3),
            out=tmp_path / name,
            **more,
        )
        return history

    whole = learner()
    history = train(whole, 60, "whole")
    losses = [row.loss for row in history.rows]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    score = evaluate(whole, EpisodeSampler(others, 5, 1, 5, seed=3), 40)
    assert score.mean > 0.3
    train(learner(), 20, "parts")
    parts = learner()
    again = train(parts, 60, "parts", resume=True)
    assert [row.loss for row in again.rows] == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_and_copies(kind):
    learner, batch = make(kind), episodes()
    if kind == "simpleshot":
        learner.centre_on(torch.randn(3, 5, dtype=torch.float64))
    other = KINDS[kind](nn.Linear(5, 5), 5, 6).double()
    other.load_state_dict(learner.state_dict())
    for rows in (batch, base_rows()):
        assert torch.equal(other(rows).logits, learner(rows).logits)
        assert torch.equal(deepcopy(learner)(rows).logits, learner(rows).logits)


def test_representations():
    assert "metric='cosine', temperature=2, normalise=True" in repr(
        make("simpleshot", metric="cosine", temperature=2)
    )
    text = repr(make("baseline++", scale=3))
    assert "lr=0.01, momentum=0.9, dampening=0.9, weight_decay=0.001, epochs=100, batch_size=4" in text
    assert "CosineHead(features=5, classes=6, scale=3)" in text
    assert "LinearHead(features=5, classes=6)" in repr(make("baseline"))


def regression():
    x, y = torch.rand(1, 2, 5, dtype=torch.float64), torch.rand(1, 2, 1)
    return Episodes(x, y, x, y, 0)


@pytest.mark.parametrize(
    ("kind", "call", "error", "message"),
    [
        ("simpleshot", {"metric": "l2"}, ValueError, "metric: expected sqeuclidean or"),
        (
            "simpleshot",
            {"temperature": -1},
            ValueError,
            "temperature: expected a positive finite number, got -1",
        ),
        ("baseline", {"lr": 0}, ValueError, "lr: expected a positive finite number, got 0"),
        (
            "baseline",
            {"momentum": -0.1},
            ValueError,
            "momentum: expected a finite number that is not negative",
        ),
        ("baseline", {"dampening": "a"}, TypeError, "dampening: expected a number, got str"),
        ("baseline", {"weight_decay": math.inf}, ValueError, "weight_decay: expected a finite number that"),
        ("baseline", {"epochs": -1}, ValueError, "epochs: expected 0 or more, got -1"),
        ("baseline", {"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ("baseline", {"seed": 0.5}, TypeError, "seed: expected an int, got float"),
        ("baseline++", {"scale": 0}, ValueError, "scale: expected a positive finite number, got 0"),
        *(
            (kind, call, error, message)
            for kind in KINDS
            for call, error, message in (
                ({"base_classes": 0}, ValueError, "base_classes: expected at least 1, got 0"),
                ({"features": 0}, ValueError, "features: expected at least 1, got 0"),
                (regression, ValueError, "episodes: expected classes, got regression tasks"),
                (
                    lambda: base_rows(classes=4),
                    ValueError,
                    "episodes: expected the 6 base classes of the head, got 4",
                ),
                (lambda: episodes(shape=(7,)), ValueError, "encoder: expected 5 features, got 7"),
                (lambda: base_rows(features=7), ValueError, "encoder: expected 5 features, got 7"),
                (
                    lambda: episodes(shape=(2, 2)),
                    ValueError,
                    r"encoder: expected features \[36, d\], got \[36, 2, 2\]",
                ),
            )
        ),
    ],
)
def test_wrong_arguments_are_named(kind, call, error, message):
    with pytest.raises(error, match=message):
        if isinstance(call, dict):
            KINDS[kind](nn.Identity(), **{"features": 5, **call})
        else:
            make(kind, encoder=nn.Identity())(call())


@pytest.mark.parametrize("kind", KINDS)
def test_without_base_classes_there_is_no_head(kind):
    learner = KINDS[kind](nn.Identity(), 5).double()
    assert learner.head is None and not list(learner.parameters())
    assert learner(episodes()).logits.shape == (2, 12, 3)
    with pytest.raises(
        ValueError, match="episodes: expected support rows, for there is no head of base classes"
    ):
        learner(base_rows())


def test_directions_are_those_of_gradients():
    """The closed gradients of a step against autograd, beside the loop above: a step of rate 1 of each parameter."""
    rows, targets = (
        torch.randn(2, 4, 6, dtype=torch.float64),
        torch.eye(3, dtype=torch.float64)[torch.tensor([[0, 1, 2, 0], [1, 1, 2, 0]])],
    )
    v, g = torch.randn(3, 6, dtype=torch.float64), torch.rand(3, 1, dtype=torch.float64) + 0.5
    for norms in (None, g):
        leaves = [v.expand(2, 3, 6).clone().requires_grad_(), g.expand(2, 3, 1).clone().requires_grad_()]
        height = 1 if norms is None else 1.5 * leaves[1] / leaves[0].norm(dim=-1, keepdim=True)
        logits = rows @ (height * leaves[0]).mT
        loss = -(targets * logits.log_softmax(-1)).sum(-1).mean(-1).sum()
        expected = torch.autograd.grad(loss, leaves, allow_unused=True)
        found = fit_directions(rows, targets, v, norms, torch.arange(4).unsqueeze(0), 4, {"lr": 1.0}, 1.5)
        torch.testing.assert_close(v - found[0], expected[0], rtol=1e-12, atol=1e-12)
        if norms is not None:
            torch.testing.assert_close(g - found[1], expected[1], rtol=1e-12, atol=1e-12)
        else:
            assert found[1].shape == (2, 3, 0)
