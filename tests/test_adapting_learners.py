"""MAML, Meta-SGD, ANIL and R2D2 against plain loops over the tasks, with torch.autograd through the steps."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear, mse_loss, one_hot

from metafast.backbones import MLP, Conv4
from metafast.data import Episodes, SinusoidSampler
from metafast.learners import ANIL, MAML, R2D2, MetaSGD, ProtoNet
from metafast.training import evaluate


def classes(tasks=3, ways=3, shots=2, queries=4, shape=(5,), seed=0):
    random = torch.Generator().manual_seed(seed)

    def part(rows):
        x = torch.randn(tasks, ways * rows, *shape, generator=random, dtype=torch.float64)
        order = [torch.randperm(ways * rows, generator=random) for _ in range(tasks)]
        return x, torch.stack([torch.arange(ways).repeat(rows)[permutation] for permutation in order])

    return Episodes(*part(shots), *part(queries), ways)


def waves(tasks=3):
    batch = SinusoidSampler(5, 7, tasks)(0)
    return Episodes(
        *(getattr(batch, name).double() for name in ("support_x", "support_y", "query_x", "query_y")), 0
    )


def each(episodes):
    return zip(episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True)


def descend(parameters, loss, rates, steps, first_order):
    """Gradient descent that can be differentiated; ``parameters`` and ``rates`` are lists."""
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(parameters), parameters, create_graph=not first_order)
        pairs = zip(parameters, rates, gradients, strict=True)
        parameters = [value - rate * gradient for value, rate, gradient in pairs]
    return parameters


def layers_of(learner):
    """Weights and biases of an MLP."""
    layers = [layer for layer in learner.model if isinstance(layer, nn.Linear)]
    return [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]


def network(parameters, x, activation):
    half = len(parameters) // 2
    for k in range(half):
        x = linear(x, parameters[k], parameters[half + k])
        x = getattr(torch, activation)(x) if k < half - 1 else x
    return x


def assert_same_training(learner, episodes, loss, logits):
    """The outcome of the learner is this, and so are the gradients of all its parameters."""
    outcome = learner(episodes)
    torch.testing.assert_close(outcome.logits, logits, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(outcome.loss, loss, rtol=1e-9, atol=1e-12)
    named = dict(learner.named_parameters())
    found = torch.autograd.grad(outcome.loss, list(named.values()), allow_unused=True)
    wanted = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    for name, got, want in zip(named, found, wanted, strict=True):
        assert got is not None and want is not None, name
        torch.testing.assert_close(
            got, want, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("regression", [True, False], ids=["waves", "classes"])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("learn_lr", [False, True])
@pytest.mark.parametrize(("steps", "activation"), [(1, "relu"), (3, "tanh")])
def test_maml_is_the_plain_loop(regression, first_order, learn_lr, steps, activation):
    torch.manual_seed(0)
    episodes = waves() if regression else classes()
    widths = (1, 6, 4, 1) if regression else (5, 6, 4, 3)
    criterion = mse_loss if regression else cross_entropy
    learner = (MetaSGD if learn_lr else MAML)(
        MLP(widths, activation, init_std=0.5),
        0.05,
        steps,
        loss="mse" if regression else "cross_entropy",
        first_order=first_order,
    ).double()
    parameters = layers_of(learner)
    names = [f"{k}.{kind}" for kind in ("weight", "bias") for k in (1, 3, 5)]
    rates = [learner.lr[name] for name in names] if learn_lr else [0.05] * len(parameters)
    assert all(rate.shape == value.shape for rate, value in zip(rates, parameters, strict=True) if learn_lr)
    outputs, losses = [], []
    for support_x, support_y, query_x, query_y in each(episodes):

        def loss(values, support_x=support_x, support_y=support_y):
            return criterion(network(values, support_x, activation), support_y)

        adapted = descend(parameters, loss, rates, steps, first_order)
        outputs.append(network(adapted, query_x, activation))
        losses.append(criterion(outputs[-1], query_y))
    assert_same_training(learner, episodes, torch.stack(losses).mean(), torch.stack(outputs))


def test_maml_flattens_images_and_takes_other_steps():
    torch.manual_seed(0)
    learner = MAML(MLP((16, 8, 3)), 0.1).double()
    images, flat = classes(shape=(1, 4, 4)), classes(shape=(16,))
    assert torch.equal(learner(images).logits, learner(flat).logits)
    learner.steps = 0
    before = learner(flat).logits
    torch.testing.assert_close(before, network(layers_of(learner), flat.query_x, "relu"))
    learner.steps = 20
    with torch.no_grad():
        assert learner(flat).loss.isfinite() and not torch.equal(learner(flat).logits, before)


@pytest.mark.parametrize("method", [ANIL, R2D2, ProtoNet])
def test_episode_statistics_make_episodes_independent(method):
    """A batch of episodes gives what each gives alone, in training mode with BatchNorm."""
    torch.manual_seed(0)
    extra = (4, 3) if method is ANIL else ()
    learner = method(Conv4(1, 4), *extra, episode_statistics=True).double().train()
    episodes = classes(shape=(1, 16, 16))
    together = learner(episodes).logits
    alone = torch.cat([learner(episodes[task]).logits for task in range(episodes.tasks)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
    learner.episode_statistics = False
    assert not torch.allclose(learner(episodes).logits, together, rtol=1e-3)


def test_an_encoder_that_does_not_know_episodes():
    learner = ProtoNet(nn.Flatten(), episode_statistics=True)
    with pytest.raises(ValueError, match=r"encoder: expected features \[3, 18, d\], got \[3, 90\]"):
        learner(classes())


def test_initial_rates():
    learner = MAML(MLP((1, 400, 400, 1)))
    assert learner.lr == 0.01 and len(list(learner.parameters())) == 6
    drawn = set()
    for seed in range(20):
        torch.manual_seed(seed)
        rates = torch.cat([r.detach().flatten() for r in MetaSGD(MLP((1, 4, 1))).lr.values()])
        assert rates.unique().numel() == 1 and 0.005 <= float(rates[0]) <= 0.1
        drawn.add(float(rates[0]))
    assert len(drawn) == 20


def conv_model():
    return nn.Sequential(Conv4(1, 4), nn.Linear(4, 3))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("learn_lr", [False, True])
def test_maml_of_any_model(learn_lr, recompute):
    """Conv4 with each task's statistics of support and of query rows, against a loop over the tasks."""
    torch.manual_seed(0)
    episodes = classes(shape=(1, 16, 16))
    learner = (MetaSGD if learn_lr else MAML)(conv_model(), 0.1, 2, recompute=recompute).double()
    names = [name for name, _ in learner.model.named_parameters()]
    rates = [learner.lr[name] for name in names] if learn_lr else [0.1] * len(names)
    outputs, losses = [], []
    for support_x, support_y, query_x, query_y in each(episodes):

        def call(values, x):
            return functional_call(learner.model, dict(zip(names, values, strict=True)), (x,))

        def loss(values, support_x=support_x, support_y=support_y):
            return cross_entropy(call(values, support_x), support_y)

        adapted = descend(list(learner.model.parameters()), loss, rates, 2, False)
        outputs.append(call(adapted, query_x))
        losses.append(cross_entropy(outputs[-1], query_y))
    assert_same_training(learner, episodes, torch.stack(losses).mean(), torch.stack(outputs))


