"""The samplers and what they draw from, on images whose pixels tell their class and number."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from metafast.data import (
    EpisodeLoader,
    Episodes,
    EpisodeSampler,
    EpisodeStream,
    FeatureClasses,
    FixedEpisodes,
    ImageClasses,
    SinusoidSampler,
    check,
)
from metafast.data._random import RandomStream, _minus_log

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
def test_episodes_are_the_same_on_cuda_devices(rotations: bool) -> None:
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
            "dataset must be metafast.data.ImageClasses, other Classes or several of them, got int as number 0",
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
            "shots + queries must be at most the images of every class: class 'class1' has 7 images, 8 are "
            "needed for 5 shots + 3 queries (dataset.at_least(8) leaves out what is too small)",
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


def philox(key: tuple[int, int], counter: int) -> list[int]:
    """One block of Philox 4x64-10, from the paper."""
    word = 2**64 - 1
    (k0, k1), c = key, [counter, 0, 0, 0]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k0, b & word, (a >> 64) ^ c[3] ^ k1, a & word]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
    return c


def test_random_bits_are_those_of_philox() -> None:
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox((0, 0), 0) == known, "the known answer of Random123"
    for key in ((0, 0), (3, 2**64 - 1), (2**63 + 5, 7)):
        words = RandomStream(*key).words(3, 4)
        assert words.tolist() == [philox(key, counter) for counter in (1, 2, 3)]


def test_a_stream_is_one_sequence_of_halves_and_words() -> None:
    stream, words = RandomStream(1, 2), RandomStream(1, 2).words(3).tolist()
    low, high = (
        [word & 0xFFFFFFFF for word in words],
        [word >> 32 for word in words],
    )
    assert stream._halves(3).tolist() == [low[0], high[0], low[1]]
    assert stream._halves(1).tolist() == [high[1]]
    assert stream.words(1).tolist() == [words[2]]


def test_uniform_numbers_exclude_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomStream, "words", lambda self, *shape: np.array([0, 2**64 - 1], dtype=np.uint64))
    assert RandomStream(0, 0).uniform(2).tolist() == [2.0**-53, 1 - 2.0**-53]


def test_logarithm() -> None:
    u = np.concatenate([RandomStream(0, 0).uniform(1000), 2.0 ** -np.arange(1.0, 54.0), [1 - 2.0**-53]])
    assert np.abs(_minus_log(u) / -np.log(u) - 1).max() < 1e-12


@pytest.mark.parametrize("count", [1, 3, 8, 9], ids=lambda k: f"{k}-of-a-row")
def test_numbers_below_sizes_are_distinct_and_uniform(count: int) -> None:
    sizes = np.array([9, 100, 500, 64, 65] * 400)
    drawn = RandomStream(5, 6).distinct_below(sizes, count, 500)
    assert all(len(set(row)) == count for row in drawn.tolist())
    assert (drawn >= 0).all() and (drawn < sizes[:, None]).all()
    for size in (9, 100, 500, 64, 65):
        # The mean of independent uniform numbers; those of a row vary less together.
        mean = drawn[sizes == size].mean()
        assert abs(mean - (size - 1) / 2) < 5 * size / (12 * 400 * count) ** 0.5


def test_the_largest_bound_is_not_reached() -> None:
    bounds = np.full(1000, 2**31 - 1)
    drawn = RandomStream(0, 1).below(bounds)
    assert drawn.min() >= 0 and drawn.max() < 2**31 - 1 and drawn.std() > 2**29


#: Of episodes as they were before samplers had ranges, several data sets and weights.
CHECKSUMS = {
    "rotations": ((40,) * 300, True, (5, 1, 15, 4), "f5f04b27cc14aa3f"),
    "many-ways": ((20,) * 300, True, (60, 1, 5, 1), "607535a1ede28487"),
    "few-classes": ((40,) * 7, False, (5, 5, 15, 3), "5f8290e78a543d40"),
    "uneven-classes": ((6, 20, 7, 9, 6, 13), False, (3, 2, 1, 32), "e989d27f2702f9e1"),
    "one-class": ((3,), False, (1, 1, 1, 2), "593182589ceacb83"),
}


@pytest.mark.parametrize("name", CHECKSUMS)
def test_episodes_are_what_they_have_always_been(name: str) -> None:
    sizes, rotations, shape, expected = CHECKSUMS[name]
    sampler = EpisodeSampler(coded(list(sizes), rotations), *shape, seed=3)
    digest = hashlib.sha256()
    for step in (0, 1, 77, 2**64 - 1):
        plan = sampler.plan(step)
        for rows in (plan.classes, plan.support_rows, plan.query_rows):
            digest.update(rows.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == expected


def test_plan_says_what_the_episodes_hold() -> None:
    data = coded([20] * 9, rotations=True)
    sampler = EpisodeSampler(data, 4, 2, 3, tasks=6, seed=1)
    plan, episodes = sampler.plan(5), sampler(5)
    classes, numbers, turns = decode(episodes.support_x)
    assert plan.support_y.tolist() == episodes.support_y.tolist()
    assert plan.query_y.tolist() == episodes.query_y.tolist()
    assert plan.support_rows.tolist() == (20 * classes + numbers).tolist()
    assert np.take_along_axis(plan.classes, plan.support_y, 1).tolist() == (classes + 9 * turns).tolist()
    assert plan.sources.tolist() == [0] * 6


def test_ways_shots_and_queries_from_ranges() -> None:
    sampler = EpisodeSampler(coded([20] * 9), (2, 4), (1, 3), (2, 3), tasks=3)
    assert (sampler.ways, sampler.shots, sampler.queries) == ((2, 4), (1, 3), (2, 3))
    seen = set()
    for episodes in itertools.islice(sampler, 150):
        check(episodes)
        ways = episodes.ways
        shots, queries = episodes.support_x.shape[1] // ways, episodes.query_x.shape[1] // ways
        assert torch.equal(episodes.support_y, torch.arange(ways).repeat_interleave(shots).repeat(3, 1))
        assert torch.equal(episodes.query_y, torch.arange(ways).repeat_interleave(queries).repeat(3, 1))
        seen.add((ways, shots, queries))
    assert seen == set(itertools.product((2, 3, 4), (1, 2, 3), (2, 3)))


def test_a_range_of_one_number_is_that_number() -> None:
    data = coded([20] * 9)
    ranged, plain = EpisodeSampler(data, (3, 3), [2, 2], 1), EpisodeSampler(data, 3, 2, 1)
    assert (ranged.ways, ranged.shots) == (3, 2)
    assert same(ranged(4), plain(4))


def test_uneven_shots() -> None:
    sampler = EpisodeSampler(coded([12] * 9), 4, (1, 5), 2, tasks=8, seed=2, uneven_shots=True)
    every, differ = torch.zeros(4, 6), False
    for episodes in itertools.islice(sampler, 60):
        check(episodes)
        shots = torch.nn.functional.one_hot(episodes.support_y, 4).sum(1)
        assert (shots.sort(1).values == shots[0].sort().values).all(), "dealt out anew in each task"
        assert torch.equal(episodes.support_y, episodes.support_y.sort(1).values)
        assert torch.equal(episodes.query_y, torch.arange(4).repeat_interleave(2).repeat(8, 1))
        differ |= bool((shots != shots[0]).any())
        every += torch.nn.functional.one_hot(shots, 6).sum(0)
        classes, numbers, _ = decode(torch.cat([episodes.support_x, episodes.query_x], 1))
        labels = torch.cat([episodes.support_y, episodes.query_y], 1)
        for task in range(8):
            rows = set(zip(classes[task].tolist(), numbers[task].tolist(), strict=True))
            assert len(rows) == labels.shape[1], "support and query share no image"
            owners = set(zip(labels[task].tolist(), classes[task].tolist(), strict=True))
            assert len(owners) == 4, "a label stands for one class"
    assert differ
    assert (every[:, 0] == 0).all() and (every[:, 1:] > 0).all(), "every label gets every number of shots"


def other(shift: int, sizes: list[int], rotations: bool = False) -> ImageClasses:
    """Coded classes with `shift` added to the class in the images."""
    data = coded(sizes, rotations)
    data.images[:, 0] += 1000 * shift
    names = tuple(f"class{shift + c}" for c in range(len(sizes)))
    return ImageClasses(data.images, data.class_starts, data.class_sizes, names, rotations)


def test_tasks_from_several_data_sets() -> None:
    data = [other(0, [9, 8, 7]), other(10, [20] * 5, rotations=True), other(30, [100] * 4)]
    sampler = EpisodeSampler(data, 3, 2, 3, tasks=40, seed=4)
    assert sampler.datasets == tuple(data)
    counts = np.zeros(3)
    for step in range(30):
        plan, episodes = sampler.plan(step), sampler(step)
        check(episodes)
        counts += np.bincount(plan.sources, minlength=3)
        classes, numbers, turns = decode(torch.cat([episodes.support_x, episodes.query_x], 1))
        first, last = np.array([0, 10, 30])[plan.sources], np.array([2, 14, 33])[plan.sources]
        assert (classes.numpy() >= first[:, None]).all() and (classes.numpy() <= last[:, None]).all()
        assert (turns[torch.from_numpy(plan.sources != 1)] == 0).all()
        base = np.array([3, 5, 4])[plan.sources][:, None]
        y = np.concatenate([plan.support_y, plan.query_y], 1)
        drawn = np.take_along_axis(plan.classes, y, 1)
        assert np.array_equal(drawn, classes.numpy() - first[:, None] + base * turns.numpy())
        for task in range(40):
            rows = zip(classes[task].tolist(), turns[task].tolist(), numbers[task].tolist(), strict=True)
            assert len(set(rows)) == 15
    assert (np.abs(counts - 400) < 5 * (1200 * 2 / 9) ** 0.5).all()


def test_data_set_weights() -> None:
    data = [other(0, [5] * 4), other(10, [5] * 4)]
    sources = EpisodeSampler(data, 2, 1, 1, tasks=4000, dataset_weights=[1, 3]).plan(0).sources
    assert abs(sources.sum() - 3000) < 5 * (4000 * 3 / 16) ** 0.5


def test_features_mix_like_images() -> None:
    rows = [torch.arange(12.0).view(6, 2) + 100 * d for d in range(2)]
    table = (torch.tensor([0, 3]), torch.tensor([3, 3]), ("a", "b"))
    data = [FeatureClasses(x, *table) for x in rows]
    episodes = EpisodeSampler(data, 2, 1, 2, tasks=50)(0)
    check(episodes)
    assert episodes.support_x.shape == (50, 2, 2)
    source = episodes.support_x[:, :, 0] // 100
    assert (source == source[:, :1]).all() and 0 < source.mean() < 1
    assert (episodes.query_x[:, :, 0] // 100 == source[:, :1]).all()


def test_class_weights() -> None:
    weights = {"class0": 1.0, "class1": 2.0, "class2": 0.0, "class3": 5.0, "class4": 2.0}
    sampler = EpisodeSampler(coded([5, 5, 1, 5, 5]), 2, 2, 1, tasks=20000, class_weights=weights)
    classes = sampler.plan(0).classes
    first = np.bincount(classes[:, 0], minlength=5) / 20000
    assert np.abs(first - np.array([0.1, 0.2, 0, 0.5, 0.2])).max() < 5 * (0.25 / 20000) ** 0.5
    # Without replacement: after class 3 the others have the chances 1/5, 2/5 and 2/5.
    after = classes[classes[:, 0] == 3, 1]
    second = np.bincount(after, minlength=5) / len(after)
    assert np.abs(second - np.array([0.2, 0.4, 0, 0, 0.4])).max() < 5 * (0.25 / len(after)) ** 0.5


def test_class_weights_count_for_rotations_and_by_data_set() -> None:
    data = [other(0, [5] * 3, rotations=True), other(10, [5] * 3)]
    sampler = EpisodeSampler(data, 2, 1, 1, tasks=400, class_weights=[torch.tensor([0, 1, 1]), None])
    plan = sampler.plan(1)
    turned = plan.classes[plan.sources == 0]
    assert set(np.unique(turned)) == {1, 2, 4, 5, 7, 8, 10, 11}
    assert set(np.unique(plan.classes[plan.sources == 1])) == {0, 1, 2}


def test_small_classes_may_be_left_out() -> None:
    data = coded([5, 20, 3, 20, 4])
    with pytest.raises(
        ValueError,
        match=r"class 'class2' has 3 images, 16 are needed for 1 shot \+ 15 queries; "
        r"2 more classes are too small \(dataset\.at_least\(16\)",
    ):
        EpisodeSampler(data, 2, 1, 15)
    large = data.at_least(16)
    assert large.names == ("class1", "class3")
    check(EpisodeSampler(large, 2, 1, 15)(0))
    check(EpisodeSampler(data, 2, 1, 15, class_weights=[0, 1, 0, 1, 0])(0))
    with pytest.raises(ValueError, match=r"^count must be at most the 20 rows of the largest class, got 21$"):
        data.at_least(21)


def test_shards_are_the_whole() -> None:
    sampler = EpisodeSampler(coded([20] * 9), 3, (1, 2), 2, tasks=6, seed=8)
    for step in (0, 3):
        whole = sampler(step)
        parts = [sampler.shard(rank, 3)(step) for rank in range(3)]
        assert all(part.tasks == 2 for part in parts)
        assert torch.equal(torch.cat([part.query_x for part in parts]), whole.query_x)
        assert torch.equal(torch.cat([part.support_y for part in parts]), whole.support_y)
    assert same(sampler.shard(1, 2).shard(2, 3)(0), sampler(0)[5])
    with pytest.raises(ValueError, match=r"^ranks must divide the 6 tasks of a step, got 4$"):
        sampler.shard(0, 4)
    with pytest.raises(ValueError, match=r"^rank must be between 0 and 1, got 2$"):
        sampler.shard(2, 2)


DATA = coded([20, 7, 20])
REFUSED = [
    pytest.param(
        {"ways": (3, 2)}, ValueError, "ways must be a pair (smallest, largest), got (3, 2)", id="pair"
    ),
    pytest.param(
        {"shots": (1, 2, 3)},
        ValueError,
        "shots must be an integer or a pair (smallest, largest), got (1, 2, 3)",
        id="triple",
    ),
    pytest.param({"queries": (0, 2)}, ValueError, "queries must be at least 1, got 0", id="no-query"),
    pytest.param(
        {"ways": (2, 4)}, ValueError, "ways must be at most the 3 classes of the data set, got 4", id="ways"
    ),
    pytest.param(
        {"uneven_shots": True},
        ValueError,
        "shots must be a pair (smallest, largest) for uneven_shots, got 1",
        id="even",
    ),
    pytest.param({"dataset": []}, ValueError, "dataset must hold at least one data set, got none", id="none"),
    pytest.param(
        {"dataset": [DATA, coded([5] * 3).to("meta")]},
        ValueError,
        "dataset must hold data sets with rows of one shape, dtype and device, got device meta in number 1 and cpu "
        "in number 0",
        id="devices",
    ),
    pytest.param(
        {
            "dataset": [
                DATA,
                ImageClasses(torch.zeros(9, 1, 4, 4), *(torch.tensor([v]) for v in (0, 9)), ("a",)),
            ]
        },
        ValueError,
        "dataset must hold data sets with rows of one shape, dtype and device, got shape [1, 4, 4] in number 1 and "
        "[2, 4, 4] in number 0",
        id="shapes",
    ),
    pytest.param(
        {"dataset": [DATA, coded([20])]},
        ValueError,
        "ways must be at most the 1 classes of data set 1, got 2",
        id="second-ways",
    ),
    pytest.param(
        {"dataset": [coded([20] * 3), DATA], "shots": 5},
        ValueError,
        "shots + queries must be at most the images of every class: class 'class1' of data set 1 has 7 images, 8 are "
        "needed for 5 shots + 3 queries (dataset.at_least(8) leaves out what is too small)",
        id="second-sizes",
    ),
    pytest.param(
        {"dataset_weights": [1.0]},
        ValueError,
        "dataset_weights must be None for one data set",
        id="one-weight",
    ),
    pytest.param(
        {"dataset": [DATA, DATA], "dataset_weights": [1, 0]},
        ValueError,
        "dataset_weights must be positive and finite, got [1, 0]",
        id="zero-weight",
    ),
    pytest.param(
        {"class_weights": [1, 1]},
        ValueError,
        "class_weights must hold 3 numbers, got shape [2]",
        id="few-weights",
    ),
    pytest.param(
        {"class_weights": [1, -1, 1]},
        ValueError,
        "class_weights must be not negative and finite, got [1, -1, 1]",
        id="negative-weight",
    ),
    pytest.param(
        {"class_weights": ["a", 1, 1]},
        TypeError,
        "class_weights must be numbers, got ['a', 1, 1]",
        id="text-weight",
    ),
    pytest.param(
        {"class_weights": {"class0": 1, "class1": 1}},
        ValueError,
        "class_weights must have the names of the data set as its keys, got none for 'class2'",
        id="missing-name",
    ),
    pytest.param(
        {"class_weights": dict.fromkeys(["class0", "class1", "class2", "b"], 1)},
        ValueError,
        "class_weights must have the names of the data set as its keys, got 'b'",
        id="unknown-name",
    ),
    pytest.param(
        {"class_weights": [1, 0, 0]},
        ValueError,
        "ways must be at most the 1 classes with a weight of the data set, got 2",
        id="one-class-left",
    ),
    pytest.param(
        {"dataset": [DATA, DATA], "class_weights": torch.ones(3)},
        ValueError,
        "class_weights must be a sequence with one entry for each of 2 data sets",
        id="weights-for-one",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED)
def test_sampler_refuses_ranges_sets_and_weights(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"dataset": DATA, "ways": 2, "shots": 1, "queries": 3}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        EpisodeSampler(**{**arguments, **changed})


def test_fixed_episodes_do_not_depend_on_the_batch() -> None:
    data = coded([20] * 12, rotations=True)
    fixed = FixedEpisodes(EpisodeSampler(data, 5, 1, 3, tasks=4, seed=5), count=11)
    assert (fixed.count, len(fixed), fixed.seed) == (11, 3, 5)
    assert [episodes.tasks for episodes in fixed] == [4, 4, 3]
    alone = EpisodeSampler(data, 5, 1, 3, tasks=1, seed=5)
    singles = [one for episodes in fixed for one in episodes]
    assert all(same(one, alone(number)) for number, one in enumerate(singles))
    assert same(fixed[1], list(fixed)[1]) and same(fixed[0:2][1], fixed[1]) and same(fixed[-1], fixed[2])
    assert [episodes.tasks for episodes in FixedEpisodes(alone, 11, batch=6)] == [6, 5]
    with pytest.raises(IndexError):
        fixed[3]


def test_fixed_episodes_of_several_shapes() -> None:
    sampler = EpisodeSampler(coded([20] * 12), (2, 3), 1, 2, tasks=8, seed=5)
    fixed = FixedEpisodes(sampler, count=40)
    assert sum(episodes.tasks for episodes in fixed) == 40
    numbers = iter(range(40))
    alone = EpisodeSampler(coded([20] * 12), (2, 3), 1, 2, seed=5)
    for episodes in fixed:
        check(episodes)
        for one in episodes:
            assert same(one, alone(next(numbers)))
    assert {episodes.ways for episodes in fixed} == {2, 3}


def test_shards_of_fixed_episodes_are_the_whole() -> None:
    fixed = FixedEpisodes(EpisodeSampler(coded([20] * 12), 3, 1, 2, tasks=4), count=11)
    parts = [fixed.shard(rank, 3) for rank in range(3)]
    assert [part.count for part in parts] == [3, 4, 4]
    whole = torch.cat([episodes.query_x for episodes in fixed])
    assert torch.equal(torch.cat([episodes.query_x for part in parts for episodes in part]), whole)
    with pytest.raises(ValueError, match=r"^ranks must be at most the 11 episodes, got 12$"):
        fixed.shard(0, 12)


def fingerprints() -> dict[str, str]:
    """Of lists that cover every way of drawing."""
    small, large = coded([20] * 12, rotations=True), coded([100, 500, 70])
    lists = {
        "rotations": EpisodeSampler(small, 5, 1, 15),
        "ranges": EpisodeSampler(small, (2, 40), (1, 5), (1, 9), seed=1),
        "uneven": EpisodeSampler(small, 5, (1, 9), 3, seed=2, uneven_shots=True),
        "weights": EpisodeSampler(small, 5, 1, 3, seed=3, class_weights=[float(c) for c in range(12)]),
        "large": EpisodeSampler(large, 2, 3, 3, seed=4),
        "several": EpisodeSampler([small, large], 2, 1, 5, seed=5, dataset_weights=[0.3, 0.7]),
        "sinusoids": SinusoidSampler((5, 10), 10, seed=6, frequency=(0.8, 1.2)),
    }
    return {name: FixedEpisodes(sampler, 50).fingerprint()[:16] for name, sampler in lists.items()}


#: The same on every machine and under every version of numpy and torch, or evaluations cannot be compared.
FINGERPRINTS: dict[str, str] = {
    "rotations": "34c55eaed8e8e055",
    "ranges": "7f30ecd9ed96535a",
    "uneven": "b0974789f9369343",
    "weights": "38051c941a366c97",
    "large": "a29f9e6bc42ddf7c",
    "several": "874d4a47541be6e1",
    "sinusoids": "3d31cbd73a5ad3d5",
}


def test_fixed_episodes_are_the_same_on_every_machine() -> None:
    assert fingerprints() == FINGERPRINTS


def test_fingerprint_tells_lists_apart() -> None:
    def of(sizes: list[int], *shape: int, count: int = 20, seed: int = 0) -> str:
        return FixedEpisodes(EpisodeSampler(coded(sizes), *shape, seed=seed), count).fingerprint()

    prints = {
        of([20] * 5, 2, 1, 2),
        of([20] * 6, 2, 1, 2),
        of([20] * 4 + [21], 2, 1, 2),
        of([20] * 5, 2, 2, 1),
        of([20] * 5, 2, 1, 2, seed=1),
        of([20] * 5, 2, 1, 2, count=21),
    }
    assert len(prints) == 6 and of([20] * 5, 2, 1, 2) in prints
    whole = FixedEpisodes(EpisodeSampler(coded([20] * 5), 2, 1, 2, tasks=7), 20, batch=3)
    assert whole.fingerprint() in prints, "neither tasks nor batch matter"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda step: step,), TypeError, "sampler must be a metafast.data.TaskSampler, got function"),
        ((EpisodeSampler(DATA, 1, 1, 1), 0), ValueError, "count must be at least 1, got 0"),
        ((EpisodeSampler(DATA, 1, 1, 1), 5, 0), ValueError, "batch must be at least 1, got 0"),
    ],
    ids=["function", "no-episodes", "no-batch"],
)
def test_fixed_episodes_refuse(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        FixedEpisodes(*arguments)


def test_sinusoids() -> None:
    sampler = SinusoidSampler(tasks=2000, seed=1)
    plan, episodes = sampler.plan(3), sampler(3)
    check(episodes)
    assert episodes.regression and episodes.ways == sampler.ways == 0
    assert episodes.support_x.shape == episodes.query_y.shape == (2000, 10, 1)
    x, y = (
        torch.cat(sides, 1)[..., 0].double().numpy()
        for sides in zip(
            (episodes.support_x, episodes.support_y), (episodes.query_x, episodes.query_y), strict=True
        )
    )
    wave = plan.amplitude[:, None] * np.sin(x - plan.phase[:, None])
    assert np.abs(y - wave).max() < 1e-5
    for values, low, high in ((plan.amplitude, 0.1, 5.0), (plan.phase, 0.0, np.pi), (plan.x, -5.0, 5.0)):
        assert values.min() > low and values.max() < high
        assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / (12 * values.size) ** 0.5
    assert (plan.frequency == 1).all()
    # What the best prediction that does not adapt leaves: the mean of the waves at a point is 0.
    assert abs((y**2).mean() - 4.2) < 0.3


def test_sinusoid_steps_and_shards() -> None:
    sampler = SinusoidSampler((5, 7), 3, tasks=4, seed=2)
    assert (sampler.shots, sampler.queries) == ((5, 7), 3)
    again = SinusoidSampler((5, 7), 3, tasks=4, seed=2)
    assert same(sampler(9), again(9)) and not torch.equal(sampler(9).query_x, again(8).query_x)
    assert {sampler(step).support_x.shape[1] for step in range(30)} == {5, 6, 7}
    whole = sampler(1)
    assert torch.equal(torch.cat([sampler.shard(r, 2)(1).support_y for r in range(2)]), whole.support_y)
    fixed = FixedEpisodes(SinusoidSampler(5, 3, tasks=4, seed=2), 6)
    assert [episodes.tasks for episodes in fixed] == [4, 2]
    assert same(fixed[0][2], SinusoidSampler(5, 3, tasks=1, seed=2)(2))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"shots": 0}, ValueError, "shots must be at least 1, got 0"),
        (
            {"amplitude": (5, 1)},
            ValueError,
            "amplitude must be a finite number or a pair (smallest, largest), got (5, 1)",
        ),
        ({"phase": "pi"}, TypeError, "phase must be a number or a pair (smallest, largest), got 'pi'"),
        (
            {"x_range": (0, float("inf"))},
            ValueError,
            "x_range must be a finite number or a pair (smallest, largest), got (0, inf)",
        ),
    ],
    ids=["shots", "order", "text", "infinite"],
)
def test_sinusoids_refuse(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        SinusoidSampler(**changed)


def few_processors(test: Any) -> Any:
    """Neither few processors nor torch's threads keep workers from being forked."""
    for message in ("This DataLoader will create", "This process .* is multi-threaded, use of fork"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


@few_processors
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_stream_gives_every_step_once_and_in_order(workers: int) -> None:
    sampler = EpisodeSampler(coded([20] * 12), 3, 1, 2, tasks=2)
    stream = EpisodeStream(sampler, start=4, stop=11)
    found = list(DataLoader(stream, batch_size=None, num_workers=workers))
    assert len(found) == 7
    assert all(same(episodes, sampler(4 + i)) for i, episodes in enumerate(found))


@few_processors
def test_loader_is_the_sampler() -> None:
    sampler = EpisodeSampler(coded([20] * 12), 3, 1, 2, tasks=2, seed=9)
    loader = EpisodeLoader(sampler, workers=2)
    before = torch.get_rng_state()
    assert loader.seed == 9
    assert all(same(loader(step), sampler(step)) for step in (0, 1, 2, 7, 8, 1))
    assert all(same(a, sampler(step)) for step, a in enumerate(itertools.islice(loader, 3)))
    assert torch.equal(torch.get_rng_state(), before), "resumed runs would differ"
    loader.close()
    assert same(loader(5), sampler(5))
    loader.close()


def test_streams_can_be_sent_to_workers_that_are_not_forked() -> None:
    stream = EpisodeStream(
        EpisodeSampler(coded([20] * 5, rotations=True), 3, (1, 2), 2, class_weights=range(5)), 4
    )
    assert same(next(iter(pickle.loads(pickle.dumps(stream)))), next(iter(stream)))


def test_stream_and_loader_refuse() -> None:
    with pytest.raises(TypeError, match=r"^sampler must be a function of the step, got list$"):
        EpisodeStream([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^stop must be at least 5, got 4$"):
        EpisodeStream(EpisodeSampler(DATA, 1, 1, 1), 5, 4)
    with pytest.raises(ValueError, match=r"^workers must be at least 1, got 0$"):
        EpisodeLoader(EpisodeSampler(DATA, 1, 1, 1), workers=0)
    with pytest.raises(
        ValueError, match=r"^sampler must have its data set on the CPU for workers, got meta$"
    ):
        EpisodeLoader(EpisodeSampler(DATA.to("meta"), 1, 1, 1))


def test_random_split_by_class() -> None:
    data = coded([3] * 25)
    parts = {part: data.split(part) for part in ("train", "val", "test", "trainval")}
    assert {part: len(found.names) for part, found in parts.items()} == {
        "train": 16,
        "val": 4,
        "test": 5,
        "trainval": 20,
    }
    train, val, test = (set(parts[part].names) for part in ("train", "val", "test"))
    assert train | val | test == set(data.names) and len(train) + len(val) + len(test) == 25
    assert set(parts["trainval"].names) == train | val
    assert parts["test"].names == ("class2", "class3", "class7", "class12", "class21"), "on every machine"
    assert data.split("test", seed=1).names != parts["test"].names
    backwards = data.subset(range(24, -1, -1)).split("test")
    assert set(backwards.names) == test
    assert len(data.split("train", fractions=(3, 1, 1)).names) == 15
    assert [len(coded([3] * 3).split(part)) for part in ("train", "val", "test")] == [1, 1, 1]
    with pytest.raises(
        ValueError, match=r"^fractions must leave .*, got \(0\.64, 0\.16, 0\.2\) for 2 classes$"
    ):
        coded([3] * 2).split("train")
    with pytest.raises(ValueError, match=r"^fractions must be three positive numbers, got \(1, 0, 1\)$"):
        data.split("train", fractions=(1, 0, 1))
    with pytest.raises(ValueError, match=r"^split must be 'train', 'val', 'trainval' or 'test', got 'dev'$"):
        data.split("dev")


def test_mixed_and_uneven_episodes_follow_the_images_to_their_device() -> None:
    data = [other(0, [20] * 4).to("meta"), other(10, [20] * 4, rotations=True).to("meta")]
    episodes = EpisodeSampler(data, 3, (1, 4), 2, tasks=5, uneven_shots=True)(0)
    assert {episodes.support_x.device.type, episodes.support_y.device.type} == {"meta"}
    assert episodes.query_x.shape == (5, 6, 2, SIDE, SIDE)


class FailingOnce:
    """A sampler that fails at its first call for step 2."""

    def __init__(self, sampler: EpisodeSampler, flag: Path) -> None:
        self.sampler, self.flag = sampler, flag

    def __call__(self, step: int) -> Episodes:
        if step == 2 and not self.flag.exists():
            self.flag.touch()
            raise OSError("the disk is away")
        return self.sampler(step)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loader_that_failed_gives_the_step_it_is_asked_for(tmp_path: Path) -> None:
    sampler = EpisodeSampler(DATA, 2, 1, 1, seed=3)
    loader = EpisodeLoader(FailingOnce(sampler, tmp_path / "failed"), workers=2)
    loader(0), loader(1)
    with pytest.raises(OSError, match="the disk is away"):
        loader(2)
    assert torch.equal(loader(2).support_x, sampler(2).support_x)
    loader.close()
