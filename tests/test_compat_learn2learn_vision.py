"""metafast.compat.learn2learn: networks, image data sets, benchmarks and the support vector machine."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import metafast
import metafast.compat.learn2learn as l2l
from metafast.compat.learn2learn.nn.metaoptnet import SVClassifier, svm_logits
from metafast.compat.learn2learn.vision import _lanczos, datasets, models
from metafast.compat.learn2learn.vision.benchmarks import get_tasksets, list_tasksets
from metafast.compat.learn2learn.vision.transforms import RandomClassRotation, rotate
from tests.test_omniglot import DATA, png, real_data

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "fc": (lambda: models.OmniglotFC(784, 5), (6, 1, 28, 28)),
    "fc of other sizes": (lambda: models.OmniglotFC(784, 5, sizes=[32, 16]), (6, 1, 28, 28)),
    "cnn": (lambda: models.OmniglotCNN(5), (6, 28 * 28)),
    "cnn4": (lambda: models.CNN4(5, hidden_size=32), (4, 3, 84, 84)),
    "cnn4, strides": (
        lambda: models.CNN4(5, hidden_size=8, max_pool=False, embedding_size=288),
        (4, 3, 84, 84),
    ),
    "backbone": (lambda: models.CNN4Backbone(hidden_size=8, channels=1, layers=2), (4, 1, 84, 84)),
    "resnet": (lambda: models.ResNet12(5, wider=False, hidden_size=512), (2, 3, 84, 84)),
    "resnet, dropblock": (
        lambda: models.ResNet12Backbone(avg_pool=False, dropblock_dropout=0.5, channels=1),
        (2, 1, 84, 84),
    ),
    "wide": (lambda: models.WRN28Backbone(), (1, 3, 84, 84)),
}
#: Of learn2learn 0.2.0 under torch 2.13 on the CPU, with the seeds below: the number of entries of the state dict, the
#: beginning of the SHA-256 of their names and shapes, and the sums of the absolute values of the initial state, of the
#: outputs in training and of those in evaluation after it.
RECORDED = {
    "fc": (18, "d836b5a3e719e83b", 2297.306622044689, 0.7162647037766874, 0.7162647037766874),
    "fc of other sizes": (10, "c2a108f1dbafcc9d", 233.84737134059378, 0.3657880839891732, 0.3657880839891732),
    "cnn": (58, "ffaa386802dc098d", 9033.244072987061, 49.69793360307813, 1.6911065001040697),
    "cnn4": (30, "bb1ab848fbd7285d", 1823.2110176585556, 18.48480099439621, 0.5695008924230933),
    "cnn4, strides": (30, "45304b453e77de2a", 352.2295737015156, 8.147589400410652, 0.931892485357821),
    "backbone": (14, "9b28e9460e7e869a", 92.80782817033469, 557.8043196499348, 125.78650183882564),
    "resnet": (98, "5052a400c4a573d4", 165891.94089115498, 4.26524244248867, 2.2870666533708572),
    "resnet, dropblock": (96, "1f8d9e13be50bcdf", 228071.61399661232, 46681.31796807397, 4613.374121496471),
    "wide": (181, "7e24fd7991e8344e", 301684.2259205095, 254.6479910314083, 162.02553989990815),
}


@pytest.mark.parametrize("name", MODELS)
def test_networks_are_those_of_the_original(name: str) -> None:
    make, shape = MODELS[name]
    entries, digest, state, trained, evaluated = RECORDED[name]
    torch.manual_seed(1)
    np.random.seed(2)
    net = make()
    values = net.state_dict()
    names = "\n".join(f"{key} {list(value.shape)}" for key, value in values.items())
    assert len(values) == entries and hashlib.sha256(names.encode()).hexdigest()[:16] == digest
    assert sum(v.double().abs().sum().item() for v in values.values()) == pytest.approx(state, rel=1e-6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(9)
    with torch.no_grad():
        assert net(x).double().abs().sum().item() == pytest.approx(trained, rel=1e-4)
        assert net.eval()(x).double().abs().sum().item() == pytest.approx(evaluated, rel=1e-4)


def test_fused_blocks_have_the_derivatives_of_their_layers() -> None:
    net = models.CNN4(3, hidden_size=4, channels=2, embedding_size=4).double()
    assert models.MiniImagenetCNN is models.CNN4
    layers = nn.Sequential(
        *(m for block in net.features for m in (block.conv, block.normalize, block.relu, block.max_pool)),
        nn.Flatten(),
        net.classifier,
    )
    x, y = torch.randn(5, 2, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    found = []
    for model in (net, layers):
        clone = l2l.algorithms.MAML(model, 0.5).clone()
        clone.adapt(cross_entropy(clone(x), y))
        loss = cross_entropy(clone(x), y)
        found.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_dropblock() -> None:
    block = models.resnet12.DropBlock(3)
    x = torch.ones(20, 4, 9, 9)
    out = block(x, gamma=0.05)
    kept = out > 0
    torch.testing.assert_close(out.mean(), torch.tensor(1.0), rtol=1e-6, atol=1e-6)
    assert 0.4 < kept.float().mean() < 0.9
    # What is dropped is a union of squares of 3 x 3.
    holes = torch.nn.functional.max_pool2d(kept.float(), 3, 1) == 0
    covered = torch.nn.functional.max_pool2d(nn.functional.pad(holes.float(), (2, 2, 2, 2)), 3, 1)
    assert torch.equal(covered == 1, ~kept)
    assert block.eval()(x, gamma=0.5) is x
    with pytest.raises(ValueError, match="depth: expected 4 more than a multiple of 6, got 27"):
        models.wrn28.WideResNet(27, 1, 0.0)


def test_initial_weights() -> None:
    layer = models.fc_init_(nn.Linear(400, 300))
    assert layer.weight.abs().max() <= 0.02 and layer.bias.abs().max() == 0
    # The standard deviation of a normal distribution cut off at 2.
    torch.testing.assert_close(layer.weight.std(), torch.tensor(0.00879626), rtol=2e-2, atol=0.0)
    layer = models.maml_init_(nn.Linear(400, 200))
    assert 0.099 < layer.weight.abs().max() <= 0.1 and layer.bias.abs().max() == 0


@pytest.mark.parametrize("degrees", [0.0, 90.0, 180.0, 270.0, -90.0, 450.0])
def test_quarter_turns_are_exact(degrees: float) -> None:
    x = torch.randn(3, 2, 7, 7)
    wanted = torch.rot90(x, int(degrees // 90), (-2, -1))
    assert torch.equal(rotate(x, degrees), wanted)
    assert torch.equal(rotate(x, degrees - 1e-4), wanted), "the general case turns the same way"


def test_other_turns() -> None:
    x = torch.zeros(1, 9, 9, dtype=torch.uint8)
    x[0, 4, 4:] = 255
    turned = rotate(x, 45.0)
    assert turned.dtype == torch.uint8 and turned[0].diagonal(offset=0).sum() == 255
    assert [int(turned[0, 4 - k, 4 + k]) for k in range(3)] == [255] * 3
    wide = torch.randn(2, 4, 6)
    turned = rotate(wide, 90.0)
    assert turned.shape == wide.shape
    assert torch.equal(turned[:, :, 1:5], torch.rot90(wide[:, :, 1:5], 1, (-2, -1)))
    assert torch.equal(turned[:, :, 0], torch.zeros(2, 4))


def test_turns_take_the_pixels_as_they_are() -> None:
    """float64 has numbers that float32 has not."""
    x = torch.rand(2, 8, 8, dtype=torch.float64)
    turned = rotate(x, 30.0)
    assert turned.dtype == torch.float64 and bool(torch.isin(turned[turned != 0], x).all())
    assert torch.equal(turned.float(), rotate(x.float(), 30.0)) and int((turned != 0).sum()) > 90


class Items(torch.utils.data.Dataset[Any]):
    """Images one by one: class c has c in its first pixel."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = torch.arange(9.0).reshape(1, 3, 3) + 10 * i
        return image, i % 4


