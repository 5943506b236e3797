"""The usual image benchmarks with their published splits, from files that are there already."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from metafast.data._decode import Box, Decoder, need_pillow
from metafast.data._pickle import as_text, load_plain_pickle
from metafast.data._splits import published_split
from metafast.data.classes import ImageClasses
from metafast.data.image_folder import Listing, cache_folder, walk

_PER_CLASS = 600
_SYNSET_FILE = re.compile(r"(n\d{8})_?\d+\.\w+")


def mini_imagenet(
    root: str | os.PathLike[str],
    split: str = "train",
    size: int = 84,
    *,
    fit: str = "stretch",
    complete: bool = True,
    skip_corrupt: bool = False,
    cache: bool | str | os.PathLike[str] = True,
) -> ImageClasses:
    """One split of mini-ImageNet: 64 train, 16 val and 20 test classes of 600 images each.

    The split is that of Ravi and Larochelle, "Optimization as a model for few-shot learning" (ICLR 2017); its
    class list comes with metafast. Images are squeezed into a square, as in the code of MAML. `root` may hold

    - a folder for each class, named like `n01532829`, at any depth: `train/n01532829/*.jpg`,
      `images/n01532829/*.jpg` ...;
    - all images in one folder, `root` or `images`, named like `n0153282900000005.jpg`, as the csv files of
      the split name them (those files are not needed);
    - the pickles `mini-imagenet-cache-train.pkl`, `-val.pkl` and `-test.pkl` of Ren et al. (84 x 84), which
      are read without letting them run code.

    Args:
        root: folder of the data set.
        split: "train", "val", "trainval" (the two together) or "test".
        size: height and width of the images.
        fit: "stretch" squeezes the whole image into a square, "crop" takes the largest centred square.
        complete: whether every class must have its 600 images.
        skip_corrupt, cache: see :func:`image_folder`.

    Returns:
        Images `[600 * classes, 3, size, size]` uint8, classes named by synset in the order of the list, images
        in the order of the file names (or of the pickle).

    Raises:
        FileNotFoundError: no folder `root`, or a class that is not in it.
        ValueError: an unknown split, a class with another number of images, files that cannot be read.
    """
    names = published_split("mini_imagenet_ravi", split)
    decoder = Decoder(size, 3, fit)
    folder = _folder(root, "mini-ImageNet")
    classes = _class_folders(folder, names) or _by_file_name(folder, names)
    if not classes:
        classes_and_images = _ren_pickles(folder, split)
        if classes_and_images is not None:
            found = _arrays(classes_and_images, names, decoder, str(folder))
            return _counted(found, _PER_CLASS if complete else None, folder)
    _require(names, classes, folder, "a folder named like it, or files n0153282900000005.jpg ...")
    return _read(folder, classes, names, decoder, _PER_CLASS if complete else None, skip_corrupt, cache)


def cifar_fs(
    root: str | os.PathLike[str],
    split: str = "train",
    size: int = 32,
    *,
    complete: bool = True,
    skip_corrupt: bool = False,
    cache: bool | str | os.PathLike[str] = True,
) -> ImageClasses:
    """One split of CIFAR-FS: 64 train, 16 val and 20 test classes of CIFAR-100 with 600 images each.

    The split is that of Bertinetto et al., "Meta-learning with differentiable closed-form solvers" (ICLR
    2019); its class list comes with metafast. `root` may hold

    - a folder for each class, named like `apple`, at any depth: `data/apple/*.png`,
      `meta-train/apple/*.png`, `cifar100/data/apple/*.png` ...;
    - `cifar-100-python.tar.gz` or the folder `cifar-100-python` of CIFAR-100's own archive, whose pickles
      are read without letting them run code; a class has its 500 training and then its 100 test images.

    Args:
        root: folder of the data set.
        split: "train", "val", "trainval" (the two together) or "test".
        size: height and width of the images, 32 as they are.
        complete: whether every class must have its 600 images.
        skip_corrupt, cache: see :func:`image_folder`.

    Returns:
        Images `[600 * classes, 3, size, size]` uint8, classes in the order of the list.

    Raises:
        FileNotFoundError: no folder `root`, or a class that is not in it.
        ValueError: an unknown split, a class with another number of images, files that cannot be read.
    """
    names = [pair.split("/")[1] for pair in published_split("cifar_fs", split)]
    return _cifar(root, names, size, complete, skip_corrupt, cache)


def fc100(
    root: str | os.PathLike[str],
    split: str = "train",
    size: int = 32,
    *,
    complete: bool = True,
    skip_corrupt: bool = False,
    cache: bool | str | os.PathLike[str] = True,
) -> ImageClasses:
    """One split of FC100: 60 train, 20 val and 20 test classes of CIFAR-100, parted by superclass.

    The split is that of Oreshkin et al., "TADAM: Task dependent adaptive metric for improved few-shot
    learning" (NeurIPS 2018); its list of superclasses comes with metafast. Layouts of `root`, arguments,
    result and errors are those of :func:`cifar_fs`.
    """
    superclasses = published_split("fc100", split)
    pairs = [pair.split("/") for part in ("trainval", "test") for pair in published_split("cifar_fs", part)]
    names = [name for wanted in superclasses for superclass, name in pairs if superclass == wanted]
    return _cifar(root, names, size, complete, skip_corrupt, cache)


def cub(
    root: str | os.PathLike[str],
    split: str = "train",
    size: int = 84,
    *,
    crop_to_box: bool = False,
    fit: str = "crop",
    complete: bool = True,
    skip_corrupt: bool = False,
    cache: bool | str | os.PathLike[str] = True,
) -> ImageClasses:
    """One split of CUB-200-2011 (Wah et al., 2011): 100 train, 50 val and 50 test bird species.

    The split is that of Chen et al., "A closer look at few-shot classification" (ICLR 2019): every second
    class trains; its class list comes with metafast. `root` is the folder `CUB_200_2011` of the archive, or
    the one that holds it, or any folder with a folder for each class, named like
    `001.Black_footed_Albatross`, at any depth.

    Args:
        root: folder of the data set.
        split: "train", "val", "trainval" (the two together) or "test".
        size: height and width of the images.
        crop_to_box: take the part of the image in its bounding box, from `images.txt` and
            `bounding_boxes.txt`, as some later papers do.
        fit: "crop" takes the largest centred square (of the box), "stretch" squeezes all of it into one.
        complete: whether every image that `images.txt` lists must be there, where that file is.
        skip_corrupt, cache: see :func:`image_folder`.

    Returns:
        Images `[N, 3, size, size]` uint8, 41 to 60 of a class, classes in the order of the list.

    Raises:
        FileNotFoundError: no folder `root`, a class or a list that is not in it.
        ValueError: an unknown split, missing images, damaged lists, files that cannot be read.
    """
    names = published_split("cub", split)
    decoder = Decoder(size, 3, fit)
    folder = _folder(root, "CUB")
    # Beside the images there may be folders of the same names with segmentations.
    places = ("images", "CUB_200_2011/images")
    home = next((place for place in places if (folder / place).is_dir()), "")
    classes = _class_folders(folder, names, home)
    _require(names, classes, folder, "a folder named like it")
    lists = folder if (folder / "images.txt").is_file() else folder / "CUB_200_2011"
    listed = _cub_list(lists / "images.txt") if (lists / "images.txt").is_file() else None
    if complete and listed is not None:
        there = {"/".join(path.split("/")[-2:]) for files in classes.values() for path in files}
        absent = [path for path in listed.values() if path.split("/")[0] in classes and path not in there]
        if absent:
            raise ValueError(
                f"{len(absent)} images that {lists / 'images.txt'} lists are not there, such as {absent[0]!r}; "
                "complete=False goes without them"
            )
    boxes = None
    if crop_to_box:
        if listed is None or not (lists / "bounding_boxes.txt").is_file():
            raise FileNotFoundError(
                f"crop_to_box needs the lists images.txt and bounding_boxes.txt in {str(folder)!r} "
                "or its folder CUB_200_2011"
            )
        boxes = _cub_boxes(lists / "bounding_boxes.txt", listed, classes)
    return _read(folder, classes, names, decoder, None, skip_corrupt, cache, boxes)


def _folder(root: str | os.PathLike[str], what: str) -> Path:
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"root must be the folder of {what}, got {str(folder)!r}, which is not a folder"
        )
    return folder


def _class_folders(folder: Path, names: list[str] | tuple[str, ...], home: str = "") -> dict[str, list[str]]:
    """The paths of the images of each of the classes that has a folder of its name, at any depth of `home`."""
    wanted = set(names)
    homes: dict[str, str] = {}
    classes: dict[str, list[str]] = {}
    for below, images in walk(folder / home):
        name = below.rpartition("/")[2]
        if name not in wanted or not images:
            continue
        path = f"{home}/{below}" if home else below
        if name in homes:
            raise ValueError(
                f"root must hold one folder for the class {name!r}, got {homes[name]!r} and {path!r} "
                f"in {str(folder)!r}"
            )
        homes[name] = path
        classes[name] = [f"{path}/{image}" for image in images]
    return classes


def _by_file_name(folder: Path, names: tuple[str, ...]) -> dict[str, list[str]]:
    """The same for images together in one folder, whose names begin with the class."""
    wanted = set(names)
    for home in ("images", ""):
        classes: dict[str, list[str]] = {}
        place = folder / home
        for image in sorted(os.listdir(place)) if place.is_dir() else []:
            match = _SYNSET_FILE.fullmatch(image)
            if match and match[1] in wanted:
                classes.setdefault(match[1], []).append(f"{home}/{image}" if home else image)
        if classes:
            return classes
    return {}


def _require(
    names: list[str] | tuple[str, ...], classes: dict[str, list[str]], folder: Path, how: str
) -> None:
    absent = [name for name in names if name not in classes]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise FileNotFoundError(
            f"{len(absent)} of the {len(names)} classes are not in {str(folder)!r}: "
            f"{', '.join(absent[:5])}{more}; expected {how}"
        )


def _read(
    folder: Path,
    classes: dict[str, list[str]],
    names: list[str] | tuple[str, ...],
    decoder: Decoder,
    count: int | None,
    skip_corrupt: bool,
    cache: bool | str | os.PathLike[str],
    boxes: dict[str, Box] | None = None,
) -> ImageClasses:
    """Decode the files of the classes, in the order of `names`."""
    need_pillow("this data set")
    listing = Listing.of(folder, {name: classes[name] for name in names}, boxes)
    _check_counts(dict(zip(listing.names, listing.counts, strict=True)), count, folder)
    return listing.decoded(decoder, False, skip_corrupt, cache_folder(folder, cache))


def _check_counts(sizes: dict[str, int], count: int | None, folder: Path) -> None:
    if count is None:
        return
    wrong = {name: size for name, size in sizes.items() if size != count}
    if wrong:
        name = next(iter(wrong))
        raise ValueError(
            f"every class must have {count} images, got {wrong[name]} of {name!r}"
            f"{f' and {len(wrong) - 1} more classes with another number' if len(wrong) > 1 else ''} in "
            f"{str(folder)!r}; complete=False takes what is there"
        )


def _counted(found: ImageClasses, count: int | None, folder: Path) -> ImageClasses:
    _check_counts(dict(zip(found.names, found.class_sizes.tolist(), strict=True)), count, folder)
    return found


def _arrays(
    images: dict[str, NDArray[np.uint8]], names: list[str] | tuple[str, ...], decoder: Decoder, where: str
) -> ImageClasses:
    """Classes from images `[n, height, width, 3]` of each class, resized where they have another size."""
    absent = [name for name in names if name not in images]
    if absent:
        raise FileNotFoundError(
            f"{len(absent)} of the {len(names)} classes are not in {where}: {absent[0]} ..."
        )
    sizes = torch.tensor([len(images[name]) for name in names])
    pixels = np.empty((int(sizes.sum()), 3, decoder.size, decoder.size), dtype=np.uint8)
    row = 0
    for name in names:
        for block in np.array_split(images[name], max(1, len(images[name]) // 100)):
            pixels[row : row + len(block)] = _resized(block, decoder)
            row += len(block)
    return ImageClasses(torch.from_numpy(pixels), sizes.cumsum(0) - sizes, sizes, tuple(names))


def _resized(block: NDArray[np.uint8], decoder: Decoder) -> NDArray[np.uint8]:
    if block.shape[1:3] == (decoder.size, decoder.size):
        return block.transpose(0, 3, 1, 2)
    need_pillow(f"another size than {block.shape[1]}")
    from PIL import Image

    return np.stack([decoder.image(Image.fromarray(image)) for image in block])


def _ren_pickles(folder: Path, split: str) -> dict[str, NDArray[np.uint8]] | None:
    """Images of each class from the pickles of Ren et al., or None if they are not there."""
    parts = {"trainval": ("train", "val")}.get(split, (split,))
    paths = [folder / f"mini-imagenet-cache-{part}.pkl" for part in parts]
    if not all(path.is_file() for path in paths):
        return None
    found: dict[str, NDArray[np.uint8]] = {}
    for path in paths:
        with path.open("rb") as file:
            values = load_plain_pickle(file, str(path))
        images = _images(values, "image_data", 4, str(path))
        classes = values.get("class_dict")
        if not isinstance(classes, dict):
            raise ValueError(f"{path} must hold a dictionary class_dict, got {type(classes).__name__}")
        for name, rows in classes.items():
            found[as_text(name)] = images[np.asarray(rows, dtype=np.int64)]
    return found


def _images(values: dict[str, Any], name: str, rank: int, where: str) -> NDArray[np.uint8]:
    images = values.get(name)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != rank:
        got = (
            f"{images.dtype} {list(images.shape)}"
            if isinstance(images, np.ndarray)
            else type(images).__name__
        )
        raise ValueError(f"{where} must hold uint8 images {name} of {rank} dimensions, got {got}")
    return images


def _cifar(
    root: str | os.PathLike[str],
    names: list[str],
    size: int,
    complete: bool,
    skip_corrupt: bool,
    cache: bool | str | os.PathLike[str],
) -> ImageClasses:
    decoder = Decoder(size, 3, "stretch")
    folder = _folder(root, "CIFAR-100")
    count = _PER_CLASS if complete else None
    archive = _cifar_archive(folder)
    if archive is not None:
        return _counted(_arrays(_cifar_images(*archive), names, decoder, archive[0]), count, folder)
    classes = _class_folders(folder, names)
    _require(names, classes, folder, "a folder named like it, cifar-100-python or cifar-100-python.tar.gz")
    return _read(folder, classes, names, decoder, count, skip_corrupt, cache)


def _cifar_archive(folder: Path) -> tuple[str, Callable[[str], dict[str, Any]]] | None:
    """Where CIFAR-100's own archive is, and how to read one of its pickles; None if it is not there."""
    for home in (folder, folder / "cifar-100-python", folder / "cifar100" / "cifar-100-python"):
        if all((home / part).is_file() for part in ("train", "test", "meta")):

            def from_folder(part: str, home: Path = home) -> dict[str, Any]:
                with (home / part).open("rb") as file:
                    return load_plain_pickle(file, str(home / part))

            return str(home), from_folder
    for path in (folder / "cifar-100-python.tar.gz", folder / "cifar100" / "cifar-100-python.tar.gz"):
        if path.is_file():

            def from_tar(part: str, path: Path = path) -> dict[str, Any]:
                return _from_tar(path, f"cifar-100-python/{part}")

            return str(path), from_tar
    return None


