"""Data sets from folders, archives and tables, on small stand-ins in the layouts people have."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tarfile
import textwrap
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metafast.data import (
    EpisodeLoader,
    EpisodeSampler,
    FeatureClasses,
    ImageClasses,
    ImageFiles,
    check,
    cifar_fs,
    cub,
    fc100,
    feature_table,
    image_folder,
    mini_imagenet,
    tensors,
)
from metafast.data._cache import Decoded, load, save
from metafast.data._splits import published_split

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def paint(path: Path, value: int, shape: tuple[int, ...] = (8, 8, 3), **options: Any) -> Path:
    """An image of one grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, dtype=np.uint8)).save(path, **options)
    return path


def values(data: Any) -> list[list[int]]:
    """The first byte of every image, by class."""
    first = data.images[:, 0, 0, 0].tolist()
    starts, sizes = data.class_starts.tolist(), data.class_sizes.tolist()
    return [first[a : a + n] for a, n in zip(starts, sizes, strict=True)]


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """Three classes of 3, 2 and 4 images, the last nested, beside files that are no images."""
    root = tmp_path / "animals"
    for name, first, count in (("dog", 10, 3), ("cat", 20, 2), ("birds/owl", 30, 4)):
        for i in range(count):
            paint(root / name / f"{i}.png", first + i)
    (root / "dog" / "notes.txt").write_text("good dogs")
    (root / "README.md").write_text("animals")
    (root / "dog" / "._0.png").write_bytes(b"what another system leaves")
    (root / "empty").mkdir()
    return root


def test_folders_are_classes(animals: Path) -> None:
    data = image_folder(animals, size=8)
    assert isinstance(data, ImageClasses)
    assert data.names == ("birds/owl", "cat", "dog")
    assert values(data) == [[30, 31, 32, 33], [20, 21], [10, 11, 12]]
    assert data.images.shape == (9, 3, 8, 8) and data.images.dtype == torch.uint8
    check(EpisodeSampler(data, 2, 1, 1, tasks=3)(0))


def test_depth_joins_folders(animals: Path) -> None:
    paint(animals / "birds" / "hawk" / "0.png", 40)
    paint(animals / "dog" / "puppies" / "9.png", 19)
    data = image_folder(animals, 8, depth=1)
    assert data.names == ("birds", "cat", "dog")
    assert values(data) == [[40, 30, 31, 32, 33], [20, 21], [10, 11, 12, 19]]
    assert image_folder(animals, 8).names == ("birds/hawk", "birds/owl", "cat", "dog", "dog/puppies")


def test_random_split_of_folders(tmp_path: Path) -> None:
    for c in range(10):
        paint(tmp_path / f"c{c}" / "0.png", c)
    parts = [image_folder(tmp_path, 8, split) for split in ("train", "val", "test", "trainval")]
    train, val, test, trainval = (set(part.names) for part in parts)
    assert (len(train), len(val), len(test)) == (6, 2, 2)
    assert len(train | val | test) == 10 and trainval == train | val
    whole = image_folder(tmp_path, 8)
    assert whole.split("test").names == parts[2].names
    halves = image_folder(tmp_path, 8, "train", fractions=(0.5, 0.25, 0.25), split_seed=4)
    assert halves.names == whole.split("train", (0.5, 0.25, 0.25), seed=4).names


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    for part, name, value in (("train", "a", 1), ("train", "b/c", 2), (val, "d", 3), ("test", "e", 4)):
        paint(tmp_path / part / name / "0.png", value)
    found = {split: image_folder(tmp_path, 8, split) for split in ("train", "val", "trainval", "test")}
    assert {split: data.names for split, data in found.items()} == {
        "train": ("a", "b/c"),
        "val": ("d",),
        "trainval": ("a", "b/c", "d"),
        "test": ("e",),
    }
    assert values(found["trainval"]) == [[1], [2], [3]]


def test_split_folders_must_be_disjoint_and_there(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "dog" / "0.png", 1)
    paint(tmp_path / "test" / "cat" / "0.png", 1)
    with pytest.raises(
        ValueError, match=r"^split 'val' needs the folder val or valid or validation in .*, which has"
    ):
        image_folder(tmp_path, 8, "val")
    paint(tmp_path / "test" / "dog" / "0.png", 1)
    with pytest.raises(
        ValueError, match=r"no class in common, got 'dog' in both train and test of .* at random$"
    ):
        image_folder(tmp_path, 8, "train")


def test_pixels_are_cropped_or_stretched(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200
    path = tmp_path / "a" / "0.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    assert image_folder(tmp_path, 10).images.float().mean() > 190
    stretched = image_folder(tmp_path, 10, fit="stretch").images[0, 0].float()
    assert (
        abs(float(stretched.mean()) - 200 / 3) < 3
        and stretched[:, 5].min() > 190
        and stretched[:, 0].max() < 10
    )


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(9, 9, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    assert np.array_equal(image_folder(tmp_path, 9).images[0].permute(1, 2, 0).numpy(), pixels)


def test_kinds_of_images(tmp_path: Path) -> None:
    """What each kind of file is on average, as RGB."""
    folder = tmp_path / "a"
    folder.mkdir()
    grey = np.full((8, 8), 100, dtype=np.uint8)
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    clear[:4] = (0, 0, 0, 255)
    bits = np.indices((8, 8)).sum(0) % 2 * 255
    images = {
        "a-grey.png": Image.fromarray(grey),
        "b-clear.png": Image.fromarray(clear),
        "c-palette.png": Image.fromarray(grey).convert("P"),
        "d-bits.png": Image.fromarray(bits.astype(np.uint8)).convert("1"),
        "e-16-bit.png": Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16)),
        "f-cmyk.jpg": Image.fromarray(np.full((8, 8, 3), 100, dtype=np.uint8)).convert("CMYK"),
        "g-grey.webp": Image.fromarray(grey).convert("RGB"),
    }
    for name, image in images.items():
        image.save(folder / name)
    means = image_folder(tmp_path, 8).images.float().mean((1, 2, 3)).tolist()
    assert np.abs(np.array(means) - [100, 127.5, 100, 127.5, 100, 100, 100]).max() < 4
    assert image_folder(tmp_path, 8, channels=1).images.shape == (7, 1, 8, 8)
    half = image_folder(tmp_path, 4, channels=1).images[3]
    assert (half.float() - 127.5).abs().max() < 40, "one-bit images are smoothed"


