"""BOIL, MAML++, Reptile and ProtoMAML against hand-written loops over the tasks."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from metafast import Conv4, inner_loop
from metafast.backbones import MLP
from metafast.data import Episodes
from metafast.learners import BOIL, MAML, MAMLPlusPlus, ProtoMAML, ProtoNet, Reptile
from metafast.training import evaluate, fit
from tests.cases import assert_same
from tests.test_adapting_learners import assert_same_training, classes, descend, each, waves


def conv_model():
    return nn.Sequential(Conv4(1, 4), nn.Linear(4, 3))


def images(**options):
    return classes(shape=(1, 16, 16), **options)


def mlp():
    return MLP((5, 6, 4, 3), "tanh", init_std=0.5)


def normed():
    return MLP((5, 6, 4, 3), "relu", batch_norm=True)


def calling(model, names):
    """The model as a function of its parameters by ``names``; BatchNorm by the rows at hand."""
    plain = deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, _BatchNorm):
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    own = dict(model.named_parameters())

    def call(values, x, **others):
        return functional_call(plain, {**own, **others, **dict(zip(names, values, strict=True))}, (x,))

    return call


@pytest.mark.parametrize("first_order", [False, True])
def test_boil_is_the_plain_loop(first_order):
    torch.manual_seed(0)
    episodes = images()
    learner = BOIL(conv_model(), 0.1, 2, first_order=first_order).double()
    names = [name for name, _ in learner.model.named_parameters() if not name.startswith("1.")]
    assert learner.adapt == names and learner.ways == 3
    call = calling(learner.model, names)
    own = dict(learner.model.named_parameters())
    outputs, losses = [], []
    for support_x, support_y, query_x, query_y in each(episodes):

        def loss(values, support_x=support_x, support_y=support_y):
            return cross_entropy(call(values, support_x), support_y)

        adapted = descend([own[name] for name in names], loss, [0.1] * len(names), 2, first_order)
        outputs.append(call(adapted, query_x))
        losses.append(cross_entropy(outputs[-1], query_y))
    assert_same_training(learner, episodes, torch.stack(losses).mean(), torch.stack(outputs))


def test_boil_with_a_head_by_name():
    model = mlp()
    assert BOIL(model, head="3").adapt == ["1.weight", "1.bias", "5.weight", "5.bias"]
    for head in ("7", "3.weights"):
        with pytest.raises(ValueError, match=f"head: expected the name of a part of the model, got '{head}'"):
            BOIL(model, head=head)
    with pytest.raises(ValueError, match="head: expected the name of a part of the model, got ''"):
        BOIL(nn.Linear(4, 3))
    with pytest.raises(
        ValueError, match="head: expected a name, since the model has no linear layer to be it"
    ):
        BOIL(nn.Conv1d(3, 4, 1), ways=4)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        BOIL(1, head="1")


MODELS = {"mlp": (mlp, (5,)), "normed": (normed, (5,)), "conv4": (conv_model, (1, 16, 16))}


def plus_plus_by_hand(learner, episodes, weights):
    """Loss and last outputs of MAML++ with these weights of the steps."""
    names, steps = learner.adapt, learner.steps
    call, own = calling(learner.model, names), dict(learner.model.named_parameters())
    tables = dict(zip(learner.scale_names, learner.scales, strict=True))
    early = learner.training and int(learner.iterations) < learner.first_order_steps
    outputs, total = [], 0.0
    for support_x, support_y, query_x, query_y in each(episodes):
        values = [own[name] for name in names]
        for t in range(steps):
            row = {name: value[t] for name, value in tables.items()}

            def loss(values, support_x=support_x, support_y=support_y, row=row):
                return cross_entropy(call(values, support_x, **row), support_y)

            values = descend(values, loss, list(learner.rates[:, t]), 1, early)
            after = {name: value[t + 1] for name, value in tables.items()}
            logits = call(values, query_x, **after)
            total = total + weights[t] * cross_entropy(logits, query_y) / episodes.tasks
        outputs.append(logits)
    return total, torch.stack(outputs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("step_scales", [True, False])
def test_maml_plus_plus_is_the_plain_loop(name, step_scales):
    """With rates, scales and shifts that differ between the steps; at the beginning, and when the last step counts."""
    torch.manual_seed(0)
    model, shape = MODELS[name]
    episodes = classes(shape=shape)
    learner = MAMLPlusPlus(model(), 0.1, 3, multi_step=4, step_scales=step_scales).double().train()
    norms = [layer for layer in learner.model.modules() if isinstance(layer, _BatchNorm)]
    assert len(learner.scales) == (2 * len(norms) if step_scales else 0)
    with torch.no_grad():
        learner.rates.uniform_(0.05, 0.2)
        for table in learner.scales:
            table.uniform_(0.5, 1.5)
    if step_scales:
        # They stand in for the layers' own.
        for norm in norms:
            assert not any(value.requires_grad for value in norm.parameters())
    for done, weights in (
        (0, [1 / 3, 1 / 3, 1 / 3]),
        (2, [1 / 6, 1 / 6, 2 / 3]),
        (3, [1 / 12, 1 / 12, 5 / 6]),
        (4, [0.0, 0.0, 1.0]),
    ):
        learner.iterations.fill_(done)
        loss, outputs = plus_plus_by_hand(learner, episodes, weights)
        outcome = learner(episodes)
        learner.after_step()
        assert int(learner.iterations) == done + 1
        torch.testing.assert_close(outcome.logits, outputs, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(outcome.loss, loss, rtol=1e-9, atol=1e-12)
        named = {key: value for key, value in learner.named_parameters() if value.requires_grad}
        found, wanted = (
            torch.autograd.grad(v, list(named.values()), allow_unused=True) for v in (outcome.loss, loss)
        )
        for key, got, want in zip(named, found, wanted, strict=True):
            assert got is not None, key
            torch.testing.assert_close(
                got, want, rtol=1e-8, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
            )
    learner.eval()
    before = int(learner.iterations)
    torch.testing.assert_close(learner(episodes).loss, plus_plus_by_hand(learner, episodes, [0, 0, 1])[0])
    assert int(learner.iterations) == before


def test_the_weights_of_the_steps_sum_to_one_and_keep_a_share():
    learner = MAMLPlusPlus(mlp(), steps=5, multi_step=1000)
    for done in (0, 1, 500, 999, 1000, 5000):
        learner.iterations.fill_(done)
        weights = learner.step_weights()
        assert sum(weights) == pytest.approx(1) and len(set(weights[:-1])) == 1
        assert weights[0] == pytest.approx(0 if done >= 1000 else max(0.2 * (1 - done / 1000), 0.03 / 5))
    learner = MAMLPlusPlus(mlp(), multi_step=0)
    assert learner.step_weights() == [0, 0, 0, 0, 1]


def test_maml_plus_plus_begins_in_first_order():
    torch.manual_seed(0)
    learner = MAMLPlusPlus(mlp(), 0.1, 2, first_order_steps=1, multi_step=0, learn_lr=False).double().train()
    with torch.no_grad():
        learner.rates.fill_(0.1)
    plain = MAML(deepcopy(learner.model), 0.1, 2, first_order=True).double()
    for first_order in (True, False):
        plain.first_order = first_order
        found = torch.autograd.grad(learner(classes()).loss, list(learner.model.parameters()))
        learner.after_step()
        wanted = torch.autograd.grad(plain(classes()).loss, list(plain.model.parameters()))
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["normed", "conv4"])
def test_running_statistics_of_each_step(name):
    """Training normalises by the rows and moves the rows of its step; evaluation normalises by them."""
    torch.manual_seed(0)
    model, shape = MODELS[name]
    episodes = classes(shape=shape)
    learner = MAMLPlusPlus(model(), 0.1, 2, batch_norm="per_step", multi_step=0).double().train()
    transductive = MAMLPlusPlus(deepcopy(learner.model), 0.1, 2, multi_step=0).double().train()
    transductive.load_state_dict(learner.state_dict(), strict=False)
    before = deepcopy(dict(learner.model.named_buffers()))
    assert torch.equal(learner(episodes).logits, transductive(episodes).logits)
    assert all(torch.equal(value, before[key]) for key, value in learner.model.named_buffers() if value.dim())
    names = [key for key in learner.running_names if not key.endswith("tracked")]
    tables = dict(zip(names, learner.running_statistics(), strict=True))
    assert len(tables) == 2 * len([m for m in learner.model.modules() if isinstance(m, _BatchNorm)])
    for key, table in tables.items():
        start = 0.0 if key.endswith("mean") else 1.0
        assert all(not torch.allclose(row, torch.full_like(row, start)) for row in table), key
    assert not torch.allclose(tables[names[0]][0], tables[names[0]][2])
    # An episode's outputs in evaluation depend on no other rows of it.
    learner.eval()
    kept = {key: table.clone() for key, table in tables.items()}
    whole = learner(episodes).logits
    part = Episodes(
        episodes.support_x, episodes.support_y, episodes.query_x[:, :1], episodes.query_y[:, :1], 3
    )
    torch.testing.assert_close(learner(part).logits, whole[:, :1], rtol=1e-9, atol=1e-12)
    assert all(torch.equal(table, kept[key]) for key, table in tables.items())
    with pytest.raises(ValueError, match="expected 'running', by which this MAMLPlusPlus normalises"):
        evaluate(learner, episodes, batch_norm="transductive")
    # More steps than there are rows for go on with the last; fewer begin with the first.
    for steps in (0, 1, 5):
        learner.steps = steps
        with torch.no_grad():
            assert learner(episodes).loss.isfinite()
    learner.train()
    with pytest.raises(
        ValueError, match="steps: expected at most 2 in training, which there are rates for, got 5"
    ):
        learner(episodes)


def test_what_maml_plus_plus_leaves_alone():
    """BatchNorm that does not train, the model of a constructor that fails, and the parameters' dtype."""
    model = normed()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.requires_grad_(False)
    assert len(MAMLPlusPlus(model).scales) == 0
    model = normed()
    with pytest.raises(ValueError, match="lr"):
        MAMLPlusPlus(model, lr=-1.0)
    assert all(value.requires_grad for value in model.parameters())
    learner = MAMLPlusPlus(model.double(), 0.1, 2)
    assert learner.rates.dtype == torch.float64 and float(learner.rates[0, 0].detach()) == 0.1
    learner.steps = 0
    assert learner.train()(classes()).loss.isfinite()


