"""metafast.compat.easyfsl: tasks, data sets, evaluation and pictures."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from metafast.compat.easyfsl import utils
from metafast.compat.easyfsl.datasets import (
    CUB,
    DanishFungi,
    EasySet,
    FeaturesDataset,
    FewShotDataset,
    MiniImageNet,
    SupportSetFolder,
    TieredImageNet,
    WrapFewShotDataset,
    default_configs,
)
from metafast.compat.easyfsl.datasets._rows import Rows
from metafast.compat.easyfsl.datasets.support_set_folder import NOT_A_TENSOR_ERROR_MESSAGE
from metafast.compat.easyfsl.methods import FewShotClassifier, PrototypicalNetworks
from metafast.compat.easyfsl.samplers import TaskSampler

PILLOW = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs Pillow")
PANDAS = importlib.util.find_spec("pandas") is not None
MEAN, STD = (
    torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
    torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
)


def labels_of(classes: int, rows: int) -> list[int]:
    """Labels with gaps, in any order, of which sets are not in ascending order."""
    labels = [97 * k % 2003 - 5 for k in range(classes) for _ in range(rows)]
    random.Random(3).shuffle(labels)
    return labels


class Items(FewShotDataset):
    """Row i is an image full of i; read one by one."""

    def __init__(self, labels: list[Any]) -> None:
        self.labels = labels
        self.reads: list[int] = []

    def __getitem__(self, item: int) -> tuple[Tensor, Any]:
        self.reads.append(item)
        return torch.full((2, 3), float(item)), self.labels[item]

    def __len__(self) -> int:
        return len(self.labels)

    def get_labels(self) -> list[Any]:
        return self.labels


def drawn(labels: list[int], ways: int, rows: int, tasks: int) -> list[list[int]]:
    """Tasks of the original, by Python's own random.sample."""
    of_label: dict[int, list[int]] = {}
    for item, label in enumerate(labels):
        of_label.setdefault(label, []).append(item)
    return [
        [
            item
            for label in random.sample(sorted(of_label), ways)
            for item in random.sample(of_label[label], rows)
        ]
        for _ in range(tasks)
    ]


# Tasks.


@pytest.mark.parametrize(("classes", "rows"), [(6, 9), (30, 20), (7, 120), (300, 21)])
@pytest.mark.parametrize(("ways", "shots", "queries"), [(5, 1, 3), (1, 2, 0), (6, 0, 9), (4, 5, 3)])
def test_tasks_are_those_of_the_seed(classes: int, rows: int, ways: int, shots: int, queries: int) -> None:
    labels = labels_of(classes, rows)
    sampler = TaskSampler(Items(labels), ways, shots, queries, 4)
    assert len(sampler) == 4
    random.seed(8)
    wanted = drawn(labels, ways, shots + queries, 4) + drawn(labels, ways, shots + queries, 4)
    after = random.random()
    random.seed(8)
    found = [*sampler, *sampler]
    assert found == wanted and random.random() == after


def test_tasks_are_drawn_when_they_are_asked_for() -> None:
    labels = labels_of(6, 9)
    sampler = TaskSampler(Items(labels), 2, 1, 1, 3)
    random.seed(9)
    wanted = []
    for _ in range(3):
        wanted.append((drawn(labels, 2, 2, 1)[0], random.random()))
    random.seed(9)
    assert [(one, random.random()) for one in sampler] == wanted


def collated(rows: list[tuple[Tensor, int]], ways: int, shots: int) -> list[Any]:
    """A task, with its classes in the order of a set."""
    classes = list({label for _, label in rows})
    each = len(rows) // ways
    support = [row for k, row in enumerate(rows) if k % each < shots]
    query = [row for k, row in enumerate(rows) if k % each >= shots]
    parts: list[Any] = []
    for part in (support, query):
        parts += [torch.stack([x for x, _ in part]), torch.tensor([classes.index(y) for _, y in part])]
    return [*parts, classes]


def same_task(found: Any, wanted: list[Any]) -> None:
    assert len(found) == len(wanted) == 5
    for one, other in zip(found[:4], wanted[:4], strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
    assert found[4] == wanted[4]


def as_items(labels: list[int]) -> FewShotDataset:
    return Items(labels)


def as_features(labels: list[int]) -> FewShotDataset:
    rows = torch.arange(float(len(labels))).view(-1, 1, 1).expand(-1, 2, 3)
    return FeaturesDataset(labels, rows, [])


def as_tensors(labels: list[int]) -> FewShotDataset:
    rows = torch.arange(float(len(labels))).view(-1, 1, 1).expand(-1, 2, 3)
    return WrapFewShotDataset(TensorDataset(rows, torch.tensor(labels)))


def as_tensor_labels(labels: list[int]) -> FewShotDataset:
    return Items([torch.tensor(label) for label in labels])


@pytest.mark.parametrize("kind", [as_items, as_features, as_tensors, as_tensor_labels])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_of_tasks(kind: Callable[[list[int]], FewShotDataset], workers: int) -> None:
    labels = labels_of(40, 8)
    dataset = kind(labels)
    sampler = TaskSampler(dataset, 5, 2, 3, 6)
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=sampler.episodic_collate_fn
    )
    random.seed(10)
    wanted = drawn(labels, 5, 5, 6)
    random.seed(10)
    for found, rows in zip(loader, wanted, strict=True):
        same_task(found, collated([(torch.full((2, 3), float(i)), labels[i]) for i in rows], 5, 2))


