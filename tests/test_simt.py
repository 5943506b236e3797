"""The emulator guards itself: every planted bug is found by the build that is meant for it, correct kernels pass."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests import simt
from tests.simt import build
from tests.simt.mutants import MUTANTS

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing())

FOLDER = Path(__file__).parent / "simt"
ORDERS = (("forward", 1), ("reverse", 1), ("random", 1), ("random", 2))
KINDS = ("plain", "address", "race")

CORRECT = (
    "vector_add", "block_sums", "tiled_distance", "copied_row_sums", "warp_sum_in_shared", "half_warps",
    "leaving_lanes", "early_return", "vector_transpose", "histogram", "collectives",
)  # fmt: skip

#: Found by the sanitizers, which end the process; undefined in the other builds.
MEMORY = {
    "shared_write_past_end": "index 64 out of bounds",
    "shared_read_past_end": "heap-buffer-overflow",
    "dynamic_shared_too_small": "heap-buffer-overflow",
    "global_write_past_end": "heap-buffer-overflow",
    "global_read_past_end": "heap-buffer-overflow",
    "misaligned_vector": "misaligned address",
}

SILENT, WRONG = "", "wrong result"
UNINITIALISED, COPYING = "read of uninitialised shared memory", "still writing"


class Unordered(NamedTuple):
    """What a missing order shows in the result, by the order of the threads, and what the race check says."""

    forward: str
    reverse: str
    random: str
    race: str


#: Found by the race check in every order, and otherwise in those orders that give a wrong result.
UNORDERED = {
    "no_barrier": Unordered(WRONG, WRONG, WRONG, UNINITIALISED),
    "no_barrier_lower_neighbour": Unordered(
        SILENT, WRONG, WRONG, f"{UNINITIALISED}|race: reads what is written"
    ),
    "no_second_barrier": Unordered(WRONG, WRONG, WRONG, "race: (reads|writes) what is (read|written)"),
    "no_syncwarp": Unordered(WRONG, SILENT, WRONG, f"{UNINITIALISED}|race: reads what is written"),
    "read_by_other_warp": Unordered(
        SILENT, WRONG, f"{WRONG}|$", "race: (reads|writes) what is (read|written)"
    ),
    "shuffle_for_syncwarp": Unordered(SILENT, SILENT, SILENT, "race: reads what is written"),
    "half_syncwarp": Unordered(SILENT, SILENT, SILENT, "race: reads what is written"),
    "no_atomic": Unordered(SILENT, SILENT, SILENT, "race: reads what is written"),
    "all_write": Unordered(SILENT, SILENT, SILENT, "race: writes what is written"),
    "atomic_and_plain": Unordered(SILENT, SILENT, SILENT, "race: (writes what is read|not atomic)"),
    "vector_overlap": Unordered(SILENT, SILENT, SILENT, "race: writes what is written"),
    "blocks_not_ordered": Unordered(
        SILENT, WRONG, f"{WRONG}|$", "race: (reads|writes) what is (read|written)"
    ),
    "uninitialised_shared": Unordered(WRONG, WRONG, WRONG, UNINITIALISED),
    "copy_not_awaited": Unordered(WRONG, WRONG, WRONG, COPYING),
    "copy_awaited_too_late": Unordered(WRONG, WRONG, WRONG, COPYING),
    "copy_without_barrier": Unordered(WRONG, WRONG, WRONG, f"{UNINITIALISED}|race: reads what is written"),
    "copy_refills_too_early": Unordered(SILENT, SILENT, SILENT, f"{COPYING}|race: writes what is read"),
}

#: Found by every build in every order.
ERRORS = {
    "copy_misaligned": "both must be multiples of its 16 bytes",
    "copy_abandoned": "returned without waiting for its copy",
    "divergent_barrier": r"divergent __syncthreads: other threads of the block wait at \S*planted.cuh:\d+",
    "return_before_barrier": r"__syncthreads when \d+ thread|but this thread has returned",
    "half_of_shuffle": r"deadlock, waits in a warp collective .*planted.cuh:\d+: deadlock, waits in __syncthreads",
    "shuffle_from_missing_lane": "__shfl_down_sync reads lane (1[6-9]|2[0-9]|3[01]), which does not take part",
    "shuffle_outside_mask": "__shfl_sync: lane (1[6-9]|2[0-9]|3[01]) is not in its own mask 0x0000ffff",
    "shuffle_width": "__shfl_sync: a width of 12",
    "different_collectives": r"in a different collective at \S*planted.cuh:\d+",
    "too_much_shared": "32768 bytes of static and 32768 of dynamic shared memory, at most 49152",
}

#: The same, before any thread runs.
LAUNCHES = {
    "too_much_dynamic_shared": "49153 bytes of dynamic shared memory",
    "empty_grid": r"a grid of \(0, 1, 1\) blocks",
    "too_many_threads": r"blocks of \(2048, 1, 1\) threads",
}

DEVICE_ERROR = re.compile(
    r"^simt: (?P<file>\S+):(?P<line>\d+)( in \S+)*: .* "
    r"\[planted::(?P<kernel>\w+), block \(\d+, \d+, \d+\), thread \(\d+, \d+, \d+\)\]"
)


def _environment(kind: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["LD_LIBRARY_PATH"] = str(Path(torch.__file__).parent / "lib")
    return {**environment, **(build.sanitizer_environment() if kind == "address" else {})}


@functools.cache
def outcomes(kind: str) -> dict[tuple[str, tuple[str, int]], str]:
    """(case, (order, seed)) -> what it said, in the build of that kind."""
    asked = [(case, order) for case in (*CORRECT, *UNORDERED, *ERRORS, *LAUNCHES) for order in ORDERS]
    if kind == "address":
        asked += [(case, ORDERS[0]) for case in MEMORY]
    done = subprocess.run(
        [sys.executable, FOLDER / "run_cases.py", build.library(kind)],
        input=json.dumps([(case, *order, case in MEMORY) for case, order in asked]),
        env=_environment(kind), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads(done.stdout), strict=True))


@functools.cache
def lines_of(kernel: str) -> range:
    """Where a kernel stands in planted.cuh."""
    lines = (FOLDER / "planted.cuh").read_text().splitlines()
    begin = next(k for k, line in enumerate(lines) if f"void {kernel}(" in line)
    end = next(k for k in range(begin, len(lines)) if lines[k] == "" or lines[k].startswith("//"))
    return range(begin + 1, end + 1)


def assert_located(text: str, kernel: str) -> None:
    """The message names a line of the kernel, the kernel, block and thread."""
    found = DEVICE_ERROR.search(text)
    assert found is not None, text
    assert found["kernel"] == kernel
    assert found["file"].endswith("tests/simt/planted.cuh") and int(found["line"]) in lines_of(kernel), text


each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("case", CORRECT)
def test_correct_kernels_pass(kind: str, case: str) -> None:
    assert {order: outcomes(kind)[case, order] for order in ORDERS} == dict.fromkeys(ORDERS, "")


@pytest.mark.parametrize("case", MEMORY)
def test_sanitizers_find(case: str) -> None:
    text = outcomes("address")[case, ORDERS[0]]
    assert re.search(MEMORY[case], text), text
    assert any(f"planted.cuh:{line}" in text for line in lines_of(case))


@pytest.mark.parametrize("kind", ["plain", "address"])
@pytest.mark.parametrize("case", UNORDERED)
def test_orders_show(kind: str, case: str) -> None:
    for order in ORDERS:
        wanted, text = getattr(UNORDERED[case], order[0]), outcomes(kind)[case, order]
        assert re.match(wanted or "$", text), f"{order}: {text}"


@pytest.mark.parametrize("case", UNORDERED)
def test_race_check_finds(case: str) -> None:
    for order in ORDERS:
        text = outcomes("race")[case, order]
        assert re.search(UNORDERED[case].race, text), f"{order}: {text}"
        assert_located(text, case)


@each_kind
@pytest.mark.parametrize("case", ERRORS)
def test_errors(kind: str, case: str) -> None:
    for order in ORDERS:
        text = outcomes(kind)[case, order]
        assert re.search(ERRORS[case], text), f"{order}: {text}"
        assert_located(text, case)


@each_kind
@pytest.mark.parametrize("case", LAUNCHES)
def test_launch_errors(kind: str, case: str) -> None:
    for order in ORDERS:
        text = outcomes(kind)[case, order]
        assert re.match(rf"simt: \S*cases.cuh:\d+: launch of planted::{case}: {LAUNCHES[case]}", text), (
            f"{order}: {text}"
        )


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return simt.module()


def test_every_case_is_tested(module: ModuleType) -> None:
    assert set(module.correct) == set(CORRECT)
    assert set(module.planted) == {*MEMORY, *UNORDERED, *ERRORS, *LAUNCHES}


def test_control(module: ModuleType) -> None:
    assert module.kind == simt.kind()
    before = module.launches()
    module.run("vector_add")
    assert module.launches() == before + 1
    with pytest.raises(ValueError, match="order: expected 'forward', 'reverse' or 'random', got 'sideways'"):
        module.configure("sideways")
    with pytest.raises(ValueError, match="no such case: perfect"):
        module.run("perfect")


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_an_error_leaves_nothing_behind(module: ModuleType, order: tuple[str, int]) -> None:
    module.configure(*order)
    for bug in ERRORS:
        with pytest.raises(RuntimeError, match="simt: "):
            module.run(bug)
        for case in CORRECT:
            module.run(case)


# ---- csrc/math/distance.h

METRICS = {
    "sqeuclidean": lambda x, y: ((x - y) ** 2).sum(-1),
    "euclidean": lambda x, y: np.sqrt(((x - y) ** 2).sum(-1)),
    "cityblock": lambda x, y: np.abs(x - y).sum(-1),
    "cosine": lambda x, y: 1 - (x * y).sum(-1) / np.maximum(norm(x), 1e-8) / np.maximum(norm(y), 1e-8),
}
FLOATS = (np.float32, np.float64)
each_metric = pytest.mark.parametrize("metric", METRICS)
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float64"])


def norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x * x).sum(-1))


def rows(dtype: type, n: int = 50, d: int = 7) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.normal(size=(n, d)).astype(dtype), generator.normal(size=(n, d)).astype(dtype)


def pair(module: ModuleType, metric: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """What a kernel knows of rows x and y [n, d]: the sums over the features and the squared norms."""
    total = np.zeros(len(x), x.dtype)
    for k in range(x.shape[1]):
        total = module.add(metric, total, x[:, k].copy(), y[:, k].copy())
    return total, (x * x).sum(-1), (y * y).sum(-1)


def gradients(module: ModuleType, metric: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the distance of each pair of rows, by both."""
    w, x_part, y_part = (part[:, None] for part in module.slope(metric, *pair(module, metric, x, y)))
    step_x, step_y = module.steps(metric, x, y)
    return w * step_x + x_part * x, w * step_y + y_part * y