def test_cumulative_statistics_of_each_step():
    """Without a momentum they are the mean over the calls, of each row by itself."""
    torch.manual_seed(0)
    model = normed()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.momentum = None
    learner = MAMLPlusPlus(model, 0.1, 2, batch_norm="per_step", multi_step=0).double().train()
    found = []
    for seed in range(2):
        learner(classes(seed=seed))
        found.append(learner.running_statistics()[0].clone())
    fresh = {key: torch.zeros_like(value) for key, value in learner.named_buffers() if "running_" in key}
    learner.load_state_dict({**learner.state_dict(), **fresh})
    learner(classes(seed=1))
    torch.testing.assert_close(found[1], (found[0] + learner.running_statistics()[0]) / 2)


@pytest.mark.parametrize("encoder", [nn.Identity, lambda: MLP((5, 4)).requires_grad_(False)])
def test_proto_maml_of_an_encoder_that_does_not_adapt(encoder):
    """The head adapts, from the prototypes."""
    learner = ProtoMAML(encoder(), 0.1, 2).double()
    first = learner(classes()).loss
    learner.steps = 0
    assert first.isfinite() and not torch.equal(first, learner(classes()).loss)


def test_a_part_of_the_steps_moves_its_own_rows():
    torch.manual_seed(0)
    learner = MAMLPlusPlus(normed(), 0.1, 3, batch_norm="per_step", multi_step=0).double().train()
    learner.steps = 1
    learner(classes())
    (mean, *_) = learner.running_statistics()
    assert (mean[:2] != 0).any() and (mean[2:] == 0).all()


