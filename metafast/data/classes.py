"""A data set of image classes held as one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from metafast.data._arguments import integer


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ImageClasses:
    """Image classes in one tensor, which a sampler gathers episodes from.

    Args:
        images: `[N, channels, height, width]`, uint8 (gathered as float32, 0..255 scaled to 0..1) or
            floating point (gathered as it is), on any device. The images of a class are consecutive.
        class_starts: `[base]` int64 on the CPU, row of the first image of each class.
        class_sizes: `[base]` int64 on the CPU, number of images of each class.
        names: the name of each class.
        rotations: whether rotated classes count as classes of their own. There are then `4 * base` classes,
            and class `c + k * base` is class `c` rotated counter-clockwise by `90 k` degrees, made when it
            is gathered. Needs square images, and as much memory again for a copy turned once, so that
            the gather has only to reverse images.

    Raises:
        TypeError: a field of another type or dtype.
        ValueError: shapes that do not fit together, images out of range, rotations of images not square.
    """

    images: Tensor
    class_starts: Tensor
    class_sizes: Tensor
    names: tuple[str, ...]
    rotations: bool = False
    _quarter_turned: Tensor | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        if not isinstance(self.images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(self.images).__name__}")
        if self.images.dtype != torch.uint8 and not self.images.is_floating_point():
            raise TypeError(f"images must be uint8 or floating point, got {self.images.dtype}")
        if self.images.dim() != 4:
            raise ValueError(
                f"images must have shape [N, channels, height, width], got {list(self.images.shape)}"
            )
        if self.rotations and self.images.shape[2] != self.images.shape[3]:
            raise ValueError(
                f"rotations needs square images, got height {self.images.shape[2]} "
                f"and width {self.images.shape[3]}"
            )
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names:
            raise ValueError("names must hold at least one class, got none")
        for name in ("class_starts", "class_sizes"):
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
            if value.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, got {value.dtype}")
            if value.device.type != "cpu":
                raise ValueError(f"{name} must be on the CPU, got {value.device}")
            if value.shape != (len(self.names),):
                raise ValueError(
                    f"{name} must have shape [{len(self.names)}], one entry for each of names, "
                    f"got {list(value.shape)}"
                )
        ends = self.class_starts + self.class_sizes
        wrong = (self.class_starts < 0) | (self.class_sizes < 1) | (ends > len(self.images))
        if bool(wrong.any()):
            c = int(wrong.nonzero()[0])
            raise ValueError(
                f"class_starts and class_sizes must name one or more of the {len(self.images)} images, got "
                f"start {int(self.class_starts[c])} and size {int(self.class_sizes[c])} for class {c} "
                f"({self.names[c]!r})"
            )
        if self.rotations:
            object.__setattr__(
                self, "_quarter_turned", torch.cat([self.images, self.images.rot90(1, (2, 3))])
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, the rotated ones included."""
        return len(self.names) * (4 if self.rotations else 1)

    def __len__(self) -> int:
        return self.num_classes

    @property
    def device(self) -> torch.device:
        """The device that holds the images."""
        return self.images.device

    def to(self, device: torch.device | str | int) -> ImageClasses:
        """The same classes with the images on `device`; the two small tables stay on the CPU."""
        return dataclasses.replace(self, images=self.images.to(device))

    def subset(self, classes: Iterable[int] | Iterable[str]) -> ImageClasses:
        """Some of the classes, in the order given, by number or by name, with a copy of their images.

        Numbers count the unrotated classes, `0..len(names)-1`; rotations come along with their class.

        Raises:
            TypeError: an entry that is neither an integer nor a string.
            ValueError: a number out of range, a name that is not there, a class given twice, none at all.
        """
        if isinstance(classes, str):
            raise TypeError(f"classes must be a sequence of numbers or names, got the string {classes!r}")
        position = {name: c for c, name in enumerate(self.names)}
        chosen: list[int] = []
        for entry in classes:
            if isinstance(entry, str):
                if entry not in position:
                    raise ValueError(f"classes must hold names of this data set, got {entry!r}")
                chosen.append(position[entry])
            else:
                chosen.append(integer("each of classes", entry, 0, len(self.names) - 1))
        if not chosen:
            raise ValueError("classes must hold at least one class, got none")
        if len(set(chosen)) != len(chosen):
            twice = next(c for i, c in enumerate(chosen) if c in chosen[:i])
            raise ValueError(f"classes must be distinct, got {self.names[twice]!r} twice")
        starts, sizes = self.class_starts[chosen], self.class_sizes[chosen]
        rows = torch.cat(
            [torch.arange(a, a + n) for a, n in zip(starts.tolist(), sizes.tolist(), strict=True)]
        )
        return ImageClasses(
            self.images.index_select(0, rows.to(self.device)),
            sizes.cumsum(0) - sizes,
            sizes,
            tuple(self.names[c] for c in chosen),
            self.rotations,
        )

    def gather(self, rows: Tensor, quarter_turns: Tensor | None = None) -> Tensor:
        """Images by row, each rotated counter-clockwise by its number of quarter turns.

        Args:
            rows: `[R]` int64 on the CPU, rows of `images`.
            quarter_turns: `[R]` int64 0..3 on the CPU for classes with rotations, or None for no rotation.

        Returns:
            `[R, channels, height, width]` on the device of the images, float32 in 0..1 if they are uint8,
            else of their dtype.
        """
        if quarter_turns is None:
            found = self.images.index_select(0, rows.to(self.device))
        else:
            if self._quarter_turned is None:
                raise ValueError("quarter_turns must be None for classes without rotations")
            # Each image upright or by one quarter turn, then all of them reversed as well, then the choice.
            source = rows + len(self.images) * (quarter_turns % 2)
            choice = torch.arange(len(rows)) + len(rows) * (quarter_turns // 2)
            indices = torch.stack([source, choice]).to(self.device)
            found = self._quarter_turned.index_select(0, indices[0])
            found = torch.cat([found, found.flip((2, 3))]).index_select(0, indices[1])
        return _unit_interval(found) if found.dtype == torch.uint8 else found

    def __repr__(self) -> str:
        return (
            f"ImageClasses(classes={self.num_classes}, rotations={self.rotations}, "
            f"images={list(self.images.shape)}, dtype={self.images.dtype}, device='{self.device}')"
        )


def _unit_interval(images: Tensor) -> Tensor:
    """uint8 images as float32 in 0..1."""
    scaled = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    # On a CPU both passes over a block of images find it in the cache.
    block = 256 if images.device.type == "cpu" else max(1, len(images))
    for source, target in zip(images.split(block), scaled.split(block), strict=True):
        target.copy_(source).div_(255)
    return scaled