def test_exif_rotation(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png", exif=exif)
    shown = image_folder(tmp_path, 8, channels=1).images[0, 0]
    assert (shown[:, 4:] == 255).all() and (shown[:, :4] == 0).all()


def test_rotations_of_folders(animals: Path) -> None:
    assert image_folder(animals, 8, rotations=True).num_classes == 12


def test_lazy_classes_are_the_decoded_ones(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for c in range(3):
        (tmp_path / f"c{c}").mkdir()
        for i in range(4):
            pixels = generator.integers(256, size=(9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"c{c}" / f"{i}.png")
    decoded = image_folder(tmp_path, 8, rotations=True, cache=False)
    lazy = image_folder(tmp_path, 8, rotations=True, lazy=True)
    assert (
        isinstance(lazy, ImageFiles)
        and lazy.names == decoded.names
        and not (tmp_path / ".metafast-cache").exists()
    )
    for a, b in ((decoded, lazy), (decoded.subset(["c2", "c0"]), lazy.subset(["c2", "c0"]))):
        left, right = (EpisodeSampler(data, 2, 2, 1, tasks=5, seed=1)(0) for data in (a, b))
        assert torch.equal(left.support_x, right.support_x) and torch.equal(left.query_x, right.query_x)
    loader = EpisodeLoader(EpisodeSampler(lazy, 2, 1, 1, tasks=2), workers=1)
    assert torch.equal(loader(3).query_x, EpisodeSampler(decoded, 2, 1, 1, tasks=2)(3).query_x)
    loader.close()
    assert lazy.to("meta").device.type == "meta"
    (tmp_path / "c1" / "2.png").write_bytes(b"cut")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'c1' / '2.png'))} cannot be read: "):
        lazy.gather(torch.tensor([6]))


def broken_png() -> bytes:
    """A PNG of which the pixels are cut off in the middle."""
    pixels = io.BytesIO()
    noise = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(pixels, "PNG")
    return pixels.getvalue()[:2000]


def test_every_corrupt_file_is_named(animals: Path) -> None:
    (animals / "dog" / "1.png").write_bytes(b"<html>404 Not Found</html>")
    (animals / "cat" / "0.png").write_bytes(broken_png())
    (animals / "birds" / "owl" / "3.png").write_bytes(b"")
    (animals / "cat" / "link.png").symlink_to(animals / "nowhere.png")
    message = (
        r"^4 of 10 image files in .*animals cannot be read; remove or replace them, or leave them out with "
        r"skip_corrupt=True:\n  birds/owl/3\.png: .+\n  cat/0\.png: .+\n  cat/link\.png: No such file or directory"
        r"\n  dog/1\.png: .+$"
    )
    for _ in ("decoded", "from the cache"):
        with pytest.raises(ValueError, match=message):
            image_folder(animals, 8)
    for _ in ("from the cache", "again"):
        with pytest.warns(
            UserWarning, match=r"^4 of 10 image files .* cannot be read and are left out:\n  birds"
        ):
            data = image_folder(animals, 8, skip_corrupt=True)
        assert values(data) == [[30, 31, 32], [21], [10, 12]]
    (animals / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^5 of 10 image files .*, which leaves no image of 'cat':\n"):
        image_folder(animals, 8, skip_corrupt=True)


def test_unreadable_file_is_named(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Image.open

    def refuse(path: str) -> Any:
        if path.endswith(os.path.join("dog", "1.png")):
            raise PermissionError(13, "Permission denied", path)
        return original(path)

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match=r"^1 of 9 image files .*:\n  dog/1\.png: Permission denied$"):
        image_folder(animals, 8)
    monkeypatch.undo()
    assert values(image_folder(animals, 8)) == [[30, 31, 32, 33], [20, 21], [10, 11, 12]], "tried again"


def test_damaged_images_never_escape_the_report(tmp_path: Path) -> None:
    """Whatever exception a decoder raises, it is of one file and ends up in the list."""
    noise = np.random.default_rng(1).integers(256, size=(16, 16, 3), dtype=np.uint8)
    generator = random.Random(0)
    (tmp_path / "a").mkdir()
    paint(tmp_path / "a" / "right.png", 5)
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, kind)
        for i in range(8):
            damaged = bytearray(buffer.getvalue())
            for _ in range(4):
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            cut = damaged[: generator.randrange(1, len(damaged))] if i % 2 else damaged
            (tmp_path / "a" / f"{i}.{kind}").write_bytes(cut)
    with pytest.warns(UserWarning, match=r"^\d+ of 57 image files"):
        data = image_folder(tmp_path, 8, skip_corrupt=True)
    assert 1 <= len(data.images) < 57


