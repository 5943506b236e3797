"""metafast.compat.learn2learn.data: the tasks that learn2learn 0.2.0 draws from the same seeds."""

from __future__ import annotations

import pickle
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from metafast.compat.learn2learn import data as l2l_data
from metafast.compat.learn2learn.data import (
    DataDescription,
    FilteredMetaDataset,
    InfiniteIterator,
    MetaDataset,
    OnDeviceDataset,
    TaskDataset,
    Taskset,
    UnionMetaDataset,
    partition_task,
    transforms,
)
from metafast.compat.learn2learn.data.samplers import TasksetSampler

ROWS = 64
LABELS = torch.tensor([(3 * i + i // 10) % 8 * 5 + 1 for i in range(ROWS)])
#: The data of row i is i.
TENSORS = TensorDataset(torch.arange(float(ROWS))[:, None], LABELS)


class Items(Dataset[Any]):
    """The same rows, which have to be made one by one."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> Any:
        self.asked.append(i)
        if i >= ROWS:
            raise IndexError(i)
        return torch.tensor([float(i)]), int(LABELS[i])


def pipelines(transforms: Any, data: Any) -> dict[str, list[Any]]:
    """By name, the transforms of a task of ``data``."""
    t, labels = transforms, data.labels
    load, remap, ordered = t.LoadData(data), t.RemapLabels(data), t.ConsecutiveLabels(data)
    return {
        "ways, shots": [t.NWays(data, 3), t.KShots(data, 2), load, remap, ordered],
        "ordered, then numbered": [t.NWays(data, 3), t.KShots(data, 2), load, ordered, remap],
        "fused": [t.FusedNWaysKShots(data, n=3, k=2), load, remap, ordered],
        "fused, replacement": [t.FusedNWaysKShots(data, n=2, k=3, replacement=True), load, remap],
        "fused, filter": [t.FusedNWaysKShots(data, n=2, k=2, filter_labels=labels[2:5]), load, remap],
        "replacement": [t.NWays(data, 2), t.KShots(data, 4, replacement=True), load, remap],
        "filter, shots": [
            t.FilterLabels(data, labels[1:4]),
            t.KShots(data, 2),
            load,
            t.RemapLabels(data, shuffle=False),
        ],
        "filter": [t.FilterLabels(data, labels[3:4]), load, remap],
        "function between": [t.NWays(data, 3), load, lambda d: random.sample(d, k=5), remap, ordered],
        "function first": [lambda d: t.KShots(data, 3)(d)[::-1], t.KShots(data, 1), load],
        "ways after filter": [
            t.FilterLabels(data, labels[2:7]),
            t.NWays(data, 2),
            t.KShots(data, 2),
            load,
            remap,
        ],
        "fused after others": [
            ordered,
            t.FusedNWaysKShots(data, n=2, k=2, filter_labels=labels[:5]),
            load,
            remap,
        ],
    }


#: What learn2learn 0.2.0 (its .pyx compiled by Cython 3, Python 3.11) draws from these after ``random.seed(7)``:
#: indices and labels of ``sample()``, ``[0]`` and ``next(iter())``, and the 32 random bits that follow. For the last
#: two ``random.sample`` was made to take sets, as it did before Python 3.11.
RECORDED: dict[str, tuple[str, str, str, str]] = {
    "ways, shots": (
        "52 34 2 59 10 18 : 0 0 2 2 1 1",
        "8 26 29 52 11 37 : 1 1 0 0 2 2",
        "1 50 7 12 5 36 : 2 2 1 1 0 0",
        "1800188482",
    ),
    "ordered, then numbered": (
        "52 34 2 59 10 18 : 0 0 2 2 1 1",
        "8 26 29 52 11 37 : 1 1 0 0 2 2",
        "1 50 7 12 5 36 : 2 2 1 1 0 0",
        "1800188482",
    ),
    "fused": (
        "52 34 2 59 10 18 : 0 0 2 2 1 1",
        "8 26 29 52 11 37 : 1 1 0 0 2 2",
        "1 50 7 12 5 36 : 2 2 1 1 0 0",
        "1800188482",
    ),
    "fused, replacement": (
        "2 15 15 21 34 3 : 0 0 0 1 1 1",
        "44 44 8 30 12 56 : 1 1 1 0 0 0",
        "1 50 1 30 7 25 : 0 0 0 1 1 1",
        "1800188482",
    ),
    "fused, filter": (
        "2 59 52 34 : 0 0 1 1",
        "34 16 2 59 : 0 0 1 1",
        "16 3 51 2 : 1 1 0 0",
        "4069265501",
    ),
    "replacement": (
        "46 2 33 20 3 29 3 29 : 0 0 0 0 1 1 1 1",
        "29 3 29 52 39 39 0 39 : 0 0 0 0 1 1 1 1",
        "29 3 21 29 39 39 44 0 : 0 0 0 0 1 1 1 1",
        "1599435267",
    ),
    "filter, shots": (
        "14 50 2 59 52 34 : 0 0 2 2 1 1",
        "9 45 2 33 16 3 : 0 0 2 2 1 1",
        "9 50 51 2 16 3 : 0 0 2 2 1 1",
        "2366729934",
    ),
    "filter": (
        "3 16 21 29 34 47 52 : 0 0 0 0 0 0 0",
        "3 16 21 29 34 47 52 : 0 0 0 0 0 0 0",
        "3 16 21 29 34 47 52 : 0 0 0 0 0 0 0",
        "4071050724",
    ),
    "function between": (
        "29 15 20 28 18 : 0 2 2 2 1",
        "44 0 21 16 11 : 1 1 2 2 0",
        "16 24 19 41 5 : 0 2 2 1 1",
        "1800188482",
    ),
    "function first": (
        "38 24 49 4 3 33 1 13 : 26 11 36 21 6 31 16 1",
        "12 6 36 40 3 15 14 0 : 26 11 36 21 6 31 16 1",
        "61 37 54 35 21 33 27 57 : 26 11 36 21 6 31 16 1",
        "3389133662",
    ),
    "ways after filter": (
        "47 3 4 40 : 0 0 1 1",
        "23 5 11 24 : 1 1 0 0",
        "3 34 49 5 : 0 0 1 1",
        "4069265501",
    ),
    "fused after others": (
        "47 3 4 40 : 0 0 1 1",
        "62 26 1 9 : 1 1 0 0",
        "26 8 40 35 : 1 1 0 0",
        "3551302831",
    ),
}
#: Of ``TasksetSampler`` of "fused" with 4 tasks, after ``random.seed(3)``.
SAMPLER = [[21, 34, 4, 35, 10, 36], [24, 42, 48, 17, 61, 30], [13, 0, 7, 56, 36, 49], [21, 3, 55, 42, 54, 10]]


def integers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def as_lists(task: Any) -> tuple[list[int], list[int]]:
    return task[0][:, 0].long().tolist(), task[1].tolist()


SOURCES = {
    "tensors": lambda: MetaDataset(TENSORS),
    "on device": lambda: MetaDataset(OnDeviceDataset(TENSORS, device="cpu")),
    "items": lambda: MetaDataset(Items()),
    "filtered": lambda: FilteredMetaDataset(MetaDataset(TENSORS), dict.fromkeys(LABELS.tolist())),
}


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("source", ["tensors", "on device", "items"])
def test_a_seed_gives_the_tasks_of_the_original(source: str, name: str) -> None:
    data = SOURCES[source]()
    *wanted, bits = RECORDED[name]
    tasks = Taskset(data, pipelines(transforms, data)[name])
    random.seed(7)
    for task, text in zip((tasks.sample(), tasks[0], next(iter(tasks))), wanted, strict=True):
        assert isinstance(task, list) and task[1].dtype == torch.int64 and task[0].dtype == torch.float32
        assert as_lists(task) == tuple(integers(part) for part in text.split(":"))
    assert random.getrandbits(32) == int(bits)


@pytest.mark.parametrize("name", RECORDED)
def test_descriptions_one_by_one_give_the_same_tasks(name: str) -> None:
    """Each transform by itself, on the lists of the one before."""
    data = MetaDataset(TENSORS)
    random.seed(7)
    random.randint(0, 0)
    description: Any = None
    for transform in pipelines(transforms, data)[name]:
        description = transform(description)
        assert isinstance(description, list) and all(type(d) is DataDescription for d in description)
    task = Taskset(data).get_task(description)
    assert as_lists(task) == tuple(integers(part) for part in RECORDED[name][0].split(":"))


@pytest.mark.parametrize("name", RECORDED)
def test_written_descriptions_give_the_same_tasks(name: str) -> None:
    data = MetaDataset(TENSORS)
    tasks = Taskset(data, pipelines(transforms, data)[name])
    random.seed(11)
    wanted = tasks[0]
    random.seed(11)
    description = tasks.sample_task_description()
    assert type(description) is list and all(type(d) is DataDescription for d in description)
    assert as_lists(tasks.get_task(description)) == as_lists(wanted)


def test_the_filtered_data_set_numbers_its_rows_anew() -> None:
    labels = [16, 1, 36]
    data = FilteredMetaDataset(MetaDataset(TENSORS), [*labels, 99])
    rows = [i for label in labels for i in range(ROWS) if LABELS[i] == label]
    assert data.labels == labels and len(data) == len(rows)
    assert [int(data[i][0]) for i in range(len(data))] == rows
    assert all(data.indices_to_labels[i] == LABELS[row] for i, row in enumerate(rows))
    assert all(data.indices_to_labels[i] == label for label in labels for i in data.labels_to_indices[label])
    assert 99 not in data.dataset.labels_to_indices
    kinds = [transforms.NWays(data, 3), transforms.KShots(data, 2), transforms.LoadData(data)]
    index, found = as_lists(Taskset(data, kinds)[0])
    assert sorted(set(found)) == sorted(labels) and [int(LABELS[i]) for i in index] == found


def test_the_union_numbers_its_labels_anew() -> None:
    first, second = MetaDataset(TENSORS), FilteredMetaDataset(Items(), [16, 1])
    data = UnionMetaDataset([first, second])
    assert data.labels == list(range(10)) and len(data) == ROWS + len(second)
    for i in (0, 5, ROWS - 1):
        assert data[i] == [torch.tensor([float(i)]), first.labels.index(int(LABELS[i]))]
    assert data[ROWS][0] == second[0][0] and data[ROWS][1] == 8 and data[-1][1] == data[len(data) - 1][1] == 9
    with pytest.raises(IndexError):
        data[len(data)]
    assert data.labels_to_indices[9] == [ROWS + i for i in second.labels_to_indices[1]]
    kinds = [transforms.NWays(data, 10), transforms.KShots(data, 2), transforms.LoadData(data)]
    index, labels = as_lists(Taskset(data, kinds)[0])
    assert sorted(set(labels)) == list(range(10)) and len(index) == 20
    assert len(UnionMetaDataset([TENSORS, TENSORS]).labels) == 16


def test_bookkeeping() -> None:
    wanted: dict[int, list[int]] = defaultdict(list)
    for i, label in enumerate(LABELS.tolist()):
        wanted[label].append(i)
    for source in (TENSORS, Items()):
        data = MetaDataset(source)
        assert data.labels == list(wanted) and data.labels_to_indices == wanted
        assert data.indices_to_labels == dict(enumerate(LABELS.tolist()))
    items = Items()
    MetaDataset(items)
    assert items.asked == list(range(ROWS))
    given = MetaDataset(Items(), labels_to_indices={"a": [0, 2], "b": [1]})
    assert given.indices_to_labels == {0: "a", 2: "a", 1: "b"} and given.labels == ["a", "b"]
    given = MetaDataset(Items(), indices_to_labels={0: "b", 1: "a", 2: "b"})
    assert given.labels_to_indices == {"b": [0, 2], "a": [1]} and given.labels == ["b", "a"]
    with pytest.raises(TypeError, match=r"dataset: expected a torch.utils.data.Dataset, got list"):
        MetaDataset([1])
    with pytest.raises(ValueError, match="dataset: expected one label for each sample"):
        MetaDataset(TensorDataset(torch.zeros(3, 1), torch.zeros(3, 2)))


def test_labels_of_the_bookkeeping_go_before_those_of_the_tensors() -> None:
    data = MetaDataset(TENSORS, labels_to_indices={"odd": [1, 3, 5], "even": [0, 2, 4]})
    task = Taskset(data, [transforms.NWays(data, 2), transforms.LoadData(data)])[0]
    assert sorted(as_lists(task)[1]) == sorted(LABELS[:6].tolist())
    with pytest.raises(ValueError, match="dataset: expected one of the labels"):
        Taskset(data, [transforms.NWays(data, 2), transforms.LoadData(data), transforms.RemapLabels(data)])[0]


def test_bookkeeping_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "kept.pkl"
    items = Items()
    items._bookkeeping_path = str(path)  # type: ignore[attr-defined]
    first = MetaDataset(items)
    items.asked.clear()
    again = MetaDataset(items)
    assert items.asked == [] and path.is_file()
    assert (again.labels, again.labels_to_indices) == (first.labels, first.labels_to_indices)
    assert again.indices_to_labels == first.indices_to_labels
    # As the original writes it.
    kept = {
        "labels_to_indices": defaultdict(list, {3: [0, 1]}),
        "indices_to_labels": defaultdict(int, {0: 3, 1: 3}),
    }
    path.write_bytes(pickle.dumps({**kept, "labels": [3]}, protocol=-1))
    assert MetaDataset(items).labels_to_indices == {3: [0, 1]}
    path.write_bytes(pickle.dumps(kept, protocol=-1))
    with pytest.raises(ValueError, match="must hold labels"):
        MetaDataset(items)
    path.write_bytes(pickle.dumps({"labels": [print]}))
    with pytest.raises(ValueError, match=r"it asks for builtins\.print"):
        MetaDataset(items)


def test_a_stale_bookkeeping_of_tensors_keeps_their_samples(tmp_path: Path) -> None:
    stored = OnDeviceDataset(TENSORS)
    stored._bookkeeping_path = str(tmp_path / "kept.pkl")  # type: ignore[attr-defined]
    kept = MetaDataset(Items(), indices_to_labels={i: i % 4 for i in range(ROWS)})
    kept.serialize_bookkeeping(stored._bookkeeping_path)
    data = MetaDataset(stored)
    task = Taskset(data, [transforms.NWays(data, 1), transforms.LoadData(data)])[0]
    index, labels = as_lists(task)
    assert len({i % 4 for i in index}) == 1 and labels == LABELS[index].tolist()


def test_tasks_with_numbers_are_kept() -> None:
    data = MetaDataset(TENSORS)
    tasks = Taskset(data, pipelines(transforms, data)["fused"], num_tasks=5)
    assert len(tasks) == 5
    first = [as_lists(task) for task in tasks]
    assert len(first) == 5 and len({tuple(index) for index, _ in first}) > 1
    assert [as_lists(task) for task in tasks] == first == [as_lists(tasks[i]) for i in range(5)]
    assert as_lists(tasks.sample()) in first
    description = tasks.sampled_descriptions[2]
    assert [d.index for d in description] == first[2][0] and len(description) == 6
    assert description[-1].index == first[2][0][-1]
    assert as_lists(tasks[2]) == first[2] == as_lists(tasks.get_task(list(description)))


def test_a_description_that_was_changed_gives_the_changed_task() -> None:
    data = MetaDataset(TENSORS)
    tasks = Taskset(data, pipelines(transforms, data)["fused"], num_tasks=1)
    x = tasks[0][0]
    for sample in tasks.sampled_descriptions[0]:
        sample.transforms.append(lambda pair: [pair[0] + 100, pair[1]])
    assert torch.equal(tasks[0][0], x + 100)


def test_endless_tasks() -> None:
    data = MetaDataset(TENSORS)
    tasks = Taskset(data, pipelines(transforms, data)["fused"])
    assert len(tasks) == 1 and tasks.num_tasks == -1
    drawn = [as_lists(task)[0] for task, _ in zip(tasks, range(6), strict=False)]
    assert len({tuple(index) for index in drawn}) > 1 and tasks.sampled_descriptions == {}
    for wrong in (0, -2):
        with pytest.raises(
            ValueError, match=rf"num_tasks: expected -1, for no end, or at least 1, got {wrong}"
        ):
            Taskset(data, num_tasks=wrong)


def test_what_task_transforms_may_be() -> None:
    tasks = Taskset(TENSORS, lambda none: [DataDescription(3), DataDescription(4)], task_collate=tuple)
    assert isinstance(tasks.dataset, MetaDataset) and tasks[0] == (3, 4)
    own = Taskset(TENSORS, [transforms.LoadData(TENSORS), lambda d: random.choices(d, k=5)])
    x, y = own.sample()
    assert x.shape == (5, 1) and y.tolist() == LABELS[x[:, 0].long()].tolist()
    with pytest.raises(ValueError, match="task_transforms: expected at least one"):
        Taskset(TENSORS)[0]
    with pytest.raises(NotImplementedError, match="UnionMetaDataset"):
        own + own
    with pytest.warns(DeprecationWarning, match="use Taskset instead"):
        assert isinstance(TaskDataset(TENSORS, own.task_transforms), Taskset)


def test_samples_with_a_transform_are_made_one_by_one() -> None:
    stored = OnDeviceDataset(TENSORS, transform=lambda x: -x)
    data = MetaDataset(stored)
    random.seed(7)
    task = Taskset(data, pipelines(transforms, data)["fused"]).sample()
    assert (-task[0][:, 0]).long().tolist() == integers(RECORDED["fused"][0].split(":")[0])


def test_a_data_set_that_is_changed_later_gives_what_it_has_then() -> None:
    stored = OnDeviceDataset(TENSORS)
    data = MetaDataset(stored)
    tasks = Taskset(data, pipelines(transforms, data)["fused"], num_tasks=1)
    x, y = tasks[0]
    stored.transform = lambda row: -row
    assert torch.equal(tasks[0][0], -x)
    stored.transform = None
    stored.tensors = (stored.tensors[0] + 100, stored.tensors[1])
    assert torch.equal(tasks[0][0], x + 100)
    # Labels that the bookkeeping does not know come from the data set.
    stored.tensors = (stored.tensors[0], stored.tensors[1] + 1)
    plain = Taskset(data, [transforms.KShots(data, 2), transforms.LoadData(data)])
    index, labels = as_lists(plain.sample())
    assert labels == [int(LABELS[int(i) - 100]) + 1 for i in index]
    assert len(y) == 6


def test_subclasses_have_the_last_word() -> None:
    class Twice(MetaDataset):
        def __getitem__(self, item: int) -> Any:
            x, y = super().__getitem__(item)
            return 2 * x, y

    class First(transforms.KShots):
        def __call__(self, task_description: Any) -> Any:
            return super().__call__(task_description)[:1]

    data = Twice(TENSORS)
    random.seed(7)
    tasks = Taskset(data, pipelines(transforms, data)["fused"])
    assert (tasks.sample()[0][:, 0] / 2).long().tolist() == integers(RECORDED["fused"][0].split(":")[0])
    kinds = [transforms.NWays(data, 2), First(data, 2), transforms.LoadData(data)]
    assert Taskset(data, kinds)[0][1].shape == (1,)


def test_task_sets_and_data_sets_with_methods_of_their_own() -> None:
    class Shorter(Taskset):
        def sample_task_description(self) -> Any:
            return super().sample_task_description()[:4]

    class Own(MetaDataset):
        def __init__(self) -> None:
            self.dataset = TENSORS
            self.labels = [0, 1]
            self.labels_to_indices = {0: [0, 1, 2], 1: [3, 4]}
            self.indices_to_labels = {i: int(i > 2) for i in range(5)}

    data = MetaDataset(TENSORS)
    kinds = [transforms.NWays(data, 3), transforms.KShots(data, 2), transforms.LoadData(data)]
    tasks = Shorter(data, kinds)
    for task in (tasks.sample(), tasks[0], next(iter(tasks)), Shorter(data, kinds, num_tasks=2)[1]):
        assert task[1].shape == (4,)
    small = Own()
    kinds = [transforms.NWays(small, 2), transforms.KShots(small, 2), transforms.LoadData(small)]
    index, labels = as_lists(Taskset(small, kinds).sample())
    assert set(index) >= {3, 4} and labels == [int(LABELS[i]) for i in index]


def test_transforms_of_different_data_sets() -> None:
    """Indices are those of the last one's data set, as the original takes them."""
    base = MetaDataset(TENSORS)
    some = FilteredMetaDataset(base, base.labels[4:])
    tasks = Taskset(some, [transforms.NWays(some, 2), transforms.KShots(base, 1), transforms.LoadData(base)])
    index, labels = as_lists(tasks[0])
    assert labels == [int(LABELS[i]) for i in index] and len(labels) == len(set(labels))


def test_labels_are_those_of_the_data_set_that_loads() -> None:
    data = MetaDataset(TENSORS)
    renamed = TensorDataset(TENSORS.tensors[0], LABELS + 1000)
    kinds = [transforms.NWays(data, 2), transforms.LoadData(renamed), transforms.RemapLabels(data)]
    with pytest.raises(ValueError, match="dataset: expected one of the labels"):
        Taskset(data, kinds)[0]
    assert min(as_lists(Taskset(data, kinds[:2])[0])[1]) > 1000


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda d: transforms.NWays(d, 9), "n: expected at most 8, the number of labels, got 9"),
        (
            lambda d: transforms.FusedNWaysKShots(d, 2, 2, filter_labels=[1]),
            "n: expected at most 1, the number of",
        ),
        (
            lambda d: transforms.KShots(d, 40),
            "k: expected at most 9, the number of samples of the class 1, got 40",
        ),
        (
            lambda d: transforms.FusedNWaysKShots(d, 1, 2, filter_labels=[99]),
            "k: expected at most 0, the number of",
        ),
    ],
)
def test_more_than_there_is(make: Any, text: str) -> None:
    data = MetaDataset(TENSORS)
    with pytest.raises(ValueError, match=text):
        make(data)(None)


