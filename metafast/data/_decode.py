"""Image files to pixels, with Pillow."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from metafast.data._arguments import integer, one_of

if TYPE_CHECKING:
    from PIL.Image import Image

#: x, y, width and height of the part of an image to take, in pixels from its upper left corner.
Box = tuple[float, float, float, float]
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
_FITS = ("crop", "stretch")


@dataclass(frozen=True)
class Decoder:
    """Makes arrays `[channels, size, size]` uint8 of image files.

    The image is turned as its EXIF entry says, put on white where it is transparent, cut to its box if it
    has one, reduced or enlarged with a Lanczos filter, and made grey or RGB before that, so that one-bit
    images get smooth edges.

    Args:
        size: height and width.
        channels: 1 for grey, 3 for red, green and blue.
        fit: "crop" takes the largest centred square, "stretch" all of the image.
    """

    size: int
    channels: int = 3
    fit: str = "crop"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", integer("size", self.size, minimum=1))
        if integer("channels", self.channels, minimum=1) not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        one_of("fit", self.fit, _FITS)

    def file(self, path: str, box: Box | None = None) -> NDArray[np.uint8]:
        """Read one file; what is wrong with it raises an exception of any kind."""
        from PIL import Image, ImageOps

        with Image.open(path) as image:
            return self.image(ImageOps.exif_transpose(image), box)

    def image(self, image: Image, box: Box | None = None) -> NDArray[np.uint8]:
        """Pixels of an image that is open already."""
        from PIL.Image import Resampling

        image = _plain(image, "L" if self.channels == 1 else "RGB")
        width, height = image.size
        left, top, right, bottom = 0.0, 0.0, float(width), float(height)
        if box is not None:
            x, y, w, h = box
            left, top, right, bottom = max(left, x), max(top, y), min(right, x + w), min(bottom, y + h)
            if not (left < right and top < bottom):
                raise ValueError(f"the box {box} is outside the {width} x {height} image")
        if self.fit == "crop":
            side = min(right - left, bottom - top)
            left, top = left + (right - left - side) / 2, top + (bottom - top - side) / 2
            right, bottom = left + side, top + side
        if (left, top, right, bottom) != (0, 0, self.size, self.size) or image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Resampling.LANCZOS, (left, top, right, bottom))
        pixels = np.asarray(image, dtype=np.uint8).reshape(self.size, self.size, self.channels)
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _plain(image: Image, mode: str) -> Image:
    """The image as 8-bit grey or RGB."""
    from PIL import Image as images

    if image.mode.startswith("I"):
        # 16 bits of grey, which Pillow's own conversion would cut off at 255.
        values = np.asarray(image).astype(np.int64)
        if values.max(initial=0) > 255:
            values >>= 8
        image = images.fromarray(values.clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("it holds floating-point numbers, of which the range is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def need_pillow(what: str) -> None:
    """Raise if Pillow is not there.

    Raises:
        ImportError: saying how to get it.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ImportError(f"{what} needs Pillow to read images: pip install metafast[train]")


def decode_files(
    decoder: Decoder, paths: Sequence[str], boxes: Sequence[Box] | None = None
) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """Decode files in threads, with a progress bar where somebody watches.

    Returns:
        Pixels `[N, channels, size, size]`, and for each file that could not be read its number and why.
    """
    from PIL import Image

    # Threads that met an unknown format at once would otherwise load Pillow's plugins over one another.
    Image.init()
    pixels = np.zeros((len(paths), decoder.channels, decoder.size, decoder.size), dtype=np.uint8)

    def decode(number: int) -> str:
        try:
            pixels[number] = decoder.file(paths[number], None if boxes is None else boxes[number])
        except Exception as error:  # Decoders of damaged data raise whatever they stumble over.
            return _reason(error, paths[number])
        return ""

    failed = {}
    with quiet(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = pool.map(decode, range(len(paths)))
        try:
            for number, reason in enumerate(_watched(results, len(paths))):
                if reason:
                    failed[number] = reason
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return pixels, failed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings of Pillow's about large images and odd metadata: pixels come, or an exception does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: Exception, path: str) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.replace(repr(path), "").strip() or type(error).__name__


def _watched(results: Any, total: int) -> Any:
    """`results` with a progress bar if standard error is a terminal and tqdm is installed."""
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return results
    tqdm = importlib.import_module("tqdm").tqdm
    return tqdm(results, "reading images", total, unit=" images", leave=False, dynamic_ncols=True)
