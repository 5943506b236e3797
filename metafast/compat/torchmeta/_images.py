"""What torchvision's transforms of the same names make of Pillow's images, without torchvision."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from metafast.data._decode import need_pillow

if TYPE_CHECKING:
    from PIL.Image import Image

_DTYPES = {"I": np.int32, "I;16": np.int16, "F": np.float32}


class Images(Protocol):
    """Those of one class: arrays ``[height, width(, 3)]`` uint8, or the bytes of files as arrays of one dimension."""

    def __getitem__(self, row: int, /) -> Any: ...

    def __len__(self) -> int: ...


def opened(images: Images, row: int, mode: str | None = None) -> Any:
    """An image as Pillow's, converted to ``mode`` where one is given."""
    need_pillow("this data set")
    from PIL import Image

    array = images[row]
    image = Image.open(io.BytesIO(array.tobytes())) if array.ndim < 2 else Image.fromarray(array)
    return image if mode is None else image.convert(mode)


class Resize:
    """To ``size``, a height and a width; or the shorter side to ``size``, bilinear or by the nearest pixels."""

    def __init__(self, size: int | tuple[int, int], nearest: bool = False) -> None:
        self.size = size
        self.nearest = nearest

    def __call__(self, image: Image) -> Image:
        from PIL.Image import Resampling

        if isinstance(self.size, int):
            short = min(image.size)
            width, height = (int(self.size * side / short) for side in image.size)
        else:
            height, width = self.size
        if (width, height) == image.size:
            return image
        return image.resize((width, height), Resampling.NEAREST if self.nearest else Resampling.BILINEAR)

    def __repr__(self) -> str:
        return f"Resize({self.size})"


class CenterCrop:
    """The square of side ``size`` in the middle."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image) -> Image:
        left, top = (round((side - self.size) / 2) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))

    def __repr__(self) -> str:
        return f"CenterCrop({self.size})"


def pixels(image: Image) -> Tensor:
    """``[channels, height, width]`` as they are, those of one bit as 0 and 255."""
    values = torch.from_numpy(np.array(image, dtype=_DTYPES.get(image.mode, np.uint8)))
    if image.mode == "1":
        values = 255 * values
    return values.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def scaled(values: Tensor) -> Tensor:
    """Bytes as floating numbers from 0 to 1, and others as they are."""
    return values.to(torch.get_default_dtype()).div_(255) if values.dtype == torch.uint8 else values


class ToTensor:
    """An image of Pillow's, or an array ``[height, width(, channels)]``, as ``[channels, height, width]`` from 0 to 1.

    Numbers that are no bytes stay as they are.
    """

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, np.ndarray):
            rows = image[:, :, None] if image.ndim == 2 else image
            return scaled(torch.from_numpy(rows.transpose(2, 0, 1)).contiguous())
        return scaled(pixels(image))

    def __repr__(self) -> str:
        return "ToTensor()"
