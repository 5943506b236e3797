"""ImageClasses and EpisodeSampler, on images whose pixels tell their class and number."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metafast.data import EpisodeSampler, ImageClasses, check

SIDE = 4


def coded(sizes: list[int], rotations: bool = False, first_row: int = 0) -> ImageClasses:
    """Float classes whose images hold class * 1000 + number in channel 0, pixel numbers in channel 1."""
    codes = torch.cat([1000.0 * c + torch.arange(n) for c, n in enumerate(sizes)])
    images = torch.empty(first_row + len(codes), 2, SIDE, SIDE).fill_(-1)
    images[first_row:, 0] = codes[:, None, None]
    images[first_row:, 1] = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    class_sizes = torch.tensor(sizes)
    starts = first_row + class_sizes.cumsum(0) - class_sizes
    return ImageClasses(
        images,
        starts,
        class_sizes,
        tuple(f"class{c}" for c in range(len(sizes))),
        rotations,
    )


def decode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class, number and quarter turns of coded images `[T, n, 2, SIDE, SIDE]`."""
    code = x[:, :, 0].flatten(2)
    assert (code == code[:, :, :1]).all()
    upright = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    turned = torch.stack([torch.rot90(upright, k) for k in range(4)])
    same = (x[:, :, None, 1] == turned).flatten(3).all(3)
    assert (same.sum(2) == 1).all()
    return (
        code[:, :, 0].long() // 1000,
        code[:, :, 0].long() % 1000,
        same.int().argmax(2),
    )


SHAPES = [
    pytest.param(5, 1, 15, 32, id="5way-1shot"),
    pytest.param(5, 5, 15, 3, id="5way-5shot"),
    pytest.param(60, 1, 5, 4, id="60way-1shot"),
    pytest.param(1, 1, 1, 1, id="smallest"),
    pytest.param(80, 10, 10, 1, id="all-classes-all-images"),
]


@pytest.mark.parametrize("rotations", [False, True], ids=["upright", "rotations"])
@pytest.mark.parametrize(("ways", "shots", "queries", "tasks"), SHAPES)
def test_episodes_are_right(ways: int, shots: int, queries: int, tasks: int, rotations: bool) -> None:
    sampler = EpisodeSampler(coded([20] * 80, rotations), ways, shots, queries, tasks, seed=3)
    episodes = sampler(7)
    check(episodes)
    assert (episodes.ways, episodes.tasks) == (ways, tasks)
    assert episodes.support_x.shape == (tasks, ways * shots, 2, SIDE, SIDE)
    assert episodes.query_x.shape == (tasks, ways * queries, 2, SIDE, SIDE)
    assert torch.equal(episodes.support_y, torch.arange(ways).repeat_interleave(shots).repeat(tasks, 1))
    assert torch.equal(episodes.query_y, torch.arange(ways).repeat_interleave(queries).repeat(tasks, 1))
    x = torch.cat([episodes.support_x, episodes.query_x], 1)
    y = torch.cat([episodes.support_y, episodes.query_y], 1)
    classes, numbers, turns = decode(x)
    assert turns.any() == rotations or tasks * ways == 1
    for task in range(tasks):
        rows = list(
            zip(
                y[task].tolist(),
                classes[task].tolist(),
                turns[task].tolist(),
                strict=True,
            )
        )
        by_label = {label: {(c, k) for row, c, k in rows if row == label} for label in range(ways)}
        assert all(len(found) == 1 for found in by_label.values()), "a label stands for one class"
        assert len(set.union(*by_label.values())) == ways, "classes of a task are distinct"
        drawings = list(zip(y[task].tolist(), numbers[task].tolist(), strict=True))
        assert len(set(drawings)) == len(drawings), "images of a class are distinct, support and query alike"


def test_uneven_classes_give_their_own_images_only() -> None:
    sizes = [6, 20, 7, 9, 6, 13]
    sampler = EpisodeSampler(coded(sizes, first_row=5), 6, 2, 4, tasks=200)
    seen: set[tuple[int, int]] = set()
    for episodes in itertools.islice(sampler, 3):
        classes, numbers, _ = decode(torch.cat([episodes.support_x, episodes.query_x], 1))
        seen |= set(zip(classes.flatten().tolist(), numbers.flatten().tolist(), strict=True))
        for task_classes, task_numbers in zip(classes.tolist(), numbers.tolist(), strict=True):
            assert len(set(zip(task_classes, task_numbers, strict=True))) == 36
    assert seen == {(c, i) for c, n in enumerate(sizes) for i in range(n)}