def test_folder_errors(tmp_path: Path, animals: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^root must be a folder .*, got '.*nowhere', which is not there$"
    ):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"README\.md', which is no folder$"):
        image_folder(animals / "README.md")
    with pytest.raises(
        ValueError, match=r"^root must hold a folder of images for each class, got no image in "
    ):
        image_folder(animals / "empty")
    with pytest.raises(ValueError, match=r"^size must be at least 1, got 0$"):
        image_folder(animals, 0)
    with pytest.raises(ValueError, match=r"^fit must be 'crop' or 'stretch', got 'pad'$"):
        image_folder(animals, fit="pad")
    with pytest.raises(ValueError, match=r"^channels must be 1 or 3, got 4$"):
        image_folder(animals, channels=4)
    with pytest.raises(ValueError, match=r"^depth must be at least 1, got 0$"):
        image_folder(animals, depth=0)
    with pytest.raises(ValueError, match=r"^split must be 'train', 'val', 'trainval' or 'test', got 'dev'$"):
        image_folder(animals, split="dev")
    with pytest.raises(ValueError, match=r"^skip_corrupt must be False for lazy classes"):
        image_folder(animals, lazy=True, skip_corrupt=True)
    paint(animals / "0.png", 1)
    with pytest.raises(
        ValueError,
        match=r"^images must be in a folder for each class, got 1 in '.*animals' itself, such as '0\.png'$",
    ):
        image_folder(animals)


def test_links_are_followed_and_do_not_loop(animals: Path) -> None:
    (animals / "birds" / "everything").symlink_to(animals)
    (animals / "hound").symlink_to(animals / "dog")
    assert image_folder(animals, 8).names == ("birds/owl", "cat", "dog", "hound")


def test_pillow_is_asked_for(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ImportError, match=r"^image_folder needs Pillow to read images: pip install metafast\[train\]$"
    ):
        image_folder(animals)


def kept(root: Path) -> list[Path]:
    return sorted((root / ".metafast-cache").glob("*.npz"))


