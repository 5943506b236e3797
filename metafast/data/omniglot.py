"""Omniglot: 1,623 handwritten characters, 20 drawings each, read from the two official zip files."""

from __future__ import annotations

import os
import random
import re
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from metafast.data._arguments import integer
from metafast.data._splits import published_split
from metafast.data.classes import ImageClasses

_SIDE = 105
_DRAWINGS = 20
ARCHIVES = ("images_background", "images_evaluation")
_DRAWING = re.compile(r"images_(?:background|evaluation)/([^/]+/character\d\d)/\d+_\d\d\.png")
_SOURCE = "get it from the folder python of the repository brendenlake/omniglot on GitHub"
_CHUNK = 1024
_SPLIT_SEED = 0
#: First and last of the characters in a random order.
_AT_RANDOM = {"train": (0, 1100), "val": (1100, 1200), "trainval": (0, 1200), "test": (1200, 1623)}


def omniglot(
    root: str | os.PathLike[str],
    split: str = "train",
    size: int = 28,
    rotations: bool = True,
    characters: str = "vinyals",
) -> ImageClasses:
    """One split of Omniglot (Lake et al., Science 350(6266), 2015), ink 1 and paper 0.

    Reads `images_background.zip` and `images_evaluation.zip` in `root` as they are; a zip that holds no
    character of the split may be absent. The 105 x 105 drawings are reduced by area averaging: a pixel is
    the share of its square that is ink. The splits are those of Vinyals et al., "Matching networks for one
    shot learning" (NIPS 2016); "trainval" is "train" and "val" together:

    | split | characters | classes with rotations |
    |---|---|---|
    | train | 1,028 | 4,112 |
    | val | 172 | 688 |
    | trainval | 1,200 | 4,800 |
    | test | 423 | 1,692 |

    No alphabet but Gurmukhi is both in a training and in the test split. Finn et al., "Model-agnostic meta-learning"
    (2017), and others before draw the characters at random instead, whatever their alphabet, which is easier:
    `characters="random"` has 1,100 for "train", 100 for "val" and 423 for "test", always the same ones.

    Args:
        root: folder that holds the two zip files.
        split: "train", "val", "trainval" or "test".
        size: height and width of the images, 1 to 105.
        rotations: whether the rotations by 90, 180 and 270 degrees are classes of their own.
        characters: "vinyals" or "random".

    Returns:
        Images `[20 * characters, 1, size, size]` uint8 (255 is ink), classes named like
        `Greek/character01`, in the order of the split.

    Raises:
        FileNotFoundError: no folder `root`, or a zip file that the split needs is not there.
        TypeError: an argument of the wrong type.
        ValueError: an unknown split or choice of characters, a size out of range, a zip file that is damaged,
            truncated or incomplete, or a drawing that is not a 105 x 105 PNG of one bit per pixel; the message
            names the file.
    """
    size = integer("size", size, 1, _SIDE)
    if characters not in ("vinyals", "random"):
        raise ValueError(f"characters must be 'vinyals' or 'random', got {characters!r}")
    names = published_split("omniglot_vinyals", split)
    if characters == "random":
        names = _at_random(split)
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"root must be the folder that holds {' and '.join(f'{a}.zip' for a in ARCHIVES)}, "
            f"got {str(folder)!r}, which is not a folder; {_SOURCE}"
        )
    rows = {name: c for c, name in enumerate(names)}
    drawings: list[list[bytes]] = [[] for _ in names]
    absent = []
    for archive in ARCHIVES:
        path = folder / f"{archive}.zip"
        if path.is_file():
            read_drawings(path, rows, drawings)
        else:
            absent.append(path)
    for name, found in zip(names, drawings, strict=True):
        if not found and absent:
            raise FileNotFoundError(
                f"the split {split!r} needs {name}, which should be in "
                f"{' or '.join(str(path) for path in absent)}, not found; {_SOURCE}"
            )
        if len(found) != _DRAWINGS:
            raise ValueError(
                f"expected {_DRAWINGS} drawings of {name} in the zip files of {str(folder)!r}, "
                f"got {len(found)}; {_SOURCE}"
            )
    bits = [bits for found in drawings for bits in found]
    return ImageClasses(
        torch.cat([_shrink(bits[i : i + _CHUNK], size) for i in range(0, len(bits), _CHUNK)]),
        torch.arange(len(names)) * _DRAWINGS,
        torch.full((len(names),), _DRAWINGS),
        names,
        rotations,
    )