def _from_tar(path: Path, member: str) -> dict[str, Any]:
    try:
        with tarfile.open(path) as archive:
            file: IO[bytes] | None = archive.extractfile(member)
            if file is None:
                raise KeyError(member)
            return load_plain_pickle(file, f"{path}: {member}")
    except (tarfile.TarError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path} is no intact archive of CIFAR-100 ({error})") from error


def _cifar_images(where: str, read: Callable[[str], dict[str, Any]]) -> dict[str, NDArray[np.uint8]]:
    """Images `[n, 32, 32, 3]` of each class, the training images first."""
    names = [as_text(name) for name in read("meta").get("fine_label_names", ())]
    images, labels = [], []
    for part in ("train", "test"):
        values = read(part)
        data = _images(values, "data", 2, f"{where}: {part}")
        fine = np.asarray(values.get("fine_labels", ()), dtype=np.int64)
        if data.shape != (len(fine), 3072) or (len(fine) and not 0 <= fine.min() <= fine.max() < len(names)):
            raise ValueError(
                f"{where}: {part} must hold data [n, 3072] and n fine_labels below {len(names)}, "
                f"got {list(data.shape)} and {len(fine)}"
            )
        images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(fine)
    everything, owners = np.concatenate(images), np.concatenate(labels)
    return {name: everything[owners == number] for number, name in enumerate(names)}


def _cub_list(path: Path) -> dict[str, str]:
    """Paths of the images by their number, from `images.txt`."""
    listed = {}
    for line in path.read_text("utf-8").splitlines():
        number, _, image = line.strip().partition(" ")
        if not number.isdecimal() or image.count("/") != 1:
            raise ValueError(
                f"{path} must hold lines such as '1 001.Black_footed_Albatross/...jpg', got {line!r}"
            )
        listed[number] = image
    return listed


def _cub_boxes(path: Path, listed: dict[str, str], classes: dict[str, list[str]]) -> dict[str, Box]:
    """The box of each image of the classes."""
    boxes: dict[str, Box] = {}
    for line in path.read_text("utf-8").splitlines():
        number, *numbers = line.split()
        try:
            x, y, width, height = map(float, numbers)
        except ValueError:
            raise ValueError(f"{path} must hold lines 'number x y width height', got {line!r}") from None
        if number in listed:
            boxes[listed[number]] = (x, y, width, height)
    found = {}
    for files in classes.values():
        for file in files:
            short = "/".join(file.split("/")[-2:])
            if short not in boxes:
                raise ValueError(f"{path} must hold a box for each image, got none for {short!r}")
            found[file] = boxes[short]
    return found