def test_the_body_or_the_head_alone_adapts():
    torch.manual_seed(0)
    episodes = classes(shape=(1, 16, 16))
    body = MetaSGD(conv_model(), 0.1, 2, adapt=["0"]).double()
    assert set(body.lr) == {name for name, _ in body.model.named_parameters() if name.startswith("0.")}
    body(episodes).loss.backward()
    assert all(value.grad is not None for value in body.parameters())
    head = MAML(conv_model(), 0.1, 2, adapt="1").double()
    head(episodes).loss.backward()
    assert all(value.grad is not None for value in head.parameters())


def test_maml_is_evaluated_by_its_own_statistics():
    learner = MAML(conv_model(), 0.1, 1)
    episodes = classes(shape=(1, 16, 16))
    single = Episodes(
        episodes.support_x.float(), episodes.support_y, episodes.query_x.float(), episodes.query_y, 3
    )
    with pytest.raises(
        ValueError, match="expected 'transductive', by which this MAML normalises, got 'running'"
    ):
        evaluate(learner, single, batch_norm="running")
    result = evaluate(learner, single)
    assert result.batch_norm == "transductive"
    hits = learner(single).logits.argmax(-1) == single.query_y
    assert result.per_episode.tolist() == hits.double().mean(-1).tolist()


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("learn_lr", [False, True])
def test_anil_is_the_plain_loop(first_order, learn_lr):
    torch.manual_seed(0)
    episodes = classes()
    learner = ANIL(nn.Linear(5, 4), 4, 3, 0.3, 4, learn_lr=learn_lr, first_order=first_order).double()
    outputs, losses = [], []
    for support_x, support_y, query_x, query_y in each(episodes):
        support, query = learner.encoder(support_x), learner.encoder(query_x)

        def loss(values, support=support, support_y=support_y):
            return cross_entropy(linear(support, *values), support_y)

        adapted = descend([learner.head.weight, learner.head.bias], loss, [learner.lr] * 2, 4, first_order)
        outputs.append(linear(query, *adapted))
        losses.append(cross_entropy(outputs[-1], query_y))
    assert_same_training(learner, episodes, torch.stack(losses).mean(), torch.stack(outputs))
    assert isinstance(learner.lr, nn.Parameter) == learn_lr


