"""The Omniglot reader, on small zip files written here and, where it is, on the real data."""

from __future__ import annotations

import functools
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metafast.data import EpisodeSampler, ImageClasses, omniglot
from metafast.data.omniglot import _at_random

SPLITS = Path(__file__).parents[1] / "metafast" / "data" / "omniglot_vinyals.txt"
DATA = (
    Path(os.environ.get("METAFAST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")) / "omniglot"
)
real_data = pytest.mark.skipif(
    not (DATA / "images_background.zip").is_file(),
    reason="needs the Omniglot zips in $METAFAST_DATA/omniglot or ../shared/data/omniglot",
)


def listed(split: str) -> list[str]:
    """Names of a split as they stand in the packaged list."""
    section = SPLITS.read_text().split(f"[{split}]\n")[1].split("[")[0]
    return section.splitlines()


def png(ink: np.ndarray, **changed: Any) -> bytes:
    """A one-bit grey PNG of ink (1) on paper (0), its header changed on demand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = ink.shape
    header = {
        "width": width,
        "height": height,
        "depth": 1,
        "colour": 0,
        "interlace": 0,
        "filter": 0,
        **changed,
    }
    rows = np.packbits(1 - ink, axis=1)
    filters = np.full((height, 1), header["filter"], dtype=np.uint8)
    pixels = zlib.compress(np.concatenate([filters, rows], 1).tobytes())
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(
            b"IHDR",
            struct.pack(
                ">II5B",
                header["width"],
                header["height"],
                header["depth"],
                header["colour"],
                0,
                0,
                header["interlace"],
            ),
        )
        + chunk(b"tIME", bytes(7))
        + chunk(b"IDAT", pixels[:10])
        + chunk(b"IDAT", pixels[10:])
        + chunk(b"IEND", b"")
    )


def drawing(character: int, drawer: int) -> np.ndarray:
    """Ink of one drawing: its two numbers in binary as solid 7 x 7 blocks on a 15 x 15 grid."""
    grid = np.zeros((15, 15), dtype=np.uint8)
    grid[2, :10] = [character >> i & 1 for i in range(10)]
    grid[4, :5] = [drawer >> i & 1 for i in range(5)]
    grid[0, 0] = 1
    return grid.repeat(7, 0).repeat(7, 1)


Members = dict[str, bytes]


@functools.cache
def val_members() -> Members:
    """The 172 characters of the val split, all of which the background zip holds."""
    return {
        f"images_background/{name}/{c:04d}_{d:02d}.png": png(drawing(c, d))
        for c, name in enumerate(listed("val"))
        for d in range(1, 21)
    }


def write(path: Path, members: Members) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images_background/", b"")
        archive.writestr("images_background/.DS_Store", b"not a drawing")
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "images_background.zip", dict(reversed(val_members().items())))
    return tmp_path


def test_reads_the_split_from_the_one_zip_it_needs(root: Path) -> None:
    data = omniglot(root, "val", size=15)
    assert isinstance(data, ImageClasses)
    assert data.names == tuple(listed("val"))
    assert (data.num_classes, data.rotations) == (688, True)
    assert data.images.dtype == torch.uint8 and data.images.shape == (3440, 1, 15, 15)
    assert data.class_starts.tolist() == [20 * c for c in range(172)]
    assert data.class_sizes.tolist() == [20] * 172
    expected = np.stack([drawing(c, d)[::7, ::7] for c in range(172) for d in range(1, 21)])
    assert torch.equal(data.images[:, 0], torch.from_numpy(expected) * 255)


def test_without_rotations(root: Path) -> None:
    assert omniglot(str(root), "val", rotations=False).num_classes == 172


def test_size_105_keeps_every_pixel(root: Path) -> None:
    data = omniglot(root, "val", size=105)
    assert torch.equal(data.images[23, 0], torch.from_numpy(drawing(1, 4)) * 255)


def test_resize_is_the_area_average(root: Path) -> None:
    small = omniglot(root, "val", size=28).images[3439, 0]
    fine = np.kron(drawing(171, 20), np.ones((4, 4)))
    average = fine.reshape(28, 15, 28, 15).mean((1, 3))
    assert np.abs(small.numpy() - 255 * average).max() <= 0.5 + 1e-3


def test_rotation_before_and_after_the_resize_agree(root: Path) -> None:
    upright = omniglot(root, "val", size=28).images[:20, 0]
    members = {
        name: png(np.rot90(drawing(0, d)).copy())
        for d, name in enumerate((name for name in val_members() if "/0000_" in name), start=1)
    }
    write(root / "images_background.zip", {**val_members(), **members})
    turned = omniglot(root, "val", size=28).images[:20, 0]
    assert (torch.rot90(upright, 1, (1, 2)).int() - turned.int()).abs().max() <= 1


def test_packaged_split_list() -> None:
    train, val, test = (listed(split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (1028, 172, 423)
    assert len({*train, *val, *test}) == 1623
    assert all(re.fullmatch(r"[^/]+/character\d\d", name) for name in train + val + test)
    assert "MIT License" in SPLITS.read_text()


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"^root must be the folder that holds images_background\.zip and "
        r"images_evaluation\.zip, got '.*nowhere', which is not a folder; .*brendenlake/omniglot",
    ):
        omniglot(tmp_path / "nowhere", "val")


def test_root_without_zips(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"needs Hebrew/character01, which should be in .*"
        r"images_background\.zip or .*images_evaluation\.zip, not found; get it .*brendenlake",
    ):
        omniglot(tmp_path, "val")


def test_root_without_the_zip_it_needs(root: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"'test' needs .*, which should be in .*images_evaluation\.zip",
    ):
        omniglot(root, "test")


@pytest.mark.parametrize("split", ["validation", "", None, ["val"]], ids=str)
def test_unknown_split(root: Path, split: Any) -> None:
    with pytest.raises(ValueError, match=r"^split must be 'train', 'val', 'trainval' or 'test', got "):
        omniglot(root, split)


def test_characters_at_random(tmp_path: Path) -> None:
    """Every character once, whatever its alphabet, and always the same ones."""
    listed_at = {split: _at_random(split) for split in ("train", "val", "trainval", "test")}
    assert {split: len(names) for split, names in listed_at.items()} == {
        "train": 1100, "val": 100, "trainval": 1200, "test": 423
    }  # fmt: skip
    assert listed_at["trainval"] == listed_at["train"] + listed_at["val"]
    everything = [name for split in ("train", "val", "test") for name in listed(split)]
    assert sorted(listed_at["trainval"] + listed_at["test"]) == sorted(everything)
    alphabets = [{name.partition("/")[0] for name in listed_at[split]} for split in ("train", "test")]
    assert alphabets[1] <= alphabets[0] and len(alphabets[0]) == 50
    assert (listed_at["train"][0], listed_at["test"][-1]) == (
        "Japanese_(hiragana)/character47",
        "Japanese_(hiragana)/character15",
    )
    first = listed_at["val"][0]
    with pytest.raises(FileNotFoundError, match=f"^the split 'val' needs {re.escape(first)}, which"):
        omniglot(tmp_path, "val", characters="random")
    with pytest.raises(ValueError, match=r"^characters must be 'vinyals' or 'random', got 'lake'"):
        omniglot(tmp_path, "val", characters="lake")


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (106, ValueError), (28.0, TypeError)], ids=str)
def test_wrong_size(root: Path, size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^size must be "):
        omniglot(root, "val", size=size)


def test_missing_drawing(root: Path) -> None:
    members = dict(val_members())
    del members["images_background/Hebrew/character02/0001_07.png"]
    write(root / "images_background.zip", members)
    write(root / "images_evaluation.zip", {})
    with pytest.raises(
        ValueError,
        match=r"^expected 20 drawings of Hebrew/character02 in the zip files of .*, got 19",
    ):
        omniglot(root, "val")


def test_missing_character(root: Path) -> None:
    members = {name: data for name, data in val_members().items() if "Hebrew/character02" not in name}
    write(root / "images_background.zip", members)
    write(root / "images_evaluation.zip", {})
    with pytest.raises(ValueError, match=r"^expected 20 drawings of Hebrew/character02 .*, got 0"):
        omniglot(root, "val")


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"<html>404 Not Found</html>", id="web-page"),
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: data[:-10], id="last-bytes-missing"),
        pytest.param(lambda data: data[1000:], id="first-bytes-missing"),
        pytest.param(
            lambda data: data[: len(data) // 3] + data[len(data) // 3 + 500 :],
            id="hole",
        ),
        pytest.param(lambda data: flip(data, data.index(b"IDAT") + 6), id="bad-checksum"),
        pytest.param(lambda data: flip(data, data.rindex(b"PK\x01\x02") + 42), id="bad-directory"),
    ],
)
def test_damaged_zip(root: Path, damage: Callable[[bytes], bytes]) -> None:
    path = root / "images_background.zip"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError,
        match=rf"^{re.escape(str(path))} is no intact zip file \(.+\); get it .*GitHub",
    ):
        omniglot(root, "val")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"GIF89a", "must be a 105 x 105 PNG of one grey bit per pixel", id="no-png"),
        pytest.param(b"", "must be a 105 x 105 PNG of one grey bit per pixel", id="empty"),
        pytest.param(
            png(np.zeros((105, 104), dtype=np.uint8)),
            "must be a 105 x 105 PNG",
            id="narrow",
        ),
        pytest.param(
            png(drawing(0, 1), depth=8),
            "must be a 105 x 105 PNG of one grey bit",
            id="8-bit",
        ),
        pytest.param(
            png(drawing(0, 1), colour=3),
            "must be a 105 x 105 PNG of one grey bit",
            id="palette",
        ),
        pytest.param(png(drawing(0, 1), interlace=1), "not interlaced", id="interlaced"),
        pytest.param(
            png(drawing(0, 1), filter=1),
            "must hold 105 unfiltered rows of 14 bytes",
            id="filtered",
        ),
        pytest.param(
            png(np.zeros((50, 105), dtype=np.uint8), height=105),
            "must hold 105 unfiltered",
            id="short",
        ),
        pytest.param(png(drawing(0, 1))[:60], "is a damaged PNG", id="cut"),
        pytest.param(png(drawing(0, 1))[:33], "is a damaged PNG", id="header-only"),
    ],
)
def test_wrong_drawing_is_named(root: Path, data: bytes, message: str) -> None:
    member = "images_background/Hebrew/character01/0000_01.png"
    path = write(root / "images_background.zip", {**val_members(), member: data})
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{path}: {member}')} .*{message}"):
        omniglot(root, "val")


@real_data
@pytest.mark.parametrize("choice", ["vinyals", "random"])
@pytest.mark.parametrize(("split", "characters"), [("trainval", 1200), ("test", 423)])
def test_real_splits_are_complete(split: str, characters: int, choice: str) -> None:
    data = omniglot(DATA, split, size=8, characters=choice)
    assert (len(data.names), data.num_classes) == (characters, 4 * characters)
    assert data.images.shape == (20 * characters, 1, 8, 8)
    assert data.images.flatten(1).amax(1).min() > 0, "every drawing has ink"


@real_data
def test_real_drawings_are_distinct_but_for_the_known_pair() -> None:
    data = omniglot(DATA, "train", size=28)
    assert (len(data.names), data.num_classes) == (1028, 4112)
    start = int(data.class_starts[data.names.index("Braille/character01")])
    assert torch.equal(data.images[start + 2], data.images[start + 18])
    assert not torch.equal(data.images[start + 2], data.images[start + 3])


@real_data
def test_real_drawings_of_a_class_resemble_each_other() -> None:
    data = omniglot(DATA, "test", size=28)
    assert 0.05 < data.images.float().mean() / 255 < 0.15, "ink is 1, and thin"
    episodes = EpisodeSampler(data, 5, 5, 5, tasks=200)(0)
    prototypes = episodes.support_x.view(200, 5, 5, -1).mean(2)
    nearest = torch.cdist(episodes.query_x.flatten(2), prototypes).argmin(2)
    accuracy = (nearest == episodes.query_y).float().mean()
    assert 0.65 < accuracy < 0.80, "nearest class mean of pixels, 5-way 5-shot"
