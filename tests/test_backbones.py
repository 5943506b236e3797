import math
from copy import deepcopy

import pytest
import torch

from metafast.backbones import MLP, Conv4


def test_parameter_names_are_those_of_the_reference_code():
    names = [
        f"encoder.{block}.{layer}.{kind}"
        for block in range(4)
        for layer in (0, 1)
        for kind in ("weight", "bias")
    ]
    assert [name for name, _ in Conv4().named_parameters()] == names


@pytest.mark.parametrize(
    ("in_channels", "channels", "height", "width", "features"),
    [(1, 64, 28, 28, 64), (3, 64, 84, 84, 1600), (3, 32, 84, 84, 800), (1, 8, 16, 16, 8), (2, 5, 47, 33, 20)],
)
def test_features(in_channels, channels, height, width, features):
    encoder = Conv4(in_channels, channels).eval()
    assert encoder.features(height, width) == features
    assert encoder(torch.zeros(2, in_channels, height, width)).shape == (2, features)


def test_square_images_need_one_size():
    assert Conv4().features(28) == 64


def test_equals_the_plain_chain_of_layers():
    torch.manual_seed(0)
    encoder = Conv4(3, 6).double()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    state = encoder.state_dict()
    maps = images
    for block in range(4):
        weight, bias = state[f"encoder.{block}.0.weight"].contiguous(), state[f"encoder.{block}.0.bias"]
        maps = torch.nn.functional.conv2d(maps, weight, bias, padding=1)
        mean = maps.mean((0, 2, 3), keepdim=True)
        variance = maps.var((0, 2, 3), unbiased=False, keepdim=True)
        maps = ((maps - mean) / (variance + 1e-5).sqrt()).relu()
        maps = torch.nn.functional.max_pool2d(maps, 2)
    torch.testing.assert_close(encoder(images), maps.flatten(1), rtol=1e-10, atol=1e-10)


def plain(encoder):
    """The same layers in torch's own chain."""
    copy = torch.nn.Sequential(
        *(torch.nn.Sequential(*block) for block in encoder.encoder), torch.nn.Flatten()
    )
    return deepcopy(copy)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_is_torchs(momentum, tracked):
    """Features, gradients and running statistics, in training and evaluation mode."""
    torch.manual_seed(0)
    encoder = Conv4(1, 5)
    for block in encoder.encoder:
        block[1] = torch.nn.BatchNorm2d(5, momentum=momentum, track_running_stats=tracked)
        torch.nn.init.normal_(block[1].weight)
        torch.nn.init.normal_(block[1].bias)
    encoder.double()
    chain = plain(encoder)
    for _ in range(3):
        images, weight = torch.rand(4, 1, 20, 33, dtype=torch.float64), torch.rand(4, 10, dtype=torch.float64)
        ours, theirs = ((network(images) * weight).sum() for network in (encoder, chain))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
        gradients = [
            torch.autograd.grad(total, tuple(network.parameters()))
            for total, network in ((ours, encoder), (theirs, chain))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(list(encoder.buffers()), list(chain.buffers()), rtol=1e-12, atol=0)
    torch.testing.assert_close(encoder.eval()(images), chain.eval()(images), rtol=1e-10, atol=1e-12)


def test_second_order_through_the_encoder():
    torch.manual_seed(0)
    encoder = Conv4(1, 4).double()
    images = torch.rand(6, 1, 16, 16, dtype=torch.float64)
    results = []
    for network in (encoder, plain(encoder)):
        parameters = tuple(network.parameters())
        first = torch.autograd.grad(network(images).square().sum(), parameters, create_graph=True)
        total = sum((g.square().sum() for g in first), torch.zeros(()))
        results.append(torch.autograd.grad(total, parameters, allow_unused=True))
    largest = max(theirs.abs().max().item() for theirs in results[1] if theirs is not None)
    for ours, theirs in zip(*results, strict=True):
        wanted = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-12 * largest)


def test_another_layer_in_the_place_of_batch_norm():
    torch.manual_seed(0)
    encoder = Conv4(1, 4)
    for block in encoder.encoder:
        block[1] = torch.nn.GroupNorm(2, 4)
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(encoder(images), plain(encoder)(images))


