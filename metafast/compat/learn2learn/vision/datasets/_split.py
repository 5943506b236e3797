"""What data sets of a training, a validation and a test part share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metafast.compat.learn2learn.data.utils import LabelledImages
from metafast.data._pickle import load_plain_pickle

#: The words for a mode in the names of files: those of the original, and of the authors' own files.
WORDS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


class ImageSplit(LabelledImages):
    """One part of a data set.

    Args:
        root: folder of the files.
        mode: ``"train"``, ``"validation"`` or ``"test"``.
        transform, target_transform, download: see :class:`LabelledImages`.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        mode: str = "train",
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        download: bool = False,
    ) -> None:
        super().__init__(root, transform, target_transform, download)
        if mode not in WORDS:
            raise ValueError(f"mode: expected train, validation or test, got {mode!r}")
        self.mode = mode
        self.read()

    def read(self) -> None:
        """Find the images and their labels."""
        raise NotImplementedError

    def pickled(self, file: str, *names: str) -> list[Any]:
        """The entries of these names in the pickle ``file``, with the mode in the place of ``{}``.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it has not all of them.
        """
        paths = [Path(self.root, file.format(word)) for word in WORDS[self.mode]]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(
                f"root: expected a folder with {paths[0].name}, got {self.root!r}; nothing is downloaded"
            )
        with path.open("rb") as opened:
            content = load_plain_pickle(opened, str(path))
        if not set(names) <= content.keys():
            raise ValueError(f"{path} must hold {' and '.join(names)}, got {', '.join(sorted(content))}")
        return [content[name] for name in names]