@pytest.fixture
def decoded_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of files in each call that decodes."""
    from metafast.data import image_folder as function

    module = sys.modules[function.__module__]
    calls: list[int] = []
    original = module.decode_files  # type: ignore[attr-defined]

    def counted(decoder: Any, paths: Any, boxes: Any) -> Any:
        calls.append(len(paths))
        return original(decoder, paths, boxes)

    monkeypatch.setattr(module, "decode_files", counted)
    return calls


def test_images_are_decoded_once(animals: Path, decoded_files: list[int]) -> None:
    first = image_folder(animals, 8)
    again = image_folder(str(animals), 8, rotations=True)
    assert decoded_files == [9] and len(kept(animals)) == 1
    assert torch.equal(first.images, again.images)
    again.images.fill_(0)
    assert torch.equal(image_folder(animals, 8).images, first.images), "the cache is no shared memory"
    assert not list((animals / ".metafast-cache").glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "options"),
    [
        pytest.param(lambda root: paint(root / "dog" / "7.png", 99), {}, id="new-file"),
        pytest.param(lambda root: (root / "dog" / "0.png").unlink(), {}, id="file-gone"),
        pytest.param(lambda root: (root / "dog" / "0.png").rename(root / "dog" / "8.png"), {}, id="renamed"),
        pytest.param(lambda root: os.utime(root / "dog" / "0.png", (1, 1)), {}, id="time"),
        pytest.param(lambda root: None, {"fit": "stretch"}, id="fit"),
        pytest.param(lambda root: None, {"channels": 1}, id="channels"),
        pytest.param(lambda root: None, {"size": 7}, id="size"),
    ],
)
def test_changes_are_seen(
    animals: Path, decoded_files: list[int], change: Callable[[Path], Any], options: dict[str, Any]
) -> None:
    image_folder(animals, 8)
    change(animals)
    fresh = image_folder(animals, **{"size": 8, **options}, cache=False)
    found = image_folder(animals, **{"size": 8, **options})
    assert len(decoded_files) == 3
    assert found.names == fresh.names and torch.equal(found.images, fresh.images)


def test_cache_elsewhere_or_nowhere(animals: Path, tmp_path: Path, decoded_files: list[int]) -> None:
    for _ in range(2):
        image_folder(animals, 8, cache=tmp_path / "made" / "cache")
    assert decoded_files == [9] and len(list((tmp_path / "made" / "cache").glob("*.npz"))) == 1
    twin = tmp_path / "twin"
    for name in ("birds/owl", "cat", "dog"):
        for path in (animals / name).glob("[0-9].png"):
            copy = paint(twin / name / path.name, 200)
            copy.write_bytes(copy.read_bytes().ljust(path.stat().st_size, b"\0"))
            os.utime(copy, ns=(path.stat().st_mtime_ns,) * 2)
    assert (image_folder(twin, 8, cache=tmp_path / "made" / "cache").images == 200).all(), "of another folder"
    image_folder(animals, 8, cache=False)
    assert decoded_files == [9, 9, 9] and not (animals / ".metafast-cache").exists()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: data[:-1], id="last-byte"),
        pytest.param(lambda data: data[100:], id="first-bytes"),
        pytest.param(lambda data: data[:900] + bytes([data[900] ^ 255]) + data[901:], id="flipped"),
        pytest.param(lambda data: b"<html>", id="foreign"),
        pytest.param(lambda data: npy(np.zeros(3)), id="array"),
        pytest.param(lambda data: npy(np.array([{}], dtype=object)), id="objects"),
    ],
)
def test_a_damaged_cache_is_made_anew(
    animals: Path, decoded_files: list[int], damage: Callable[[bytes], bytes]
) -> None:
    first = image_folder(animals, 8)
    (path,) = kept(animals)
    path.write_bytes(damage(path.read_bytes()))
    assert torch.equal(image_folder(animals, 8).images, first.images)
    assert torch.equal(image_folder(animals, 8).images, first.images)
    assert decoded_files == [9, 9]


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_what_cannot_be_kept_is_given_all_the_same(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (animals / "file").write_text("")
    with pytest.warns(
        UserWarning, match=r"^the decoded images are not kept: .*file.cache cannot be written \(.+\);"
    ):
        assert len(image_folder(animals, 8, cache=animals / "file" / "cache").images) == 9

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(
        UserWarning, match=r"\(No space left on device\); give another folder as cache, or cache=False$"
    ):
        assert len(image_folder(animals, 8).images) == 9
    assert not kept(animals) and not list((animals / ".metafast-cache").glob("*.tmp"))


def test_save_and_load(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)
    for alone in (True, False):
        save(tmp_path / "a.npz", Decoded(pixels, {1: "cut\n off", 0: "é"}), alone)
        found = load(tmp_path / "a.npz")
        assert found is not None and np.array_equal(found.pixels, pixels)
        assert found.failed == {1: "cut\n off", 0: "é"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert load(tmp_path / "b.npz") is None


class ForkServer:
    """Runs programs that fork and kill themselves, each in a process of its own that need not import torch."""

    PROGRAM = """
        import json, os, random, signal, sys, time, traceback
        from pathlib import Path
        import numpy as np
        from metafast.data import image_folder
        from metafast.data._cache import Decoded, load, save

        def child(function):
            process = os.fork()
            if process == 0:
                try:
                    function()
                finally:
                    os._exit(0)
            return process

        for line in sys.stdin:
            code, sys.argv, output = json.loads(line)
            process = os.fork()
            if process == 0:
                status = 1
                try:
                    with open(output, "w") as sys.stdout:
                        exec(code, dict(globals()))
                    status = 0
                except BaseException:
                    Path(output).write_text(traceback.format_exc())
                os._exit(status)
            print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    """

    def __init__(self, folder: Path) -> None:
        self.output = folder / "output"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(self.PROGRAM)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, code: str, *arguments: Path) -> str:
        """What the program prints."""
        assert self.process.stdin and self.process.stdout
        request = (textwrap.dedent(code), ["", *map(str, arguments)], str(self.output))
        print(json.dumps(request), file=self.process.stdin, flush=True)
        status = self.process.stdout.readline()
        assert status == "0\n", self.output.read_text()
        return self.output.read_text()


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("forked"))
    with server.process:
        yield server
        assert server.process.stdin
        server.process.stdin.close()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_a_kill_while_writing_leaves_the_cache_complete_or_absent(forked: ForkServer, tmp_path: Path) -> None:
    printed = forked(
        """
        folder = Path(sys.argv[1])
        path, draw = folder / "key.npz", random.Random(0)

        def write():
            for value in range(10 ** 6):
                pixels = np.full((200, 3, 84, 84), value % 256, dtype=np.uint8)
                if value % 3 == 0:
                    path.unlink(missing_ok=True)
                save(path, Decoded(pixels, {}), alone=True)

        absent = torn = 0
        for trial in range(40):
            process = child(write)
            time.sleep(draw.uniform(0.005, 0.06))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            torn += path.with_suffix(".tmp").exists()
            if path.exists():
                found = load(path)
                assert found is not None, "neither complete nor absent"
                assert found.pixels.shape == (200, 3, 84, 84)
                assert (found.pixels == found.pixels[0, 0, 0, 0]).all(), "of two writings"
            else:
                absent += 1
        assert len(list(folder.iterdir())) <= 2, "what the dead left behind adds up"
        print(torn)
        """,
        tmp_path,
    )
    assert int(printed) >= 20, "most kills have to hit the writing"


@needs_fork
def test_a_kill_at_any_moment_of_image_folder(forked: ForkServer, animals: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "expected.npy", image_folder(animals, 64, cache=False).images.numpy())
    forked(
        """
        root, expected, folder = sys.argv[1], np.load(sys.argv[2]), Path(sys.argv[3])
        draw = random.Random(1)
        for trial in range(25):
            process = child(lambda: image_folder(root, 64, cache=folder))
            time.sleep(draw.uniform(0, 0.03))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            assert all(load(path) is not None for path in folder.glob("*.npz"))
            assert np.array_equal(image_folder(root, 64, cache=folder).images.numpy(), expected)
            assert np.array_equal(image_folder(root, 64, cache=folder).images.numpy(), expected)
            assert len(list(folder.glob("*.npz"))) == 1 and not list(folder.glob("*.tmp"))
            for path in folder.glob("*.npz"):
                path.unlink()
        """,
        animals,
        tmp_path / "expected.npy",
        tmp_path / "cache",
    )


@needs_fork
def test_of_several_processes_one_decodes(forked: ForkServer, animals: Path, tmp_path: Path) -> None:
    printed = forked(
        """
        root, log = sys.argv[1], Path(sys.argv[2])
        module = sys.modules[image_folder.__module__]
        decode_files = module.decode_files

        def slowly(*arguments):
            with log.open("a") as file:
                file.write("decoded ")
            time.sleep(0.3)
            return decode_files(*arguments)

        def read():
            found = image_folder(root, 8)
            with log.open("a") as file:
                file.write(f"{len(found.images)} ")

        module.decode_files = slowly
        for process in [child(read) for _ in range(4)]:
            os.waitpid(process, 0)
        print(log.read_text())
        """,
        animals,
        tmp_path / "log",
    )
    assert printed.split() == ["decoded", "9", "9", "9", "9"]


def test_published_splits_are_complete() -> None:
    sizes = {
        "mini_imagenet_ravi": (64, 16, 20),
        "cub": (100, 50, 50),
        "cifar_fs": (64, 16, 20),
        "fc100": (12, 4, 4),
        "omniglot_vinyals": (1028, 172, 423),
    }
    for file, counts in sizes.items():
        parts = [published_split(file, split) for split in ("train", "val", "test")]
        assert tuple(map(len, parts)) == counts
        assert len(set().union(*parts)) == sum(counts), "the parts share no class"
        assert published_split(file, "trainval") == parts[0] + parts[1]
    assert all(re.fullmatch(r"n\d{8}", name) for name in published_split("mini_imagenet_ravi", "train"))
    birds = [published_split("cub", split) for split in ("train", "val", "test")]
    assert [{(int(name[:3]) - 1) % 4 for name in part} for part in birds] == [{0, 2}, {1}, {3}]
    pairs = [pair.split("/") for split in ("trainval", "test") for pair in published_split("cifar_fs", split)]
    assert {pair[0] for pair in pairs} == {
        s for p in ("trainval", "test") for s in published_split("fc100", p)
    }


SYNSETS = published_split("mini_imagenet_ravi", "val")


def mini_images(root: Path, layout: str, per_class: int = 2) -> Path:
    for c, name in enumerate(SYNSETS):
        for i in range(per_class):
            file = f"{name}{i + 3:08d}.jpg"
            paint(root / layout.format(name=name) / file, 10 * c + i, (6, 6, 3), quality=100)
    return root


MINI = [
    pytest.param("val/{name}", id="split-folders"),
    pytest.param("images/{name}", id="class-folders"),
    pytest.param("{name}", id="root"),
    pytest.param("images", id="flat"),
    pytest.param("", id="flat-root"),
]


@pytest.mark.parametrize("layout", MINI)
def test_mini_imagenet_layouts(tmp_path: Path, layout: str) -> None:
    root = mini_images(tmp_path, layout)
    (root / "val.csv").write_text("filename,label\n")
    data = mini_imagenet(root, "val", 6, complete=False)
    assert data.names == SYNSETS and data.images.shape == (32, 3, 6, 6)
    assert np.abs(np.array(values(data)) - [[10 * c, 10 * c + 1] for c in range(16)]).max() <= 2


def test_mini_imagenet_must_be_complete(tmp_path: Path) -> None:
    root = mini_images(tmp_path, "images", 1)
    with pytest.raises(
        ValueError,
        match=r"^every class must have 600 images, got 1 of 'n01855672' and 15 more classes with another number "
        r"in '.*'; complete=False takes what is there$",
    ):
        mini_imagenet(root, "val", 6)
    with pytest.raises(
        FileNotFoundError,
        match=r"^64 of the 64 classes are not in .*: n01532829, .* and 59 more; expected a folder",
    ):
        mini_imagenet(root, "train")
    with pytest.raises(
        FileNotFoundError, match=r"^root must be the folder of mini-ImageNet, got '.*nowhere'"
    ):
        mini_imagenet(root / "nowhere")
    with pytest.raises(ValueError, match=r"^split must be 'train', 'val', 'trainval' or 'test', got 'dev'$"):
        mini_imagenet(root, "dev")


def test_two_folders_for_a_class_are_refused(tmp_path: Path) -> None:
    mini_images(tmp_path, "val/{name}", 1)
    mini_images(tmp_path, "copy/{name}", 1)
    with pytest.raises(
        ValueError, match=r"^root must hold one folder for the class '.*', got 'copy/(n\d+)' and 'val/\1' in "
    ):
        mini_imagenet(tmp_path, "val", complete=False)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_mini_imagenet_pickles(tmp_path: Path, protocol: int) -> None:
    pixels = np.arange(16 * 3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 6, 6, 3), dtype=np.uint8)
    # The rows of a class need not follow one another.
    classes = OrderedDict((name, [np.int64(c), c + 16, c + 32]) for c, name in enumerate(SYNSETS))
    content = {"image_data": pixels, "class_dict": classes}
    (tmp_path / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(content, protocol))
    data = mini_imagenet(tmp_path, "val", 6, complete=False)
    assert data.names == SYNSETS
    assert values(data) == [[c, c + 16, c + 32] for c in range(16)]
    assert mini_imagenet(tmp_path, "val", 4, complete=False).images.shape == (48, 3, 4, 4)
    with pytest.raises(ValueError, match=r"^every class must have 600 images, got 3 of"):
        mini_imagenet(tmp_path, "val", 6)


class Harmful:
    """What a pickle can do: it calls a function when it is read."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda witness: pickle.dumps(Harmful(witness)), id="call"),
        pytest.param(lambda witness: pickle.dumps({"image_data": Harmful(witness)}), id="inside"),
        pytest.param(lambda witness: b"cos\nsystem\n(S'true'\ntR.", id="system"),
        pytest.param(lambda witness: pickle.dumps({"image_data": torch.nn.Linear}), id="class"),
        pytest.param(lambda witness: pickle.dumps({"image_data": np.zeros(3)})[:-20], id="truncated"),
        pytest.param(lambda witness: b"", id="empty"),
        pytest.param(lambda witness: pickle.dumps([1]), id="list"),
        pytest.param(lambda witness: pickle.dumps({"image_data": np.zeros((2, 6, 6, 3))}), id="floats"),
        pytest.param(lambda witness: pickle.dumps({"image_data": np.zeros(2, dtype=object)}), id="objects"),
    ],
)
def test_pickles_run_no_code(tmp_path: Path, content: Callable[[Path], bytes]) -> None:
    path = tmp_path / "mini-imagenet-cache-val.pkl"
    path.write_bytes(content(tmp_path / "witness"))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} "):
        mini_imagenet(tmp_path, "val")
    assert not (tmp_path / "witness").exists()