def reptile_by_hand(model, episodes, batches, lr, steps, squares, count):
    """Each task's parameters after Adam steps with first beta 0, and its mean squares."""
    names = [name for name, _ in model.named_parameters()]
    call = calling(model, names)
    ends, ended = [], []
    for support_x, support_y, _, _ in each(episodes):
        values = [value.detach().clone().requires_grad_() for value in model.parameters()]
        optimizer = torch.optim.Adam(values, lr, betas=(0.0, 0.999))
        for value, square in zip(values, squares, strict=True):
            optimizer.state[value] = {
                "step": torch.tensor(float(count)),
                "exp_avg": torch.zeros_like(value),
                "exp_avg_sq": square.clone(),
            }
        for rows in batches:
            optimizer.zero_grad()
            cross_entropy(call(values, support_x[rows]), support_y[rows]).backward()
            optimizer.step()
        ends.append([value.detach() for value in values])
        ended.append([optimizer.state[value]["exp_avg_sq"] for value in values])
    return [[torch.stack(each).mean(0) for each in zip(*found, strict=True)] for found in (ends, ended)]


@pytest.mark.parametrize("name", MODELS)
def test_reptile_is_the_plain_loop(name, monkeypatch):
    """Two outer steps by SGD with a rate of 0.5, with torch's Adam inside, whose mean square goes on."""
    torch.manual_seed(0)
    model, shape = MODELS[name]
    learner = Reptile(model(), 0.01, 3, batch_size=4).double().train()
    plain = deepcopy(learner.model)
    squares = [torch.zeros_like(value) for value in plain.parameters()]
    outer = torch.optim.SGD(learner.parameters(), 0.5)
    for turn in range(2):
        episodes = classes(shape=shape, seed=turn)
        batches = torch.randint(0, 6, (3, 4))
        monkeypatch.setattr(Reptile, "batches", lambda self, rows, device, batches=batches: batches)
        ends, squares = reptile_by_hand(plain, episodes, batches, 0.01, 3, squares, 3 * turn)
        with torch.no_grad():
            for value, end in zip(plain.parameters(), ends, strict=True):
                value += 0.5 * (end - value)
        loss, _ = learner(episodes)
        outer.zero_grad()
        loss.backward()
        outer.step()
        assert int(learner.inner_steps) == 3 * (turn + 1)
        for got, want in zip(learner.model.parameters(), plain.parameters(), strict=True):
            # Of a bias before BatchNorm Adam divides rounding by rounding.
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)
        for got, want in zip(learner.running_statistics(), squares, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-14)


