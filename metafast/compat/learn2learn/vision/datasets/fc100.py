"""FC100, from its pickles."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from metafast.compat.learn2learn.data.utils import LabelledImages
from metafast.compat.learn2learn.vision.datasets.mini_imagenet import split_file
from metafast.data._decode import need_pillow
from metafast.data._pickle import load_plain_pickle


class FC100(LabelledImages):
    """A split of FC100, from ``FC100_train.pickle`` and its like, which are not let run code.

    Images are Pillow's, 32 x 32 and coloured; labels are those of the pickle.

    Args:
        root: folder of the pickles.
        mode: ``"train"``, ``"validation"`` or ``"test"``.
        transform, target_transform, download: see :class:`LabelledImages`.

    Raises:
        ValueError: an unknown mode, a damaged pickle.
        FileNotFoundError: the pickle is not there.
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
        self.mode = mode
        path = split_file(self.root, mode, "FC100_{}.pickle")
        with path.open("rb") as file:
            content = load_plain_pickle(file, str(path))
        if not {"data", "labels"} <= content.keys():
            raise ValueError(f"{path} must hold data and labels, got {', '.join(sorted(content))}")
        self.images = content["data"]
        self.labels = [int(label) for label in content["labels"]]

    def image(self, i: int) -> Any:
        need_pillow("FC100")
        from PIL import Image

        return Image.fromarray(self.images[i])
