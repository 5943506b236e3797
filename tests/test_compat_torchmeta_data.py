"""metafast.compat.torchmeta: data sets of classes and tasks, splitters, loaders, toy problems, images in files."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

import metafast
from metafast.compat.torchmeta import datasets, toy
from metafast.compat.torchmeta import transforms as tf
from metafast.compat.torchmeta._images import CenterCrop, Resize, ToTensor
from metafast.compat.torchmeta.datasets import _classes, helpers
from metafast.compat.torchmeta.transforms.utils import wrap_transform
from metafast.compat.torchmeta.utils import data as tm
from metafast.compat.torchmeta.utils.data import _whole
from metafast.compat.torchmeta.utils.data.dataloader import BatchMetaCollate
from metafast.data._splits import published_split
from tests.test_omniglot import DATA, png, real_data

PIL = pytest.importorskip("PIL.Image")


class Rows(tm.Dataset):
    """The samples of a class of one's own."""

    def __init__(self, index: int, values: Tensor, label: Any, **options: Any) -> None:
        super().__init__(index, **options)
        self.values, self.label = values, label

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> Any:
        x, y = self.values[row], self.label
        if self.transform is not None:
            x = self.transform(x)
        return x, y if self.target_transform is None else self.target_transform(y)


class Times:
    """A class augmentation."""

    def __init__(self, *factors: float) -> None:
        self.factors = factors

    def __iter__(self) -> Any:
        return (Times(factor) for factor in self.factors)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factors[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Times) and self.factors == other.factors

    def __hash__(self) -> int:
        return hash(self.factors)