def test_one_step_of_plain_reptile_is_joint_training():
    """Of SGD, on all rows: the gradient of the mean support loss, times the rate."""
    torch.manual_seed(0)
    episodes = classes()
    learner = Reptile(mlp(), 0.1, 1, batch_size=100, optimizer="sgd").double().train()
    loss, logits = learner(episodes)
    adapted = MAML(learner.model, 0.1, 1)(episodes)
    torch.testing.assert_close(loss, adapted.loss)
    torch.testing.assert_close(logits, adapted.logits)
    assert learner.running_statistics() == []
    found = torch.autograd.grad(loss, list(learner.model.parameters()))
    joint = learner.model(episodes.support_x.flatten(0, 1))
    wanted = torch.autograd.grad(
        0.1 * cross_entropy(joint, episodes.support_y.flatten()), list(learner.model.parameters())
    )
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_mini_batches_pass_through_all_rows():
    torch.manual_seed(0)
    learner = Reptile(mlp(), steps=7, batch_size=4).train()
    drawn = learner.batches(10, torch.device("cpu"))
    assert drawn.shape == (7, 4)
    passes = drawn.flatten()[:20].reshape(2, 10).sort(dim=1).values
    assert torch.equal(passes, torch.arange(10).expand(2, 10))
    assert not torch.equal(learner.batches(10, torch.device("cpu")), drawn)
    assert learner.batches(3, torch.device("cpu")).shape == (7, 3)
    learner.steps = 0
    assert learner.batches(3, torch.device("cpu")).shape == (0, 3)
    learner.eval().steps = 3
    assert torch.equal(learner.batches(10, torch.device("cpu")), learner.batches(10, torch.device("cpu")))


def test_reptile_is_evaluated_as_it_is():
    torch.manual_seed(0)
    learner = Reptile(normed(), 0.01, 2, batch_size=4).double().train()
    learner(classes())
    before = deepcopy(learner.state_dict())
    learner.eval().steps = 20
    first, second = learner(classes(seed=3)), learner(classes(seed=3))
    assert torch.equal(first.logits, second.logits) and not first.loss.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_proto_maml_is_the_plain_loop(first_order, recompute):
    torch.manual_seed(0)
    episodes = images()
    learner = ProtoMAML(Conv4(1, 4), 0.05, 2, first_order=first_order, recompute=recompute).double()
    names = [name for name, _ in learner.encoder.named_parameters()]
    call = calling(learner.encoder, names)
    outputs, losses = [], []
    for support_x, support_y, query_x, query_y in each(episodes):
        body = list(learner.encoder.parameters())
        features = call(body, support_x)
        means = torch.stack([features[support_y == label].mean(0) for label in range(3)])
        # The steps follow the partial derivatives: the head's values do not move with the body's.
        values = [value.clone() for value in (*body, 2 * means, -means.square().sum(1))]

        def logits(values, x):
            return call(values[:-2], x) @ values[-2].T + values[-1]

        def loss(values, support_x=support_x, support_y=support_y):
            return cross_entropy(logits(values, support_x), support_y)

        values = descend(values, loss, [0.05] * len(values), 2, first_order)
        outputs.append(logits(values, query_x))
        losses.append(cross_entropy(outputs[-1], query_y))
    assert_same_training(learner, episodes, torch.stack(losses).mean(), torch.stack(outputs))