OTHERS = {
    "stride": (0, lambda: torch.nn.Conv2d(1, 4, 3, stride=2, padding=1)),
    "no padding": (0, lambda: torch.nn.Conv2d(1, 4, 3)),
    "reflected": (0, lambda: torch.nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")),
    "wide kernel": (0, lambda: torch.nn.Conv2d(1, 4, 5, padding=2)),
    "no bias": (0, lambda: torch.nn.Conv2d(1, 4, 3, padding=1, bias=False)),
    "not affine": (1, lambda: torch.nn.BatchNorm2d(4, affine=False)),
    "leaky": (2, lambda: torch.nn.LeakyReLU(0.1)),
    "no activation": (2, torch.nn.Identity),
    "mean": (3, lambda: torch.nn.AvgPool2d(2)),
    "overlapping": (3, lambda: torch.nn.MaxPool2d(3, 2, padding=1)),
    "rounded up": (3, lambda: torch.nn.MaxPool2d(2, ceil_mode=True)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_layer_in_the_first_block(other):
    """What stands in a block is what is computed, in training and evaluation mode."""
    torch.manual_seed(0)
    encoder = Conv4(1, 4)
    place, make = OTHERS[other]
    encoder.encoder[0][place] = make()
    encoder.double()
    chain = plain(encoder)
    images = torch.rand(3, 1, 35, 37, dtype=torch.float64)
    for mode in (True, False):
        torch.testing.assert_close(
            encoder.train(mode)(images), chain.train(mode)(images), rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("place", range(4))
def test_hooks_are_called(place):
    torch.manual_seed(0)
    encoder = Conv4(1, 4)
    images, seen = torch.rand(2, 1, 16, 16), []
    expected = encoder(images)
    handle = encoder.encoder[0][place].register_forward_hook(lambda layer, given, out: seen.append(out.shape))
    torch.testing.assert_close(encoder(images), expected)
    assert seen == [(2, 4, 8, 8) if place == 3 else (2, 4, 16, 16)]
    handle.remove()
    encoder(images)
    assert len(seen) == 1
    layer = encoder.encoder[0][place]
    forward = layer.forward
    layer.forward = lambda given: 0 * forward(given)
    assert not torch.equal(encoder(images), expected), "a forward of this layer alone"
    del layer.forward
    torch.testing.assert_close(encoder(images), expected)


def test_under_a_transform():
    """Gradients for parameters that are arguments, mapped over tasks, by the statistics of each task's images."""
    torch.manual_seed(0)
    encoder = Conv4(1, 4).double()
    for block in encoder.encoder:
        block[1].track_running_stats = False
        block[1].running_mean = block[1].running_var = None
    parameters = dict(encoder.named_parameters())
    images = torch.rand(3, 5, 1, 16, 16, dtype=torch.float64)

    def loss(parameters, own):
        return torch.func.functional_call(encoder, parameters, (own,)).square().sum()

    mapped = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for k in range(3):
        alone = torch.autograd.grad(encoder(images[k]).square().sum(), tuple(parameters.values()))
        for ours, theirs in zip(mapped.values(), alone, strict=True):
            torch.testing.assert_close(ours[k], theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("in_channels", [1, 5])
@pytest.mark.parametrize("training", [True, False])
def test_tasks_have_statistics_of_their_own(in_channels, training):
    """Features and gradients are those of a loop over the tasks; running statistics follow the mean over them."""
    torch.manual_seed(0)
    encoder = Conv4(in_channels, 4).double().train(training)
    together, alone = deepcopy(encoder), [deepcopy(encoder) for _ in range(3)]
    images = torch.rand(3, 4, in_channels, 16, 20, dtype=torch.float64)
    weight = torch.rand(3, 4, 4, dtype=torch.float64)
    features = together(images)
    each = torch.stack([network(own) for network, own in zip(alone, images, strict=True)])
    torch.testing.assert_close(features, each, rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad((features * weight).sum(), tuple(together.parameters()))
    parts = [
        torch.autograd.grad((own * w).sum(), tuple(network.parameters()), retain_graph=True)
        for own, w, network in zip(each, weight, alone, strict=True)
    ]
    for ours, *theirs in zip(found, *parts, strict=True):
        torch.testing.assert_close(ours, sum(theirs), rtol=1e-8, atol=1e-10)
    for ours, *theirs in zip(together.buffers(), *(network.buffers() for network in alone), strict=True):
        wanted = torch.stack(theirs).double().mean(0).to(ours.dtype)
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=0)


def test_images_with_a_gradient():
    """The first block is another one then."""
    torch.manual_seed(0)
    encoder = Conv4(1, 4).double()
    found = []
    for network in (encoder, plain(encoder)):
        images = (
            torch.linspace(0, 1, 2 * 400, dtype=torch.float64).sin().reshape(2, 1, 20, 20).requires_grad_()
        )
        found.append(torch.autograd.grad(network(images).square().sum(), images)[0])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_tasks_need_a_batch_norm_that_knows_them():
    encoder = Conv4(1, 4)
    encoder.encoder[0][1] = torch.nn.SyncBatchNorm(4)
    with pytest.raises(ValueError, match=r"images: expected \[n, planes, H, W\] for SyncBatchNorm"):
        encoder(torch.rand(2, 3, 1, 16, 16))
    for block in encoder.encoder:
        block[1] = torch.nn.GroupNorm(2, 4)
    images = torch.rand(2, 3, 1, 16, 16)
    torch.testing.assert_close(encoder(images).flatten(0, 1), encoder(images.flatten(0, 1)))


def test_bfloat16_and_autocast():
    torch.manual_seed(0)
    encoder = Conv4(1, 8)
    images = torch.rand(8, 1, 28, 28)
    exact = plain(encoder).double()(images.double())
    with torch.autocast("cpu", torch.bfloat16):
        cast = encoder(images)
    half = encoder.bfloat16()(images.bfloat16())
    for features in (cast, half):
        assert features.dtype == torch.bfloat16
        assert (features.double() - exact).abs().max() < 0.15


def test_order_of_images_in_memory_does_not_matter():
    torch.manual_seed(0)
    encoder = Conv4(3, 8)
    images = torch.rand(5, 3, 20, 24)
    turned = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(encoder(turned), encoder(images))


def test_state_dict_goes_through_a_plain_copy():
    torch.manual_seed(0)
    first, second = Conv4(channels=4).eval(), Conv4(channels=4).eval()
    second.load_state_dict({name: value.contiguous() for name, value in first.state_dict().items()})
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(first(images), second(images))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "in_channels: expected at least 1, got 0"),
        ((1, -3), ValueError, "channels: expected at least 1, got -3"),
        ((1.0,), TypeError, "in_channels: expected an int, got float"),
        ((1, True), TypeError, "channels: expected an int, got bool"),
    ],
    ids=["no channels", "negative", "float", "bool"],
)
def test_bad_sizes(arguments, error, message):
    with pytest.raises(error, match=message):
        Conv4(*arguments)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 28, 28), ValueError, r"images: expected \[\.\.\., n, 1, H, W\], got \[1, 28, 28\]"),
        (
            torch.zeros(2, 3, 28, 28),
            ValueError,
            r"images: expected \[\.\.\., n, 1, H, W\], got \[2, 3, 28, 28\]",
        ),
        (torch.zeros(2, 1, 28, 15), ValueError, "images: expected at least 16 x 16, got 28 x 15"),
        (
            torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
            TypeError,
            "images: expected a floating point tensor, got torch.uint8",
        ),
    ],
    ids=["rank", "channels", "size", "dtype"],
)
def test_bad_images(images, error, message):
    with pytest.raises(error, match=message):
        Conv4()(images)


