"""Data sets of named classes: what a sampler draws from."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from metafast.data._arguments import integer
from metafast.data._splits import class_split

AnyClasses = TypeVar("AnyClasses", bound="Classes")


class Classes(abc.ABC):
    """Rows in named classes, the rows of a class consecutive: the base of the data sets.

    Attributes:
        class_starts: `[base]` int64 on the CPU, the first row of each class.
        class_sizes: `[base]` int64 on the CPU, the number of rows of each class.
        names: the name of each class.
        rotations: whether rotated classes count as classes of their own. There are then `4 * base` classes,
            and class `c + k * base` is class `c` rotated counter-clockwise by `90 k` degrees.
    """

    class_starts: Tensor
    class_sizes: Tensor
    names: tuple[str, ...]
    rotations: bool = False

    @property
    @abc.abstractmethod
    def row_shape(self) -> torch.Size:
        """Shape of one row as `gather` gives it."""

    @property
    @abc.abstractmethod
    def row_dtype(self) -> torch.dtype:
        """Type of the rows as `gather` gives them."""

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """The device on which `gather` gives rows."""

    @abc.abstractmethod
    def gather(self, rows: Tensor, quarter_turns: Tensor | None = None) -> Tensor:
        """Rows by number `[R]` int64 on the CPU, each rotated by its quarter turns `[R]`: `[R, *row_shape]`."""

    @abc.abstractmethod
    def to(self: AnyClasses, device: torch.device | str | int) -> AnyClasses:
        """The same classes with their rows on `device`; the two small tables stay on the CPU."""

    @abc.abstractmethod
    def _keep(
        self: AnyClasses, rows: Tensor, starts: Tensor, sizes: Tensor, names: tuple[str, ...]
    ) -> AnyClasses:
        """Only the rows numbered `rows`, with new tables."""

    @property
    def num_classes(self) -> int:
        """Number of classes, the rotated ones included."""
        return len(self.names) * (4 if self.rotations else 1)

    def __len__(self) -> int:
        return self.num_classes

    def subset(self: AnyClasses, classes: Iterable[int] | Iterable[str]) -> AnyClasses:
        """Some of the classes, in the order given, by number or by name, with a copy of their rows.

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
        return self._keep(rows, sizes.cumsum(0) - sizes, sizes, tuple(self.names[c] for c in chosen))

    def at_least(self: AnyClasses, count: int) -> AnyClasses:
        """The classes with `count` or more rows.

        Raises:
            ValueError: no class has as many.
        """
        count = integer("count", count, minimum=1)
        enough = (self.class_sizes >= count).nonzero()[:, 0].tolist()
        if not enough:
            raise ValueError(
                f"count must be at most the {int(self.class_sizes.max())} rows of the largest class, got {count}"
            )
        return self.subset(enough)

    def split(
        self: AnyClasses, split: str, fractions: Sequence[float] = (0.64, 0.16, 0.2), seed: int = 0
    ) -> AnyClasses:
        """The classes of one part of a random split by class, for data that come without a published one.

        The classes, ordered by the SHA-256 of seed and name, are cut in proportion to `fractions`: the same
        parts on every machine, whatever the order of the classes.

        Args:
            split: "train", "val", "test", or "trainval" for the first two together.
            fractions: shares of train, val and test; 64, 16 and 20 % as in mini-ImageNet.
            seed: integer from 0 to 2**64 - 1.

        Raises:
            ValueError: an unknown split, fractions that are not three positive numbers, too few classes.
        """
        return self.subset(class_split(self.names, split, fractions, seed))


