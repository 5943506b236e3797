"""Data sets of images, from files that are there already."""

from metafast.compat import absent
from metafast.compat.learn2learn.vision.datasets.cifarfs import CIFARFS
from metafast.compat.learn2learn.vision.datasets.fc100 import FC100
from metafast.compat.learn2learn.vision.datasets.full_omniglot import FullOmniglot
from metafast.compat.learn2learn.vision.datasets.mini_imagenet import MiniImagenet

_FOLDER = (
    "this package downloads nothing; wrap your files in a torch Dataset, or see metafast.data.image_folder"
)
__getattr__ = absent(
    __name__,
    {
        "TieredImagenet": "its 12 GB of pickles would have to be loaded whole; see metafast.data.image_folder",
        "CUBirds200": "see metafast.data.cub, which reads the data set's own archive",
        **dict.fromkeys(
            ("VGGFlower102", "FGVCAircraft", "DescribableTextures", "Quickdraw", "FGVCFungi"), _FOLDER
        ),
    },
)

__all__ = ["CIFARFS", "FC100", "FullOmniglot", "MiniImagenet"]