CIFAR = sorted(
    pair.split("/")[1] for split in ("trainval", "test") for pair in published_split("cifar_fs", split)
)


def python2(content: dict[str, Any]) -> bytes:
    """A pickle of protocol 2 in which text and pixels are bytes, as Python 2 wrote them."""
    if "data" not in content:
        lists = b"".join(
            b"U"
            + bytes([len(key)])
            + key.encode()
            + b"]("
            + b"".join(b"U" + bytes([len(name)]) + name.encode() for name in names)
            + b"e"
            for key, names in content.items()
        )
        return b"\x80\x02}(" + lists + b"u."
    data, labels = content["data"], content["fine_labels"]
    raw = data.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + b"M" + struct.pack("<H", len(data)) + b"M" + struct.pack("<H", 3072) + b"\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    return b"\x80\x02}(U\x04data" + array + b"U\x0bfine_labels](" + numbers + b"eu."


def cifar_pickles(write: Callable[[dict[str, Any]], bytes]) -> dict[str, bytes]:
    """The three files of CIFAR-100 with 2 training images and 1 test image of each class."""
    parts: dict[str, bytes] = {"meta": write({"fine_label_names": CIFAR})}
    for part, count in (("train", 2), ("test", 1)):
        labels = [*range(100)] * count
        pixels = np.zeros((100 * count, 3, 32, 32), dtype=np.uint8)
        pixels[:, 0] = np.array(labels)[:, None, None]
        pixels[:, 1] = np.arange(100 * count)[:, None, None] // 100 + (2 if part == "test" else 0)
        parts[part] = write({"data": pixels.reshape(-1, 3072), "fine_labels": labels})
    return parts


def cifar_folder(root: Path, parts: dict[str, bytes]) -> None:
    for part, content in parts.items():
        path = root / "cifar-100-python" / part
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def cifar_tar(root: Path, parts: dict[str, bytes]) -> None:
    with tarfile.open(root / "cifar-100-python.tar.gz", "w:gz") as archive:
        for part, content in parts.items():
            member = tarfile.TarInfo(f"cifar-100-python/{part}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("write", [pickle.dumps, python2], ids=["python3", "python2"])
@pytest.mark.parametrize("store", [cifar_folder, cifar_tar], ids=["folder", "tar"])
def test_cifar_archive(tmp_path: Path, store: Callable[..., None], write: Callable[..., bytes]) -> None:
    store(tmp_path, cifar_pickles(write))
    for split, classes in (("train", 64), ("val", 16), ("test", 20), ("trainval", 80)):
        data = cifar_fs(tmp_path, split, complete=False)
        assert len(data.names) == classes and data.images.shape == (3 * classes, 3, 32, 32)
        labels = [CIFAR.index(name) for name in data.names]
        assert values(data) == [[label] * 3 for label in labels]
        assert data.images[:3, 1, 5, 7].tolist() == [0, 1, 2], "training images first"
    assert cifar_fs(tmp_path, "val", 16, complete=False).images.shape == (48, 3, 16, 16)
    with pytest.raises(ValueError, match=r"^every class must have 600 images, got 3 of 'beaver'"):
        cifar_fs(tmp_path, "val")


def test_fc100_has_whole_superclasses(tmp_path: Path) -> None:
    cifar_folder(tmp_path, cifar_pickles(pickle.dumps))
    parts = {split: fc100(tmp_path, split, complete=False).names for split in ("train", "val", "test")}
    assert {split: len(names) for split, names in parts.items()} == {"train": 60, "val": 20, "test": 20}
    assert len(set().union(*parts.values())) == 100
    assert {"baby", "boy", "girl", "man", "woman"} <= set(parts["test"])


@pytest.mark.parametrize("layout", ["data/{name}", "cifar100/data/{name}", "meta-val/{name}"])
def test_cifar_folders(tmp_path: Path, layout: str) -> None:
    names = [pair.split("/")[1] for pair in published_split("cifar_fs", "val")]
    for c, name in enumerate(names):
        for i in range(2):
            paint(tmp_path / layout.format(name=name) / f"{i}.png", 2 * c + i, (32, 32, 3))
    data = cifar_fs(tmp_path, "val", complete=False)
    assert data.names == tuple(names) and values(data) == [[2 * c, 2 * c + 1] for c in range(16)]
    with pytest.raises(
        FileNotFoundError, match=r"^20 of the 20 classes are not in .*expected a folder named like it,"
    ):
        cifar_fs(tmp_path, "test")


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        (
            "train",
            {"data": np.zeros((3, 3072), dtype=np.uint8), "fine_labels": [0, 1]},
            r"train must hold data",
        ),
        (
            "train",
            {"data": np.zeros((1, 3072), dtype=np.uint8), "fine_labels": [100]},
            r"fine_labels below 100",
        ),
        (
            "test",
            {"data": [1, 2], "fine_labels": [0]},
            r"test must hold uint8 images data of 2 dimensions, got list",
        ),
        ("meta", [1], r"meta must hold a dictionary, got list"),
    ],
    ids=["labels", "number", "data", "meta"],
)
def test_damaged_cifar(tmp_path: Path, part: str, content: Any, message: str) -> None:
    cifar_folder(tmp_path, {**cifar_pickles(pickle.dumps), part: pickle.dumps(content)})
    with pytest.raises(ValueError, match=message):
        cifar_fs(tmp_path)


