"""mini-ImageNet, from the pickles of Ren et al."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metafast.compat.learn2learn.data.utils import LabelledImages
from metafast.data._pickle import as_text, load_plain_pickle

#: The names of a mode in the file names: those of the original, and of the authors' own files.
FILES = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}


def split_file(root: str, mode: str, name: str) -> Path:
    """The file of a mode, ``name`` with the mode in the place of ``{}``.

    Raises:
        ValueError: an unknown mode.
        FileNotFoundError: it is not there.
    """
    if mode not in FILES:
        raise ValueError(f"mode: expected train, validation or test, got {mode!r}")
    paths = [Path(root, name.format(word)) for word in FILES[mode]]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"root: expected a folder with {paths[0].name}, got {root!r}; nothing is downloaded"
        )
    return found


class MiniImagenet(LabelledImages):
    """A split of mini-ImageNet, from ``mini-imagenet-cache-train.pkl`` and its like, which are not let run code.

    Images are tensors ``[3, 84, 84]`` of floats from 0 to 255; classes are numbered in the order of the pickle.

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
        path = split_file(self.root, mode, "mini-imagenet-cache-{}.pkl")
        with path.open("rb") as file:
            content = load_plain_pickle(file, str(path))
        if not {"image_data", "class_dict"} <= content.keys():
            raise ValueError(f"{path} must hold image_data and class_dict, got {', '.join(sorted(content))}")
        self.x = torch.from_numpy(content["image_data"]).permute(0, 3, 1, 2).float()
        self.class_idx = {as_text(name): k for k, name in enumerate(content["class_dict"])}
        self.labels = [0] * len(self.x)
        for name, rows in content["class_dict"].items():
            for row in rows:
                self.labels[row] = self.class_idx[as_text(name)]

    def image(self, i: int) -> Tensor:
        return self.x[i]