@pytest.mark.parametrize("whole", [False, True])
def test_all_images_of_a_class_are_turned_alike(whole: bool) -> None:
    items = Items()
    data = l2l.data.MetaDataset(l2l.data.OnDeviceDataset(items) if whole else items)
    t = l2l.data.transforms
    kinds = [
        t.FusedNWaysKShots(data, n=4, k=5),
        t.LoadData(data),
        t.RemapLabels(data),
        RandomClassRotation(data, [0.0, 90.0, 180.0, 270.0]),
    ]
    random.seed(5)
    x, y = l2l.data.Taskset(data, kinds)[0]
    random.seed(5)
    classes = [data.indices_to_labels[i] for i in (int(v.min()) // 10 for v in x)]
    t.RemapLabels(data)(t.FusedNWaysKShots(data, n=4, k=5)(None))
    angles = {c: random.choice([0.0, 90.0, 180.0, 270.0]) for c in dict.fromkeys(classes)}
    assert len(set(angles.values())) > 1
    for image, c in zip(x, classes, strict=True):
        original = items[int(image.min()) // 10][0]
        assert torch.equal(image, torch.rot90(original, int(angles[c] // 90), (-2, -1)))
    assert len({(c, int(label)) for c, label in zip(classes, y, strict=True)}) == 4
    tasks = l2l.data.Taskset(data, kinds, num_tasks=1)
    first = tasks[0]
    again = tasks.get_task(list(tasks.sampled_descriptions[0]))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_lanczos() -> None:
    # Of Pillow 13's Image.resize((4, 4), LANCZOS) of 7 rows of 9 bytes.
    image = (torch.arange(63, dtype=torch.int64) ** 2 * 7 % 256).to(torch.uint8).reshape(1, 7, 9)
    wanted = [[48, 113, 139, 126], [220, 140, 85, 109], [138, 136, 129, 177], [162, 158, 116, 142]]
    assert _lanczos.resize(image, 4)[0].tolist() == wanted
    assert torch.equal(
        _lanczos.resize(torch.full((2, 5, 5), 77, dtype=torch.uint8), 9), torch.full((2, 9, 9), 77)
    )


def omniglot_root(folder: Path) -> Path:
    """Two small zip files in the place of Omniglot's; the drawings of a class are columns of its number of pixels."""
    folder.mkdir(parents=True)
    for archive, names in (
        ("images_background", ("B/character02", "B/character01", "A/character01")),
        ("images_evaluation", ("A_/character01",)),
    ):
        with zipfile.ZipFile(folder / f"{archive}.zip", "w") as file:
            for number, name in enumerate(names):
                for drawer in (1, 2):
                    ink = np.zeros((105, 105), dtype=np.uint8)
                    ink[:, : 10 * number + drawer] = 1
                    file.writestr(f"{archive}/{name}/{number:04d}_{drawer:02d}.png", png(ink))
    return folder


@pytest.mark.parametrize("inner", ["", "omniglot-py"])
def test_full_omniglot(tmp_path: Path, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = omniglot_root(tmp_path / "data" / inner)
    given = tmp_path / "data"
    data = datasets.FullOmniglot(given, target_transform=lambda y: y + 100)
    assert data.labels == [0, 0, 1, 1, 2, 2, 3, 3] and len(data) == 8
    small = data.resized(21)
    assert small.shape == (8, 1, 21, 21) and small.dtype == torch.uint8
    # Background before evaluation, each by name: A, B/character01, B/character02, A_.
    ink = [int((small[i, 0, 0] < 255).sum()) for i in (0, 2, 4, 6)]
    assert ink[0] > ink[1] > ink[2] and ink[3] == ink[2]
    meta = l2l.data.MetaDataset(data)
    assert meta.labels == [100, 101, 102, 103] and meta.labels_to_indices[103] == [6, 7]
    monkeypatch.setattr(datasets.FullOmniglot, "image", lambda self, i: i)
    assert datasets.FullOmniglot(given, transform=lambda i: -i)[3] == (-3, 1)
    (root / "images_evaluation.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="is no intact zip file"):
        datasets.FullOmniglot(given)
    (root / "images_evaluation.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"root: expected a folder with images_evaluation\.zip"):
        datasets.FullOmniglot(given)


def mini_imagenet_root(folder: Path) -> Path:
    """Pickles of 7 classes of 12 images of 4 x 4, for a mode by each of the names in use."""
    for k, mode in enumerate(("train", "val", "test")):
        images = np.zeros((84, 4, 4, 3), dtype=np.uint8)
        images[:, 0, 0, 0] = np.arange(84)
        images[:, :, :, 1] = k
        images[:, 1, 3, 2] = 9
        classes = {f"n{c}": list(range(c, 84, 7)) for c in reversed(range(7))}
        content = {"image_data": images, "class_dict": classes}
        (folder / f"mini-imagenet-cache-{mode}.pkl").write_bytes(pickle.dumps(content))
    return folder


def test_mini_imagenet(tmp_path: Path) -> None:
    data = datasets.MiniImagenet(mini_imagenet_root(tmp_path), mode="validation", transform=lambda x: x + 1)
    image, label = data[9]
    assert len(data) == 84 and label == 7 - 1 - 9 % 7 and isinstance(label, int)
    assert image.shape == (3, 4, 4) and image[0, 0, 0] == 10 and image[1, 2, 2] == 2
    assert (image[2] > 1).nonzero().tolist() == [[1, 3]]
    with pytest.raises(ValueError, match="mode: expected train, validation or test, got 'val'"):
        datasets.MiniImagenet(tmp_path, mode="val")
    (tmp_path / "mini-imagenet-cache-test.pkl").write_bytes(pickle.dumps({"image_data": 1}))
    with pytest.raises(ValueError, match="must hold image_data and class_dict, got image_data"):
        datasets.MiniImagenet(tmp_path, mode="test")
    (tmp_path / "mini-imagenet-cache-test.pkl").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"root: expected a folder with mini-imagenet-cache-test\.pkl"
    ):
        datasets.MiniImagenet(tmp_path, mode="test", download=True)


def test_fc100(tmp_path: Path) -> None:
    images = np.arange(40 * 4 * 4 * 3).astype(np.uint8).reshape(40, 4, 4, 3)
    for mode in ("train", "val", "test"):
        labels = [i % 5 for i in range(40)]
        (tmp_path / f"FC100_{mode}.pickle").write_bytes(pickle.dumps({"data": images, "labels": labels}))
    data = datasets.FC100(tmp_path, mode="validation")
    assert len(data) == 40 and data.all_labels() == labels
    tasks = get_tasksets("fc100", train_ways=2, train_samples=3, root=tmp_path).train
    x, y = tasks[0]
    assert x.shape == (6, 3, 4, 4) and x.dtype == torch.float32 and set(y.tolist()) == {0, 1}
    rows = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    assert all(any(torch.equal(image, row) for row in rows) for image in x)
    (tmp_path / "FC100_test.pickle").write_bytes(pickle.dumps({"labels": []}))
    with pytest.raises(ValueError, match="must hold data and labels, got labels"):
        datasets.FC100(tmp_path, mode="test")


def test_cifarfs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode: expected train, validation or test, got 'val'"):
        datasets.CIFARFS(tmp_path, mode="val")
    with pytest.raises(FileNotFoundError):
        datasets.CIFARFS(tmp_path)


def test_cifarfs_numbers_classes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(5 * 3 * 2 * 2, dtype=torch.uint8).reshape(5, 3, 2, 2)
    found = metafast.data.ImageClasses(images, torch.tensor([0, 2]), torch.tensor([2, 3]), ("wolf", "apple"))
    asked = []

    def cifar_fs(root: Any, split: str) -> Any:
        asked.append((Path(root), split))
        return found

    monkeypatch.setattr("metafast.compat.learn2learn.vision.datasets.cifarfs.cifar_fs", cifar_fs)
    (tmp_path / "cifarfs").mkdir()
    data = datasets.CIFARFS(tmp_path, mode="validation")
    assert asked == [(tmp_path / "cifarfs", "val")] and data.classes == ["apple", "wolf"]
    assert data.labels == [0, 0, 0, 1, 1] and torch.equal(data.images, images[[2, 3, 4, 0, 1]])


def test_get_tasksets(tmp_path: Path) -> None:
    mini_imagenet_root(tmp_path)
    assert list(list_tasksets()) == ["omniglot", "mini-imagenet", "fc100", "cifarfs"]
    random.seed(0)
    for scale, options in ((1, {}), (255, {"data_augmentation": "normalize"})):
        sets = get_tasksets(
            "mini-imagenet",
            train_ways=3,
            train_samples=4,
            test_ways=2,
            test_samples=5,
            num_tasks=7,
            root=tmp_path,
            **options,
        )
        assert sets._fields == ("train", "validation", "test")
        for k, (tasks, ways, samples) in enumerate(zip(sets, (3, 2, 2), (4, 5, 5), strict=True)):
            x, y = tasks.sample()
            assert len(tasks) == 7 and sorted(y.tolist()) == sorted(list(range(ways)) * samples)
            torch.testing.assert_close(x[:, 1], torch.full((ways * samples, 4, 4), k / scale))
            found = {
                (int(image[0, 0, 0] * scale + 0.5) % 7, int(label)) for image, label in zip(x, y, strict=True)
            }
            assert len(found) == ways
    kinds = [type(t).__name__ for t in sets.validation.task_transforms]
    assert kinds == ["NWays", "KShots", "LoadData", "ConsecutiveLabels", "RemapLabels"]
    with pytest.raises(
        ValueError, match="name: expected one of omniglot, mini-imagenet, fc100, cifarfs, got 'mnist'"
    ):
        get_tasksets("mnist")
    with pytest.raises(ValueError, match="kwargs: expected data_augmentation or nothing, got ways"):
        get_tasksets("omniglot", ways=3)
    with pytest.raises(ValueError, match="data_augmentation: expected None, or 'normalize'"):
        get_tasksets("fc100", data_augmentation="lee2019")


@real_data
def test_omniglot_benchmark() -> None:
    random.seed(3)
    order = list(range(1623))
    random.shuffle(order)
    random.seed(3)
    sets = get_tasksets("omniglot", train_samples=2, test_ways=20, root=DATA)
    parts = (order[:1100], order[1100:1200], order[1200:])
    for tasks, part, ways, samples in zip(sets, parts, (5, 20, 20), (2, 10, 10), strict=True):
        assert tasks.dataset.labels == part and len(tasks.dataset) == 20 * len(part)
        x, y = tasks.sample()
        assert x.shape == (ways * samples, 1, 28, 28) and sorted(y.tolist()) == sorted(
            list(range(ways)) * samples
        )
        assert x.min() == 0 and x.max() == 1 and 0.02 < x.mean() < 0.3
    # All pixels as torchvision and Pillow 13 have them, of every 331st drawing.
    images = 255 - (sets.train.dataset.dataset.dataset.tensors[0][::331, 0] * 255).round().to(torch.uint8)
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == "5463054f8d9124ad"


def test_what_is_absent_says_why() -> None:
    for code, text in (
        (
            "from metafast.compat.learn2learn.vision.models import get_pretrained_backbone",
            "downloads nothing",
        ),
        ("from metafast.compat.learn2learn.vision.datasets import TieredImagenet", "12 GB"),
        ("import metafast.compat.learn2learn.gym", "reinforcement-learning"),
        ("from metafast.compat.learn2learn import text", "transformers"),
        (
            "from metafast.compat.learn2learn.vision.models import ResNet18",
            r"learn2learn\.vision\.models\.ResNet18",
        ),
        (
            "from metafast.compat.learn2learn.data.transforms import Nothing",
            r"learn2learn\.data\.transforms\.Nothing",
        ),
    ):
        with pytest.raises(ImportError, match=text):
            exec(code)
    with pytest.raises(AttributeError, match=r"learn2learn\.nn\.Nothing"):
        l2l.nn.Nothing  # noqa: B018


def conditions(
    rows: Tensor, labels: Tensor, ways: int, bound: float, solution: Tensor
) -> tuple[Tensor, Tensor]:
    """What the dual variables violate of their bounds and sums, and of the signs of their multipliers."""
    rows, solution = rows.double(), solution.double()
    upper = bound * nn.functional.one_hot(labels, ways).double()
    outside = torch.cat([(solution - upper).clamp(min=0).flatten(), solution.sum(1).abs()]).amax()
    slope = rows @ (rows.t() @ solution) + solution - upper / bound
    # Free entries of a row have one slope, those at their bound none above it.
    free = solution < upper - 1e-9
    level = (slope * free).sum(1) / free.sum(1)
    over = slope - level[:, None]
    return outside, torch.where(free, over.abs(), over.clamp(min=0)).amax()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("n", "ways", "d", "bound"), [(25, 5, 64, 0.1), (25, 5, 3, 0.1), (12, 3, 8, 10.0), (7, 4, 2, 1.0)]
)
def test_the_support_vector_machine_is_optimal(
    n: int, ways: int, d: int, bound: float, dtype: torch.dtype
) -> None:
    rows, query = torch.randn(n, d, dtype=dtype), torch.randn(6, d, dtype=dtype)
    labels = torch.arange(n) % ways
    classifier = SVClassifier(C_reg=bound)
    classifier.fit_(rows, labels)
    assert classifier.qp_solution.shape == (n, ways) and classifier.qp_solution.dtype == dtype
    outside, slope = conditions(rows, labels, ways, bound, classifier.qp_solution)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-10
    assert outside <= tolerance * bound and slope <= tolerance * max(1.0, bound) * rows.norm() ** 2
    wanted = query @ rows.t() @ classifier.qp_solution
    torch.testing.assert_close(classifier(query), wanted, rtol=10 * tolerance, atol=tolerance * bound)
    assert torch.equal(svm_logits(query, rows, labels, ways, n // ways, C_reg=bound), classifier(query))


def test_the_support_vector_machine_against_numbers_of_qpth() -> None:
    # qpth 0.0.18 with 50 iterations and learn2learn's svm_logits, in float64.
    rows = torch.tensor([[0.0, 1.0], [1.0, 0.5], [-1.0, 0.25], [0.5, -1.0]], dtype=torch.float64)
    query = torch.tensor([[1.0, 1.0], [-2.0, 0.5]], dtype=torch.float64)
    found = svm_logits(query, rows, torch.tensor([0, 1, 2, 1]), 3, 1, C_reg=0.3, max_iters=15)
    torch.testing.assert_close(
        found,
        torch.tensor(
            [
                [0.13240740740745235, 0.2525462962962625, -0.384953703703715],
                [0.2097222222221644, -0.9588789682539182, 0.7491567460317536],
            ],
            dtype=torch.float64,
        ),
        rtol=1e-8,
        atol=1e-8,
    )


@pytest.mark.parametrize(("n", "ways", "d", "bound"), [(25, 5, 3, 0.1), (12, 3, 8, 10.0), (25, 5, 64, 0.1)])
def test_a_bad_guess_of_what_is_at_its_bound_is_put_right(n: int, ways: int, d: int, bound: float) -> None:
    rows, labels = torch.randn(n, d, dtype=torch.float64), torch.arange(n) % ways
    wanted = SVClassifier(rows, labels, C_reg=bound).qp_solution
    for iterations in (0, 1, 3):
        found = SVClassifier(rows, labels, C_reg=bound, max_iters=iterations).qp_solution
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_derivatives_of_the_support_vector_machine() -> None:
    rows = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(6) % 3

    def logits(rows: Tensor, query: Tensor) -> Tensor:
        return svm_logits(query, rows, labels, 3, 2)

    assert torch.autograd.gradcheck(logits, (rows, query))
    assert torch.autograd.gradgradcheck(logits, (rows, query))


def test_support_vector_classifier() -> None:
    rows, query = torch.randn(10, 4), torch.randn(3, 4)
    labels = torch.arange(10) % 2
    plain = SVClassifier(rows, labels)
    scaled = SVClassifier(7 * rows, labels, normalize=True)
    unit = rows / (rows.norm(dim=1, keepdim=True) + 1e-8)
    torch.testing.assert_close(scaled(query), SVClassifier(unit, labels)(SVClassifier.normalize(query)))
    assert plain.ways == 2 and SVClassifier(rows, labels, ways=4)(query).shape == (3, 4)
    other = SVClassifier(rows, labels)
    other.fit_(rows, labels, C_reg=0.01)
    assert not torch.equal(other(query), plain(query))
    with pytest.raises(ValueError, match=r"labels: expected numbers from 0 to 1, got \[0, 1, 2\]"):
        SVClassifier(rows, torch.arange(10) % 3, ways=2)
    with pytest.raises(AssertionError, match="fit_"):
        SVClassifier()(query)


def run(script: str, *arguments: str) -> Any:
    """What a script that imports learn2learn prints, run as it stands."""
    path = Path(__file__).parent / "scripts" / script
    done = subprocess.run(
        [sys.executable, "-m", "metafast.compat", "--as", "learn2learn", str(path), *arguments],
        cwd=Path(metafast.__file__).parents[1],
        # Networks this small gain nothing from threads, which wait for each other on a busy machine.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@real_data
def test_gradient_scripts_run_unmodified() -> None:
    methods = ("maml", "anil", "metasgd", "gbml")
    for name, results in zip(methods, run("learn2learn_adapt.py", str(DATA), "30", *methods), strict=True):
        losses = [loss for loss, _ in results]
        assert len(losses) == 31 and all(loss == loss for loss in losses)
        assert sum(losses[20:30]) < sum(losses[:10]), f"{name} learns"


@real_data
def test_a_prototypical_network_runs_unmodified(tmp_path: Path) -> None:
    found = metafast.data.omniglot(DATA, "val", size=28, rotations=False)
    torch.save((found.images.float() / 255, torch.arange(172).repeat_interleave(20)), tmp_path / "images.pt")
    results = run("learn2learn_protonet.py", str(tmp_path / "images.pt"), "30")
    assert sum(a for _, a in results[15:]) / 15 > 0.5 and sum(x for x, _ in results[15:]) < sum(
        x for x, _ in results[:15]
    )
