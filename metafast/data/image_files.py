"""Image classes that stay in their files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from metafast.data._decode import Box, Decoder, quiet
from metafast.data.classes import Classes, check_tables, unit_interval


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ImageFiles(Classes):
    """Image classes whose images are read from their files whenever a sampler asks, for what memory cannot hold.

    :func:`image_folder` with `lazy=True` makes it. Reading is slow, so let worker processes do it
    (:class:`EpisodeLoader`, :class:`EpisodeStream`).

    Args:
        files: the path of each image, those of a class consecutive.
        class_starts: `[base]` int64 on the CPU, the first file of each class.
        class_sizes: `[base]` int64 on the CPU, number of files of each class.
        names: the name of each class.
        rotations: whether rotated classes count as classes of their own, as in :class:`ImageClasses`.
        size: height and width of the images.
        channels: 1 for grey, 3 for red, green and blue.
        fit: "crop" takes the largest centred square of an image, "stretch" all of it.
        boxes: for each image the x, y, width and height of the part to take, or None for all of it.
        target: the device to give the images on.

    Raises:
        TypeError: a field of another type or dtype.
        ValueError: tables that do not fit together, a number out of range; on gathering, a file that cannot
            be read, which is named.
    """

    files: tuple[str, ...]
    class_starts: Tensor
    class_sizes: Tensor
    names: tuple[str, ...]
    rotations: bool = False
    size: int = 84
    channels: int = 3
    fit: str = "crop"
    boxes: tuple[Box, ...] | None = None
    target: torch.device | str | int = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(self.files))
        if self.boxes is not None and len(self.boxes) != len(self.files):
            raise ValueError(
                f"boxes must hold one for each of {len(self.files)} files, got {len(self.boxes)}"
            )
        Decoder(self.size, self.channels, self.fit)
        check_tables(self, "files", len(self.files))

    @property
    def row_shape(self) -> torch.Size:
        return torch.Size((self.channels, self.size, self.size))

    @property
    def row_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        """The device that images are given on."""
        return torch.device(self.target)

    def to(self, device: torch.device | str | int) -> ImageFiles:
        """The same classes, whose images are copied to `device` when they have been read."""
        return dataclasses.replace(self, target=device)

    def _keep(self, rows: Tensor, starts: Tensor, sizes: Tensor, names: tuple[str, ...]) -> ImageFiles:
        numbers = rows.tolist()
        boxes = None if self.boxes is None else tuple(self.boxes[number] for number in numbers)
        files = tuple(self.files[number] for number in numbers)
        return dataclasses.replace(
            self, files=files, class_starts=starts, class_sizes=sizes, names=names, boxes=boxes
        )

    def gather(self, rows: Tensor, quarter_turns: Tensor | None = None) -> Tensor:
        """Read images, each rotated counter-clockwise by its number of quarter turns.

        Args:
            rows: `[R]` int64 on the CPU, numbers of `files`.
            quarter_turns: `[R]` int64 0..3 on the CPU for classes with rotations, or None for no rotation.

        Returns:
            `[R, channels, size, size]` float32 in 0..1.
        """
        if quarter_turns is not None and not self.rotations:
            raise ValueError("quarter_turns must be None for classes without rotations")
        decoder = Decoder(self.size, self.channels, self.fit)
        pixels = torch.empty(len(rows), *self.row_shape, dtype=torch.uint8)
        with quiet():
            for image, number in zip(pixels, rows.tolist(), strict=True):
                box = None if self.boxes is None else self.boxes[number]
                try:
                    image.copy_(torch.from_numpy(decoder.file(self.files[number], box)))
                except Exception as error:  # Decoders of damaged data raise whatever they stumble over.
                    raise ValueError(f"{Path(self.files[number])} cannot be read: {error}") from error
        if quarter_turns is not None:
            for turns in (1, 2, 3):
                turned = quarter_turns == turns
                pixels[turned] = pixels[turned].rot90(turns, (2, 3))
        return unit_interval(pixels.to(self.device))

    def __repr__(self) -> str:
        return (
            f"ImageFiles(classes={self.num_classes}, rotations={self.rotations}, files={len(self.files)}, "
            f"channels={self.channels}, size={self.size}, fit={self.fit!r}, device='{self.device}')"
        )