def test_damaged_cifar_tar(tmp_path: Path) -> None:
    cifar_tar(tmp_path, cifar_pickles(pickle.dumps))
    path = tmp_path / "cifar-100-python.tar.gz"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>", zlib.compress(b"")):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"^{re.escape(str(path))} is no intact archive of CIFAR-100 \("
        ):
            cifar_fs(tmp_path)


BIRDS = published_split("cub", "val")


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """CUB_200_2011 with two images for each class of the val split: a bright square in the box, dark around."""
    root = tmp_path / "CUB_200_2011"
    images, boxes = [], []
    for c, name in enumerate(BIRDS):
        for i in range(2):
            short = name.split(".")[1]
            file = f"{name}/{short}_{i}.png"
            pixels = np.zeros((20, 30, 3), dtype=np.uint8)
            pixels[4:12, 6:14] = 100 + c
            path = root / "images" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
            paint(root / "segmentations" / file, 1)
            images.append(f"{2 * c + i + 1} {file}")
            boxes.append(f"{2 * c + i + 1} 6.0 4.0 8.0 8.0")
    (root / "images.txt").write_text("\n".join(images) + "\n")
    (root / "bounding_boxes.txt").write_text("\n".join(boxes) + "\n")
    return root


@pytest.mark.parametrize("outside", [False, True], ids=["folder", "archive"])
def test_cub(birds: Path, outside: bool) -> None:
    root = birds.parent if outside else birds
    data = cub(root, "val", 8, cache=False)
    assert data.names == BIRDS and data.images.shape == (100, 3, 8, 8)
    assert data.images.float().mean() < 60
    boxed = cub(root, "val", 8, crop_to_box=True)
    assert values(boxed) == [[100 + c] * 2 for c in range(50)]
    assert (boxed.images == boxed.images[:, :1, :1, :1]).all()
    assert not torch.equal(cub(root, "val", 8).images, boxed.images), "the cache knows of boxes"


