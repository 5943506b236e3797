"""Images of triple digits."""

from __future__ import annotations

from metafast.compat import absent
from metafast.compat.torchmeta.datasets._classes import Combinations, MultiDigits

__getattr__ = absent(__name__)


class TripleMNISTClassDataset(MultiDigits):
    """The numbers of a split, see :class:`TripleMNIST`."""

    folder = "triplemnist"
    image_folder = "triple_mnist_seed_123_image_size_84_84"
    files = f"{image_folder} of the archive of that name, with folders train, val and test,"


class TripleMNIST(Combinations):
    """Tasks of Triple MNIST (Sun, *Multi-digit MNIST for Few-shot Learning*, 2019).

    1,000 numbers of three digits (640, 160 and 200). Images are Pillow's, 84 x 84 and coloured.
    ``root`` holds the folder ``triplemnist`` with what the data set's own archive unpacks to; all arguments are those
    of ``CIFARFS``.
    """

    classes = TripleMNISTClassDataset
