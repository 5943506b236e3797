"""FC100, from its pickles."""

from __future__ import annotations

from typing import Any

from metafast.compat.learn2learn.vision.datasets._split import ImageSplit


class FC100(ImageSplit):
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

    def read(self) -> None:
        self.images, labels = self.pickled("FC100_{}.pickle", "data", "labels")
        self.labels = [int(label) for label in labels]

    def image(self, i: int) -> Any:
        return self.pillow(self.images[i])