def _at_random(split: str) -> tuple[str, ...]:
    """The names of a split of characters at random."""
    names = sorted(
        name for part in ("trainval", "test") for name in published_split("omniglot_vinyals", part)
    )
    random.Random(_SPLIT_SEED).shuffle(names)
    begin, end = _AT_RANDOM[split]
    return tuple(names[begin:end])


def characters(path: Path) -> list[str]:
    """Names of all characters in a zip file, such as `Greek/character01`, in ascending order."""
    try:
        with zipfile.ZipFile(path) as archive:
            matches = [_DRAWING.fullmatch(member) for member in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no intact zip file ({error}); {_SOURCE}") from error
    return sorted({match[1] for match in matches if match})


def read_drawings(path: Path, rows: dict[str, int], drawings: list[list[bytes]]) -> None:
    """Append the packed pixels of the wanted characters in a zip file, drawers in order."""
    with path.open("rb") as file:
        try:
            archive = zipfile.ZipFile(file)
            for member in sorted(archive.namelist()):
                match = _DRAWING.fullmatch(member)
                if match and match[1] in rows:
                    drawings[rows[match[1]]].append(_pixels(archive.read(member), f"{path}: {member}"))
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            OSError,
            RuntimeError,
        ) as error:
            raise ValueError(f"{path} is no intact zip file ({error}); {_SOURCE}") from error


def _pixels(png: bytes, where: str) -> bytes:
    """The packed rows of a PNG, each led by its filter byte, 0 for none."""
    chunks: dict[bytes, bytes] = {}
    offset = 8
    while offset + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, offset)
        chunks[kind] = chunks.get(kind, b"") + png[offset + 8 : offset + 8 + length]
        offset += length + 12
    # Width, height, one bit, grey, deflate, standard filters, not interlaced.
    if not png.startswith(b"\x89PNG\r\n\x1a\n") or chunks.get(b"IHDR") != struct.pack(
        ">II5B", _SIDE, _SIDE, 1, 0, 0, 0, 0
    ):
        raise ValueError(f"{where} must be a {_SIDE} x {_SIDE} PNG of one grey bit per pixel, not interlaced")
    try:
        pixels = zlib.decompress(chunks.get(b"IDAT", b""))
    except zlib.error as error:
        raise ValueError(f"{where} is a damaged PNG ({error})") from error
    stride = 1 + (_SIDE + 7) // 8
    if len(pixels) != _SIDE * stride or any(pixels[::stride]):
        raise ValueError(f"{where} must hold {_SIDE} unfiltered rows of {stride - 1} bytes")
    return pixels


def unpack(drawings: list[bytes]) -> NDArray[np.uint8]:
    """Paper 1 and ink 0, `[N, 105, 105]`."""
    packed = np.frombuffer(b"".join(drawings), dtype=np.uint8).reshape(len(drawings), _SIDE, -1)[:, :, 1:]
    return np.unpackbits(packed, axis=2, count=_SIDE)


def _shrink(drawings: list[bytes], size: int) -> Tensor:
    """Ink averaged over the squares of a `size` x `size` grid, uint8 `[N, 1, size, size]`."""
    ink = 1 - torch.from_numpy(unpack(drawings)).float()
    # Row i of the matrix is the overlap of each source pixel with [i, i + 1) of the target, as a share.
    edges = torch.arange(size + 1, dtype=torch.float64) * (_SIDE / size)
    source = torch.arange(_SIDE, dtype=torch.float64)
    overlap = (torch.minimum(edges[1:, None], source + 1) - torch.maximum(edges[:-1, None], source)).clamp(
        min=0
    )
    average = (overlap * (size / _SIDE)).float()
    return (average @ ink @ average.T * 255).round().to(torch.uint8)[:, None]