def check_tables(classes: Classes, field: str, rows: int) -> None:
    """Check the names and the two tables against the number of rows, and make `names` a tuple.

    Raises:
        TypeError: a table of another type or dtype.
        ValueError: shapes that do not fit together, rows that are not there.
    """
    object.__setattr__(classes, "names", tuple(classes.names))
    if not classes.names:
        raise ValueError("names must hold at least one class, got none")
    for name in ("class_starts", "class_sizes"):
        value = getattr(classes, name)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {value.dtype}")
        if value.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {value.device}")
        if value.shape != (len(classes.names),):
            raise ValueError(
                f"{name} must have shape [{len(classes.names)}], one entry for each of names, "
                f"got {list(value.shape)}"
            )
    wrong = (
        (classes.class_starts < 0)
        | (classes.class_sizes < 1)
        | (classes.class_starts + classes.class_sizes > rows)
    )
    if bool(wrong.any()):
        c = int(wrong.nonzero()[0])
        raise ValueError(
            f"class_starts and class_sizes must name one or more of the {rows} {field}, got "
            f"start {int(classes.class_starts[c])} and size {int(classes.class_sizes[c])} for class {c} "
            f"({classes.names[c]!r})"
        )


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ImageClasses(Classes):
    """Image classes in one tensor.

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
        check_tables(self, "images", len(self.images))
        if self.rotations:
            object.__setattr__(
                self, "_quarter_turned", torch.cat([self.images, self.images.rot90(1, (2, 3))])
            )

    @property
    def row_shape(self) -> torch.Size:
        return self.images.shape[1:]

    @property
    def row_dtype(self) -> torch.dtype:
        return torch.float32 if self.images.dtype == torch.uint8 else self.images.dtype

    @property
    def device(self) -> torch.device:
        """The device that holds the images."""
        return self.images.device

    def to(self, device: torch.device | str | int) -> ImageClasses:
        """The same classes with the images on `device`; the two small tables stay on the CPU."""
        return dataclasses.replace(self, images=self.images.to(device))

    def _keep(self, rows: Tensor, starts: Tensor, sizes: Tensor, names: tuple[str, ...]) -> ImageClasses:
        images = self.images.index_select(0, rows.to(self.device))
        return ImageClasses(images, starts, sizes, names, self.rotations)

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
        return unit_interval(found) if found.dtype == torch.uint8 else found

    def __repr__(self) -> str:
        return (
            f"ImageClasses(classes={self.num_classes}, rotations={self.rotations}, "
            f"images={list(self.images.shape)}, dtype={self.images.dtype}, device='{self.device}')"
        )


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class FeatureClasses(Classes):
    """Classes of feature vectors, token numbers or other rows in one tensor, gathered as they are.

    Args:
        features: `[N, ...]` of any dtype, on any device. The rows of a class are consecutive.
        class_starts: `[base]` int64 on the CPU, the first row of each class.
        class_sizes: `[base]` int64 on the CPU, the number of rows of each class.
        names: the name of each class.

    Raises:
        TypeError: a field of another type or dtype.
        ValueError: shapes that do not fit together, rows out of range.
    """

    features: Tensor
    class_starts: Tensor
    class_sizes: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.features, Tensor):
            raise TypeError(f"features must be a tensor, got {type(self.features).__name__}")
        if self.features.dim() < 2:
            raise ValueError(f"features must have shape [N, ...], got {list(self.features.shape)}")
        check_tables(self, "rows", len(self.features))

    @property
    def row_shape(self) -> torch.Size:
        return self.features.shape[1:]

    @property
    def row_dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        """The device that holds the features."""
        return self.features.device

    def to(self, device: torch.device | str | int) -> FeatureClasses:
        """The same classes with the features on `device`; the two small tables stay on the CPU."""
        return dataclasses.replace(self, features=self.features.to(device))

    def _keep(self, rows: Tensor, starts: Tensor, sizes: Tensor, names: tuple[str, ...]) -> FeatureClasses:
        return FeatureClasses(self.features.index_select(0, rows.to(self.device)), starts, sizes, names)

    def gather(self, rows: Tensor, quarter_turns: Tensor | None = None) -> Tensor:
        """Rows by number.

        Args:
            rows: `[R]` int64 on the CPU.
            quarter_turns: None; features cannot be rotated.

        Returns:
            `[R, ...]` on the device of the features.
        """
        if quarter_turns is not None:
            raise ValueError("quarter_turns must be None for classes without rotations")
        return self.features.index_select(0, rows.to(self.device))

    def __repr__(self) -> str:
        return (
            f"FeatureClasses(classes={self.num_classes}, features={list(self.features.shape)}, "
            f"dtype={self.features.dtype}, device='{self.device}')"
        )


def unit_interval(images: Tensor) -> Tensor:
    """uint8 images as float32 in 0..1."""
    scaled = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    # On a CPU both passes over a block of images find it in the cache.
    block = 256 if images.device.type == "cpu" else max(1, len(images))
    for source, target in zip(images.split(block), scaled.split(block), strict=True):
        target.copy_(source).div_(255)
    return scaled