@pytest.mark.parametrize("classes", [4, 8, 20], ids=lambda n: f"{n}-classes")
def test_classes_and_labels_are_uniform(classes: int) -> None:
    tasks = 1000 * classes
    episodes = EpisodeSampler(coded([3] * classes), 4, 1, 1, tasks=tasks, seed=1)(0)
    found, numbers, _ = decode(episodes.support_x)
    counts = torch.zeros(4, classes)
    counts.index_put_((episodes.support_y, found), torch.ones(tasks, 4), accumulate=True)
    # Each pair of label and class is binomial with mean 1,000 and standard deviation below 31.7.
    assert (counts - 1000).abs().max() < 5 * 31.7
    # So is each ordered pair of different images of a class, of which there are six.
    pairs = torch.bincount(3 * numbers.flatten() + decode(episodes.query_x)[1].flatten(), minlength=9)
    assert pairs[[0, 4, 8]].eq(0).all()
    expected = 4 * tasks / 6
    assert (pairs[[1, 2, 3, 5, 6, 7]] - expected).abs().max() < 5 * (expected * 5 / 6) ** 0.5


def same(a: Any, b: Any) -> bool:
    return torch.equal(a.support_x, b.support_x) and torch.equal(a.query_x, b.query_x)


def test_is_a_pure_function_of_seed_and_step() -> None:
    data = coded([20] * 30, rotations=True)
    sampler = EpisodeSampler(data, 5, 1, 5, tasks=4, seed=11)
    first = [sampler(step) for step in range(4)]
    torch.manual_seed(5)
    np.random.seed(5)
    again = EpisodeSampler(data, 5, 1, 5, tasks=4, seed=11)
    assert all(same(again(step), first[step]) for step in (3, 1, 0, 2, 1))
    assert all(same(a, b) for a, b in zip(again, first, strict=False))


def test_neighbouring_seeds_and_steps_share_nothing() -> None:
    data = coded([20] * 100)
    batches = {
        (seed, step): EpisodeSampler(data, 5, 1, 1, tasks=2, seed=seed)(step)
        for seed in (0, 1, 2, 2**32, 2**64 - 1)
        for step in (0, 1, 2, 2**32, 2**64 - 1)
    }
    for (a, left), (b, right) in itertools.combinations(batches.items(), 2):
        assert not same(left, right), (a, b)
        assert not torch.equal(decode(left.support_x)[0][0], decode(right.support_x)[0][0]), (a, b)


@pytest.mark.parametrize("channels", [1, 3])
def test_rotation_is_rot90_counter_clockwise(channels: int) -> None:
    images = torch.randint(256, (6, channels, 5, 5), dtype=torch.uint8)
    data = ImageClasses(images, torch.arange(6), torch.ones(6, dtype=torch.int64), tuple("abcdef"), True)
    rows, turns = (
        torch.tensor([5, 0, 3, 3, 1, 2, 0]),
        torch.tensor([1, 3, 0, 2, 1, 3, 0]),
    )
    expected = [
        torch.rot90(images[i].float() / 255, k, (1, 2)) for i, k in zip(rows, turns.tolist(), strict=True)
    ]
    assert torch.equal(data.gather(rows, turns), torch.stack(expected))


def test_gather_refuses_turns_without_rotations() -> None:
    with pytest.raises(ValueError, match=r"^quarter_turns must be None for classes without rotations$"):
        coded([5]).gather(torch.tensor([0]), torch.tensor([0]))


def test_rotated_classes_are_numbered_after_the_upright_ones() -> None:
    data = coded([2] * 3, rotations=True)
    assert data.num_classes == len(data) == 12
    episodes = EpisodeSampler(data, 12, 1, 1, tasks=50)(0)
    classes, _, turns = decode(episodes.support_x)
    assert torch.equal((classes + 3 * turns).sort(1).values, torch.arange(12).expand(50, 12))