def test_proto_maml_without_steps_is_a_prototypical_network():
    """Up to the squared length of the query, which all classes share; and it takes any number of ways."""
    torch.manual_seed(0)
    encoder = MLP((5, 6, 4), "tanh", init_std=0.5)
    learner, plain = ProtoMAML(encoder, steps=0).double(), ProtoNet(encoder).double()
    for ways in (3, 5):
        episodes = classes(ways=ways)
        torch.testing.assert_close(
            learner(episodes).logits.softmax(-1), plain(episodes).logits.softmax(-1), rtol=1e-9, atol=1e-12
        )
        learner.steps = 2
        assert learner(episodes).logits.shape == (3, 4 * ways, ways)
        learner.steps = 0


@pytest.mark.parametrize("policy", ["transductive", "running", "frozen"])
def test_policies_of_proto_maml(policy):
    """In training ``running`` moves the statistics once for each call, and evaluation leaves them."""
    torch.manual_seed(0)
    learner = ProtoMAML(Conv4(1, 4), 0.05, 2, batch_norm=policy).double().train()
    before = deepcopy(learner.state_dict())
    episodes = images()
    learner(episodes)
    moved = int(learner.encoder.encoder[0][1].num_batches_tracked)
    assert moved == (3 if policy == "running" else 0)
    after = deepcopy(learner.state_dict())
    same = all(torch.equal(after[name], value) for name, value in before.items())
    assert same == (policy != "running")
    learner.eval()
    learner(episodes)
    assert all(torch.equal(after[name], value) for name, value in learner.state_dict().items())