def test_samplers() -> None:
    data = MetaDataset(TENSORS)
    random.seed(3)
    tasks = Taskset(data, pipelines(transforms, data)["fused"], num_tasks=4)
    sampler = TasksetSampler(tasks)
    assert list(sampler) == SAMPLER and len(sampler) == 4
    loaded = [
        as_lists(batch)[0] for batch in DataLoader(data, batch_sampler=TasksetSampler(tasks, shuffle=False))
    ]
    assert loaded == [as_lists(tasks[i])[0] for i in range(4)] and sorted(loaded) == sorted(SAMPLER)
    endless = TasksetSampler(Taskset(data, [transforms.NWays(data, 2)]))
    assert len([batch for batch, _ in zip(endless, range(7), strict=False)]) == 7
    with pytest.raises(TypeError, match="without end"):
        len(endless)


def test_transforms_and_task_sets_can_be_pickled() -> None:
    data = MetaDataset(TENSORS)
    kinds = pipelines(transforms, data)["ways, shots"]
    tasks = pickle.loads(pickle.dumps(Taskset(data, kinds, num_tasks=3)))
    tasks[0]
    again = pickle.loads(pickle.dumps(tasks))
    assert as_lists(again[0]) == as_lists(tasks[0])


def test_workers_load_task_sets() -> None:
    data = MetaDataset(TENSORS)
    tasks = Taskset(data, pipelines(transforms, data)["ways, shots"], num_tasks=4)
    (batch,) = DataLoader(tasks, batch_size=4, num_workers=1)
    assert batch[0].shape == (4, 6, 1) and batch[1].shape == (4, 6)


