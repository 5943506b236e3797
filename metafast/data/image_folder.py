"""Image classes from folders of image files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from metafast.data._arguments import integer, one_of
from metafast.data._cache import Decoded, cached, key_of
from metafast.data._decode import SUFFIXES, Box, Decoder, decode_files, need_pillow
from metafast.data._splits import SPLITS, class_split
from metafast.data.classes import ImageClasses
from metafast.data.image_files import ImageFiles

#: The folder for decoded images in the folder of a data set.
CACHE = ".metafast-cache"
_SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
#: To be counted up when the same files give other pixels.
_FORMAT = 1


def image_folder(
    root: str | os.PathLike[str],
    size: int = 84,
    split: str | None = None,
    *,
    channels: int = 3,
    fit: str = "crop",
    depth: int | None = None,
    fractions: Sequence[float] = (0.64, 0.16, 0.2),
    split_seed: int = 0,
    rotations: bool = False,
    lazy: bool = False,
    skip_corrupt: bool = False,
    cache: bool | str | os.PathLike[str] = True,
) -> ImageClasses | ImageFiles:
    """Image classes from a folder with a folder for each class.

    Files count as images by their suffix (jpg, png, bmp, gif, webp, tiff, ppm ...); other files, and names
    that begin with a dot, are passed over. Folders may be nested: every folder that holds images itself is a
    class, named by its path below `root`, such as `dog` or `Greek/alpha`. With `depth=1` each folder in
    `root` is a class with all images below it, as in torchvision's ImageFolder.

    The images are decoded once, in threads, and kept as one file of bytes in `cache`. It is found again by
    the names, sizes and times of all files and the arguments, so a file that was added or changed is seen. A
    kill at any moment leaves the cache complete or absent; of several processes one decodes and the others
    wait. The folder may be removed at any time.

    Args:
        root: folder with the class folders.
        size: height and width of the images.
        split: None for all classes; or "train", "val", "test", or "trainval" for the first two together:
            those in the folder of that name if `root` has the folders train, val and test, else a part of a
            random split by class (see :meth:`Classes.split`).
        channels: 3 for red, green and blue, 1 for grey.
        fit: "crop" takes the largest centred square of an image, "stretch" squeezes all of it into one.
        depth: folder levels that make a class; None for all.
        fractions: shares of train, val and test in a random split.
        split_seed: seed of a random split.
        rotations: whether rotations by 90, 180 and 270 degrees are classes of their own.
        lazy: read images from their files whenever they are asked for, without a cache, for what does not
            fit into memory; a file that cannot be read is then noticed when it is asked for.
        skip_corrupt: leave out files that cannot be read, with a warning that names them.
        cache: True for the folder `.metafast-cache` in `root`, another folder, or False for none.

    Returns:
        Images `[N, channels, size, size]` uint8, sorted by class and file name; with `lazy`
        :class:`ImageFiles`.

    Raises:
        FileNotFoundError: `root` is no folder.
        ImportError: Pillow is not installed.
        ValueError: no classes, images that are in no class folder, an argument out of range, or files that
            cannot be read: one message names all of them.
    """
    need_pillow("image_folder")
    decoder = Decoder(size, channels, fit)
    if lazy and skip_corrupt:
        raise ValueError("skip_corrupt must be False for lazy classes, whose files are not read beforehand")
    if depth is not None:
        depth = integer("depth", depth, minimum=1)
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"root must be a folder with a folder of images for each class, got {str(folder)!r}, "
            f"which is {'no folder' if folder.exists() else 'not there'}"
        )
    classes = _split_classes(folder, split, depth, fractions, split_seed)
    listing = Listing.of(folder, classes)
    if lazy:
        return listing.lazily(decoder, rotations)
    return listing.decoded(decoder, rotations, skip_corrupt, cache_folder(folder, cache))


def cache_folder(root: Path, cache: bool | str | os.PathLike[str]) -> Path | None:
    """The folder that an argument `cache` means."""
    if isinstance(cache, bool):
        return root / CACHE if cache else None
    return Path(cache)


@dataclass(frozen=True)
class Listing:
    """The files of some classes.

    Attributes:
        root: the folder that the paths start from.
        names: of the classes.
        counts: number of files of each class.
        paths: of the files below `root`, with slashes, those of a class consecutive.
        boxes: the part of each image to take, or None for all of it.
    """

    root: Path
    names: tuple[str, ...]
    counts: tuple[int, ...]
    paths: tuple[str, ...]
    boxes: tuple[Box, ...] | None = None

    @staticmethod
    def of(root: Path, classes: dict[str, list[str]], boxes: dict[str, Box] | None = None) -> Listing:
        """The listing of classes with their paths below `root`, in the order given."""
        paths = tuple(path for files in classes.values() for path in files)
        return Listing(
            root,
            tuple(classes),
            tuple(map(len, classes.values())),
            paths,
            None if boxes is None else tuple(boxes[path] for path in paths),
        )

    def _full_paths(self) -> list[str]:
        return [os.path.join(self.root, *path.split("/")) for path in self.paths]

    def lazily(self, decoder: Decoder, rotations: bool) -> ImageFiles:
        """The classes, read whenever they are asked for."""
        sizes = torch.tensor(self.counts)
        return ImageFiles(
            tuple(self._full_paths()),
            sizes.cumsum(0) - sizes,
            sizes,
            self.names,
            rotations,
            decoder.size,
            decoder.channels,
            decoder.fit,
            self.boxes,
        )

    def decoded(
        self, decoder: Decoder, rotations: bool, skip_corrupt: bool, cache: Path | None
    ) -> ImageClasses:
        """The classes in memory, from the cache if they are there."""
        paths = self._full_paths()
        key = key_of(
            {
                "format": _FORMAT,
                # A folder of caches elsewhere may serve several data sets.
                "root": None if cache == self.root / CACHE else os.path.realpath(self.root),
                "decoder": [decoder.size, decoder.channels, decoder.fit],
                "files": [[path, *_stamp(full)] for path, full in zip(self.paths, paths, strict=True)],
                "boxes": self.boxes,
            }
        )
        pixels, failed = cached(cache, key, lambda: Decoded(*decode_files(decoder, paths, self.boxes)))
        failed = self._try_again(decoder, paths, pixels, failed)
        sizes = np.array(self.counts, dtype=np.int64)
        if failed:
            pixels, sizes = self._without(pixels, sizes, failed, skip_corrupt)
        class_sizes = torch.from_numpy(sizes)
        return ImageClasses(
            torch.from_numpy(pixels), class_sizes.cumsum(0) - class_sizes, class_sizes, self.names, rotations
        )

    def _try_again(
        self, decoder: Decoder, paths: list[str], pixels: NDArray[np.uint8], failed: dict[int, str]
    ) -> dict[int, str]:
        """Fill in files that could not be read when they were cached, such as for want of permission, but now can."""
        if not failed:
            return failed
        numbers = list(failed)
        boxes = None if self.boxes is None else [self.boxes[number] for number in numbers]
        found, still = decode_files(decoder, [paths[number] for number in numbers], boxes)
        for place, number in enumerate(numbers):
            if place not in still:
                pixels[number] = found[place]
        return {numbers[place]: reason for place, reason in still.items()}

    def _without(
        self, pixels: NDArray[np.uint8], sizes: NDArray[np.int64], failed: dict[int, str], skip_corrupt: bool
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Leave out what could not be read, or raise."""
        listed = "".join(f"\n  {self.paths[number]}: {reason}" for number, reason in failed.items())
        count = f"{len(failed)} of {len(self.paths)} image files in {self.root} cannot be read"
        if not skip_corrupt:
            raise ValueError(
                f"{count}; remove or replace them, or leave them out with skip_corrupt=True:{listed}"
            )
        owners = np.arange(len(sizes)).repeat(sizes)
        kept = np.ones(len(pixels), dtype=np.bool_)
        kept[list(failed)] = False
        left = np.bincount(owners[kept], minlength=len(sizes))
        empty = [self.names[c] for c in np.flatnonzero(left == 0)]
        if empty:
            raise ValueError(f"{count}, which leaves no image of {', '.join(map(repr, empty))}:{listed}")
        warnings.warn(f"{count} and are left out:{listed}", stacklevel=4)
        return pixels[kept], left


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of a file."""
    try:
        stat = os.stat(path)
    except OSError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _split_classes(
    root: Path, split: str | None, depth: int | None, fractions: Sequence[float], seed: int
) -> dict[str, list[str]]:
    """Names of the classes of a split and the paths of their files below `root`."""
    if split is None:
        return find_classes(root, "", depth)
    one_of("split", split, SPLITS)
    folders = {
        part: next((name for name in names if (root / name).is_dir()), None)
        for part, names in _SPLIT_FOLDERS.items()
    }
    if folders["train"] and folders["test"]:
        parts = {part: find_classes(root, name, depth) for part, name in folders.items() if name}
        for first, second in combinations(parts, 2):
            both = parts[first].keys() & parts[second].keys()
            if both:
                raise ValueError(
                    f"the parts of a split must have no class in common, got {min(both)!r} in both {first} and "
                    f"{second} of {str(root)!r}; with all images of a class in one folder, and no folders train "
                    "and test, the classes are split at random"
                )
        wanted = ("train", "val") if split == "trainval" else (split,)
        for part in wanted:
            if part not in parts:
                raise ValueError(
                    f"split {split!r} needs the folder {' or '.join(_SPLIT_FOLDERS[part])} in {str(root)!r}, "
                    f"which has {', '.join(filter(None, folders.values()))}"
                )
        return {name: files for part in wanted for name, files in parts[part].items()}
    everything = find_classes(root, "", depth)
    return {name: everything[name] for name in class_split(list(everything), split, fractions, seed)}


def find_classes(root: Path, below: str, depth: int | None) -> dict[str, list[str]]:
    """The classes in the folder `below` of `root`, sorted, each with the sorted paths of its images below `root`."""
    start = root / below if below else root
    classes: dict[str, list[str]] = {}
    loose: list[str] = []
    for folder, images in walk(start):
        if not folder and images:
            loose = images
        elif images:
            name = folder if depth is None else "/".join(folder.split("/")[:depth])
            prefix = "/".join(filter(None, (below, folder)))
            classes.setdefault(name, []).extend(f"{prefix}/{image}" for image in images)
    if loose:
        raise ValueError(
            f"images must be in a folder for each class, got {len(loose)} in {str(start)!r} itself, "
            f"such as {loose[0]!r}"
        )
    if not classes:
        raise ValueError(f"root must hold a folder of images for each class, got no image in {str(start)!r}")
    return {name: sorted(classes[name]) for name in sorted(classes)}


def walk(start: Path) -> list[tuple[str, list[str]]]:
    """Every folder at and below `start`, by its path with slashes, with the sorted names of its images."""
    found: list[tuple[str, list[str]]] = []
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(start),))]
    while waiting:
        folder, trail = waiting.pop()
        images = []
        with os.scandir(trail[-1]) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                    # A link to a folder above would never end.
                    if real not in trail:
                        waiting.append((f"{folder}/{entry.name}" if folder else entry.name, (*trail, real)))
                # A link to nowhere counts, and is reported as a file that cannot be read.
                elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                    images.append(entry.name)
        found.append((folder, sorted(images)))
    return sorted(found)