@pytest.mark.parametrize(("shots", "queries"), [(0, 2), (2, 0)])
@pytest.mark.parametrize("kind", [as_items, as_features])
def test_tasks_without_support_or_query(
    kind: Callable[[list[int]], FewShotDataset], shots: int, queries: int
) -> None:
    dataset = kind(labels_of(4, 3))
    sampler = TaskSampler(dataset, 2, shots, queries, 1)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)
    support, support_labels, query, query_labels, _ = next(iter(loader))
    assert support.shape == (2 * shots, 2, 3) and query.shape == (2 * queries, 2, 3)
    assert len(support_labels) == 2 * shots and len(query_labels) == 2 * queries


def test_labels_in_a_tensor() -> None:
    dataset = Items(labels_of(6, 4))
    plain = TaskSampler(dataset, 2, 1, 1, 3)
    dataset.get_labels = lambda: torch.tensor(dataset.labels)  # type: ignore[method-assign, assignment, return-value]
    other = TaskSampler(dataset, 2, 1, 1, 3)
    assert plain.items_per_label == other.items_per_label
    assert all(type(label) is int for label in other.items_per_label)


@pytest.mark.parametrize("kind", [tuple, np.array, iter, lambda labels: dict(enumerate(labels)).values()])
def test_labels_in_any_collection(kind: Callable[[list[int]], Any]) -> None:
    dataset = Items(labels_of(6, 4))
    plain = TaskSampler(dataset, 2, 1, 1, 3)
    dataset.get_labels = lambda: kind(dataset.labels)  # type: ignore[method-assign]
    assert TaskSampler(dataset, 2, 1, 1, 3).items_per_label == plain.items_per_label


def test_rows_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(*_: Any) -> Any:
        raise AssertionError("read one by one")

    dataset = as_features(labels_of(6, 4))
    wrapped = as_tensors(labels_of(6, 4))
    for kind in (TensorDataset, FeaturesDataset, WrapFewShotDataset):
        monkeypatch.setattr(kind, "__getitem__", one_by_one)
    for source in (dataset, wrapped):
        sampler = TaskSampler(source, 2, 1, 1, 1)
        next(iter(DataLoader(source, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)))


@pytest.mark.parametrize("base", [FeaturesDataset, WrapFewShotDataset])
def test_what_a_subclass_gives_is_kept(base: Any) -> None:
    class Doubled(base):  # type: ignore[misc]
        def __getitem__(self, item: int) -> Any:
            image, label = super().__getitem__(item)
            return 2 * image, label

    rows, labels = torch.rand(8, 3), [0, 0, 0, 0, 1, 1, 1, 1]
    if base is FeaturesDataset:
        dataset = Doubled(labels, rows, [])
    else:
        dataset = Doubled(TensorDataset(rows, torch.tensor(labels)))
    found = dataset.__getitems__([5, 2])
    assert [label for _, label in found] == [1, 0] and torch.equal(found[0][0], 2 * rows[5])


def test_other_readers_of_rows_taken_at_once() -> None:
    rows = torch.rand(9, 4)
    dataset = FeaturesDataset([k // 3 for k in range(9)], rows, ["a", "b", "c"])
    images, labels = next(iter(DataLoader(dataset, batch_size=9)))
    assert torch.equal(images, rows) and labels.tolist() == dataset.labels
    part: Subset[Any] = Subset(dataset, [8, 1, 4])
    images, labels = next(iter(DataLoader(part, batch_size=3)))
    assert torch.equal(images, rows[[8, 1, 4]]) and labels.tolist() == [2, 0, 1]
    taken = dataset.__getitems__([7, 0])
    assert len(taken) == 2 and torch.equal(taken[1][0], rows[0]) and taken[0][1] == 2
    assert isinstance(taken[:1], Rows) and [label for _, label in taken[:1]] == [2]
    assert default_collate(taken)[1].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([(np.ones(2), 0)], TypeError, "image: expected a tensor, got ndarray"),
        ([(torch.ones(2), 0.5)], TypeError, "label: expected an int, got float"),
        ([(torch.ones(2), "0")], TypeError, "label: expected an int, got str"),
        (
            [(torch.ones(2), torch.tensor(0.0))],
            TypeError,
            r"label: expected an integer dtype, got torch\.float32",
        ),
        (
            [(torch.ones(2), torch.tensor(True))],
            TypeError,
            r"label: expected an integer dtype, got torch\.bool",
        ),
        ([(torch.ones(2), torch.tensor([0]))], ValueError, r"label: expected shape \[\], got \[1\]"),
    ],
)
def test_rows_that_make_no_task(rows: list[Any], error: type[Exception], message: str) -> None:
    sampler = TaskSampler(Items([0, 0, 1, 1]), 1, 1, 1, 1)
    with pytest.raises(error, match=message):
        sampler.episodic_collate_fn([(torch.ones(2), 0), *rows])
    if "image" not in message:
        with pytest.raises(error, match=message):
            sampler.episodic_collate_fn(Rows(torch.ones(2, 2), [0, rows[0][1]], [0, 1]))


