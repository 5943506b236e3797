"""Episodes and check: what they accept, give back and say when something is wrong."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

from metafast.data import Episodes, check


def fields(**changed: Any) -> dict[str, Any]:
    """Fields of two 3-way tasks with 3 support and 4 query rows of two numbers."""
    right: dict[str, Any] = {
        "support_x": torch.arange(12.0).view(2, 3, 2),
        "support_y": torch.tensor([[0, 1, 2], [2, 1, 0]]),
        "query_x": torch.arange(16.0).view(2, 4, 2),
        "query_y": torch.tensor([[0, 1, 2, 0], [2, 2, 2, 2]]),
        "ways": 3,
    }
    return {**right, **changed}


def test_properties() -> None:
    episodes = Episodes(**fields())
    assert (episodes.tasks, len(episodes), episodes.ways) == (2, 2, 3)
    assert episodes.device == torch.device("cpu")
    check(episodes)


def test_repr_names_shapes() -> None:
    assert repr(Episodes(**fields())) == (
        "Episodes(tasks=2, ways=3, support_x=[2, 3, 2], query_x=[2, 4, 2], dtype=torch.float32, device='cpu')"
    )


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Episodes(**fields()).ways = 4  # type: ignore[misc]


def test_to_changes_dtype_of_inputs_only() -> None:
    episodes = Episodes(**fields()).to(dtype=torch.float64)
    assert episodes.support_x.dtype == episodes.query_x.dtype == torch.float64
    assert episodes.support_y.dtype == episodes.query_y.dtype == torch.int64
    assert torch.equal(episodes.query_x, fields()["query_x"].double())


def test_to_moves_every_tensor() -> None:
    episodes = Episodes(**fields()).to("meta")
    assert episodes.device.type == "meta"
    assert {getattr(episodes, f).device.type for f in ("support_y", "query_x", "query_y")} == {"meta"}
    assert episodes.ways == 3


def test_to_without_arguments_copies_nothing() -> None:
    episodes = Episodes(**fields())
    same = episodes.to()
    assert same.support_x is episodes.support_x and same.query_y is episodes.query_y


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a CUDA device")
def test_pinned_episodes_reach_a_cuda_device() -> None:
    pinned = Episodes(**fields()).pin_memory()
    assert all(getattr(pinned, f).is_pinned() for f in ("support_x", "support_y", "query_x", "query_y"))
    moved = pinned.to("cuda")
    assert moved.device.type == "cuda"
    assert torch.equal(moved.query_x.cpu(), fields()["query_x"])


def test_some_of_the_tasks() -> None:
    episodes = Episodes(**fields())
    assert episodes[1:].tasks == 1 and torch.equal(episodes[1:].query_y, episodes.query_y[1:])
    assert torch.equal(episodes[-1].support_x, episodes.support_x[1:])
    assert [one.support_y.tolist() for one in episodes] == [[[0, 1, 2]], [[2, 1, 0]]]
    assert episodes[:0].tasks == 0
    with pytest.raises(IndexError, match=r"^tasks must be below 2, got 2$"):
        episodes[2]
    with pytest.raises(ValueError, match=r"^tasks must be at least -2, got -3$"):
        episodes[-3]


def targets(**changed: Any) -> dict[str, Any]:
    """Fields of two regression tasks of one input and two outputs."""
    right = fields(support_y=torch.zeros(2, 3, 2), query_y=torch.ones(2, 4, 2), ways=0)
    return {**right, **changed}


def test_regression() -> None:
    episodes = Episodes(**targets())
    assert episodes.regression and not Episodes(**fields()).regression
    check(episodes)
    assert episodes.to(dtype=torch.float64).query_y.dtype == torch.float64
    assert episodes[0].query_y.shape == (1, 4, 2)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        pytest.param(
            {"support_y": torch.zeros(2, 3, dtype=torch.int64)},
            TypeError,
            "support_y must be floating point for 0 ways (regression), got torch.int64",
            id="labels",
        ),
        pytest.param(
            {"support_y": torch.zeros(2, 3)},
            ValueError,
            "support_y must have shape [2, 3, outputs], the targets of each row of support_x, got [2, 3]",
            id="no-outputs",
        ),
        pytest.param(
            {"query_y": torch.zeros(2, 3, 2)},
            ValueError,
            "query_y must have shape [2, 4, outputs], the targets of each row of query_x, got [2, 3, 2]",
            id="rows",
        ),
        pytest.param(
            {"query_y": torch.zeros(2, 4, 1)},
            ValueError,
            "query_y must have the trailing shape of support_y, [2], got [1]",
            id="outputs",
        ),
        pytest.param(
            {"query_y": torch.zeros(2, 4, 2, dtype=torch.float64)},
            TypeError,
            "query_y must have the dtype of support_y, torch.float32, got torch.float64",
            id="dtype",
        ),
    ],
)
def test_regression_refuses(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Episodes(**targets(**changed))


def test_check_refuses_targets_that_are_not_finite() -> None:
    query_y = torch.ones(2, 4, 2)
    query_y[1, 2, 0] = torch.inf
    with pytest.raises(ValueError, match=r"^query_y must be finite, got \[inf, 1\.0\] at task 1, row 2$"):
        check(Episodes(**targets(query_y=query_y)))


def test_numpy_integer_ways() -> None:
    assert Episodes(**fields(ways=np.int64(3))).ways == 3


def test_no_query_rows() -> None:
    check(
        Episodes(
            **fields(
                query_x=torch.zeros(2, 0, 2),
                query_y=torch.zeros(2, 0, dtype=torch.int64),
            )
        )
    )


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        pytest.param(
            {"support_x": [1.0]},
            TypeError,
            "support_x must be a tensor, got list",
            id="list",
        ),
        pytest.param(
            {"query_y": None},
            TypeError,
            "query_y must be a tensor, got NoneType",
            id="None",
        ),
        pytest.param(
            {"support_x": torch.zeros(2)},
            ValueError,
            "support_x must have shape [tasks, rows, ...], got [2]",
            id="support-rank",
        ),
        pytest.param(
            {"query_x": torch.zeros(2)},
            ValueError,
            "query_x must have shape [tasks, rows, ...], got [2]",
            id="query-rank",
        ),
        pytest.param(
            {"support_y": torch.zeros(2, 3, dtype=torch.int32)},
            TypeError,
            "support_y must be int64, got torch.int32",
            id="int32-labels",
        ),
        pytest.param(
            {"query_y": torch.zeros(2, 4)},
            TypeError,
            "query_y must be int64, got torch.float32",
            id="float-labels",
        ),
        pytest.param(
            {"support_y": torch.zeros(2, 4, dtype=torch.int64)},
            ValueError,
            "support_y must have shape [2, 3], one label for each row of support_x, got [2, 4]",
            id="support-rows",
        ),
        pytest.param(
            {"query_y": torch.zeros(8, dtype=torch.int64)},
            ValueError,
            "query_y must have shape [2, 4], one label for each row of query_x, got [8]",
            id="query-labels-rank",
        ),
        pytest.param(
            {
                "query_x": torch.zeros(3, 4, 2),
                "query_y": torch.zeros(3, 4, dtype=torch.int64),
            },
            ValueError,
            "query_x must have as many tasks as support_x, 2, got 3",
            id="tasks",
        ),
        pytest.param(
            {"query_x": torch.zeros(2, 4, 5)},
            ValueError,
            "query_x must have the trailing shape of support_x, [2], got [5]",
            id="trailing-shape",
        ),
        pytest.param(
            {"query_x": torch.zeros(2, 4, 2, dtype=torch.float64)},
            TypeError,
            "query_x must have the dtype of support_x, torch.float32, got torch.float64",
            id="input-dtypes",
        ),
        pytest.param(
            {"query_y": torch.zeros(2, 4, dtype=torch.int64, device="meta")},
            ValueError,
            "query_y must be on the device of support_x, cpu, got meta",
            id="device",
        ),
        pytest.param({"ways": -1}, ValueError, "ways must be at least 0, got -1", id="negative-ways"),
        pytest.param(
            {"ways": 2.0},
            TypeError,
            "ways must be an integer, got 2.0 of type float",
            id="float-ways",
        ),
        pytest.param(
            {"ways": True},
            TypeError,
            "ways must be an integer, got True of type bool",
            id="bool-ways",
        ),
    ],
)
def test_construction_refuses(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Episodes(**fields(**changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(
            {"support_y": torch.tensor([[0, 1, 2], [2, 1, 3]])},
            "support_y must hold labels in 0..2, got 3 at task 1, row 2",
            id="support-too-large",
        ),
        pytest.param(
            {"query_y": torch.tensor([[0, -1, 2, 0], [0, 0, 0, 0]])},
            "query_y must hold labels in 0..2, got -1 at task 0, row 1",
            id="query-negative",
        ),
        pytest.param(
            {"support_y": torch.tensor([[0, 1, 2], [2, 0, 0]])},
            "support_y must hold every class of 0..2 in each task, got no row of class 1 in task 1",
            id="class-without-support",
        ),
        pytest.param(
            {"ways": 4},
            "support_y must hold every class of 0..3 in each task, got no row of class 3 in task 0",
            id="more-ways-than-labels",
        ),
    ],
)
def test_check_refuses(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(Episodes(**fields(**changed)))


def test_check_refuses_what_is_no_episodes() -> None:
    with pytest.raises(TypeError, match=r"^episodes must be metafast\.Episodes, got dict$"):
        check({})  # type: ignore[arg-type]