@each_float
@each_metric
def test_value(module: ModuleType, metric: str, dtype: type) -> None:
    x, y = rows(dtype)
    x[1] = y[1]
    x[2], y[3] = 0, 0
    value = module.value(metric, *pair(module, metric, x, y))
    assert value.dtype == dtype
    expected = METRICS[metric](x.astype(np.float64), y.astype(np.float64))
    np.testing.assert_allclose(value, expected, rtol=10 * np.finfo(dtype).eps, atol=10 * np.finfo(dtype).eps)


@each_metric
def test_slope(module: ModuleType, metric: str) -> None:
    x, y = rows(np.float64)
    by_x, by_y = gradients(module, metric, x, y)
    distance, h = METRICS[metric], 1e-6
    for k, step in enumerate(h * np.eye(x.shape[1])):
        expected = (distance(x + step, y) - distance(x - step, y)) / (2 * h)
        np.testing.assert_allclose(by_x[:, k], expected, rtol=1e-6, atol=1e-8)
        expected = (distance(x, y + step) - distance(x, y - step)) / (2 * h)
        np.testing.assert_allclose(by_y[:, k], expected, rtol=1e-6, atol=1e-8)


@each_float
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cityblock"])
def test_slope_is_zero_at_distance_zero(module: ModuleType, metric: str, dtype: type) -> None:
    x, _ = rows(dtype)
    for gradient in gradients(module, metric, x, x):
        assert gradient.dtype == dtype and np.all(gradient == 0)