class Numbers(tm.ClassDataset):
    """Class k holds the numbers from 100 k on, 6 to 8 of them."""

    def __init__(self, count: int = 5, transform: Any = None, **options: Any) -> None:
        super().__init__(**{"meta_train": True, **options})
        self.count, self.transform = count, transform

    @property
    def num_classes(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Rows:
        number = index % self.count
        return Rows(
            index,
            100.0 * number + torch.arange(6 + number % 3),
            f"class {number}",
            transform=self.get_transform(index, self.transform),
            target_transform=self.get_target_transform(index),
        )


def combined(ways: int = 3, count: int = 5, **options: Any) -> Any:
    classes = Numbers(
        count, **{k: options.pop(k) for k in ("class_augmentations", "transform") if k in options}
    )
    return tm.CombinationMetaDataset(classes, ways, **options)


# Splits.


@pytest.mark.parametrize("kind", [tm.ClassDataset, tm.MetaDataset])
def test_meta_splits(kind: Any) -> None:
    assert kind(meta_val=True).meta_split == "val"
    found = kind(meta_split="test")
    assert (found.meta_train, found.meta_val, found.meta_test) == (False, False, True)
    with pytest.raises(ValueError, match=r"meta_split: expected a split, .* got none"):
        kind()
    with pytest.raises(ValueError, match="meta_split: expected train, val or test, got 'validation'"):
        kind(meta_split="validation")
    with pytest.raises(ValueError, match="expected one of them to be true, got True, True, False"):
        kind(meta_train=True, meta_val=True)
    own = type("Own", (kind,), {"meta_split": property(lambda self: "its own")})
    assert own(meta_train=True).meta_split == "its own"
    with pytest.raises(NotImplementedError, match="has no __getitem__"):
        found[0]


# Classes and tasks.


def test_augmented_classes() -> None:
    twice, minus = Times(2.0), Times(-1.0)
    with pytest.warns(UserWarning, match="class_augmentations: .* is there already"):
        classes = Numbers(5, class_augmentations=[Times(2.0, -1.0), minus])
    assert classes.class_augmentations == [twice, minus] and len(classes) == 15
    assert [classes.get_class_augmentation(k) for k in (4, 5, 14)] == [None, twice, minus]
    assert classes[6][1] == (202.0, ("class 1", twice))
    assert classes[1][1] == (101.0, ("class 1", None))
    classes.transform = lambda x: x + 0.5
    assert classes[6][1][0] == 202.5
    assert classes.get_transform(0) is None and classes.get_transform(5) == twice
    with pytest.raises(TypeError, match="class_augmentations: expected a list, got Times"):
        Numbers(5, class_augmentations=twice)


def test_combinations() -> None:
    tasks = combined(class_augmentations=[Times(2.0)])
    task = tasks[1, 7, 3]
    assert type(task) is tm.ConcatTask and (task.index, task.num_classes, len(task)) == (
        (1, 7, 3),
        3,
        7 + 8 + 6,
    )
    assert hash(task) == hash((1, 7, 3)) and hash(task.datasets[1]) == 7
    # By default the augmentation comes as a number.
    assert task[0] == (100.0, ("class 1", 0)) and task[7] == (400.0, ("class 2", 1)) and task[-1][0] == 305.0
    assert len(tasks) == comb(10, 3) and [t.index for t in islice(tasks, 2)] == [(0, 1, 2), (0, 1, 3)]
    for wrong in (1, (1, 2), (1, 2, 3, 4)):
        with pytest.raises(
            ValueError, match=r"index: expected 3 numbers of classes, such as \[\(0, 1, 2\)\]"
        ):
            tasks[wrong]
    with pytest.raises(TypeError, match="num_classes_per_task: expected an int, got NoneType"):
        combined(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes_per_task: expected at least 1, got 0"):
        combined(0)


def test_lengths() -> None:
    # The original multiplies fractions, and loses one here and there.
    assert len(combined(8, 60)) == comb(60, 8)
    tasks = combined(20, 4000)
    with pytest.warns(UserWarning, match=f"len gives {sys.maxsize}"):
        assert len(tasks) == sys.maxsize


def test_tasks_that_numpy_draws() -> None:
    tasks = combined(3, 9)
    tasks.seed(4)
    draw = np.random.RandomState(4)
    for _ in range(3):
        assert tasks.sample_task().index == tuple(draw.choice(9, size=3, replace=False))
    problem = toy.Sinusoid(3, num_tasks=50)
    problem.seed(4)
    wanted = np.random.RandomState(4).randint(50)
    assert problem.sample_task().index == wanted


def test_categorical() -> None:
    torch.manual_seed(3)
    order = torch.randperm(3).tolist()
    torch.manual_seed(3)
    number = tf.Categorical(3)
    assert number.labels == order and [number(x) for x in "bab"] == [order[0], order[1], order[0]]
    assert number.classes == {"b": order[0], "a": order[1]}
    assert pickle.loads(pickle.dumps(number))("c") == number("c") == order[2]
    with pytest.raises(
        ValueError, match="num_classes: expected 3 different targets, got 'd' besides 'b', 'a', 'c'"
    ):
        number("d")
    number.reset()
    assert number.classes == {} and str(number) == "Categorical(3)"
    plain = tf.Categorical()
    assert (
        [plain(x) for x in "baab"] == [0, 1, 1, 0] and str(plain) == "Categorical()" and plain.labels is None
    )


def test_categorical_begins_anew_with_every_task() -> None:
    number = tf.Categorical()
    tasks = combined(target_transform=number)
    assert number("what another program asked for") == 0
    torch.manual_seed(1)
    first, second = tasks[0, 1, 2], tasks[2, 3, 4]
    found = [[task.datasets[k][0][1] for k in range(3)] for task in (first, second, first)]
    torch.manual_seed(1)
    orders = [torch.randperm(3).tolist() for _ in range(2)]
    assert found == [orders[0], orders[1], orders[0]]
    assert number.num_classes == 3 and number.classes == {}
    nested = combined(target_transform=wrap_transform(number, lambda t: t))
    assert nested[0, 1, 2].datasets[0].target_transform.transforms[1] is not number


def test_other_target_transforms() -> None:
    assert (
        str(tf.FixedCategory(None)) == "FixedCategory(None)"
        and str(tf.TargetTransform()) == "TargetTransform"
    )
    with pytest.raises(TypeError, match="target: expected a pair of label and class augmentation, got 3"):
        tf.DefaultTargetTransform([])(3)
    with pytest.raises(NotImplementedError, match="TargetTransform has no __call__"):
        tf.TargetTransform()(3)
    rows = np.arange(6).reshape(2, 3).T
    found = tf.NumpyToTorch()(rows)
    assert (
        found.is_contiguous()
        and found.tolist() == rows.tolist()
        and str(tf.NumpyToTorch()) == "NumpyToTorch()"
    )
    with pytest.raises(TypeError, match="numpy_array: expected a NumPy array, got list"):
        tf.NumpyToTorch()([1])  # type: ignore[arg-type]


# Splitters.


def by_hand(
    sizes: list[int],
    keys: list[int],
    counts: Callable[[int], list[int]],
    shuffle: bool,
    seed: int,
    used: list[int] | None = None,
) -> list[list[int]]:
    """The rows of each split, numbered through all classes, of which the first ones may be used alone."""
    draw = np.random.RandomState(seed)
    splits: list[list[int]] = [[] for _ in counts(10)]
    first = 0
    for size, rows, key in zip(sizes, used or sizes, keys, strict=True):
        order = np.random.RandomState(key % 2**32).permutation(rows) if shuffle else np.arange(rows)
        begin = 0
        for split, count in zip(splits, counts(rows), strict=True):
            part = order[begin : begin + count].copy()
            begin += count
            if shuffle:
                draw.shuffle(part)
            split.extend((part + first).tolist())
        first += size
    return splits


@pytest.mark.parametrize("shuffle", [True, False])
def test_class_splitter(shuffle: bool) -> None:
    tasks = tf.ClassSplitter(combined(), shuffle=shuffle, num_train_per_class=2, num_test_per_class=3)
    tasks.seed(8)
    parts = tasks[2, 0, 1]
    assert isinstance(parts, OrderedDict) and list(parts) == ["train", "test"]
    keys = [hash((2, 0, 1)) + k for k in (2, 0, 1)]
    train, test = by_hand([8, 6, 7], keys, lambda n: [2, 3], shuffle, 8)
    assert (parts["train"].indices, parts["test"].indices) == (train, test)
    part = parts["test"]
    assert type(part) is tm.SubsetTask and (part.num_classes, len(part), part.index) == (3, 9, (2, 0, 1))
    assert hash(part) == hash(((2, 0, 1), tuple(test)))
    assert [x.item() for x, _ in part] == [part.dataset[row][0] for row in test]
    assert len(DataLoader(part, batch_size=9).dataset) == 9  # type: ignore[arg-type]
    assert next(iter(DataLoader(part, batch_size=9)))[0].tolist() == [x.item() for x, _ in part]


class Task(tm.Task):
    """3 classes, 7, 9 and 8 samples, mixed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(5, 3, **options)
        self.targets = [0] * 4 + [2] * 9 + [0] * 3 + [1] * 8

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> Any:
        return torch.tensor(float(row)), self.targets[row]


def test_splits_of_a_task_by_its_targets() -> None:
    parts = tf.ClassSplitter(Task(), num_support_per_class=2, num_query_per_class=4, random_state_seed=9)
    assert list(parts) == ["support", "query"]
    # Classes in the order of their first samples, and numbered so.
    members = [[0, 1, 2, 3, 13, 14, 15], list(range(4, 13)), list(range(16, 24))]
    numbers = [row for rows in members for row in rows]
    wanted = by_hand([7, 9, 8], [hash(5) + k + 9 for k in range(3)], lambda n: [2, 4], True, 9)
    assert [parts["support"].indices, parts["query"].indices] == [
        [numbers[k] for k in rows] for rows in wanted
    ]
    regression = tm.Task(3, None)
    regression.__class__ = type("Regression", (tm.Task,), {"__len__": lambda self: 6})
    found = tf.ClassSplitter(num_samples_per_class={"a": 1, "b": 4})(regression)
    assert [found[name].indices for name in "ab"] == by_hand([6], [hash(3)], lambda n: [1, 4], True, 0)


WEIGHTED: list[tuple[dict[str, Any], Callable[[int], list[int]]]] = [
    ({"train_weights": 0.3, "test_weights": 0.5}, lambda n: [max(1, int(0.3 * n)), max(1, int(0.5 * n))]),
    (
        {
            "weights": {"a": 0.1, "b": 0.9},
            "min_num_samples": {"a": 2, "b": 0},
            "max_num_samples": 4,
        },
        lambda n: [max(2, int(0.1 * n)), min(4, int(0.9 * n))],
    ),
    ({"support_weights": 0.2, "query_weights": 0.2, "min_num_samples": None}, lambda n: [int(0.2 * n)] * 2),
]


@pytest.mark.parametrize(("options", "counts"), WEIGHTED)
@pytest.mark.parametrize("equal", [False, True])
def test_weighted_splitter(options: dict[str, Any], counts: Any, equal: bool) -> None:
    splitter = tf.WeightedClassSplitter(**options, force_equal_per_class=equal, random_state_seed=3)
    assert len(splitter) == 2
    parts = splitter(Task())
    members = [[0, 1, 2, 3, 13, 14, 15], list(range(4, 13)), list(range(16, 24))]
    sizes = [7, 7, 7] if equal else [7, 9, 8]
    numbers = [row for rows, size in zip(members, sizes, strict=True) for row in rows[:size]]
    wanted = by_hand(sizes, [hash(5) + k + 3 for k in range(3)], counts, True, 3)
    assert [part.indices for part in parts.values()] == [[numbers[k] for k in rows] for rows in wanted]
    splitter.seed(3)
    task = combined()[2, 0, 1]
    found = splitter(task)
    keys = [hash((2, 0, 1)) + k + 3 for k in (2, 0, 1)]
    used = [6, 6, 6] if equal else None
    assert [p.indices for p in found.values()] == by_hand([8, 6, 7], keys, counts, True, 3, used)
    one, other = (set(part.indices) for part in found.values())
    assert not one & other


def test_wrong_splits() -> None:
    with pytest.raises(ValueError, match="num_samples_per_class: expected one or more splits"):
        tf.ClassSplitter()
    with pytest.raises(TypeError, match="num_samples_per_class: expected a dictionary of splits, got int"):
        tf.ClassSplitter(num_samples_per_class=3)
    with pytest.raises(ValueError, match=r"num_samples_per_class\['train'\]: expected 0 or more, got -1"):
        tf.ClassSplitter(num_train_per_class=-1)
    with pytest.raises(ValueError, match="weights: expected shares of 0 or more, together at most 1"):
        tf.WeightedClassSplitter(train_weights=0.6, test_weights=0.5)
    with pytest.raises(TypeError, match=r"weights\['train'\]: expected a number, got str"):
        tf.WeightedClassSplitter(train_weights="1")
    with pytest.raises(ValueError, match="min_num_samples: expected the keys train, got test"):
        tf.WeightedClassSplitter(train_weights=0.5, min_num_samples={"test": 1})
    with pytest.raises(TypeError, match=r"max_num_samples\['train'\]: expected an int, got float"):
        tf.WeightedClassSplitter(train_weights=0.5, max_num_samples=1.5)
    splitter = tf.ClassSplitter(num_train_per_class=7)
    with pytest.raises(ValueError, match="task: expected at least 7 samples of each class, got 6 of class 1"):
        splitter(combined()[2, 0, 1])
    with pytest.raises(
        ValueError, match="task: expected 4 different targets, as its num_classes says, got 3"
    ):
        tf.ClassSplitter(tm.SubsetTask(Task(), range(24), num_classes=4), num_train_per_class=1)
    with pytest.raises(ValueError, match="task: expected a Task or a ConcatTask, got list"):
        splitter([1])
    with pytest.raises(
        NotImplementedError, match="task_or_dataset: expected a Task or a MetaDataset, got list"
    ):
        tf.ClassSplitter([1], num_train_per_class=1)
    single = Task()
    single.__class__ = type("Single", (Task,), {"__getitem__": lambda self, row: torch.zeros(1)})
    with pytest.raises(ValueError, match="task: expected samples that are tuples with their target last"):
        tf.ClassSplitter(single, num_train_per_class=1)
    with pytest.raises(NotImplementedError, match="Splitter has no get_indices_task"):
        tf.Splitter({"a": 1}, 0)(Task())


def test_transforms_of_a_data_set_follow_each_other() -> None:
    tasks = combined(dataset_transform=lambda task: tm.SubsetTask(task, range(21)))
    tasks = tf.ClassSplitter(tasks, num_train_per_class=1, random_state_seed=1)
    state = tasks.dataset_transform.transforms[1].np_random.get_state()[1]
    tasks.seed(2)
    assert not np.array_equal(tasks.dataset_transform.transforms[1].np_random.get_state()[1], state)
    assert len(tasks[0, 1, 2]["train"]) == 3
    subset = tm.SubsetTask(Task(), [0, 1], target_transform=str)
    assert subset.dataset.target_transform is str


# Samplers and loaders.


def test_orders_of_tasks() -> None:
    tasks = combined(3, 6)
    assert [*tm.CombinationSequentialSampler(tasks)][:3] == [(0, 1, 2), (0, 1, 3), (0, 1, 4)]
    random.seed(5)
    found = [*tm.CombinationRandomSampler(tasks)]
    random.seed(5)
    assert found == [tuple(random.sample(range(6), 3)) for _ in range(20)]
    for sampler in (tm.CombinationRandomSampler, tm.CombinationSequentialSampler):
        with pytest.raises(TypeError, match="data_source: expected a CombinationMetaDataset, got list"):
            sampler([])
    tm.CombinationRandomSampler(combined(20, 4000))


def test_lists_of_tasks() -> None:
    tasks = combined(3, 6)
    random.seed(5)
    found = next(iter(tm.MetaDataLoader(tasks, batch_size=4)))
    random.seed(5)
    assert [task.index for task in found] == [tuple(random.sample(range(6), 3)) for _ in range(4)]
    ordered = tm.MetaDataLoader(tasks, batch_size=2, shuffle=False)
    assert [task.index for task in next(iter(ordered))] == [(0, 1, 2), (0, 1, 3)] and len(ordered) == 10
    waves = tm.MetaDataLoader(toy.Sinusoid(3, num_tasks=4), shuffle=False)
    assert [batch[0].index for batch in waves] == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_tasks(workers: int) -> None:
    tasks = combined(target_transform=tf.Categorical(3))
    tasks = tf.ClassSplitter(tasks, shuffle=False, num_train_per_class=2, num_test_per_class=1)
    loader = tm.BatchMetaDataLoader(tasks, batch_size=2, shuffle=False, num_workers=workers)
    batch = next(iter(loader))
    assert isinstance(batch, OrderedDict) and list(batch) == ["train", "test"]
    inputs, targets = batch["train"]
    assert inputs.tolist() == [[0, 1, 100, 101, 200, 201], [0, 1, 100, 101, 300, 301]]
    assert targets.shape == (2, 6) and sorted(targets[0, ::2].tolist()) == [0, 1, 2]
    assert torch.equal(targets[:, ::2], targets[:, 1::2])
    assert batch["test"][0].tolist() == [[2, 102, 202], [2, 102, 302]]


def test_a_transform_that_draws_sees_every_sample() -> None:
    seen: list[float] = []

    def noisy(x: Tensor) -> Tensor:
        seen.append(x.item())
        return x + torch.rand(())

    tasks = combined(transform=noisy, target_transform=tf.Categorical(3))
    tasks = tf.ClassSplitter(tasks, shuffle=False, num_train_per_class=1, num_test_per_class=1)
    torch.manual_seed(2)
    inputs, targets = BatchMetaCollate(default_collate)([tasks[0, 1, 2]])["train"]
    assert seen == [0, 100, 200, 1, 101, 201]
    torch.manual_seed(2)
    # The order of the class numbers is drawn between the first sample's input and the second's.
    first, order, rest = torch.rand(()), torch.randperm(3), torch.rand(2, 1).flatten()
    del rest
    assert inputs[0, 0] == first and targets.tolist() == [order.tolist()]


def test_collating_by_hand() -> None:
    collate = BatchMetaCollate(lambda batch: batch)
    assert collate([toy.Sinusoid(2, num_tasks=1)[0]])[0][1][0].shape == (1,)
    with pytest.raises(
        NotImplementedError, match="task: expected a torch Dataset or an OrderedDict of them, got dict"
    ):
        collate([{}])
    pairs = BatchMetaCollate(default_collate).collate_task(TensorDataset(torch.arange(4), torch.arange(4)))
    assert [part.tolist() for part in pairs] == [[0, 1, 2, 3]] * 2


# Toy problems.

#: Of torchmeta 1.8.0: sums of squares of inputs and targets, of each split.
RECORDED = {
    "sinusoid": [80.93325349642163, 23.96275531089824, 130.45719958131775, 10.657767967450138],
    "harmonic": [80.64337642057751, 6.603769590686287, 93.28325871602574, 10.769102376876988],
    "line": [104.82733353875216, 248.1092810208967, 204.56332751556988, 270.868133845885],
}


def squares(batch: Any) -> list[float]:
    return [value.square().sum().item() for part in batch.values() for value in part]


@pytest.mark.parametrize("name", ["sinusoid", "harmonic"])
def test_toy_problems_are_those_of_the_original(name: str) -> None:
    problem = getattr(toy.helpers, name)(shots=2, test_shots=3, seed=1, noise_std=0.1, num_tasks=50)
    torch.manual_seed(3)
    batch = next(iter(tm.BatchMetaDataLoader(problem, batch_size=4)))
    assert batch["train"][0].shape == (4, 2, 1) and batch["test"][1].dtype == torch.float64
    assert squares(batch) == pytest.approx(RECORDED[name], rel=1e-13)


def test_sines_and_lines_are_those_of_the_original() -> None:
    problem = toy.SinusoidAndLine(6, num_tasks=50, noise_std=0.2)
    problem = tf.ClassSplitter(problem, num_support_per_class=2, num_query_per_class=3)
    problem.seed(5)
    torch.manual_seed(3)
    batch = next(iter(tm.BatchMetaDataLoader(problem, batch_size=8)))
    assert squares(batch) == pytest.approx(RECORDED["line"], rel=1e-13)


def test_toy_formulas() -> None:
    waves = toy.SinusoidAndLine(5, num_tasks=9)
    assert waves.is_sinusoid.sum() == 5
    for index in range(9):
        x, y = (np.stack(values) for values in zip(*waves[index], strict=True))
        line = waves.intercepts[index] + waves.slopes[index] * x
        wave = waves.amplitudes[index] * np.sin(x - waves.phases[index])
        np.testing.assert_allclose(y, wave if waves.is_sinusoid[index] else line, rtol=1e-13, atol=1e-13)
        assert abs(x).max() <= 5
    for values, low, high in (
        (waves.amplitudes, 0.1, 5.0),
        (waves.phases, 0.0, np.pi),
        (waves.slopes, -3.0, 3.0),
        (waves.intercepts, -3.0, 3.0),
    ):
        assert values.shape == (9,) and low <= values.min() <= values.max() <= high
    sums = toy.Harmonic(5, num_tasks=3)
    x, y = (np.stack(values) for values in zip(*sums[1], strict=True))
    a, b, f = sums.amplitudes[1], sums.phases[1], sums.frequencies[1]
    wanted = a[0] * np.sin(f * x + b[0]) + a[1] * np.sin(2 * f * x + b[1])
    np.testing.assert_allclose(y, wanted, rtol=1e-13, atol=1e-13)
    assert abs(x.mean() - sums.domains[1]) < 2 and len(sums) == 3 and len(toy.Sinusoid(1)) == 1_000_000
    alone = toy.sinusoid.SinusoidTask(3, 2.0, 0.0, np.array([0.0, 1.0]), None, 4)
    assert len(alone) == 4 and alone.num_classes is None and hash(alone) == 3


def test_classes_that_are_ranges_of_rows() -> None:
    """Of a splitter that finds them itself: its parts are rows, wherever those of a class begin."""

    class Halves(tf.splitters.ClassSplitter_):
        def _get_class_indices(self, task: Any) -> Any:
            return {"second": range(10, 20), "first": range(10)}

    parts = Halves(num_train_per_class=3, num_test_per_class=7).get_indices(
        toy.sinusoid.SinusoidTask(0, 1.0, 1.0, np.array([0.0, 1.0]), None, 20)
    )
    assert [row >= 10 for row in parts["train"]] == 3 * [True] + 3 * [False]
    assert [row >= 10 for row in parts["test"]] == 7 * [True] + 7 * [False]
    assert sorted(parts["train"] + parts["test"]) == list(range(20))


PROBLEMS = (toy.Sinusoid, toy.SinusoidAndLine, toy.Harmonic)
SPLITTERS: tuple[Any, ...] = (
    None,
    lambda: tf.ClassSplitter(num_train_per_class=3, num_test_per_class=5),
    lambda: tf.ClassSplitter(shuffle=False, num_train_per_class=3, num_test_per_class=5),
    lambda: tf.WeightedClassSplitter(train_weights=0.3, test_weights=0.5),
)


def problem_of(kind: Any, splitter: Any, **options: Any) -> Any:
    """One whose parameters are drawn."""
    split = None if splitter is None else splitter()
    tasks = kind(9, num_tasks=40, **{"dataset_transform": split, **options})
    tasks.seed(3)
    for index in range(8):
        tasks[index]
    return tasks


@pytest.mark.parametrize("splitter", range(4))
@pytest.mark.parametrize("kind", PROBLEMS)
def test_toy_problems_drawn_together(kind: Any, splitter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, tasks and the streams after them are those of tasks that are drawn one by one."""

    def drawn() -> tuple[Any, ...]:
        tasks = problem_of(kind, SPLITTERS[splitter])
        torch.manual_seed(0)
        batches = list(islice(tm.BatchMetaDataLoader(tasks, batch_size=7), 3))
        lists = list(islice(tm.MetaDataLoader(tasks, batch_size=6), 2))
        assert all(type(each) is list for each in lists)
        rows = [
            [(name, task[name] if name else task) for name in (task if isinstance(task, dict) else [""])]
            for each in lists
            for task in each
        ]
        found = [
            (name, hash(part), len(part), np.array([part[k] for k in range(len(part))]))
            for task in rows
            for name, part in task
        ]
        alone = [part.dataset if name else part for task in rows for name, part in task]
        about = [{k: v for k, v in vars(task).items() if k not in ("_inputs", "_outputs")} for task in alone]
        split = tasks.dataset_transform
        return (
            batches,
            found,
            [type(task) for task in alone],
            about,
            tasks.np_random.uniform(),
            None if split is None else split.np_random.uniform(),
        )

    together = drawn()
    monkeypatch.setattr(kind, "_ready", lambda self: False)
    one_by_one = drawn()
    for a, b in zip(together[0], one_by_one[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    np.testing.assert_equal(together[1:], one_by_one[1:])


def test_toy_problems_that_are_drawn_one_by_one() -> None:
    """Where a number depends on what comes between, or something else has to see each task."""

    class Own(toy.Sinusoid):
        pass

    def same(x: Any) -> Any:
        return x

    def shared(tasks: Any) -> Any:
        tasks.dataset_transform.np_random = tasks.np_random
        return tasks

    split = SPLITTERS[1]
    one_by_one = [
        kind(9, num_tasks=40, dataset_transform=split())
        for kind in PROBLEMS  # parameters that are not drawn
    ]
    one_by_one += [
        problem_of(Own, split),
        problem_of(toy.Sinusoid, split, noise_std=0.1),
        problem_of(toy.Sinusoid, split, transform=same),
        problem_of(toy.Sinusoid, split, target_transform=same),
        problem_of(toy.Sinusoid, split, dataset_transform=same),
        shared(problem_of(toy.Sinusoid, split)),
    ]
    for tasks in one_by_one:
        assert type(tasks.__getitems__([1, 2])) is list
    tasks = problem_of(toy.Sinusoid, split, noise_std=0.0)
    assert type(tasks.__getitems__([np.int64(1), 2])) is list
    together = tasks.__getitems__([1, -1])
    assert type(together) is not list and len(together) == 2
    assert together[1]["train"].dataset is together[1]["test"].dataset
    assert together[1]["train"].dataset.amplitude == tasks.amplitudes[39]
    with pytest.raises(IndexError):
        tasks.__getitems__([40])
    tasks.dataset_transform = tf.ClassSplitter(num_train_per_class=5, num_test_per_class=6)
    with pytest.raises(ValueError, match="at least 11 samples of each class, got 9"):
        tasks.__getitems__([1, 2])
    empty = problem_of(toy.Sinusoid, lambda: tf.ClassSplitter(num_train_per_class=3, num_test_per_class=0))
    with pytest.raises(IndexError):
        next(iter(tm.BatchMetaDataLoader(empty, batch_size=3)))


def test_toy_problems_at_once_and_one_by_one() -> None:
    def changed(x: Any) -> Tensor:
        return torch.tensor(x * 2)

    tasks = [toy.helpers.sinusoid(3, seed=2, num_tasks=5, **o)[1] for o in ({}, {"transform": changed})]
    collate = BatchMetaCollate(default_collate)
    at_once, one_by_one = (collate.collate_task(task) for task in tasks)
    assert (
        _whole.whole(tasks[0]["train"], set()) is not None and _whole.whole(tasks[1]["train"], set()) is None
    )
    assert torch.equal(at_once["test"][0] * 2, one_by_one["test"][0])
    assert torch.equal(at_once["test"][1], one_by_one["test"][1])

    class Shifted(toy.sinusoid.SinusoidTask):
        def __getitem__(self, row: int) -> Any:
            return super().__getitem__(row)[0] + 1, 0

    assert _whole.whole(Shifted(0, 1.0, 1.0, np.array([0.0, 1.0]), None, 4), set()) is None
    wave = toy.sinusoid.SinusoidTask(0, 1.0, 1.0, np.array([0.0, 1.0]), None, 4)
    last = _whole.whole(tm.SubsetTask(wave, [-1]), set())
    assert last is not None and np.array_equal(last.parts[0].inputs[0], wave[3][0])
    with pytest.raises(IndexError):
        _whole.whole(tm.SubsetTask(wave, [4]), set())
    both = tm.ConcatTask([wave, toy.sinusoid.SinusoidTask(1, 2.0, 1.0, np.array([0.0, 1.0]), None, 4)], 2)
    x, _ = BatchMetaCollate(default_collate).collate_task(tm.SubsetTask(both, [0, -1]))
    assert np.array_equal(x, [both[0][0], both[7][0]])


def test_toy_helpers() -> None:
    with pytest.warns(UserWarning, match="shots: num_samples_per_task is given too"):
        task = toy.helpers.harmonic(99, test_shots=3, num_samples_per_task=8, num_tasks=2)[0]
    assert [len(task[name]) for name in ("train", "test")] == [5, 3]
    with pytest.warns(UserWarning, match="shots"):
        task = toy.helpers.sinusoid(99, num_samples_per_task=8)[0]
    assert [len(task[name]) for name in ("train", "test")] == [4, 4]
    with (
        pytest.warns(UserWarning, match="shots"),
        pytest.raises(
            ValueError, match="test_shots: expected fewer than the 3 of num_samples_per_task, got 3"
        ),
    ):
        toy.helpers.sinusoid(1, test_shots=3, num_samples_per_task=3)
    with pytest.raises(TypeError, match="num_tasks: expected an int, got float"):
        toy.Sinusoid(3, num_tasks=2.0)  # type: ignore[arg-type]


def test_numbers_of_numpy() -> None:
    def rows(task: Any) -> Any:
        return [[*map(int, part.indices)] for part in task.values()]

    two, task = np.int64(2), combined()[0, 1, 2]
    for shuffle in (True, False):
        found = tf.ClassSplitter(shuffle=shuffle, num_train_per_class=two, num_test_per_class=torch.tensor(1))
        wanted = tf.ClassSplitter(shuffle=shuffle, num_train_per_class=2, num_test_per_class=1)
        assert rows(found(task)) == rows(wanted(task))
    shares = {
        "train_weights": np.float32(0.5),
        "test_weights": np.float64(0.25),
        "min_num_samples": np.int64(1),
    }
    plain = {"train_weights": 0.5, "test_weights": 0.25, "min_num_samples": 1}
    assert rows(tf.WeightedClassSplitter(**shares)(task)) == rows(tf.WeightedClassSplitter(**plain)(task))
    assert [len(part) for part in toy.helpers.sinusoid(two, num_tasks=two)[1].values()] == [2, 2]
    with pytest.raises(TypeError, match=r"num_samples_per_class\['train'\]: expected an int, got float"):
        tf.ClassSplitter(num_train_per_class=np.float64(2))


# Transforms of images.


def picture(height: int = 7, width: int = 5, mode: str = "RGB", seed: int = 0) -> Any:
    channels = {"RGB": (3,), "L": ()}[mode]
    values = np.random.RandomState(seed).randint(0, 256, (height, width, *channels), dtype=np.uint8)
    return PIL.fromarray(values)


def test_class_augmentations() -> None:
    image = picture()
    values = np.asarray(image)
    np.testing.assert_array_equal(tf.HorizontalFlip()(image), values[:, ::-1])
    np.testing.assert_array_equal(tf.VerticalFlip()(image), values[::-1])
    square = picture(6, 6)
    for turns, rotation in enumerate(tf.Rotation([90, 180, 630]), 1):
        np.testing.assert_array_equal(rotation(square), np.rot90(np.asarray(square), turns))
    np.testing.assert_array_equal(tf.Rotation(90, expand=True)(image), np.rot90(values))
    np.testing.assert_array_equal(
        tf.Rotation(10, resample=2)(image), image.rotate(10, PIL.Resampling.BILINEAR)
    )
    assert tf.Rotation(90) == tf.Rotation(450) and hash(tf.Rotation(90)) == hash(tf.Rotation(450))
    assert (
        tf.Rotation([90]) == tf.Rotation((90,))
        and tf.Rotation(90) != tf.Rotation(91)
        and tf.Rotation(90) != 90
    )
    assert (repr(tf.Rotation(450)), str(tf.Rotation(450)), repr(tf.Rotation([1, 2]))) == (
        "Rotation(90)",
        "Rotation(450)",
        "Rotation(1, 2)",
    )
    assert [repr(x) for flip in (tf.HorizontalFlip(), tf.VerticalFlip()) for x in flip] == [
        "HorizontalFlip()",
        "VerticalFlip()",
    ]
    with pytest.warns(UserWarning, match="angle: 360 degrees turn nothing"):
        tf.Rotation(360)
    with pytest.raises(ValueError, match=r"angle: expected one number to turn an image by, got \[90, 180\]"):
        tf.Rotation([90, 180])(image)
    with pytest.raises(TypeError, match="image: expected one of Pillow's, got Tensor"):
        tf.Rotation(90)(torch.zeros(3, 4, 4))
    for flip, dim in ((tf.HorizontalFlip(), -1), (tf.VerticalFlip(), -2)):
        with pytest.raises(TypeError, match="image: expected one of Pillow's, got ndarray"):
            flip(values)
        of_many = torch.randn(2, 3, 4, 5)
        assert torch.equal(flip(of_many), of_many.flip(dim))


def test_images_to_tensors() -> None:
    image = picture()
    found = ToTensor()(image)
    assert torch.equal(found, torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    assert torch.equal(ToTensor()(np.array(image)), found) and found.is_contiguous()
    grey = picture(mode="L")
    assert torch.equal(ToTensor()(np.array(grey)), ToTensor()(grey)) and ToTensor()(grey).shape == (1, 7, 5)
    assert ToTensor()(grey.convert("1")).unique().tolist() == [0, 1]
    assert ToTensor()(grey.convert("F")).dtype == torch.float32 and ToTensor()(grey.convert("F")).max() > 1
    assert ToTensor()(grey.convert("I")).dtype == torch.int32
    assert Resize(10)(image).size == (10, 14) and Resize((3, 4))(image).size == (4, 3)
    np.testing.assert_array_equal(Resize(10)(image), image.resize((10, 14), PIL.Resampling.BILINEAR))
    assert Resize(5)(image) is image and Resize((7, 5))(image) is image
    np.testing.assert_array_equal(CenterCrop(3)(image), np.asarray(image)[2:5, 1:4])
    transform = tf.SegmentationPairTransform(4)
    pair = transform(image, grey)
    assert torch.equal(transform.image_transform(image), pair[0])
    assert torch.equal(transform.mask_transform(grey), pair[1])
    np.testing.assert_array_equal(pair[1][0] * 255, np.asarray(grey.resize((4, 4), PIL.Resampling.NEAREST)))
    np.testing.assert_array_equal(
        pair[0], ToTensor()(image.resize((4, 4), PIL.Resampling.BILINEAR)), strict=False
    )


# Data sets of images, in their public layouts.

Where = tuple[Any, Path]


def pictures(folder: Path, names: list[str], suffix: str, count: int = 4, side: int = 6) -> None:
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for row in range(count):
            picture(side, side, seed=10 * number + row).save(folder / name / f"{row}{suffix}")


def doublemnist(root: Path) -> None:
    home = root / "doublemnist" / "double_mnist_seed_123_image_size_64_64"
    pictures(home / "train", ["07", "01", "12"], ".png")
    (home / "train" / "01" / "notes.txt").write_text("no image")
    pictures(home / "test", ["99"], ".png")


def triplemnist(root: Path) -> None:
    pictures(root / "triplemnist" / "triple_mnist_seed_123_image_size_84_84" / "val", ["123", "120"], ".png")


def cub(root: Path) -> None:
    pictures(root / "cub" / "CUB_200_2011" / "images", list(published_split("cub", "val")), ".jpg", 2)


def cifar(root: Path) -> None:
    home = root / "cifar100" / "cifar-100-python"
    home.mkdir(parents=True)
    pairs = sorted(
        p.split("/")[1] for part in ("trainval", "test") for p in published_split("cifar_fs", part)
    )
    draw = np.random.RandomState(0)
    for part, count in (("train", 3), ("test", 1)):
        labels = np.repeat(np.arange(100), count)
        images = draw.randint(0, 256, (len(labels), 3072), dtype=np.uint8)
        (home / part).write_bytes(pickle.dumps({b"data": images, b"fine_labels": labels.tolist()}))
    (home / "meta").write_bytes(pickle.dumps({"fine_label_names": pairs}))


def miniimagenet(root: Path) -> None:
    (root / "miniimagenet").mkdir()
    names = published_split("mini_imagenet_ravi", "val")
    images = np.random.RandomState(0).randint(0, 256, (32, 84, 84, 3), dtype=np.uint8)
    rows = {name: [k, k + 16] for k, name in enumerate(names)}
    path = root / "miniimagenet" / "mini-imagenet-cache-val.pkl"
    path.write_bytes(pickle.dumps({"image_data": images, "class_dict": rows}))


def pascal(root: Path) -> None:
    home = root / "pascal5i"
    names = ["background", *(f"class {k}" for k in range(1, 21))]
    (home / "VOCdevkit/VOC2012/JPEGImages").mkdir(parents=True)
    (home / "pascal-voc-classes.txt").write_text("\n".join(names) + "\n\n")
    for split, folds in (("train", (1, 2, 3)), ("test", (0,))):
        for fold in folds:
            lines = []
            for number in range(5 * fold + 1, 5 * fold + 6):
                (home / "Binary_map_aug" / split / str(number)).mkdir(parents=True)
                for row in range(2):
                    name = f"2007_{number:03d}{row:03d}"
                    lines.append(f"{name}__{number:02d}\n")
                    picture(8, 6, seed=number + row).save(home / f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg")
                    picture(8, 6, "L", number + row).save(
                        home / "Binary_map_aug" / split / str(number) / f"{name}.png"
                    )
            (home / "Binary_map_aug" / split / f"split{fold}_{split}.txt").write_text("".join(lines))


def test_multi_digits(tmp_path: Path) -> None:
    doublemnist(tmp_path)
    triplemnist(tmp_path)
    found = datasets.DoubleMNIST(tmp_path, 2, meta_train=True)
    assert found.dataset.labels == ["01", "07", "12"] and len(found.dataset[0]) == 4
    image, target = found[2, 0][5]
    assert image.mode == "RGB" and target == ("01", 0)
    np.testing.assert_array_equal(image, np.asarray(picture(6, 6, seed=11)))
    assert datasets.TripleMNIST(tmp_path, 2, meta_split="val").dataset.labels == ["120", "123"]
    with pytest.raises(
        RuntimeError, match=r"root: expected double_mnist_seed_123_.* in '.*nothing is downloaded"
    ):
        datasets.DoubleMNIST(tmp_path, 2, meta_val=True, download=True)


def test_cub(tmp_path: Path) -> None:
    cub(tmp_path)
    found = datasets.CUB(tmp_path, 5, meta_val=True)
    assert found.dataset.labels == list(published_split("cub", "val")) and len(found.dataset) == 50
    image, target = found.dataset[3][1]
    home = tmp_path / "cub/CUB_200_2011/images" / found.dataset.labels[3]
    np.testing.assert_array_equal(image, np.asarray(PIL.open(home / "1.jpg").convert("RGB")))
    assert target == (found.dataset.labels[3], None)
    (home / "0.jpg").unlink()
    (home / "1.jpg").unlink()
    with pytest.raises(RuntimeError, match=r"expected CUB_200_2011/images .*no \.jpg files in"):
        datasets.CUB(tmp_path, 5, meta_val=True)


def test_cifar(tmp_path: Path) -> None:
    cifar(tmp_path)
    found = datasets.CIFARFS(tmp_path, 5, meta_test=True).dataset
    wanted = [pair.split("/") for pair in published_split("cifar_fs", "test")]
    assert found.labels == wanted and found[0][0][1] == ((wanted[0][0], wanted[0][1]), None)
    plain = metafast.data.cifar_fs(tmp_path / "cifar100", "test", complete=False)
    start = int(plain.class_starts[plain.names.index(wanted[7][1])])
    np.testing.assert_array_equal(found[7][3][0], plain.images[start + 3].permute(1, 2, 0))
    coarse = datasets.FC100(tmp_path, 5, meta_val=True).dataset
    supers = published_split("fc100", "val")
    assert [label[0] for label in coarse.labels] == [name for name in supers for _ in range(5)]
    assert all(coarse.labels[k][1] < coarse.labels[k + 1][1] for k in range(4))
    assert coarse[19][2][1] == (tuple(coarse.labels[19]), None)


def test_mini_imagenet(tmp_path: Path) -> None:
    miniimagenet(tmp_path)
    found = datasets.MiniImagenet(tmp_path, 5, meta_val=True).dataset
    names = published_split("mini_imagenet_ravi", "val")
    assert found.labels == sorted(names)
    images = np.random.RandomState(0).randint(0, 256, (32, 84, 84, 3), dtype=np.uint8)
    where = names.index(found.labels[2])
    np.testing.assert_array_equal(found[2][1][0], images[where + 16])
    with pytest.raises(RuntimeError, match=r"expected mini-imagenet-cache-train\.pkl"):
        datasets.MiniImagenet(tmp_path, 5, meta_train=True)


def test_pascal(tmp_path: Path) -> None:
    pascal(tmp_path)
    train = datasets.Pascal5i(tmp_path, 1, meta_train=True).dataset
    assert train.labels == [f"class {k}" for k in range(6, 21)]
    test = datasets.Pascal5i(tmp_path, 1, meta_test=True)
    assert test.dataset.labels == [f"class {k}" for k in range(1, 6)]
    image, mask, number = test[(2,)][1]
    assert number == 3 and image.size == mask.size == (6, 8)
    np.testing.assert_array_equal(mask, np.asarray(picture(8, 6, "L", 4)))
    tasks = helpers.pascal5i(tmp_path, 1, meta_test=True, seed=1, transform=tf.SegmentationPairTransform(4))
    images, masks, numbers = next(iter(tm.BatchMetaDataLoader(tasks, batch_size=2)))["train"]
    assert images.shape == (2, 1, 3, 4, 4) and masks.shape == (2, 1, 1, 4, 4) and numbers.shape == (2, 1)
    with pytest.raises(ValueError, match="fold: expected a number from 0 to 3, got 4"):
        datasets.Pascal5i(tmp_path, 1, meta_test=True, fold=4)
    with pytest.raises(ValueError, match="meta_split: expected train or test"):
        datasets.Pascal5i(tmp_path, 1, meta_split="val")
    with pytest.raises(RuntimeError, match="expected VOCdevkit"):
        datasets.Pascal5i(tmp_path, 1, meta_test=True, fold=2)
    (tmp_path / "pascal5i" / "pascal-voc-classes.txt").write_text("background\n")
    with pytest.raises(ValueError, match=r"expected 21 lines in pascal-voc-classes\.txt, got 1"):
        datasets.Pascal5i(tmp_path, 1, meta_test=True)


def omniglot_zips(root: Path) -> None:
    """Three characters of each split of Vinyals et al., two drawings each, and others."""
    (root / "omniglot").mkdir()
    names = {"background": ["Zoo/character01"], "evaluation": ["Ape/character02"]}
    for part in ("train", "val", "test"):
        listed = published_split("omniglot_vinyals", part)
        names["background" if part != "test" else "evaluation"] += listed
    draw = np.random.RandomState(0)
    for archive, characters in names.items():
        with zipfile.ZipFile(root / "omniglot" / f"images_{archive}.zip", "w") as file:
            for name in characters:
                for row in range(2):
                    ink = np.zeros((105, 105), dtype=np.uint8)
                    ink[draw.randint(105, size=30), draw.randint(105, size=30)] = 1
                    file.writestr(f"images_{archive}/{name}/0001_{row + 1:02d}.png", png(ink))


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    omniglot_zips(root)
    return root


def test_omniglot(omniglot: Path, tmp_path: Path) -> None:
    for part, count in (("train", 1028), ("val", 172), ("test", 423)):
        found = datasets.Omniglot(omniglot, 5, meta_split=part).dataset
        names = {"/".join(label[1:]) for label in found.labels}
        assert len(found) == count and names == set(published_split("omniglot_vinyals", part))
        assert found.labels == sorted(found.labels) and found.labels[0][0].startswith("images_")
    image, target = found[0][1]
    assert image.mode == "L" and image.size == (105, 105) and target == ("/".join(found.labels[0]), None)
    with zipfile.ZipFile(omniglot / "omniglot" / "images_evaluation.zip") as file:
        drawing = PIL.open(io.BytesIO(file.read(f"{target[0]}/0001_02.png"))).convert("L")
    np.testing.assert_array_equal(image, 255 - np.asarray(drawing))
    background = datasets.Omniglot(omniglot, 5, meta_train=True, use_vinyals_split=False).dataset
    assert len(background) == 1 + 1028 + 172 and background.labels[-1][1] == "Zoo"
    assert len(datasets.Omniglot(omniglot, 5, meta_test=True, use_vinyals_split=False).dataset) == 424
    with pytest.raises(ValueError, match="meta_val: expected use_vinyals_split=True"):
        datasets.Omniglot(omniglot, 5, meta_val=True, use_vinyals_split=False)
    with pytest.raises(
        RuntimeError, match=r"root: expected images_background\.zip and images_evaluation\.zip"
    ):
        datasets.Omniglot(tmp_path, 5, meta_val=True, download=True)
    (tmp_path / "omniglot").mkdir()
    for archive in ("background", "evaluation"):
        with zipfile.ZipFile(tmp_path / "omniglot" / f"images_{archive}.zip", "w") as file:
            file.writestr(
                f"images_{archive}/Zoo/character01/0001_01.png", png(np.zeros((105, 105), np.uint8))
            )
    with pytest.raises(ValueError, match="root: expected all characters of the split"):
        datasets.Omniglot(tmp_path, 5, meta_val=True)
    with pytest.raises(TypeError, match="num_classes_per_task: expected an int, got NoneType"):
        datasets.Omniglot(omniglot, meta_val=True)


# At once, and one by one.


def one_by_one(tasks: Any, indices: list[Any]) -> Any:
    """Batches as torch collates the samples."""
    return default_collate(
        [
            OrderedDict(
                (name, default_collate([part[row] for row in range(len(part))]))
                for name, part in tasks[index].items()
            )
            for index in indices
        ]
    )


class Fake:
    """A transform of torchvision's, of the module that knows it."""

    def __init__(self, name: str, act: Callable[[Any], Any]) -> None:
        self.__class__ = type(name, (Fake,), {"__module__": "torchvision.transforms.transforms"})
        self.act = act

    def __call__(self, value: Any) -> Any:
        return self.act(value)


def chain(*parts: Any) -> Any:
    from metafast.compat.torchmeta._chain import Compose

    return Compose(parts)


CHAINS: dict[str, tuple[Callable[[], Any], bool]] = {
    "usual": (lambda: chain(Resize(28), ToTensor()), True),
    "as it is": (ToTensor, True),
    "cropped": (lambda: chain(Resize((40, 30)), CenterCrop(20), ToTensor()), True),
    "flipped": (lambda: chain(tf.HorizontalFlip(), chain(tf.VerticalFlip(), ToTensor())), True),
    "torchvision": (
        lambda: chain(
            Fake("Grayscale", lambda image: image.convert("RGB")),
            Fake("ToTensor", ToTensor()),
            Fake("Normalize", lambda x: (x - 0.3) / 0.7),
        ),
        True,
    ),
    "a function": (lambda: lambda image: ToTensor()(image) + 1, False),
    "a part unknown": (lambda: chain(lambda image: image.rotate(3), ToTensor()), False),
    "a crop at random": (lambda: chain(Fake("RandomCrop", Resize(9)), ToTensor()), False),
    "after the tensor": (lambda: chain(ToTensor(), lambda x: x + 1), False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_batches_are_what_the_samples_are(name: str, omniglot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, known = CHAINS[name]
    tasks = datasets.Omniglot(
        omniglot,
        5,
        meta_val=True,
        transform=make(),
        target_transform=tf.Categorical(),
        class_augmentations=[tf.Rotation([90, 180, 270])],
    )
    tasks = tf.ClassSplitter(tasks, num_train_per_class=1, num_test_per_class=1)
    indices = [(3, 1, 600, 200, 400), (1, 600, 601, 5, 3), (3, 1, 600, 200, 400)]
    found = []
    whole: list[Any] = []
    monkeypatch.setattr(
        "metafast.compat.torchmeta.utils.data.dataloader.whole",
        lambda *given: (whole.append(_whole.whole(*given)), whole[-1])[1],
    )
    for batch in (one_by_one, lambda t, i: BatchMetaCollate(default_collate)([t[index] for index in i])):
        tasks.seed(1)
        torch.manual_seed(1)
        found.append(batch(tasks, indices))
        found[-1]["draw"] = torch.rand(3)
    assert len(whole) == 6 and all((each is not None) == known for each in whole)
    for part in ("train", "test"):
        for a, b in zip(found[0][part], found[1][part], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(found[0]["draw"], found[1]["draw"]), "torch's generator is where it was"


def small(root: Path, ways: int = 2, **options: Any) -> Any:
    doublemnist(root)
    chosen = {"transform": ToTensor(), "target_transform": tf.Categorical(ways), **options}
    return datasets.DoubleMNIST(root, ways, meta_train=True, **chosen)


def at_once(task: Any) -> Any:
    found = _whole.whole(task, set())
    return None if found is None else _whole.alone(found)


def test_tasks_are_finished_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    scaled = _classes.scaled
    monkeypatch.setattr(_classes, "scaled", lambda x: (sizes.append(len(x)), scaled(x))[1])
    tasks = small(tmp_path)
    tasks.dataset_transform = tf.ClassSplitter(shuffle=False, num_train_per_class=2, num_test_per_class=1)
    batch = [tasks[0, 1], tasks[2, 1], tasks[1, 2]]
    collate = BatchMetaCollate(default_collate)

    def samples(task: Any) -> Any:
        return {name: default_collate(list(part)) for name, part in task.items()}

    def check() -> None:
        found, wanted = collate(batch), default_collate([samples(task) for task in batch])
        assert list(found) == ["train", "test"]
        for part in wanted:
            for a, b in zip(found[part], wanted[part], strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)

    check()
    assert sizes == [12, 6], "a call for each part of the batch"
    batch[1]["train"].dataset.datasets[0].transform = lambda image: ToTensor()(image) + 1
    sizes.clear()
    check()
    assert sizes == [4, 4, 2, 2], "one task is asked for each sample"

    class Own(BatchMetaCollate):
        def collate_task(self, task: Any) -> Any:
            return len(task)

    assert Own(default_collate)(batch).tolist() == [2, 2, 2]
    tasks.dataset_transform = tf.ClassSplitter(shuffle=False, num_train_per_class=1, num_test_per_class=1)
    with pytest.raises(RuntimeError, match="equal size"):
        collate([batch[0], tasks[0, 1]])
    with pytest.raises(NotImplementedError, match="expected a torch Dataset"):
        collate([batch[0], 3])


def test_images_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = small(tmp_path)
    read = []
    fromfile = np.fromfile
    monkeypatch.setattr(
        np, "fromfile", lambda path, dtype: (read.append(path), fromfile(path, dtype=dtype))[1]
    )
    for _ in range(3):
        first = at_once(tm.SubsetTask(tasks[0, 1], [1, 1, 6]))
        assert first is not None
        first[0].zero_()
    assert len(read) == len(set(read)) == 2
    again = at_once(tm.SubsetTask(tasks[0, 1], [1, 1, 6]))
    assert again is not None
    assert again[0].any() and torch.equal(again[0][0], tasks[0, 1][1][0])
    tasks.dataset.close()
    _whole.whole(tm.SubsetTask(tasks[0, 1], [1]), set())
    assert len(read) == 4


def test_what_was_changed_since_is_seen(tmp_path: Path) -> None:
    tasks = small(tmp_path)
    before = at_once(tasks[0, 1])
    tasks.dataset.transform = chain(Resize(3), ToTensor())
    after = at_once(tasks[0, 1])
    assert before is not None and after is not None
    assert before[0].shape[-1] == 6 and after[0].shape[-1] == 3
    task = tasks[0, 1]
    task.datasets[0].transform = lambda image: torch.zeros(3, 3, 3)
    assert _whole.whole(task, set()) is None
    other = tasks[0, 1]
    other.datasets[1].target_transform_append(lambda number: number + 10)
    assert _whole.whole(other, set()) is None
    third = tasks[0, 1]
    numbers = at_once(third)
    third.datasets[0].target_transform = chain(tf.FixedCategory(), tf.Categorical())
    changed = at_once(third)
    assert numbers is not None and changed is not None and changed[1][0] == 0


def test_a_transform_that_was_changed_in_place_is_seen(tmp_path: Path) -> None:
    tasks = small(tmp_path, transform=chain(ToTensor()), class_augmentations=[tf.HorizontalFlip()])
    parts = tasks.dataset.transform.transforms = [ToTensor()]

    def shape(*numbers: int) -> Any:
        """That of the inputs at once, which are those that come one by one."""
        task = tasks[numbers]
        found = at_once(task)
        if found is None:
            return None
        wanted = default_collate(list(task))
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
        return found[0].shape[1:]

    assert shape(0, 3) == (3, 6, 6)
    parts.insert(0, Resize(4))
    assert shape(0, 3) == (3, 4, 4)
    parts[0].size = 5
    assert shape(0, 3) == (3, 5, 5)
    parts[0].size = size = [2, 7]
    assert shape(0, 3) == (3, 2, 7)
    size[1] = 8
    assert shape(0, 3) == (3, 2, 8)
    parts[0].size = np.array([3, 2])
    assert shape(0, 3) == shape(0, 3) == (3, 3, 2)
    parts[0] = Resize(3)
    assert shape(0, 3) == (3, 3, 3)
    parts.append(lambda x: x + 1)
    assert shape(0, 3) is None
    parts[-1] = Fake("Normalize", lambda x: x + 1)
    assert shape(0, 3) == (3, 3, 3)
    tasks.dataset.class_augmentations[0] = tf.VerticalFlip()
    flipped = tasks[0, 3]
    assert shape(0, 3) == (3, 3, 3)
    assert torch.equal(flipped[4][0], flipped[0][0].flip(-2))
    # The images as well.
    flipped.datasets[0].data = tasks.dataset[1].data
    assert _whole.whole(flipped, set()) is None
    first, second = tasks.dataset.labels[:2]
    tasks.dataset.data[first] = tasks.dataset.data[second]
    assert shape(0, 3) == (3, 3, 3) and torch.equal(tasks[0, 1][0][0], tasks[0, 1][4][0])


def test_a_data_set_may_have_any_names_of_its_own() -> None:
    class Own(tm.Task):
        _samples = _at_once = 3

        def __len__(self) -> int:
            return 6

        def __getitem__(self, row: int) -> Any:
            return float(row), row % 2

    split = tf.ClassSplitter(shuffle=False, num_train_per_class=1, num_test_per_class=2)
    inputs, targets = BatchMetaCollate(default_collate)([split(Own(0, 2))])["test"]
    assert inputs.tolist() == [[2, 4, 3, 5]] and targets.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("target", [None, lambda pair: 3, tf.Categorical])
def test_targets_that_are_no_class_numbers(tmp_path: Path, target: Any) -> None:
    if target is tf.Categorical:
        target = type("Own", (tf.Categorical,), {"__call__": lambda self, pair: 1})(2)
    task = small(tmp_path, target_transform=target)[0, 1]
    assert _whole.whole(task, set()) is None
    assert len(BatchMetaCollate(default_collate).collate_task(task)) == 2


def test_a_subclass_of_the_samples_is_asked_for_each(tmp_path: Path) -> None:
    tasks = small(tmp_path)
    task = tasks[0, 1]
    task.datasets[0].__class__ = type("Own", (_classes.ImagesOfClass,), {})
    assert _whole.whole(task, set()) is None
    own = tasks[0, 1]
    own.__class__ = type("OwnTask", (tm.ConcatTask,), {})
    assert _whole.whole(own, set()) is None and _whole.whole(Subset(tasks[0, 1], [0]), set()) is None
    assert _whole.whole(tm.SubsetTask(tasks[0, 1], []), set()) is None
    assert _whole.whole(tm.SubsetTask(tasks[0, 1], [-1]), set()) is None
    for task, row in ((tasks[0, 1], 8), (tasks[0, 1].datasets[0], 4)):
        with pytest.raises(IndexError):
            task[row]
        with pytest.raises(IndexError):
            _whole.whole(tm.SubsetTask(task, [row], 2), set())


def test_images_beyond_the_budget_are_read_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One class of 4 images of 6 x 6 with 3 channels.
    monkeypatch.setattr(_classes, "KEPT", 4 * 3 * 36 + 5)
    tasks = small(tmp_path, 1)
    assert _whole.whole(tasks[(0,)], set()) is not None and _whole.whole(tasks[(1,)], set()) is None
    assert _whole.whole(tasks[(0,)], set()) is not None


def test_images_of_different_sizes(tmp_path: Path) -> None:
    tasks = small(tmp_path, 1)
    home = tmp_path / "doublemnist" / "double_mnist_seed_123_image_size_64_64" / "train"
    picture(6, 9).save(home / "01" / "2.png")
    assert _whole.whole(tasks[(0,)], set()) is None
    assert tasks[(0,)][2][0].shape == (3, 6, 9)
    # Two classes, each of one size of its own.
    for row in range(4):
        picture(5, 5).save(home / "07" / f"{row}.png")
    both = tm.ConcatTask([tasks.dataset[1], tasks.dataset[2]], 2, target_transform=tf.Categorical(2))
    assert _whole.whole(both, set()) is None


def test_arrays_serve_without_a_copy(tmp_path: Path) -> None:
    cifar(tmp_path)
    tasks = helpers.cifar_fs(tmp_path, 1, 2, test_shots=2, meta_test=True, seed=0)
    inputs, targets = next(iter(tm.BatchMetaDataLoader(tasks, batch_size=3)))["test"]
    assert inputs.shape == (3, 4, 3, 32, 32) and inputs.dtype == torch.float32 and targets.shape == (3, 4)
    kept = [each.pixels._kept for each in tasks.dataset._kept.values()]
    assert all(
        np.shares_memory(k, tasks.dataset.data["/".join(tasks.dataset.labels[i])])
        for i, k in zip(tasks.dataset._kept, kept, strict=True)
    )
    sample = tasks.dataset[4][2][0]
    stack = at_once(tm.ConcatTask([tasks.dataset[4]], 1, target_transform=tf.Categorical(1)))
    assert stack is not None and torch.equal(stack[0][2], sample)
    # Unless the transform changes them.
    tasks.dataset.transform = chain(Resize(16), ToTensor())
    smaller = at_once(tm.ConcatTask([tasks.dataset[4]], 1, target_transform=tf.Categorical(1)))
    assert smaller is not None and torch.equal(smaller[0][2], tasks.dataset[4][2][0])


def test_without_tasks(tmp_path: Path) -> None:
    tasks = small(tmp_path, class_augmentations=[tf.HorizontalFlip()], target_transform=None)
    found = tm.NonEpisodicWrapper(tasks, target_transform=lambda pair: [*pair])
    assert (len(found), found.num_samples, found.num_classes) == (24, 12, 6)
    assert [found[k][1] for k in (0, 3, 4, 8, 11, 12, 23)] == [
        ["01", 0],
        ["01", 0],
        ["07", 0],
        ["12", 0],
        ["12", 0],
        ["01", 1],
        ["12", 1],
    ]
    assert torch.equal(found[17][0], tasks.dataset[4][1][0]) and torch.equal(
        found[5][0], found[17][0].flip(2)
    )
    assert tm.NonEpisodicWrapper(tasks)[4][1] == ("07", 0)
    tasks.dataset.transform = None
    assert found[0][0].size == (6, 6)
    assert len(next(iter(DataLoader(found, batch_size=5, collate_fn=list)))) == 5
    for wrong in (-1, 24):
        with pytest.raises(IndexError, match=f"index: expected a number below 24, got {wrong}"):
            found[wrong]
    with pytest.raises(ValueError, match="dataset: expected a CombinationMetaDataset, got list"):
        tm.NonEpisodicWrapper([])  # type: ignore[arg-type]


HELPERS = {
    "doublemnist": (doublemnist, "train", (3, 6, 6)),
    "triplemnist": (triplemnist, "val", (3, 6, 6)),
    "cub": (cub, "val", (3, 84, 84)),
    "cifar_fs": (cifar, "val", (3, 32, 32)),
    "fc100": (cifar, "test", (3, 32, 32)),
    "miniimagenet": (miniimagenet, "val", (3, 84, 84)),
    "omniglot": (omniglot_zips, "val", (1, 28, 28)),
}


@pytest.mark.parametrize("name", HELPERS)
def test_helpers(name: str, tmp_path: Path) -> None:
    write, split, shape = HELPERS[name]
    write(tmp_path)
    tasks = getattr(helpers, name)(tmp_path, 1, 2, seed=3, meta_split=split)
    draw = np.random.RandomState(3)
    assert tasks.sample_task()["train"].index == tuple(draw.choice(len(tasks.dataset), size=2, replace=False))
    assert len(tasks.dataset.class_augmentations) == (3 if name == "omniglot" else 0)
    tasks.dataset.class_augmentations += [tf.HorizontalFlip()]
    batch = next(iter(tm.BatchMetaDataLoader(tasks, batch_size=2)))
    inputs, targets = batch["test"]
    assert inputs.shape == (2, 2, *shape) and inputs.min() >= 0 and inputs.max() <= 1
    assert [sorted(row) for row in targets.tolist()] == [[0, 1]] * 2


def test_arguments_of_helpers(tmp_path: Path) -> None:
    doublemnist(tmp_path)
    with pytest.warns(UserWarning, match="ways: num_classes_per_task is given too"):
        tasks = helpers.doublemnist(
            tmp_path,
            1,
            9,
            shuffle=False,
            test_shots=2,
            num_classes_per_task=3,
            meta_train=True,
            transform=str,
        )
    task = tasks[0, 1, 2]
    assert [len(part) for part in task.values()] == [3, 6] and task["train"].indices == [0, 4, 8]
    assert isinstance(task["train"][0][0], str) and sorted(t for _, t in task["train"]) == [0, 1, 2]


def test_torchvisions_compose_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs:
        def __init__(self, transforms: list[Any]) -> None:
            self.transforms = transforms

        def __call__(self, value: Any) -> Any:
            for transform in self.transforms:
                value = transform(value)
            return value

    stand_in: Any = types.ModuleType("torchvision.transforms")
    stand_in.Compose = Theirs
    monkeypatch.setitem(sys.modules, "torchvision.transforms", stand_in)
    number = tf.Categorical()
    tasks = combined(target_transform=Theirs([lambda pair: pair[0], number]))
    splitter = tf.ClassSplitter(num_train_per_class=1)
    tasks.dataset_transform = Theirs([splitter])
    before = splitter.np_random
    tasks.seed(3)
    assert splitter.np_random is not before and number.classes == {}
    assert sorted(t for _, t in tasks[0, 1, 2]["train"]) == [0, 1, 2] and number.classes == {}


# On Omniglot.


@real_data
def test_omniglots_tasks_are_those_of_the_original() -> None:
    tasks = helpers.omniglot(DATA.parent, shots=2, ways=5, test_shots=3, seed=1, meta_val=True)
    random.seed(4)
    torch.manual_seed(3)
    batch = next(iter(tm.BatchMetaDataLoader(tasks, batch_size=4)))
    # Of torchmeta 1.8.0, whose drawings were in the order of their names.
    assert batch["train"][0].double().square().sum().item() == pytest.approx(1844.066772236969, rel=1e-12)
    assert batch["test"][0].double().square().sum().item() == pytest.approx(2705.9636847632455, rel=1e-12)
    assert batch["train"][1].tolist() == [
        [2, 2, 4, 4, 3, 3, 0, 0, 1, 1],
        [0, 0, 2, 2, 3, 3, 4, 4, 1, 1],
        [4, 4, 0, 0, 1, 1, 2, 2, 3, 3],
        [1, 1, 2, 2, 0, 0, 3, 3, 4, 4],
    ]
    task = tasks.sample_task()["train"]
    assert task.index == (257, 23, 408, 47, 539)
    assert task.indices == [8, 17, 28, 38, 56, 46, 67, 65, 92, 93]


def run(script: str, *arguments: str) -> Any:
    """What a script that imports torchmeta prints, run as it stands."""
    path = Path(__file__).parent / "scripts" / script
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "metafast.compat", "--as", "torchmeta", str(path), *arguments],
        cwd=Path(metafast.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@real_data
def test_a_prototypical_network_runs_unmodified() -> None:
    results = run("torchmeta_protonet.py", str(DATA.parent), "30")
    # Of torchmeta 1.8.0: the first loss and accuracy.
    assert results[0] == pytest.approx([2.2642316818237305, 0.43], rel=1e-5)
    assert sum(a for _, a in results[15:]) / 15 > 0.6
    assert sum(x for x, _ in results[15:]) < sum(x for x, _ in results[:15])


@real_data
def test_maml_runs_unmodified() -> None:
    losses = run("torchmeta_maml.py", str(DATA.parent), "30")
    # Of torchmeta 1.8.0: the first two losses.
    assert losses[:2] == pytest.approx([1.6080212593078613, 1.6082193851470947], rel=1e-5)
    assert sum(losses[20:]) < sum(losses[:10])
