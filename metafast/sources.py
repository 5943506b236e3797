"""The data sets of the command line, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from metafast.config import UsageError
from metafast.data import (
    ImageClasses,
    SinusoidSampler,
    cifar_fs,
    cub,
    fc100,
    glyphs,
    image_folder,
    mini_imagenet,
    omniglot,
)

SPLITS = ("train", "val", "trainval", "test")
#: Instead of a split: the whole of an image folder.
ALL = "all"
#: Classes of the procedural data set, all disjoint: number and first class.
GLYPHS = {"train": (400, 0), "val": (100, 400), "trainval": (500, 0), "test": (200, 500)}
#: Regression on sine waves, which has no classes. Its splits are waves of different seeds: what is added to the seed.
SINUSOID = "sinusoid"
SINUSOID_SEEDS = {"train": 0, "val": 1_000_000, "test": 2_000_000}


def sinusoids(
    split: str, shots: int, queries: int, tasks: int, seed: int, frequency: Sequence[float]
) -> SinusoidSampler:
    """Sine waves of a split; ``frequency`` is one number or a range."""
    ends = (frequency[0], frequency[-1])
    return SinusoidSampler(shots, queries, tasks, seed + SINUSOID_SEEDS[split], frequency=ends)


@dataclass(frozen=True)
class Reading:
    """How a data set is read.

    Attributes:
        size: height and width of the images; None for the usual ones of the data set.
        channels: 1 for grey, 3 for colour; None for what the data set has.
        split_seed: seed of the random split of an image folder.
        min_images: classes with fewer images are left out.
        skip_corrupt: whether damaged files are left out.
    """

    size: int | None = None
    channels: int | None = None
    split_seed: int = 0
    min_images: int = 1
    skip_corrupt: bool = False

    def arguments(self, *names: str) -> dict[str, Any]:
        """The named settings, those that are None left out."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Source:
    """A data set that the command line knows.

    Attributes:
        read: from folder, split and reading to the classes.
        train_ways: usual number of ways in training.
        files: what has to be in the folder; empty for a data set without files.
    """

    read: Callable[[Path, str, Reading], Any]
    train_ways: int
    files: str = ""


def _glyphs(root: Path, split: str, reading: Reading) -> ImageClasses:
    classes, first = GLYPHS[split]
    return glyphs(classes, first_class=first, rotations=True, **reading.arguments("size"))


def _omniglot(root: Path, split: str, reading: Reading) -> ImageClasses:
    return omniglot(root, split, **reading.arguments("size"))


def _omniglot_random(root: Path, split: str, reading: Reading) -> ImageClasses:
    return omniglot(root, split, characters="random", **reading.arguments("size"))


def _image_folder(root: Path, split: str, reading: Reading) -> Any:
    arguments = reading.arguments("size", "channels", "split_seed", "skip_corrupt")
    return image_folder(root, split=None if split == ALL else split, **arguments)


def _benchmark(read: Callable[..., ImageClasses]) -> Callable[[Path, str, Reading], ImageClasses]:
    return lambda root, split, reading: read(root, split, **reading.arguments("size", "skip_corrupt"))


#: By the names of `--data`.
SOURCES = {
    "glyphs": Source(_glyphs, 60),
    "omniglot": Source(_omniglot, 60, "the folder with images_background.zip and images_evaluation.zip"),
    "omniglot-random": Source(
        _omniglot_random, 60, "the folder with images_background.zip and images_evaluation.zip"
    ),
    "image-folder": Source(_image_folder, 20, "a folder with a folder of images for each class"),
    "mini-imagenet": Source(
        _benchmark(mini_imagenet), 20, "the folder with the images, or with mini-imagenet-cache-*.pkl"
    ),
    "cifar-fs": Source(_benchmark(cifar_fs), 20, "the folder with cifar-100-python, or with class folders"),
    "fc100": Source(_benchmark(fc100), 20, "the folder with cifar-100-python, or with class folders"),
    "cub": Source(_benchmark(cub), 20, "the folder CUB_200_2011"),
}


def with_roots(
    names: Sequence[str], roots: Sequence[Path], option: str = "--data", root_option: str = "--root"
) -> dict[str, Path]:
    """The folder of each data set: they go, in order, to the data sets that have files.

    Raises:
        UsageError: too few or too many folders, a name given twice.
    """
    if len(set(names)) < len(names):
        raise UsageError(f"{option}: expected different data sets, got {' '.join(names)}")
    need = [name for name in names if SOURCES[name].files]
    if len(roots) < len(need):
        name = need[len(roots)]
        raise UsageError(f"{option} {name} needs {root_option} DIR, {SOURCES[name].files}")
    if need and len(roots) > len(need):
        raise UsageError(
            f"{root_option}: expected {len(need)} of them, for {', '.join(need)}, got {len(roots)}"
        )
    if roots and not names:
        raise UsageError(f"{root_option}: there is no {option} that the folder is for")
    if roots and not need:
        raise UsageError(
            f"{root_option}: {' '.join(names)} is computed and has no folder; leave {root_option} out"
        )
    folders = iter(roots)
    return {name: next(folders) if SOURCES[name].files else Path() for name in names}


def open_splits(
    roots: Mapping[str, Path],
    split: str,
    reading: Reading,
    device: torch.device,
    root_option: str = "--root",
) -> tuple[dict[str, ImageClasses], Reading]:
    """A split of each data set on the device, all images in one form; and how to read more in this form.

    Where ``reading`` does not say, the first data set decides on the size, and one in colour makes all so.

    Raises:
        UsageError: files that are not there or cannot be read.
    """
    found = {}
    for name, root in roots.items():
        found[name] = _read(name, root, split, reading, root_option)
        reading = replace(reading, size=reading.size or found[name].images.shape[-1])
    channels = reading.channels or max(dataset.images.shape[1] for dataset in found.values())
    found = {name: _with_channels(dataset, channels).to(device) for name, dataset in found.items()}
    return found, replace(reading, channels=channels)


def _read(name: str, root: Path, split: str, reading: Reading, root_option: str) -> ImageClasses:
    if split == ALL and name != "image-folder":
        raise UsageError(f"--split {ALL} is for image-folder; {name} has {', '.join(SPLITS)}")
    try:
        dataset: ImageClasses = SOURCES[name].read(root, split, reading)
        largest = int(dataset.class_sizes.max())
        if reading.min_images > largest:
            raise UsageError(
                f"--min-images: expected at most {largest}, the images of the largest class of {name}"
            )
        return dataset.at_least(reading.min_images) if reading.min_images > 1 else dataset
    except FileNotFoundError as error:
        raise UsageError(f"{root_option}: {error}") from error
    except (ValueError, ImportError) as error:
        raise UsageError(f"{name}: {str(error).replace('skip_corrupt=True', '--skip-corrupt')}") from error


def _with_channels(dataset: ImageClasses, channels: int) -> ImageClasses:
    """The same images with 1 or 3 channels: grey is repeated, and colours become their luminance."""
    images = dataset.images
    if channels == images.shape[1]:
        return dataset
    if channels == 3:
        images = images.expand(-1, 3, -1, -1)
    else:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        images = (images.float() * weights).sum(1, keepdim=True).round().to(images.dtype)
    return replace(dataset, images=images.contiguous())
