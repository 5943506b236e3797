"""The compiled draws of tasks: those of Python's random and of NumPy's, from the same words of their streams."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from metafast import _C
from metafast.compat import _draws


@pytest.mark.parametrize("n", [0, 1, 2, 7, 20, 21, 22, 77, 85, 86, 277, 278, 1623, 10000])
def test_the_draws_are_those_of_the_random_module(n: int) -> None:
    for k in {0, 1, 2, 5, 6, 10, 21, n // 3, n}:
        if k <= n:
            for population in (range(n), [str(i) for i in range(n)]):
                random.seed(n * k)
                wanted = random.sample(population, k), random.random()
                random.seed(n * k)
                assert (_draws.sample(population, k), random.random()) == wanted
    first, second = list(range(n)), list(range(n))
    random.seed(n)
    random.shuffle(first)
    wanted_next = random.random()
    random.seed(n)
    _draws.shuffle(second)
    assert first == second and random.random() == wanted_next


@pytest.mark.parametrize(
    ("ways", "rows"), [(0, 0), (0, 3), (3, 0), (5, 20), (1, 6), (12, 40), (30, 1), (20, 300)]
)
def test_a_task_is_one_sample_after_the_other(ways: int, rows: int) -> None:
    labels = [f"label {k}" for k in range(30)]
    rows_of = {label: [(label, row) for row in range(rows + 7 * k)] for k, label in enumerate(labels)}
    random.seed(ways * rows)
    wanted = [row for label in random.sample(labels, ways) for row in random.sample(rows_of[label], rows)]
    then = random.random()
    random.seed(ways * rows)
    assert _draws.sample_task(labels, rows_of, ways, rows) == wanted and random.random() == then


def test_populations_of_32_bits() -> None:
    random.seed(0)
    wanted = random.sample(range(2**32 - 1), 9)
    random.seed(0)
    assert _draws.sample(range(2**32 - 1), 9) == wanted


def broken(bits: int) -> int:
    raise RuntimeError("no more bits")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _C.sample(random.getrandbits, range(3), 4), ValueError, "k: expected 0 to 3, .* got 4"),
        (lambda: _C.sample(random.getrandbits, range(3), -1), ValueError, "k: expected 0 to 3, .* got -1"),
        (lambda: _C.sample(random.getrandbits, range(2**32), 1), ValueError, "fewer than 2\\^32"),
        (lambda: _C.sample(random.getrandbits, 3, 1), TypeError, "len"),
        (lambda: _C.sample(random.getrandbits, {1, 2}, 1), TypeError, "index"),
        (lambda: _C.sample(random.getrandbits, range(3), 1.0), TypeError, "int"),
        (lambda: _C.sample(random.getrandbits, range(3)), TypeError, "sample: expected 3 arguments, got 2"),
        (lambda: _C.sample(broken, range(3), 2), RuntimeError, "no more bits"),
        (lambda: _C.sample(broken, range(99), 40), RuntimeError, "no more bits"),
        (lambda: _C.sample(lambda bits: "1", range(3), 2), TypeError, "int"),
        (lambda: _C.sample(lambda bits: "1", range(99), 40), AttributeError, "to_bytes"),
        (lambda: _C.sample(lambda bits: -1, range(3), 2), OverflowError, "negative"),
        (lambda: _C.sample(lambda bits: -1, range(99), 40), OverflowError, "negative"),
        (lambda: _C.shuffle(random.getrandbits, (1, 2)), TypeError, "values: expected a list, .*tuple"),
        (lambda: _C.shuffle(broken, [1, 2]), RuntimeError, "no more bits"),
        (lambda: _C.sample_task(random.getrandbits, [1], {1: [2]}, 2, 1), ValueError, "k: expected 0 to 1"),
        (lambda: _C.sample_task(random.getrandbits, [1], {1: [2]}, 1, 2), ValueError, "k: expected 0 to 1"),
        (lambda: _C.sample_task(random.getrandbits, [1], {1: [2]}, -1, 2), ValueError, "got -1 and 2"),
        (lambda: _C.sample_task(random.getrandbits, [1], {2: [2]}, 1, 1), KeyError, "1"),
        (lambda: _C.sample_task(broken, [1], {1: [2]}, 1, 1), RuntimeError, "no more bits"),
    ],
)
def test_what_cannot_be_drawn(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def split(items: list[int], labels: list[int], ways: int, shots: int) -> tuple[list[int], list[int]]:
    """What ``split_rows`` gives, in plain Python."""
    places = np.arange(len(items)).reshape(ways, -1)
    support, query = places[:, :shots].flatten().tolist(), places[:, shots:].flatten().tolist()
    found = [labels[item] for item in items]
    classes = list(set(found))
    numbers = [classes.index(label) for label in found]
    return [of[row] for of in (items, numbers) for row in support + query], classes


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("values", [1, 10, 2**40, 2**62])
def test_the_parts_of_a_task(values: int, apart: bool) -> None:
    draw = random.Random(values)
    for ways, shots, queries in (
        (1, 1, 1),
        (5, 1, 15),
        (7, 3, 0),
        (4, 0, 2),
        (0, 2, 3),
        (3, 0, 0),
        (40, 5, 15),
    ):
        names = [draw.randrange(-values, values) for _ in range(ways)]
        labels = [name for name in names for _ in range(shots + queries)]
        if not apart:
            draw.shuffle(labels)
        items = draw.sample(range(len(labels)), len(labels)) if not apart else list(range(len(labels)))
        found = _C.split_rows(items, labels, ways, shots, queries)
        assert found is not None
        numbers = np.frombuffer(found[0], np.int64).tolist()
        assert (numbers, found[1]) == split(items, labels, max(ways, 1), shots)


@pytest.mark.parametrize(
    ("items", "labels"),
    [
        ([0, 2], [0, 0]),
        ([0, -1], [0, 0]),
        ([0, 2**70], [0, 0]),
        ([0, True], [0, 0]),
        ([0, 1], [0, 0.0]),
        ([0, 1], [0, "0"]),
        ([0, 1], [0, True]),
        ([0, 1], [0, 2**63]),
    ],
)
def test_rows_that_python_has_to_look_at(items: list[int], labels: list[Any]) -> None:
    assert _C.split_rows(items, labels, 1, 1, 1) is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 1, 2], [0] * 3, 2, 1, 1), ValueError, r"items: expected 2 \* \(1 \+ 1\) of them, got 3"),
        (([0, 1, 2, 3], [0] * 4, 2, 3, -1), ValueError, r"expected 2 \* \(3 \+ -1\)"),
        (([0, 1, 2, 3], [0] * 4, 2, -1, 3), ValueError, r"expected 2 \* \(-1 \+ 3\)"),
        (([0], [0], 0, 1, 0), ValueError, "got 1"),
        (([], [0], -1, 1, 0), ValueError, "got 0"),
        (([], [0], 2**60, 2**60, 2**60), ValueError, "got 0"),
        (((0,), [0], 1, 1, 0), TypeError, "items: expected a list"),
        (([0], (0,), 1, 1, 0), TypeError, "labels: expected a list"),
        (([0], [0], 1, 1), TypeError, "split_rows: expected 5 arguments, got 4"),
        (([0], [0], 1, 1.0, 0), TypeError, "int"),
    ],
)
def test_rows_that_are_no_task(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _C.split_rows(*arguments)


def orders_by_numpy(
    generator: np.random.RandomState,
    seeds: list[int],
    rows: list[int],
    first: list[int],
    counts: list[list[int]],
) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in counts]
    for k, seed in enumerate(seeds):
        order, begin = np.random.RandomState(seed).permutation(rows[k]), 0
        for split, count in enumerate(counts):
            part = order[begin : begin + count[k]]
            begin += len(part)
            generator.shuffle(part)
            found[split] += (part + first[k]).tolist()
    return found


@pytest.mark.parametrize("bits", [np.random.MT19937, np.random.PCG64])
def test_orders_are_those_of_numpy(bits: Callable[[int], Any]) -> None:
    """Permutations longer than the 624 words of the generator's state too, and both generators go on alike."""
    draw = random.Random(0)
    ours, theirs = (np.random.RandomState(bits(5)) for _ in range(2))
    for classes in (0, 1, 2, 5):
        for splits in (0, 1, 2, 3):
            seeds = [draw.choice([0, 1, 2**32 - 1, draw.randrange(2**32)]) for _ in range(classes)]
            rows = [draw.choice([0, 1, 2, 3, 4, 5, 31, 32, 33, 600, 3000]) for _ in seeds]
            first = [draw.randrange(10**6) for _ in seeds]
            counts = [[draw.choice([0, 1, 5, 15, 700, 2**31]) for _ in seeds] for _ in range(splits)]
            arguments = seeds, rows, first, counts
            assert _draws.split_orders(ours, *arguments) == orders_by_numpy(theirs, *arguments)
            assert ours.uniform() == theirs.uniform()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0], [2], [0]), TypeError, "split_orders: expected 5 arguments, got 4"),
        (((0,), [2], [0], [[1]]), TypeError, "seeds: expected a list"),
        (([0], (2,), [0], [[1]]), TypeError, "rows: expected a list"),
        (([0], [2], [0], [(1,)]), TypeError, "counts: expected a list"),
        (([0], [2], [0], ([1],)), TypeError, "counts: expected a list"),
        (([0], [2], [0, 1], [[1]]), ValueError, "first: expected 1 numbers, got 2"),
        (([0], [2], [0], [[1], []]), ValueError, "counts: expected 1 numbers, got 0"),
        (([0], [-1], [0], [[1]]), ValueError, r"rows: expected 0 or more and less than 2\^32, got -1"),
        (([2**32], [1], [0], [[1]]), ValueError, r"seeds: .* got 4294967296"),
        (([0], [1.0], [0], [[1]]), TypeError, "int"),
        (([2**70], [1], [0], [[1]]), OverflowError, "too big"),
    ],
)
def test_orders_that_cannot_be_made(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    generator = np.random.RandomState(0)
    with pytest.raises(error, match=message):
        _C.split_orders(generator._bit_generator.capsule, *arguments)


def test_orders_of_another_generator() -> None:
    """Of NumPy's other generators, of a subclass with a shuffle of its own: what they do."""

    class Reversing(np.random.RandomState):
        def shuffle(self, x: Any) -> None:
            x[:] = x[::-1].copy()

    arguments: tuple[Any, ...] = [3, 7], [9, 4], [0, 9], [[3, 2], [8, 1]]
    for make in (np.random.default_rng, Reversing):
        ours, theirs = (make(5) for _ in range(2))
        assert _draws.split_orders(ours, *arguments) == orders_by_numpy(theirs, *arguments)
        assert ours.uniform() == theirs.uniform()
    with pytest.raises(ValueError, match="PyCapsule"):
        _C.split_orders(object(), [0], [2], [0], [[1]])


class Doubled(list[int]):
    """Gives other items than those that it keeps."""

    def __getitem__(self, index: Any) -> Any:
        return 2 * super().__getitem__(index)


class Long(list[int]):
    def __len__(self) -> int:
        return 50


def test_lists_of_another_kind() -> None:
    random.seed(3)
    wanted = random.sample(Doubled(range(100)), 5)
    random.seed(3)
    assert _draws.sample(Doubled(range(100)), 5) == wanted
    with pytest.raises(IndexError):
        _draws.sample(Long(range(3)), 5)