def test_mlp_initial_weights():
    torch.manual_seed(0)
    model = MLP((1, 400, 400, 1), init_std=0.01)
    values = model[3].weight.detach()
    # A normal distribution cut off at two deviations has 0.88 of its deviation.
    assert float(values.abs().max()) <= 0.02 and float(values.std()) == pytest.approx(0.0088, rel=0.02)
    assert all(not layer.bias.any() for layer in model if isinstance(layer, torch.nn.Linear))
    he = MLP((784, 256, 5))[1].weight.detach()
    assert float(he.std()) == pytest.approx(0.88 * math.sqrt(2 / 784), rel=0.02)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_mlp_layers(activation, batch_norm):
    """As in the MAML paper's code: linear, BatchNorm, activation; nothing after the last layer."""
    kinds = [type(layer).__name__ for layer in MLP((12, 6, 5, 2), activation, batch_norm=batch_norm)]
    hidden = [
        "Linear",
        *(["BatchNorm1d"] if batch_norm else []),
        {"relu": "ReLU", "tanh": "Tanh"}[activation],
    ]
    assert kinds == ["Flatten", *hidden, *hidden, "Linear"]
    assert MLP((12, 6, 5, 2), activation, batch_norm=batch_norm)(torch.rand(4, 3, 2, 2)).shape == (4, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MLP([4]), ValueError, r"widths: expected those of the inputs and of each layer, got \[4\]"),
        (lambda: MLP((1, 0, 1)), ValueError, r"widths\[1\]: expected at least 1, got 0"),
        (lambda: MLP((1, 4.0, 1)), TypeError, r"widths\[1\]: expected an int, got float"),
        (lambda: MLP((1, 1), "elu"), ValueError, "activation: expected relu or tanh, got 'elu'"),
        (
            lambda: MLP((1, 1), init_std=0.0),
            ValueError,
            "init_std: expected a positive finite number, got 0.0",
        ),
    ],
)
def test_mlp_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