def test_cub_that_is_not_whole(birds: Path) -> None:
    (birds / "images" / BIRDS[3] / f"{BIRDS[3].split('.')[1]}_1.png").unlink()
    with pytest.raises(
        ValueError, match=rf"^1 images that .*images\.txt lists are not there, such as '{BIRDS[3]}/"
    ):
        cub(birds, "val", 8)
    assert cub(birds, "val", 8, complete=False).class_sizes.tolist() == [2] * 3 + [1] + [2] * 46
    (birds / "bounding_boxes.txt").write_text("1 6 4 8\n")
    with pytest.raises(ValueError, match=r"must hold lines 'number x y width height', got '1 6 4 8'$"):
        cub(birds, "val", 8, crop_to_box=True, complete=False)
    (birds / "bounding_boxes.txt").write_text("1 6 4 8 8\n")
    with pytest.raises(ValueError, match=r"must hold a box for each image, got none for "):
        cub(birds, "val", 8, crop_to_box=True, complete=False)
    (birds / "bounding_boxes.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"^crop_to_box needs the lists images\.txt and bounding_boxes\.txt in"
    ):
        cub(birds, "val", 8, crop_to_box=True, complete=False)
    (birds / "images.txt").write_text("one two\n")
    with pytest.raises(ValueError, match=r"images\.txt must hold lines such as '1 001\."):
        cub(birds, "val", 8)
    with pytest.raises(
        FileNotFoundError, match=r"^100 of the 100 classes are not in .*; expected a folder named like"
    ):
        cub(birds, "train")


def test_a_box_outside_its_image_is_named(birds: Path) -> None:
    lines = (birds / "bounding_boxes.txt").read_text().replace("5 6.0 4.0 8.0 8.0", "5 60 4 8 8", 1)
    (birds / "bounding_boxes.txt").write_text(lines)
    with pytest.raises(
        ValueError, match=r"\n  images/.*: the box \(60\.0, 4\.0, 8\.0, 8\.0\) is outside the 30 x 20"
    ):
        cub(birds, "val", 8, crop_to_box=True)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list], ids=["tensor", "array", "list"])
def test_tensors_are_sorted_by_class(kind: Any) -> None:
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    data = tensors(torch.from_numpy(x) if kind is torch.tensor else x, kind([7, 3, 7, 3, 10, 7]))
    assert isinstance(data, FeatureClasses)
    assert data.names == ("3", "7", "10") and data.class_sizes.tolist() == [2, 3, 1]
    assert data.features[:, 0].tolist() == [2, 6, 0, 4, 10, 8]
    check(EpisodeSampler(data.at_least(2), 2, 1, 1, tasks=4)(0))


