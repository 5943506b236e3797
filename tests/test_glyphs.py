"""The procedural characters: reproducible, bounded, well-formed and about as hard as Omniglot."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from metafast.data import EpisodeSampler, glyphs


def test_shapes_names_and_dtype() -> None:
    data = glyphs(7, per_class=3, size=20, first_class=41)
    assert data.images.shape == (21, 1, 20, 20) and data.images.dtype == torch.uint8
    assert data.names == tuple(f"glyph{c:05d}" for c in range(41, 48))
    assert data.class_starts.tolist() == [0, 3, 6, 9, 12, 15, 18] and data.class_sizes.tolist() == [3] * 7
    assert (data.num_classes, data.rotations) == (7, False)


def test_rotations_on_demand() -> None:
    assert glyphs(2, rotations=True).num_classes == 8


def test_a_class_is_the_same_whatever_is_asked_with_it() -> None:
    data = glyphs(30)
    assert torch.equal(glyphs(30).images, data.images)
    assert torch.equal(glyphs(5, first_class=20).images, data.images[20 * 20 : 25 * 20])
    assert torch.equal(glyphs(1, first_class=29).images, data.images[29 * 20 :])


def test_more_drawings_leave_the_first_ones_alone() -> None:
    few, many = glyphs(5, per_class=4).images, glyphs(5, per_class=25).images
    difference = few.view(5, 4, -1).int() - many.view(5, 25, -1)[:, :4].int()
    assert difference.abs().max() <= 1


def test_every_drawing_differs() -> None:
    flat = torch.cat([glyphs(100, seed=seed).images.flatten(1) for seed in (0, 1)])
    assert len(flat.unique(dim=0)) == len(flat)


@pytest.mark.parametrize("size", [8, 28, 64])
def test_ink_is_thin_and_on_the_page(size: int) -> None:
    ink = glyphs(60, size=size).images.float() / 255
    share = ink.mean((1, 2, 3))
    assert share.min() > 0.01 and share.max() < 0.4
    assert 0.06 < share.mean() < 0.14
    assert ink.amax((1, 2, 3)).mean() > (0.6 if size == 8 else 0.98)
    border = torch.cat([ink[..., 0, :], ink[..., -1, :], ink[..., :, 0], ink[..., :, -1]], -1)
    assert border.mean() < 0.05


def test_edges_are_smooth() -> None:
    ink = glyphs(20).images
    grey = ((ink > 0) & (ink < 255)).float().mean() / (ink > 0).float().mean()
    assert 0.3 < grey < 0.9


def test_sizes_show_the_same_drawing() -> None:
    large = glyphs(20, size=56).images.float() / 255
    small = glyphs(20, size=28).images.float() / 255
    reduced = torch.nn.functional.avg_pool2d(large, 2)
    pair = torch.stack([reduced.flatten(), small.flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.97


def test_is_about_as_hard_as_omniglot() -> None:
    episodes = EpisodeSampler(glyphs(400), 5, 1, 5, tasks=500)(0)
    nearest = torch.cdist(episodes.query_x.flatten(2), episodes.support_x.flatten(2)).argmin(2)
    accuracy = (nearest == episodes.query_y).float().mean()
    assert 0.45 < accuracy < 0.60, "nearest neighbour of pixels, 5-way 1-shot"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"classes": 0}, ValueError, "classes must be at least 1, got 0"),
        (
            {"classes": 2.0},
            TypeError,
            "classes must be an integer, got 2.0 of type float",
        ),
        ({"per_class": 0}, ValueError, "per_class must be at least 1, got 0"),
        ({"size": 7}, ValueError, "size must be at least 8, got 7"),
        ({"seed": -1}, ValueError, f"seed must be between 0 and {2**64 - 1}, got -1"),
        (
            {"first_class": -1},
            ValueError,
            f"first_class must be between 0 and {2**64 - 1}, got -1",
        ),
    ],
    ids=[
        "no-classes",
        "float-classes",
        "no-drawings",
        "small",
        "negative-seed",
        "negative-first-class",
    ],
)
def test_refuses(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        glyphs(**{"classes": 1, **changed})