def test_bytes_become_floats_from_0_to_1() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 1, 1, 1)
    x = EpisodeSampler(ImageClasses(images, torch.tensor([0]), torch.tensor([2]), ("a",)), 1, 1, 1)(0).query_x
    assert x.dtype == torch.float32
    assert torch.equal(x.flatten(), torch.arange(256.0) / 255)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_floats_stay_as_they_are(dtype: torch.dtype) -> None:
    images = torch.randn(4, 1, 3, 2).to(dtype)
    data = ImageClasses(images, torch.tensor([0]), torch.tensor([4]), ("a",))
    x = EpisodeSampler(data, 1, 3, 1)(0).support_x
    assert x.dtype == dtype
    assert all((images == row).flatten(1).all(1).sum() == 1 for row in x[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rotations", [False, True], ids=["upright", "rotations"])
def test_episodes_are_the_same_on_every_device(rotations: bool) -> None:
    data = coded([20] * 30, rotations)
    here = EpisodeSampler(data, 5, 1, 5, tasks=8)(3)
    there = EpisodeSampler(data.to("cuda"), 5, 1, 5, tasks=8)(3)
    assert there.device.type == "cuda" and same(there.to("cpu"), here)


def test_episodes_follow_the_images_to_their_device() -> None:
    episodes = EpisodeSampler(coded([5] * 5, rotations=True).to("meta"), 5, 1, 2, tasks=2)(0)
    assert episodes.device.type == "meta"
    assert episodes.query_x.shape == (2, 10, 2, SIDE, SIDE)


def test_batches_do_not_share_memory() -> None:
    sampler = EpisodeSampler(coded([5] * 5), 5, 1, 2, tasks=2)
    kept = sampler(0)
    kept.support_y.fill_(-1)
    kept.support_x.fill_(-1)
    check(sampler(0))
    assert decode(sampler(0).support_x)[0].min() >= 0


@pytest.mark.parametrize("classes", [[4, 1, 2], ["class4", "class1", "class2"]], ids=["numbers", "names"])
def test_subset_keeps_order_and_images(classes: Any) -> None:
    part = coded([3, 4, 5, 6, 7], rotations=True, first_row=2).subset(classes)
    assert part.names == ("class4", "class1", "class2")
    assert part.class_sizes.tolist() == [7, 4, 5] and part.class_starts.tolist() == [
        0,
        7,
        11,
    ]
    assert (part.rotations, part.num_classes, len(part.images)) == (True, 12, 16)
    code = part.images[:, 0, 0, 0].tolist()
    assert code == [4000.0 + i for i in range(7)] + [1000.0 + i for i in range(4)] + [
        2000.0 + i for i in range(5)
    ]


def test_attributes_and_repr() -> None:
    sampler = EpisodeSampler(coded([20] * 3), 2, 3, 4, tasks=5, seed=6)
    assert (
        sampler.ways,
        sampler.shots,
        sampler.queries,
        sampler.tasks,
        sampler.seed,
    ) == (2, 3, 4, 5, 6)
    assert repr(sampler) == (
        "EpisodeSampler(ImageClasses(classes=3, rotations=False, images=[60, 2, 4, 4], dtype=torch.float32, "
        "device='cpu'), ways=2, shots=3, queries=4, tasks=5, seed=6)"
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        pytest.param(
            {"dataset": [1]},
            TypeError,
            "dataset must be metafast.data.ImageClasses, got list",
            id="data",
        ),
        pytest.param(
            {"ways": 4},
            ValueError,
            "ways must be at most the 3 classes of the data set, got 4",
            id="many-ways",
        ),
        pytest.param(
            {"shots": 5, "queries": 3},
            ValueError,
            "shots + queries must be at most the images of every class, got 5 + 3 = 8, "
            "but class 'class1' has 7",
            id="few-images",
        ),
        pytest.param({"ways": 0}, ValueError, "ways must be at least 1, got 0", id="no-ways"),
        pytest.param({"shots": 0}, ValueError, "shots must be at least 1, got 0", id="no-shots"),
        pytest.param(
            {"queries": -1},
            ValueError,
            "queries must be at least 1, got -1",
            id="negative-queries",
        ),
        pytest.param({"tasks": 0}, ValueError, "tasks must be at least 1, got 0", id="no-tasks"),
        pytest.param(
            {"tasks": 1.5},
            TypeError,
            "tasks must be an integer, got 1.5 of type float",
            id="float-tasks",
        ),
        pytest.param(
            {"shots": True},
            TypeError,
            "shots must be an integer, got True of type bool",
            id="bool-shots",
        ),
        pytest.param(
            {"seed": -1},
            ValueError,
            f"seed must be between 0 and {2**64 - 1}, got -1",
            id="negative-seed",
        ),
        pytest.param(
            {"seed": "1"},
            TypeError,
            "seed must be an integer, got '1' of type str",
            id="string-seed",
        ),
    ],
)
def test_sampler_refuses(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "dataset": coded([20, 7, 20]),
        "ways": 2,
        "shots": 1,
        "queries": 3,
    }
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        EpisodeSampler(**{**arguments, **changed})


@pytest.mark.parametrize(
    ("step", "error"),
    [(-1, ValueError), (2**64, ValueError), (0.0, TypeError)],
    ids=str,
)
def test_step_must_be_a_64_bit_integer(step: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^step must be "):
        EpisodeSampler(coded([5]), 1, 1, 1)(step)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        pytest.param(
            {"images": [[1.0]]},
            TypeError,
            "images must be a tensor, got list",
            id="list",
        ),
        pytest.param(
            {"images": torch.zeros(6, 1, 4, 4, dtype=torch.int32)},
            TypeError,
            "images must be uint8 or floating point, got torch.int32",
            id="dtype",
        ),
        pytest.param(
            {"images": torch.zeros(6, 4, 4)},
            ValueError,
            "images must have shape [N, channels, height, width], got [6, 4, 4]",
            id="rank",
        ),
        pytest.param(
            {"images": torch.zeros(6, 1, 4, 5), "rotations": True},
            ValueError,
            "rotations needs square images, got height 4 and width 5",
            id="not-square",
        ),
        pytest.param(
            {"class_starts": [0, 3]},
            TypeError,
            "class_starts must be a tensor, got list",
            id="starts",
        ),
        pytest.param(
            {"class_sizes": torch.ones(2)},
            TypeError,
            "class_sizes must be int64, got torch.float32",
            id="sizes",
        ),
        pytest.param(
            {"class_sizes": torch.ones(2, dtype=torch.int64, device="meta")},
            ValueError,
            "class_sizes must be on the CPU, got meta",
            id="device",
        ),
        pytest.param(
            {"names": ("a",)},
            ValueError,
            "class_starts must have shape [1], one entry for each of names, got [2]",
            id="names",
        ),
        pytest.param(
            {"class_sizes": torch.tensor([3, 4])},
            ValueError,
            "class_starts and class_sizes must name one or more of the 6 images, got start 3 and size 4 for "
            "class 1 ('b')",
            id="out-of-range",
        ),
        pytest.param(
            {"class_sizes": torch.tensor([0, 3])},
            ValueError,
            "class_starts and class_sizes must name one or more of the 6 images, got start 0 and size 0 for "
            "class 0 ('a')",
            id="empty-class",
        ),
        pytest.param(
            {
                "names": (),
                "class_starts": torch.zeros(0, dtype=torch.int64),
                "class_sizes": torch.zeros(0, dtype=torch.int64),
            },
            ValueError,
            "names must hold at least one class, got none",
            id="no-classes",
        ),
    ],
)
def test_image_classes_refuse(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    right: dict[str, Any] = {
        "images": torch.zeros(6, 1, 4, 4),
        "class_starts": torch.tensor([0, 3]),
        "class_sizes": torch.tensor([3, 3]),
        "names": ("a", "b"),
    }
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ImageClasses(**{**right, **changed})


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        pytest.param(
            [3],
            ValueError,
            "each of classes must be between 0 and 2, got 3",
            id="number",
        ),
        pytest.param(
            ["x"],
            ValueError,
            "classes must hold names of this data set, got 'x'",
            id="name",
        ),
        pytest.param(
            [1, "class1"],
            ValueError,
            "classes must be distinct, got 'class1' twice",
            id="twice",
        ),
        pytest.param([], ValueError, "classes must hold at least one class, got none", id="none"),
        pytest.param(
            "class1",
            TypeError,
            "classes must be a sequence of numbers or names, got the string 'class1'",
            id="string",
        ),
        pytest.param(
            [0.5],
            TypeError,
            "each of classes must be an integer, got 0.5 of type float",
            id="float",
        ),
    ],
)
def test_subset_refuses(classes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        coded([5] * 3).subset(classes)