def partitioned(x: Tensor, y: Tensor, shots: int) -> Iterator[Tensor]:
    """Class after class."""
    for part in (slice(0, shots), slice(shots, None)):
        rows = torch.cat([torch.where(y == label)[0][part] for label in y.unique()])
        yield from (x[rows], y[rows])


@pytest.mark.parametrize("shots", [0, 1, 3, 4])
def test_partition_task(shots: int) -> None:
    y = torch.tensor([5, 2, 9, 2, 5, 9, 9, 9, 2, 5, 5, 2])
    x = torch.randn(12, 2, 3)
    (a, b), (c, d) = partition_task(x, y, shots=shots)
    for found, wanted in zip((a, b, c, d), partitioned(x, y, shots), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="shots: expected at most 4, the rows of each class, got 5"):
        partition_task(x, y, shots=5)
    with pytest.raises(ValueError, match=r"labels: expected as many rows of each class, got \[4, 3, 4\]"):
        partition_task(x[1:], y[1:])
    with pytest.raises(ValueError, match="labels: expected size 11"):
        partition_task(x[1:], y)


def test_infinite_iterator() -> None:
    numbers = InfiniteIterator([1, 2, 3])
    assert iter(numbers) is numbers and [next(numbers) for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]
    with pytest.raises(ValueError, match="dataloader: expected something in it"):
        next(InfiniteIterator([]))


def test_on_device_dataset() -> None:
    items = Items()
    items._bookkeeping_path = "somewhere"  # type: ignore[attr-defined]
    stored = OnDeviceDataset(items, device="cpu", transform=lambda x: x + 1)
    assert len(stored) == ROWS and stored._bookkeeping_path == "somewhere"
    x, y = stored[5]
    assert x.tolist() == [6.0] and y.shape == () and y == LABELS[5]
    assert torch.equal(stored.tensors[0], TENSORS.tensors[0]) and torch.equal(stored.tensors[1], LABELS)
    assert default_collate([stored[0], stored[1]])[0].shape == (2, 1)


def test_what_downloads_is_absent() -> None:
    with pytest.raises(ImportError, match=r"learn2learn.data.utils.download_file is not provided"):
        from metafast.compat.learn2learn.data.utils import download_file  # noqa: F401
    with pytest.raises(AttributeError, match="nothing_like_it"):
        l2l_data.utils.nothing_like_it  # noqa: B018
