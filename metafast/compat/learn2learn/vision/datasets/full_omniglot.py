"""All of Omniglot."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafast.compat.learn2learn.data.utils import LabelledImages
from metafast.compat.learn2learn.vision._lanczos import resize
from metafast.data.omniglot import ARCHIVES, characters, read_drawings, unpack

_CHUNK = 1024


class FullOmniglot(LabelledImages):
    """The 1,623 characters of Omniglot, 20 drawings each, from the two official zip files.

    The classes of ``images_background.zip`` come first, then those of ``images_evaluation.zip``, each in the order of
    their names (the original takes the order of the folder on disk). Images are Pillow's, 105 x 105 of 8 bits.

    Args:
        root: folder of the zip files, or the one that holds their folder ``omniglot-py``.
        transform, target_transform, download: see :class:`LabelledImages`.

    Raises:
        FileNotFoundError: a zip file that is not there.
        ValueError: a damaged one.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(root, transform, target_transform, download)
        self._drawings: list[bytes] = []
        classes = 0
        for archive in ARCHIVES:
            path = next(
                (p for f in ("", "omniglot-py") if (p := Path(self.root, f, f"{archive}.zip")).is_file()),
                None,
            )
            if path is None:
                raise FileNotFoundError(
                    f"root: expected a folder with {archive}.zip, got {self.root!r}; get it from the folder python of "
                    "the repository brendenlake/omniglot on GitHub"
                )
            names = characters(path)
            drawings: list[list[bytes]] = [[] for _ in names]
            read_drawings(path, {name: k for k, name in enumerate(names)}, drawings)
            for k, found in enumerate(drawings):
                self._drawings += found
                self.labels += [classes + k] * len(found)
            classes += len(names)

    def image(self, i: int) -> Any:
        return self.pillow(unpack([self._drawings[i]])[0] * 255)

    def resized(self, size: int) -> Tensor:
        """All drawings ``[N, 1, size, size]``, uint8, by Pillow's Lanczos filter."""
        parts = [
            resize(torch.from_numpy(unpack(self._drawings[i : i + _CHUNK])) * 255, size)
            for i in range(0, len(self._drawings), _CHUNK)
        ]
        return torch.cat(parts)[:, None]
