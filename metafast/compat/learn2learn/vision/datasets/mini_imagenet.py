"""mini-ImageNet, from the pickles of Ren et al."""

from __future__ import annotations

import torch
from torch import Tensor

from metafast.compat.learn2learn.vision.datasets._split import ImageSplit
from metafast.data._pickle import as_text


class MiniImagenet(ImageSplit):
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

    def read(self) -> None:
        images, classes = self.pickled("mini-imagenet-cache-{}.pkl", "image_data", "class_dict")
        self.x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        self.class_idx = {as_text(name): k for k, name in enumerate(classes)}
        self.labels = [0] * len(self.x)
        for label, rows in enumerate(classes.values()):
            for row in rows:
                self.labels[row] = label

    def image(self, i: int) -> Tensor:
        return self.x[i]
