"""A procedural set of handwritten characters with unlimited classes and no download."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from metafast.data._arguments import integer
from metafast.data.classes import ImageClasses

_POINTS = 36
# Columns of a stroke: start x, start y, heading, length, turn (arc), wave (S shape), corner, corner position.
_FIELDS = 8
_STROKE_JITTER = np.array([0.045, 0.045, 0.1, 0.08, 0.2, 0.15, 0.15, 0.05])


def glyphs(
    classes: int,
    per_class: int = 20,
    size: int = 28,
    seed: int = 0,
    first_class: int = 0,
    rotations: bool = False,
) -> ImageClasses:
    """Images of invented characters, ink 1 and paper 0: a stand-in for Omniglot of any size.

    A class is a skeleton of two to four pen strokes (lines, arcs, loops, waves, corners), each of which
    starts anywhere or on an earlier stroke. A stroke is the path of a pen whose heading at `u` in 0..1 is
    `heading + turn (u - 1/2) + wave sin(2 pi u) + corner [u > position]`. A drawing jitters every number of
    the strokes, then rotates, shears, scales and shifts the whole, and has its own pen width. It is
    rendered as the distance `d` to the strokes, `d^2 = -2 s^2 log sum_k w_k exp(-|p - q_k|^2 / (2 s^2))`
    with points `q_k` along the strokes, ink `clamp((width / 2 - d) + 1/2, 0, 1)` in pixels.

    Class number `c` of a seed has the same images whatever `classes`, `first_class` and, as far as they
    go, `per_class` are: `glyphs(1000)` and `glyphs(200, first_class=1000)` are disjoint and reproducible.

    Args:
        classes: number of classes.
        per_class: drawings of each class.
        size: height and width of the images, at least 8.
        seed: integer from 0 to 2**64 - 1.
        first_class: number of the first class.
        rotations: whether the rotations by 90, 180 and 270 degrees are classes of their own.

    Returns:
        Images `[classes * per_class, 1, size, size]` uint8 (255 is ink), classes named like `glyph00042`.

    Raises:
        TypeError: an argument that is no integer.
        ValueError: an integer out of range.
    """
    classes = integer("classes", classes, minimum=1)
    per_class = integer("per_class", per_class, minimum=1)
    size = integer("size", size, minimum=8)
    seed = integer("seed", seed, 0, 2**64 - 1)
    first_class = integer("first_class", first_class, 0, 2**64 - classes)
    numbers = range(first_class, first_class + classes)
    images = np.empty((classes, per_class, size, size), dtype=np.uint8)
    for image, number in zip(images, numbers, strict=True):
        random = np.random.Generator(np.random.Philox(key=np.array([seed, number], dtype=np.uint64)))
        points, width = _draw(_skeleton(random), per_class, random)
        image[:] = _render(points, width, size)
    return ImageClasses(
        torch.from_numpy(images.reshape(-1, 1, size, size)),
        torch.arange(classes) * per_class,
        torch.full((classes,), per_class),
        tuple(f"glyph{number:05d}" for number in numbers),
        rotations,
    )


def _path(strokes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points along strokes `[..., 8]`, `[..., points, 2]`."""
    x, y, heading, length, turn, wave, corner, position = np.moveaxis(strokes[..., None], -2, 0)
    u = (np.arange(_POINTS) + 0.5) / _POINTS
    angle = heading + turn * (u - 0.5) + wave * np.sin(2 * np.pi * u) + corner * (u > position)
    step = length / _POINTS
    return np.stack(
        [
            x + np.cumsum(step * np.cos(angle), -1),
            y + np.cumsum(step * np.sin(angle), -1),
        ],
        -1,
    )


def _skeleton(random: np.random.Generator) -> NDArray[np.float64]:
    """The strokes `[strokes, 8]` of a class, its bounding box centred with longer side 1.5."""
    count = int(random.choice([2, 3, 4], p=[0.3, 0.4, 0.3]))
    strokes = np.zeros((count, _FIELDS))
    for i, stroke in enumerate(strokes):
        kind = random.choice(5, p=[0.34, 0.28, 0.14, 0.10, 0.14])
        side = random.choice([-1.0, 1.0])
        start = random.uniform(-0.8, 0.8, 2)
        if i and random.random() < 0.85:
            start = _path(strokes[random.integers(i)])[random.choice([0, _POINTS // 2, _POINTS - 1])]
        length = random.uniform(0.7, 1.6)
        turn = wave = corner = 0.0
        if kind == 1:
            turn = side * random.uniform(0.8, 3.2)
        elif kind == 2:
            turn, length = side * random.uniform(4.5, 6.3), random.uniform(1.5, 2.6)
        elif kind == 3:
            wave, length = side * random.uniform(0.8, 1.5), random.uniform(1.2, 2.0)
        elif kind == 4:
            corner, length = side * random.uniform(1.2, 2.5), random.uniform(1.2, 2.2)
        # A pen favours the four directions of the page.
        heading = random.choice([0.0, 0.5, 1.0, -0.5]) * np.pi + random.normal(0.0, 0.35)
        stroke[:] = (
            *start,
            heading,
            length,
            turn,
            wave,
            corner,
            random.uniform(0.35, 0.65),
        )
    points = _path(strokes).reshape(-1, 2)
    low, high = points.min(0), points.max(0)
    scale = 1.5 / max((high - low).max(), 1e-6)
    strokes[:, :2] = (strokes[:, :2] - (low + high) / 2) * scale
    strokes[:, 3] *= scale
    return strokes


def _draw(
    strokes: NDArray[np.float64], count: int, random: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points `[count, strokes, points, 2]` and pen widths `[count]` of drawings, the page being -1..1."""
    # One row of random numbers for each drawing, so that a drawing does not depend on how many follow it.
    noise = random.standard_normal((count, strokes.size + 7)).clip(-2.5, 2.5)
    jittered = strokes + noise[:, 7:].reshape(count, *strokes.shape) * _STROKE_JITTER
    rotation, shear, scale_x, scale_y, shift_x, shift_y, width = noise[:, :7].T
    angle, shear = 0.14 * rotation, 0.14 * shear
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = np.exp(0.12 * scale_x), np.exp(0.12 * scale_y)
    affine = np.stack([a * cos, b * (shear * cos - sin), a * sin, b * (shear * sin + cos)], -1)
    shift = 0.09 * np.stack([shift_x, shift_y], -1)
    points = _path(jittered) @ affine.reshape(-1, 1, 2, 2).swapaxes(-1, -2) + shift[:, None, None]
    return points, 0.115 * np.exp(0.18 * width)


def _render(points: NDArray[np.float64], width: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Ink of drawings, `[count, size, size]` uint8."""
    spread = 0.055
    centres = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    step = np.linalg.norm(points[..., 1:, :] - points[..., :-1, :], axis=-1)
    weight = np.concatenate([step, step[..., -1:]], -1).reshape(len(points), -1, 1)
    weight = (weight / (spread * np.sqrt(2 * np.pi))).astype(np.float32)
    flat = points.reshape(len(points), -1, 2, 1).astype(np.float32)
    near = np.exp((flat - centres) ** 2 / np.float32(-2 * spread**2))
    total = (near[:, :, 1] * weight).swapaxes(1, 2) @ near[:, :, 0]
    distance = np.sqrt(-2 * spread**2 * np.log(total.clip(1e-30, 1.0)))
    pixels = size / 2
    ink = (pixels * (width[:, None, None] / 2 - distance) + 0.5).clip(0, 1)
    rendered: NDArray[np.uint8] = np.round(255 * ink).astype(np.uint8)
    return rendered
