"""Images of double digits."""

from __future__ import annotations

from metafast.compat import absent
from metafast.compat.torchmeta.datasets._classes import Combinations, MultiDigits

__getattr__ = absent(__name__)


class DoubleMNISTClassDataset(MultiDigits):
    """The numbers of a split, see :class:`DoubleMNIST`."""

    folder = "doublemnist"
    image_folder = "double_mnist_seed_123_image_size_64_64"
    files = f"{image_folder} of the archive of that name, with folders train, val and test,"


class DoubleMNIST(Combinations):
    """Tasks of Double MNIST (Sun, *Multi-digit MNIST for Few-shot Learning*, 2019).

    100 numbers of two digits (64, 16 and 20). Images are Pillow's, 64 x 64 and coloured.
    ``root`` holds the folder ``doublemnist`` with what the data set's own archive unpacks to; all arguments are those
    of ``CIFARFS``.
    """

    classes = DoubleMNISTClassDataset
