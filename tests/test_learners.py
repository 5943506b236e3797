import math

import pytest
import torch
from torch import nn

from metafast.backbones import Conv4
from metafast.data import Episodes
from metafast.learners import Outcome, ProtoNet


def episodes(tasks=2, ways=3, shots=2, queries=4, shape=(5,), dtype=torch.float64, seed=0):
    """Episodes with labels in random order."""
    random = torch.Generator().manual_seed(seed)

    def labels(rows):
        order = [torch.randperm(ways * rows, generator=random) for _ in range(tasks)]
        return torch.stack([torch.arange(ways).repeat(rows)[permutation] for permutation in order])

    def inputs(rows):
        return torch.rand(tasks, ways * rows, *shape, generator=random, dtype=torch.float64).to(dtype)

    return Episodes(inputs(shots), labels(shots), inputs(queries), labels(queries), ways)


DISTANCES = {
    "sqeuclidean": lambda a, b: sum((x - y) ** 2 for x, y in zip(a, b, strict=True)),
    "euclidean": lambda a, b: math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))),
    "cityblock": lambda a, b: sum(abs(x - y) for x, y in zip(a, b, strict=True)),
    "cosine": lambda a, b: 1
    - sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b),
}


@pytest.mark.parametrize("metric", DISTANCES)
def test_equals_the_formula_computed_by_hand(metric):
    batch = episodes()
    loss, logits = ProtoNet(nn.Identity(), metric, temperature=1.7)(batch)
    losses = []
    for task in range(2):
        support, query = batch.support_x[task].tolist(), batch.query_x[task].tolist()
        means = []
        for label in range(3):
            rows = [row for row, y in zip(support, batch.support_y[task].tolist(), strict=True) if y == label]
            means.append([sum(column) / len(rows) for column in zip(*rows, strict=True)])
        for i, (row, y) in enumerate(zip(query, batch.query_y[task].tolist(), strict=True)):
            expected = [-1.7 * DISTANCES[metric](row, mean) for mean in means]
            assert logits[task, i].tolist() == pytest.approx(expected, rel=1e-10)
            losses.append(math.log(sum(math.exp(value) for value in expected)) - expected[y])
    assert loss.dim() == 0
    assert float(loss) == pytest.approx(sum(losses) / len(losses), rel=1e-10)


def test_all_images_go_through_the_encoder_in_one_call():
    sizes = []

    class Counting(nn.Flatten):
        def forward(self, x):
            sizes.append(list(x.shape))
            return super().forward(x)

    outcome = ProtoNet(Counting())(episodes(tasks=3, shape=(1, 4, 4)))
    assert sizes == [[3 * (6 + 12), 1, 4, 4]]
    assert isinstance(outcome, Outcome)
    assert outcome.logits.shape == (3, 12, 3)


def test_uneven_shots():
    support = torch.tensor([[[0.0], [1.0], [8.0]]])
    batch = Episodes(support, torch.tensor([[0, 0, 1]]), torch.tensor([[[2.5]]]), torch.tensor([[1]]), 2)
    assert ProtoNet(nn.Identity())(batch).logits.tolist() == [[[-4.0, -30.25]]]


def test_training_uses_the_statistics_of_the_batch_and_updates_the_running_ones():
    norm = nn.BatchNorm1d(5, affine=False, eps=1e-14).double()
    batch = episodes()
    support, query = ProtoNet(norm).train().embed(batch)
    everything = torch.cat([support, query], 1).flatten(0, 1)
    torch.testing.assert_close(everything.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(everything.var(0, unbiased=False), torch.ones(5, dtype=torch.float64))
    images = torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1)
    torch.testing.assert_close(norm.running_mean, 0.1 * images.mean(0))


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    norm = nn.BatchNorm1d(5).double()
    norm.running_mean.fill_(0.3)
    norm.running_var.fill_(4.0)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    batch = episodes()
    support, _ = ProtoNet(norm).eval().embed(batch)
    torch.testing.assert_close(support, (batch.support_x - 0.3) / (4.0 + norm.eps) ** 0.5)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_learnt_temperature_gets_the_gradient_of_the_formula():
    batch = episodes()
    learner = ProtoNet(nn.Identity(), temperature=2.5, learn_temperature=True).double()
    assert [name for name, _ in learner.named_parameters()] == ["log_temperature"]
    learner(batch).loss.backward()
    step = 1e-6
    low, high = (
        float(ProtoNet(nn.Identity(), temperature=2.5 * math.exp(x))(batch).loss) for x in (-step, step)
    )
    assert float(learner.log_temperature.grad) == pytest.approx((high - low) / (2 * step), rel=1e-6)


def test_a_fixed_temperature_is_no_parameter():
    assert list(ProtoNet(nn.Identity(), temperature=3.0).parameters()) == []


def test_under_autocast_only_the_encoder_computes_in_bfloat16():
    torch.manual_seed(0)
    learner = ProtoNet(Conv4(channels=8))
    dtypes = []
    learner.encoder.encoder[3].register_forward_hook(
        lambda module, inputs, output: dtypes.append(output.dtype)
    )
    batch = episodes(shape=(1, 16, 16), dtype=torch.float32)
    exact = learner(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = learner(batch)
    assert dtypes == [torch.float32, torch.bfloat16]
    assert loss.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(loss, exact.loss, rtol=0.1, atol=0.1)
    # The head's own arithmetic is float32: it is far finer than bfloat16 can tell apart.
    with torch.autocast("cpu", torch.bfloat16):
        flat = ProtoNet(nn.Flatten())(batch).logits
    torch.testing.assert_close(flat, ProtoNet(nn.Flatten())(batch).logits, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in learner.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"metric": "manhattan"},
            "metric: expected sqeuclidean, euclidean, cityblock or cosine, got 'manhattan'",
        ),
        ({"temperature": 0.0}, "temperature: expected a positive finite number, got 0.0"),
        ({"temperature": math.nan}, "temperature: expected a positive finite number, got nan"),
        ({"temperature": math.inf}, "temperature: expected a positive finite number, got inf"),
    ],
    ids=["metric", "zero", "nan", "inf"],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProtoNet(nn.Identity(), **arguments)


def test_an_encoder_that_keeps_maps_is_named():
    with pytest.raises(ValueError, match=r"encoder: expected features \[36, d\], got \[36, 1, 4, 4\]"):
        ProtoNet(nn.Identity())(episodes(shape=(1, 4, 4)))


def test_representation_names_the_settings():
    text = repr(ProtoNet(nn.Identity(), "cosine", 10.0, learn_temperature=True))
    assert "metric='cosine', temperature=10.0, learn_temperature=True" in text