@each_float
def test_clamped_norms_are_constants(module: ModuleType, dtype: type) -> None:
    short, long = np.full((1, 1), 1e-9, dtype), np.full((1, 1), 2, dtype)
    sums = pair(module, "cosine", short, long)
    np.testing.assert_allclose(module.value("cosine", *sums), [0.9], rtol=1e-6)
    w, x_part, y_part = module.slope("cosine", *sums)
    np.testing.assert_allclose([w, y_part], [[1 / (1e-8 * 2)], [0.1 / 4]], rtol=1e-6)
    assert x_part == 0
    _, x_part, y_part = module.slope("cosine", *pair(module, "cosine", long, short))
    assert y_part == 0 and x_part > 0


@each_float
def test_close_directions(module: ModuleType, dtype: type) -> None:
    eps = np.finfo(dtype).eps
    angle = np.array([eps, 1e-5, 1e-3, 0.1, 1.0, 1.04, 1.05, 2.0, 3.1], dtype).astype(np.float64)
    x = (3 * np.stack([np.cos(angle), np.sin(angle)], -1)).astype(dtype)
    y = np.tile(np.array([2, 0], dtype), (len(angle), 1))
    sums = pair(module, "cosine", x, y)
    residual = ((x - (sums[0] / sums[2])[:, None] * y) ** 2).sum(-1)
    close, value = module.close_value(*sums, residual)
    assert close.astype(bool).tolist() == [*[True] * 6, *[False] * 3]
    np.testing.assert_allclose(value[:6], 2 * np.sin(angle[:6] / 2) ** 2, rtol=20 * eps)


@each_float
@each_metric
def test_nan_reaches_every_result(module: ModuleType, metric: str, dtype: type) -> None:
    nan, one = np.array([[np.nan]], dtype), np.array([[1]], dtype)
    for x, y in ((nan, one), (one, nan)):
        assert np.isnan(module.value(metric, *pair(module, metric, x, y)))
        assert np.isnan(gradients(module, metric, x, y)).all()


def test_arrays_are_checked(module: ModuleType) -> None:
    x, y = rows(np.float32)
    with pytest.raises(TypeError, match="all float32 or all float64"):
        module.steps("cosine", x, y.astype(np.float64))
    with pytest.raises(TypeError, match="same shape"):
        module.steps("cosine", x, y[1:])
    with pytest.raises(ValueError, match="no such metric: hamming"):
        module.steps("hamming", x, y)


def test_the_mutants_are_mistakes_in_the_sources() -> None:
    """Each has one place in them, or it would be planted nowhere."""
    sources = build.ROOT / "csrc" / "cuda"
    lost = [m.name for m in MUTANTS if (sources / m.file).read_text().count(m.old) != 1]
    assert not lost and len({m.name for m in MUTANTS}) == len(MUTANTS)