def test_tensors_of_images() -> None:
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 1, 5, 5)
    data = tensors(images, ["b", "a", "b", "a"], rotations=True)
    assert isinstance(data, ImageClasses) and data.num_classes == 8 and data.names == ("a", "b")
    assert values(data) == [[1, 3], [0, 2]]
    named = tensors(images.float(), [1, 0, 1, 0], names=("zero", "one"))
    assert isinstance(named, ImageClasses) and named.names == ("zero", "one")
    tokens = tensors(torch.zeros(4, 9, dtype=torch.int64), [0, 0, 1, 1])
    assert isinstance(tokens, FeatureClasses) and tokens.features.dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            (torch.zeros(3, 2), [0, 1]),
            ValueError,
            "y must have shape [3], a label for each row of x, got [2]",
            id="y",
        ),
        pytest.param(
            (torch.zeros(3), [0, 1, 2]), ValueError, "x must have shape [N, ...], got [3]", id="rank"
        ),
        pytest.param(
            (torch.zeros(2, 2), [0.5, 1]),
            TypeError,
            "y must hold integers or strings, got float64",
            id="floats",
        ),
        pytest.param(
            (torch.zeros(0, 2), torch.zeros(0).long()),
            ValueError,
            "x must hold at least one row, got none",
            id="none",
        ),
        pytest.param(
            (torch.zeros(2, 2), [0, 2], ("a", "b")),
            ValueError,
            "y must hold the labels 0..1, one for each of names, got [0, 2]",
            id="names",
        ),
        pytest.param(
            (torch.zeros(2, 5, 5, dtype=torch.uint8), [0, 1]),
            ValueError,
            "x must have shape [N, channels, height, width] if it is uint8, got [2, 5, 5]; add a dimension for the "
            "channels, or convert what is no image to another dtype",
            id="bytes",
        ),
        pytest.param(
            (torch.zeros(2, 5), [0, 1], None, True),
            ValueError,
            "rotations needs images [N, channels, height, width], got [2, 5]",
            id="rotations",
        ),
    ],
)
def test_tensors_refuse(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        tensors(*arguments)


def test_feature_table_of_text(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        'label,width,"height, cm"\nrose,1,2\n"tulip, red",3.5,-4e1\nrose,5,6\n\n', encoding="utf-8-sig"
    )
    data = feature_table(path)
    assert data.names == ("rose", "tulip, red")
    assert data.features.tolist() == [[1, 2], [5, 6], [3.5, -40]] and data.features.dtype == torch.float32
    assert feature_table(path, features=["height, cm"]).features.tolist() == [[2], [6], [-40]]
    table = tmp_path / "t.tsv"
    table.write_text("a\tclass\n1\t10\n2\t9\n3\t10\n")
    assert feature_table(str(table), "class").names == ("9", "10"), "whole numbers are sorted by value"
    table.write_text("a\tclass\n1\t07\n2\t7\n")
    assert feature_table(table, "class").names == ("07", "7")


def test_feature_table_of_arrays(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(
        path, features=np.arange(6.0).reshape(3, 2), label=np.array(["b", "a", "b"]), y=np.array([1, 0, 1])
    )
    data = feature_table(path)
    assert data.names == ("a", "b") and data.features.tolist() == [[2, 3], [0, 1], [4, 5]]
    assert feature_table(path, label="y").names == ("0", "1")
    assert data.features.dtype == torch.float32
    np.savez(path, z=np.zeros((3, 1, 2, 2), dtype=np.float64), label=np.array([1, 2, 3]))
    assert feature_table(path, features=["z"]).features.shape == (3, 1, 2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label,a\nx,1\ny,two\n", r", line 3: column 'a' must hold finite numbers, got 'two'$"),
        ("label,a\nx,nan\n", r", line 2: column 'a' must hold finite numbers, got 'nan'$"),
        ("label,a\nx,1e39\n", r", line 2: column 'a' must hold finite numbers, got '1e39'$"),
        ("label,a\nx,1,2\n", r", line 2: expected 2 entries, got 3$"),
        ("class,a\nx,1\n", r": the first line must name the column 'label' once, got class, a$"),
        ("label,a,a\nx,1,2\n", r": the first line must name the column 'a' once, got label, a, a$"),
        ("label\nx\n", r": there must be a column besides 'label'$"),
        ("label,a\n", r": there must be at least one row$"),
        ("", r": the first line must name the column 'label' once, got $"),
    ],
    ids=["word", "nan", "large", "length", "label", "twice", "no-column", "no-row", "empty"],
)
def test_wrong_tables_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}{message}"):
        feature_table(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": np.zeros((2, 1))}, "there must be an array 'label', got features"),
        (
            {"features": np.zeros(2), "label": np.zeros(2, dtype=int)},
            r"'features' must be numbers \[N, \.\.\.\], got",
        ),
        (
            {"features": np.array([[1.0], [np.inf]]), "label": np.arange(2)},
            r"finite numbers, got inf at \[1, 0\]$",
        ),
        (
            {"features": np.array([[{}]], dtype=object), "label": np.arange(1)},
            "Object arrays cannot be loaded",
        ),
    ],
    ids=["label", "rank", "infinite", "objects"],
)
def test_wrong_arrays_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{message}"):
        feature_table(path)


def test_other_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^path must end in \.csv, \.tsv or \.npz, got '.*t\.xlsx'$"):
        feature_table(tmp_path / "t.xlsx")
    with pytest.raises(FileNotFoundError, match=r"^path must be a file, got '.*t\.csv', which is not there$"):
        feature_table(tmp_path / "t.csv")
    (tmp_path / "t.npz").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"^.*t\.npz: "):
        feature_table(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0.5, 1.0]), "label must hold integers or strings, got float64"),
        (np.array([1, 2, 3]), r"label must have shape \[2\], a label for each row of x, got \[3\]"),
    ],
    ids=["numbers", "three"],
)
def test_labels_of_a_table(tmp_path: Path, labels: Any, message: str) -> None:
    np.savez(tmp_path / "table.npz", label=labels, features=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=rf"table\.npz: {message}"):
        feature_table(tmp_path / "table.npz")