def test_r2d2_is_its_formula():
    torch.manual_seed(0)
    episodes = classes(shots=3)
    learner = R2D2(nn.Linear(5, 4), regularisation=0.7, scale=3.0).double()
    with torch.no_grad():
        learner.offset.fill_(0.25)
    outputs = []
    for support_x, support_y, query_x, _ in each(episodes):
        z, query = (
            torch.cat([learner.encoder(x), torch.ones(len(x), 1, dtype=x.dtype)], 1)
            for x in (support_x, query_x)
        )
        # As in the source's code: features and labels divided by the square root of the number of rows.
        z, y = z / math.sqrt(len(z)), one_hot(support_y, 3).double() / math.sqrt(len(z))
        eye = torch.eye(z.shape[1], dtype=z.dtype)
        w = torch.linalg.solve(z.T @ z + learner.log_regularisation.exp() * eye, z.T @ y)
        outputs.append(learner.scale * (query @ w) + learner.offset)
    logits = torch.stack(outputs)
    loss = cross_entropy(logits.flatten(0, 1), episodes.query_y.flatten())
    assert float(learner.log_regularisation.detach().exp()) == pytest.approx(0.7, rel=1e-6)
    assert_same_training(learner, episodes, loss, logits)
    assert learner(classes(ways=5)).logits.shape == (3, 20, 5)


@pytest.mark.parametrize(
    "make",
    [lambda encoder: ANIL(encoder, 8, 3, learn_lr=True), R2D2],
    ids=["anil", "r2d2"],
)
def test_under_autocast_the_head_computes_in_float32(make):
    torch.manual_seed(0)
    learner = make(Conv4(channels=8))
    batch = classes(shape=(1, 16, 16))
    batch = Episodes(batch.support_x.float(), batch.support_y, batch.query_x.float(), batch.query_y, 3)
    exact = learner(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = learner(batch)
    assert loss.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(loss, exact.loss, rtol=0.05, atol=0.05)
    loss.backward()
    assert all(parameter.grad is not None for parameter in learner.parameters())


def test_maml_computes_in_float32_under_autocast():
    torch.manual_seed(0)
    learner, batch = MAML(MLP((1, 8, 1), init_std=0.5), loss="mse"), SinusoidSampler(5, 5, 2)(0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = learner(batch)
    assert torch.equal(logits, learner(batch).logits) and torch.equal(loss, learner(batch).loss)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MAML((1, 1)), TypeError, "model: expected a torch.nn.Module, got tuple"),
        (lambda: MAML(MLP((1, 1)), -1.0), ValueError, "lr: expected a positive finite number, got -1.0"),
        (lambda: MAML(MLP((1, 1)), steps=-1), ValueError, "steps: expected 0 or more, got -1"),
        (lambda: MAML(MLP((1, 1)), loss="l1"), ValueError, "loss: expected cross_entropy or mse, got 'l1'"),
        (
            lambda: MAML(MLP((1, 1)), batch_norm="batch"),
            ValueError,
            "batch_norm: expected transductive or running or frozen, got 'batch'",
        ),
        (
            lambda: MAML(MLP((1, 1)), adapt=["head"]),
            ValueError,
            "adapt: expected names of parameters or submodules, got 'head'",
        ),
        (lambda: ANIL(nn.Identity(), 5, 0), ValueError, "ways: expected at least 1, got 0"),
        (
            lambda: ANIL(nn.Identity(), 5, 3, math.nan),
            ValueError,
            "lr: expected a positive finite number, got nan",
        ),
        (lambda: ANIL(nn.Identity(), 5, 3, 0.1, 1.0), TypeError, "steps: expected an int, got float"),
        (
            lambda: R2D2(nn.Identity(), 0.0),
            ValueError,
            "regularisation: expected a positive finite number, got 0.0",
        ),
        (
            lambda: R2D2(nn.Identity(), scale=-1),
            ValueError,
            "scale: expected a positive finite number, got -1",
        ),
        (
            lambda: MAML(MLP((5, 1)), loss="mse").double()(classes()),
            ValueError,
            "expected regression tasks for the loss 'mse', got 3 ways",
        ),
        (
            lambda: MAML(MLP((5, 4))).double()(classes()),
            ValueError,
            "episodes: expected 4 ways, the outputs of the head, got 3",
        ),
        (
            lambda: MAML(MLP((1, 4))).double()(waves()),
            ValueError,
            "episodes: expected classes, got regression tasks",
        ),
        (
            lambda: ANIL(nn.Identity(), 5, 4).double()(classes()),
            ValueError,
            "episodes: expected 4 ways, the outputs of the head, got 3",
        ),
        (lambda: ANIL(nn.Identity(), 6, 3)(classes()), ValueError, "encoder: expected 6 features, got 5"),
        (
            lambda: R2D2(nn.Identity())(waves()),
            ValueError,
            "episodes: expected classes, got regression tasks",
        ),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_representations_name_the_settings():
    text = repr(MAML(MLP((1, 4, 1)), lr=0.02, loss="mse"))
    assert "lr=0.02, steps=1, loss='mse', first_order=False, batch_norm='transductive'" in text
    assert "lr=0.1, steps=5, learn_lr=False, first_order=True" in repr(
        ANIL(nn.Identity(), 4, 3, first_order=True)
    )