def test_labels_of_any_integer_type() -> None:
    sampler = TaskSampler(Items([0, 0, 1, 1]), 2, 1, 1, 1)
    images = torch.rand(4, 2)
    for kind in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        rows = [(image, torch.tensor(k // 2, dtype=kind)) for k, image in enumerate(images)]
        same_task(sampler.episodic_collate_fn(rows), collated([(x, int(y)) for x, y in rows], 2, 1))
    rows = [(image, np.int64(k // 2)) for k, image in enumerate(images)]
    same_task(sampler.episodic_collate_fn(rows), collated([(x, int(y)) for x, y in rows], 2, 1))


def test_a_task_of_another_size() -> None:
    sampler = TaskSampler(Items([0, 0, 1, 1]), 2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"n_way \* \(n_shot \+ n_query\) = 4 rows, got 3"):
        sampler.episodic_collate_fn([(torch.ones(2), 0)] * 3)


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ((3, 1, 1, 1), ValueError, "n_way: expected at most 2, the labels of the dataset, got 3"),
        (
            (2, 2, 1, 1),
            ValueError,
            r"expected at least n_shot \+ n_query = 3 rows of each label, got 2 of label 7",
        ),
        ((-1, 1, 1, 1), ValueError, "n_way: expected 0 or more, got -1"),
        ((1, -1, 1, 1), ValueError, "n_shot: expected 0 or more, got -1"),
        ((1, 1, -1, 1), ValueError, "n_query: expected 0 or more, got -1"),
        ((1, 1, 1, -1), ValueError, "n_tasks: expected 0 or more, got -1"),
        ((1.0, 1, 1, 1), TypeError, "n_way: expected an int, got float"),
        ((1, 1, 1, "2"), TypeError, "n_tasks: expected an int, got str"),
    ],
)
def test_samplers_that_cannot_be(numbers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskSampler(Items([4, 4, 4, 7, 7]), *numbers)


def test_numbers_of_numpy() -> None:
    sampler = TaskSampler(Items([4, 4, 7, 7]), *np.array([2, 1, 1, 3]))
    assert len(list(sampler)) == 3 and type(sampler.n_way) is int


# Data sets.


def test_a_few_shot_dataset_is_abstract() -> None:
    class Nothing(FewShotDataset):
        def __getitem__(self, item: int) -> Any:
            return super().__getitem__(item)  # type: ignore[safe-super]

        def __len__(self) -> int:
            return super().__len__()  # type: ignore[safe-super]

        def get_labels(self) -> Any:
            return super().get_labels()  # type: ignore[safe-super]

    nothing = Nothing()
    for call, name in (
        (lambda: nothing[0], "getitem"),
        (lambda: len(nothing), "len"),
        (nothing.get_labels, "get_labels"),
    ):
        with pytest.raises(NotImplementedError, match=rf"Nothing: .*{name}"):
            call()


class Wide(Dataset[Any]):
    """Items of four, an image that is never the same twice, and its label, which tells of it."""

    def __init__(self, rows: int, sized: bool) -> None:
        self.rows = rows
        self.reads = 0
        if sized:
            self.__class__ = SizedWide

    def __getitem__(self, item: int) -> Any:
        if item >= self.rows:
            raise IndexError(item)
        self.reads += 1
        return "x", item % 3, None, torch.tensor([self.reads, item])


class SizedWide(Wide):
    def __len__(self) -> int:
        return self.rows


@pytest.mark.parametrize("sized", [False, True])
def test_wrapping(sized: bool) -> None:
    source = Wide(7, sized)
    dataset = WrapFewShotDataset(source, 3, 1)
    assert dataset.get_labels() == dataset.labels == [0, 1, 2, 0, 1, 2, 0] and len(dataset) == 7
    reads = source.reads
    image, label = dataset[5]
    assert image.tolist() == [reads + 1, 5] and label == 2 and source.reads == reads + 1
    assert dataset.source_dataset is source
    assert [label for _, label in dataset.__getitems__([1, 2])] == [1, 2]
    for places, message in (
        ((1, 1), "expected two places, got 1 for both"),
        ((-1, 1), "image_position_in_get_item_output: expected a number from 0 to 3, got -1"),
        ((0, 4), "label_position_in_get_item_output: expected a number from 0 to 3, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            WrapFewShotDataset(source, *places)
    with pytest.raises(ValueError, match="dataset: expected at least one item, got none"):
        WrapFewShotDataset(SizedWide(0, True))


def test_wrapping_tensors() -> None:
    rows = torch.rand(6, 2)
    dataset = WrapFewShotDataset(TensorDataset(torch.arange(6) % 2, rows), 1, 0)
    assert dataset.labels == [0, 1, 0, 1, 0, 1] and type(dataset.labels[0]) is int
    assert torch.equal(dataset[3][0], rows[3]) and dataset[3][1] == 1 and type(dataset[3][1]) is int
    assert [image.tolist() for image, _ in dataset.__getitems__([4, 0])] == rows[[4, 0]].tolist()
    one = WrapFewShotDataset([(rows[0], torch.tensor(4)), (rows[1], torch.tensor(2))])  # type: ignore[arg-type]
    assert one.labels == [4, 2] and type(one.labels[0]) is int


def test_features() -> None:
    parts = {"b": np.arange(6.0).reshape(3, 2), "a": torch.full((1, 2), 7.0, dtype=torch.float64)}
    dataset = FeaturesDataset.from_dict(parts)
    assert dataset.labels == dataset.get_labels() == [0, 0, 0, 1] and dataset.class_names == ["b", "a"]
    assert dataset.embeddings.tolist() == [[0, 1], [2, 3], [4, 5], [7, 7]] and len(dataset) == 4
    assert dataset.embeddings.dtype == torch.float64 and dataset.number_of_classes() == 2
    assert dataset[1][0].tolist() == [2, 3] and dataset[3][1] == 1
    with pytest.raises(ValueError, match="source_dict: expected a tensor or an array for 'a', got list"):
        FeaturesDataset.from_dict({"a": [[1.0]]})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="source_dict: expected at least one class, got none"):
        FeaturesDataset.from_dict({})
    with pytest.raises(ValueError, match=r"embeddings: expected shape \[2, \.\.\.\], got \[3, 1\]"):
        FeaturesDataset([0, 1], torch.rand(3, 1), [])
    with pytest.raises(TypeError, match="embeddings: expected a tensor, got ndarray"):
        FeaturesDataset([0], np.ones((1, 2)), [])  # type: ignore[arg-type]


class Frame(dict[str, list[Any]]):
    """As much of a DataFrame as is needed."""

    @property
    def columns(self) -> list[str]:
        return list(self)


def test_features_of_a_table() -> None:
    frame = Frame(class_name=["z", "y", "z"], embedding=[torch.tensor([1.0, 2.0]), np.ones(2), np.zeros(2)])
    dataset = FeaturesDataset.from_dataframe(frame)
    assert dataset.labels == [0, 1, 0] and dataset.class_names == ["z", "y"]
    assert dataset.embeddings.tolist() == [[1, 2], [1, 1], [0, 0]]
    with pytest.raises(ValueError, match=r"source_dataframe: expected the columns embedding and class_name"):
        FeaturesDataset.from_dataframe(Frame(embedding=[]))
    with pytest.warns(UserWarning, match="source_dataframe is empty"):
        empty = FeaturesDataset.from_dataframe(Frame(class_name=[], embedding=[]))
    assert len(empty) == 0 and empty.class_names == []


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Folders of images, JSON and CSV files about them in the current folder; the images of each class."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    g = np.random.default_rng(0)
    found: dict[str, list[Any]] = {}
    for name in ("b", "a a", "c"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("no image")
        found[name] = []
        for k, suffix in enumerate(("png", "BMP", "jpg")):
            one = image.fromarray(g.integers(0, 256, (20 + 3 * k, 26, 3), dtype=np.uint8))
            one.save(folder / f"{k}.{suffix}")
            with image.open(folder / f"{k}.{suffix}") as read:
                found[name].append(read.convert("RGB"))
    specs = {"class_names": list(found), "class_roots": [f"images/{name}" for name in found]}
    rows = [(name, f"{k}.{suffix}") for name in found for k, suffix in enumerate(("png", "BMP", "jpg"))]
    for path in ("data/CUB/train.json", "data/tiered_imagenet/train.json", "specs.json"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(specs))
    for path, header in (
        ("data/mini_imagenet/train.csv", "extra,class_name,image_name"),
        ("data/fungi/DF20_metadata.csv", "year,scientific_name,image_path"),
    ):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        of_file = "" if "mini" in path else "{}/"
        lines = [f'1,"{name}",{of_file.format(name)}{file}' for name, file in rows]
        Path(path).write_text("\n".join([header, *lines]) + "\n")
    return found


def middle(image: Any, size: int) -> Tensor:
    """The default transform: resized, its middle, normalised."""
    from PIL.Image import Resampling

    side = int(size * 1.15)
    pixels = np.array(image.resize((side, side), Resampling.BILINEAR))
    first = round((side - size) / 2)
    part = torch.from_numpy(pixels[first : first + size, first : first + size]).permute(2, 0, 1)
    return (part / 255 - MEAN) / STD


def same_pictures(dataset: Any, pictures: dict[str, list[Any]], size: int = 84) -> None:
    wanted = [(image, k) for k, images in enumerate(pictures.values()) for image in images]
    assert len(dataset) == len(wanted)
    assert list(dataset.get_labels()) == [k for _, k in wanted]
    assert list(dataset.class_names) == list(pictures)
    for i, (image, label) in enumerate(wanted):
        found, number = dataset[i]
        assert number == label and type(number) is int
        torch.testing.assert_close(found, middle(image, size), rtol=1e-6, atol=1e-6)
    sampler = TaskSampler(dataset, 2, 1, 1, 1)
    task = next(iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=sampler.episodic_collate_fn)))
    assert task[0].shape == (2, 3, size, size)


def test_folders_of_a_json_file(pictures: dict[str, list[Any]]) -> None:
    same_pictures(EasySet("specs.json"), pictures)
    same_pictures(EasySet(Path("specs.json"), image_size=17), pictures, 17)
    same_pictures(CUB("train"), pictures)
    same_pictures(TieredImageNet("train", image_size=20), pictures, 20)
    one = EasySet("specs.json", transform=lambda image: image.size, supported_formats={".png"})
    assert len(one) == 3 and one[0] == ((26, 20), 0) and one.number_of_classes() == 3
    assert one.images == [str(Path("images", name, "0.png")) for name in pictures]
    for kind in (CUB, TieredImageNet):
        with pytest.raises(ValueError, match=r"split: expected a split with a file in data.*no test\.json"):
            kind("test")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("specs.yaml", {}, "specs_file: expected a file that ends with .json, got .*specs.yaml"),
        ("specs.json", [], "specs_file: expected a dict with class_names and class_roots"),
        ("specs.json", {"class_names": []}, "specs_file: expected a dict with class_names and class_roots"),
        (
            "specs.json",
            {"class_names": ["a"], "class_roots": []},
            "as many class_roots as class_names, got 0 and 1",
        ),
    ],
)
def test_wrong_json_files(tmp_path: Path, name: str, content: Any, message: str) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        EasySet(tmp_path / name)


def test_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "specs.json").write_text(json.dumps({"class_names": ["a"], "class_roots": [str(tmp_path)]}))
    with pytest.warns(UserWarning, match="class_roots: no image in any of the folders"):
        assert len(EasySet(tmp_path / "specs.json")) == 0


def test_mini_imagenet(pictures: dict[str, list[Any]]) -> None:
    same_pictures(MiniImageNet("images", "train"), pictures)
    dataset = MiniImageNet(Path("images"), specs_file="data/mini_imagenet/train.csv", image_size=20)
    same_pictures(dataset, pictures, 20)
    assert dataset.class_to_label == {"b": 0, "a a": 1, "c": 2}
    kept = MiniImageNet("images", "train", image_size=20, load_on_ram=True)
    assert kept.images.shape == (9, 3, 40, 40)
    half = nn.functional.interpolate(kept.images, (23, 23), mode="bilinear", antialias=True)
    torch.testing.assert_close(kept[4][0], (half[4, :, 2:22, 2:22] - MEAN) / STD, rtol=1e-6, atol=1e-6)
    own = MiniImageNet(
        "images",
        "train",
        load_on_ram=True,
        loading_transform=lambda x: torch.ones(1),
        transform=lambda x: 2 * x,
    )
    assert own[0] == (2, 0) and own.images.tolist() == [[1.0]] * 9
    for options, got in (({}, "neither"), ({"split": "train", "specs_file": "x.csv"}, "both")):
        with pytest.raises(ValueError, match=f"split, specs_file: expected one of the two, got {got}"):
            MiniImageNet("images", **options)
    with pytest.raises(FileNotFoundError):
        MiniImageNet("images", "test")
    Path("marked.csv").write_text("class_name,image_name\nc,0.png\nb,0.png\n", encoding="utf-8-sig")
    assert MiniImageNet("images", specs_file="marked.csv").class_to_label == {"c": 0, "b": 1}
    Path("bad.csv").write_text("class_name,file\n")
    with pytest.raises(
        ValueError, match=r"expected the columns class_name, image_name, bad\.csv lacks image_name"
    ):
        MiniImageNet("images", specs_file="bad.csv")


def test_danish_fungi(pictures: dict[str, list[Any]]) -> None:
    same_pictures(DanishFungi("images"), pictures)
    path = Path("data/fungi/DF20_metadata.csv")
    Path("other.csv").write_text(path.read_text().replace(".jpg", ".JPG"))
    same_pictures(DanishFungi("images", "other.csv", 20, image_file_extension=".jpg"), pictures, 20)


@pytest.mark.skipif(not PANDAS, reason="needs pandas")
def test_tables_of_data_sets(pictures: dict[str, list[Any]]) -> None:
    table = MiniImageNet("images", "train").data_df
    assert list(table.columns) == ["extra", "class_name", "image_name", "image_path"]
    assert table.image_path[4] == Path("images", "a a", "1.BMP")
    table = DanishFungi("images", image_file_extension=".jpg").data
    assert list(table.label) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_tables_need_pandas(pictures: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    loader: Any = DataLoader(TensorDataset(torch.rand(2, 2), torch.arange(2)))
    for call in (
        lambda: MiniImageNet("images", "train").data_df,
        lambda: DanishFungi("images").data,
        lambda: utils.predict_embeddings(loader, nn.Identity()),
    ):
        with pytest.raises(ImportError, match="a DataFrame needs pandas: pip install pandas"):
            call()


def test_a_support_set_in_a_folder(pictures: dict[str, list[Any]]) -> None:
    deep = Path("images", "c", "more")
    deep.mkdir()
    pictures["c"][0].save(deep / "0.png")
    dataset = SupportSetFolder("images", image_size=12)
    assert dataset.classes == ["a a", "b", "c"] and dataset.class_to_idx == {"a a": 0, "b": 1, "c": 2}
    wanted = [image for name in dataset.classes for image in pictures[name]] + [pictures["c"][0]]
    torch.testing.assert_close(
        dataset.get_images(), torch.stack([middle(image, 12) for image in wanted]), rtol=1e-6, atol=1e-6
    )
    assert dataset.get_labels().tolist() == dataset.targets == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert dataset.get_labels().dtype == torch.int64 and len(dataset) == 10
    assert dataset.samples is dataset.imgs and dataset.samples[-1] == (str(Path("images/c/more/0.png")), 2)
    model = PrototypicalNetworks(nn.Flatten())
    model.process_support_set(dataset.get_images(), dataset.get_labels())
    assert model(dataset.get_images()[:2]).shape == (2, 3)
    some = SupportSetFolder(
        "images",
        transform=lambda x: torch.ones(1),
        target_transform=lambda k: 10 * k,
        loader=lambda path: path,
        is_valid_file=lambda path: path.endswith(".txt"),
    )
    assert len(some) == 3 and some[2][1] == 20 and some.targets == [0, 1, 2]
    with pytest.raises(TypeError, match=f"^{NOT_A_TENSOR_ERROR_MESSAGE}$"):
        SupportSetFolder("images", transform=lambda x: x)
    Path("images", "d").mkdir()
    with pytest.raises(
        FileNotFoundError, match="root: expected images of each class, got none in d of images"
    ):
        SupportSetFolder("images")
    assert SupportSetFolder("images", allow_empty=True).classes == ["a a", "b", "c", "d"]
    with pytest.raises(
        FileNotFoundError, match="root: expected a folder of each class in data/CUB, got none"
    ):
        SupportSetFolder("data/CUB")


def part_of(height: int, width: int) -> tuple[int, int, int, int]:
    """torchvision's part of an image at random."""
    for _ in range(10):
        area = height * width * torch.empty(1).uniform_(0.08, 1.0).item()
        low, high = (torch.log(torch.tensor([value])).item() for value in (3 / 4, 4 / 3))
        ratio = torch.exp(torch.empty(1).uniform_(low, high)).item()
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,)).item()
            return int(top), int(torch.randint(0, width - w + 1, (1,)).item()), h, w
    if width / height < 3 / 4:
        w, h = width, round(width * 4 / 3)
    else:
        w, h = round(height * 4 / 3), height
    return (height - h) // 2, (width - w) // 2, h, w


@PILLOW
@pytest.mark.parametrize("shape", [(30, 40), (400, 6), (6, 400)])
def test_transforms_for_training(shape: tuple[int, int]) -> None:
    from PIL import Image, ImageEnhance

    height, width = shape
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
    transform = default_configs.default_transform(9, training=True)
    flips = 0
    for seed in range(12):
        torch.manual_seed(seed)
        found, after = transform(image), torch.rand(1)
        torch.manual_seed(seed)
        top, left, h, w = part_of(height, width)
        wanted = image.crop((left, top, left + w, top + h)).resize((9, 9), Image.Resampling.BILINEAR)
        order = torch.randperm(4).tolist()
        factors = [torch.empty(1).uniform_(0.6, 1.4).item() for _ in range(3)]
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for k in order:
            if k < 3:
                wanted = kinds[k](wanted).enhance(factors[k])
        pixels = torch.from_numpy(np.array(wanted)).permute(2, 0, 1) / 255
        if torch.rand(1) < 0.5:
            flips += 1
            pixels = pixels.flip(-1)
        torch.testing.assert_close(found, (pixels - MEAN) / STD, rtol=1e-6, atol=1e-6)
        assert torch.equal(torch.rand(1), after)
    assert 0 < flips < 12


def test_transforms_of_tensors_for_training() -> None:
    image = torch.rand(3, 30, 40)
    transform = default_configs.default_mini_imagenet_serving_transform(9, training=True)
    for seed in range(8):
        torch.manual_seed(seed)
        found = transform(image)
        torch.manual_seed(seed)
        top, left, h, w = part_of(30, 40)
        wanted = image[None, :, top : top + h, left : left + w]
        wanted = nn.functional.interpolate(wanted, (9, 9), mode="bilinear", antialias=True)[0]
        order = torch.randperm(4).tolist()
        factors = [torch.empty(1).uniform_(0.6, 1.4).item() for _ in range(3)]
        for k in order:
            if k == 3:
                continue
            grey = (wanted * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
            other = (0.0, grey.mean(), grey)[k]
            wanted = (factors[k] * wanted + (1 - factors[k]) * other).clamp(0, 1)
        if torch.rand(1) < 0.5:
            wanted = wanted.flip(-1)
        torch.testing.assert_close(found, (wanted - MEAN) / STD, rtol=1e-5, atol=1e-5)


# Evaluation.


class Scores(FewShotClassifier):
    """The scores are the queries."""

    modes: tuple[bool, bool] = (True, True)

    def process_support_set(self, support_images: Tensor, support_labels: Tensor) -> None:
        self.seen = support_images, support_labels

    def forward(self, query_images: Tensor) -> Tensor:
        self.modes = self.training, torch.is_grad_enabled()
        return query_images

    @staticmethod
    def is_transductive() -> bool:
        return False


def test_evaluation_of_one_task() -> None:
    model = Scores()
    x, y = torch.rand(4, 1), torch.tensor([0, 1, 2, 1])
    z = torch.eye(3)[[0, 1, 2, 2]]
    assert utils.evaluate_on_one_task(model, x, y, z, torch.tensor([0, 1, 2, 0])) == (3, 4)
    assert model.seen[0] is x and model.seen[1] is y
    # As many columns as labels: the labels in ascending order.
    y = torch.tensor([30, 4, 9, 4])
    assert utils.evaluate_on_one_task(model, x, y, z, torch.tensor([4, 9, 30, 30])) == (4, 4)
    y = torch.tensor([1, -1, 0, -1])
    assert utils.evaluate_on_one_task(model, x, y, z, torch.tensor([-1, 0, 1, 0])) == (3, 4)
    # Others are the labels themselves.
    z = torch.eye(5)[[4, 0, 2, 2]]
    y = torch.tensor([4, 2, 0, 4])
    assert utils.evaluate_on_one_task(model, x, y, z, torch.tensor([4, 0, 2, 0])) == (3, 4)


def test_evaluation() -> None:
    x, y = torch.rand(2, 1), torch.arange(2)
    eye = torch.eye(2)
    tasks: Any = [
        (x, y, eye[[0, 1, 1]], torch.tensor([0, 1, 0]), [5, 6]),
        (x, y, eye[[0]], torch.tensor([1]), [5, 6]),
    ]
    model = Scores()
    assert utils.evaluate(model, tasks, device="cpu") == 2 / 4
    assert model.modes == (False, False) and not model.training
    assert utils.evaluate(model, tasks, device="cpu", use_tqdm=False, tqdm_prefix="x") == 2 / 4
    with pytest.raises(ValueError, match="data_loader: expected at least one task with a query, got none"):
        utils.evaluate(model, [], device="cpu")  # type: ignore[arg-type]


def test_progress_is_shown_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Bar:
        def update(self) -> None:
            shown.append("update")

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            shown.append(text)

        def close(self) -> None:
            shown.append("close")

    def bar(*arguments: Any) -> Bar:
        shown.append(arguments)
        return Bar()

    monkeypatch.setattr(utils, "progress_bar", bar)
    eye = torch.eye(2)
    tasks: Any = [(eye, torch.arange(2), eye, torch.tensor([0, 0]), [])]
    utils.evaluate(Scores(), tasks, device="cpu", tqdm_prefix="Valid")
    assert shown == [(1, "Valid", "task"), "update", "accuracy=0.5", "close"]
    shown.clear()
    utils.evaluate(Scores(), tasks, device="cpu", use_tqdm=False)
    assert shown == []


def test_evaluation_of_labels_with_gaps() -> None:
    """A whole evaluation in which the labels of the data set are those of the tasks."""
    g = torch.Generator().manual_seed(0)
    labels = labels_of(6, 10)
    centres = {label: torch.randn(5, generator=g) for label in set(labels)}
    rows = torch.stack([centres[label] + 0.1 * torch.randn(5, generator=g) for label in labels])
    keep = torch.tensor(labels)
    support, query = torch.arange(30), torch.arange(30, 60)
    tasks: Any = [(rows[support], keep[support], rows[query], keep[query], [])]
    assert utils.evaluate(PrototypicalNetworks(), tasks, device="cpu") == 1.0


def test_average_features() -> None:
    model = nn.Linear(3, 2)
    rows = torch.rand(7, 3)
    for labels in (torch.arange(7), None):
        dataset: Any = TensorDataset(rows, torch.arange(7))
        if labels is None:
            dataset = [(row, f"class {k % 2}") for k, row in enumerate(rows)]
        loader = DataLoader(dataset, batch_size=3)
        found = utils.compute_average_features_from_images(loader, model)
        torch.testing.assert_close(found, model(rows).mean(0))
        assert found.shape == (2,) and not found.requires_grad
    assert utils.compute_average_features_from_images(loader, model, "cpu").device.type == "cpu"


def test_features_of_a_loader_without_a_length() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return zip(rows, "abc", strict=True)

    rows = torch.rand(3, 2)
    batches: Any = iter([(rows, list("abc"))])
    for loader in (DataLoader(Stream(), batch_size=2), batches):
        found = utils.compute_average_features_from_images(loader, nn.Identity())
        torch.testing.assert_close(found, rows.mean(0))


@pytest.mark.parametrize("names", [[3, 1, 1], ["x", "y", "x"]])
def test_table_of_features(names: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Pandas:
        DataFrame = Frame

    monkeypatch.setattr(utils, "pandas", lambda: Pandas)
    rows = torch.rand(3, 2)
    loader: Any = DataLoader(list(zip(rows, names, strict=True)), batch_size=2)  # type: ignore[arg-type]
    frame = utils.predict_embeddings(loader, nn.Identity(), "cpu")
    assert list(frame) == ["embedding", "class_name"] and frame["class_name"] == names
    assert torch.equal(torch.stack(frame["embedding"]), rows)


def test_sliding_average() -> None:
    values = [1.0, 2.0, 6.0]
    assert utils.sliding_average(values, 2) == 4 and utils.sliding_average(values, 0) == 3
    assert utils.sliding_average(values, 9) == 3
    with pytest.raises(ValueError, match="value_list: expected at least one value, got none"):
        utils.sliding_average([], 2)


def test_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    images = torch.rand(5, 1, 4, 3)
    utils.plot_images(images, "five", images_per_row=2)
    axes = pyplot.gca()
    shown = torch.from_numpy(np.asarray(axes.images[0].get_array()))
    pyplot.close("all")
    assert axes.get_title() == "five" and shown.shape == (3 * 6 + 2, 2 * 5 + 2, 3)
    for k, image in enumerate(images):
        top, left = 2 + 6 * (k // 2), 2 + 5 * (k % 2)
        assert torch.equal(shown[top : top + 4, left : left + 3, 1], image[0])
    assert float(shown.double().sum()) == pytest.approx(3 * float(images.double().sum()))
    for count, columns, shape in ((1, 4, (4, 3, 3)), (2, 8, (8, 12, 3))):
        utils.plot_images(torch.rand(count, 3, 4, 3), "some", columns)
        assert pyplot.gca().images[0].get_array().shape == shape
        pyplot.close("all")
    utils.plot_images(list(images), "a list", images_per_row=2)
    assert np.array_equal(pyplot.gca().images[0].get_array(), shown)
    utils.plot_images(images.expand(-1, 4, -1, -1), "with opacity", images_per_row=2)
    assert np.array_equal(pyplot.gca().images[0].get_array()[..., :3], shown)
    pyplot.close("all")
    with pytest.raises(
        ValueError, match=r"images: expected shape \[n, 1, 3 or 4, height, width\], got \[5, 2, 4, 3\]"
    ):
        utils.plot_images(images.expand(-1, 2, -1, -1), "x", 2)
    with pytest.raises(ValueError, match=r"images: expected shape .* got \[0\]"):
        utils.plot_images([], "x", 2)
    with pytest.raises(ValueError, match="images_per_row: expected at least 1, got 0"):
        utils.plot_images(images, "x", 0)