@pytest.mark.parametrize("policy", ["transductive", "running", "frozen"])
def test_policies_of_maml(policy):
    """What ``evaluate`` lets it normalise by, and what training leaves behind."""
    torch.manual_seed(0)
    learner = MAML(normed(), 0.1, 2, batch_norm=policy).double().train()
    episodes = classes()
    learner(episodes)
    norm = next(layer for layer in learner.model.modules() if isinstance(layer, _BatchNorm))
    assert int(norm.num_batches_tracked) == (3 if policy == "running" else 0)
    mode = "transductive" if policy == "transductive" else "running"
    result = evaluate(learner, episodes)
    assert result.batch_norm == mode
    learner.eval()
    wanted = inner_loop(learner.model, episodes.support_x, episodes.support_y, 0.1, 2, batch_norm=policy)(
        episodes.query_x
    )
    hits = wanted.argmax(-1) == episodes.query_y
    assert result.per_episode.tolist() == hits.double().mean(-1).tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda: MAMLPlusPlus(normed(), 0.1, 2, batch_norm="per_step", multi_step=3, first_order_steps=2),
        lambda: Reptile(normed(), 0.01, 2, batch_size=4),
    ],
    ids=["maml++", "reptile"],
)
def test_a_resumed_run_goes_on(make, tmp_path):
    """Counters, statistics and drawn mini-batches are part of the checkpoint."""

    def sample(step):
        batch = classes(seed=step)
        return Episodes(batch.support_x.float(), batch.support_y, batch.query_x.float(), batch.query_y, 3)

    def run(learner, steps, **options):
        torch.manual_seed(7)
        sgd = torch.optim.SGD(learner.parameters(), 0.1)
        fit(learner, sample, steps, optimizer=sgd, schedule="constant", validate_every=2, **options)
        return learner.state_dict()

    torch.manual_seed(0)
    begin = make()
    whole = run(deepcopy(begin), 5)
    run(deepcopy(begin), 2, out=tmp_path / "run")
    parts = run(deepcopy(begin), 5, out=tmp_path / "run", resume=True)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: MAMLPlusPlus(normed(), adapt=["1", "2"]),
            ValueError,
            "adapt: expected nothing that step_scales learns for each step, got '2.weight'",
        ),
        (
            lambda: Reptile(mlp(), recompute=True),
            TypeError,
            "recompute: Reptile differentiates through no step",
        ),
        (lambda: MAMLPlusPlus(mlp(), steps=0), ValueError, "steps: expected at least 1, got 0"),
        (lambda: MAMLPlusPlus(mlp(), multi_step=-1), ValueError, "multi_step: expected 0 or more, got -1"),
        (
            lambda: MAMLPlusPlus(mlp(), first_order_steps=1.5),
            TypeError,
            "first_order_steps: expected an int, got float",
        ),
        (lambda: MAMLPlusPlus(3), TypeError, r"model: expected a torch\.nn\.Module, got int"),
        (lambda: Reptile(mlp(), batch_size=0), ValueError, "batch_size: expected at least 1, got 0"),
        (lambda: Reptile(mlp(), optimizer="lamb"), ValueError, "optimizer: expected sgd or adam, got 'lamb'"),
        (
            lambda: Reptile(mlp(), beta2=1.0),
            ValueError,
            "beta2: expected a number from 0 to below 1, got 1.0",
        ),
        (lambda: ProtoMAML(3), TypeError, r"encoder: expected a torch\.nn\.Module, got int"),
        (lambda: MAML(mlp(), "fast"), TypeError, "lr: expected a number, got str"),
        (lambda: ProtoMAML(nn.Identity(), 0.0), ValueError, "lr: expected a positive finite number, got 0.0"),
        (
            lambda: ProtoMAML(mlp()).double()(waves()),
            ValueError,
            "episodes: expected classes, got regression tasks",
        ),
        (
            lambda: ProtoMAML(nn.Conv2d(1, 2, 3)).double()(images()),
            ValueError,
            r"encoder: expected features \[T, n, d\], got \[3, 6, 2, 14, 14\]",
        ),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_representations_name_the_settings():
    assert "lr=0.01, steps=5, first_order=False" in repr(ProtoMAML(nn.Identity()))
    assert "lr=0.1, steps=5, loss='cross_entropy'" in repr(MAMLPlusPlus(mlp()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MAMLPlusPlus(MLP((5, 4, 3), batch_norm=True), 0.1, 1, multi_step=4),
        lambda: Reptile(MLP((5, 4, 3), batch_norm=True), 0.01, 1, batch_size=4),
        lambda: ProtoMAML(MLP((5, 4), batch_norm=True), 0.1, 1),
    ],
    ids=["maml++", "reptile", "protomaml"],
)
def test_a_learner_compiles_whole(make):
    """What counts the training steps goes on doing so; ProtoMAML has seen such episodes once before."""
    torch.manual_seed(0)
    eager = make().double()
    eager(classes())
    learner = deepcopy(eager)

    def step(*tensors):
        return learner(Episodes(*tensors, ways=3)).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        episodes = classes(seed=seed)
        rows = (episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y)
        results = []
        for who, call in ((eager, lambda *_: eager(episodes).loss), (learner, compiled)):  # noqa: B023
            torch.manual_seed(seed)
            leaves = [value for value in who.parameters() if value.requires_grad]
            loss = call(*rows)
            results.append([loss, *torch.autograd.grad(loss, leaves), *who.buffers()])
            if isinstance(who, MAMLPlusPlus):
                who.after_step()
        assert_same(*results, 1e-12)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_training_in_half_precision(precision):
    """Layers compute in it; what is learnt, and the loss, stay float32, and the first loss is about the exact one."""
    torch.manual_seed(0)

    def sample(step):
        batch = images(seed=step)
        return Episodes(batch.support_x.float(), batch.support_y, batch.query_x.float(), batch.query_y, 3)

    losses = []
    for name in ("float32", precision):
        torch.manual_seed(1)
        learner = MAML(conv_model(), 0.1, 2, recompute=True)
        rows = fit(learner, sample, 2, precision=name).rows
        assert all(value.dtype == torch.float32 for value in learner.parameters())
        losses.append([row.loss for row in rows])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
