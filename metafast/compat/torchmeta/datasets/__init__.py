"""Data sets of images, from files that are there already."""

from metafast.compat import absent
from metafast.compat.torchmeta.datasets import helpers
from metafast.compat.torchmeta.datasets.cifar100 import CIFARFS, FC100
from metafast.compat.torchmeta.datasets.cub import CUB
from metafast.compat.torchmeta.datasets.doublemnist import DoubleMNIST
from metafast.compat.torchmeta.datasets.miniimagenet import MiniImagenet
from metafast.compat.torchmeta.datasets.omniglot import Omniglot
from metafast.compat.torchmeta.datasets.pascal5i import Pascal5i
from metafast.compat.torchmeta.datasets.triplemnist import TripleMNIST

_TABLES = "tables to download; derive from ClassDataset, or see metafast.data.feature_table"
__getattr__ = absent(
    __name__,
    {
        "TieredImagenet": helpers.TIERED,
        "TCGA": "medical data to download and to process with pandas; derive from MetaDataset",
        **dict.fromkeys(("Letter", "PlantsTexture", "PlantsShape", "PlantsMargin", "Bach"), _TABLES),
        "helpers_tabular": _TABLES,
    },
)

__all__ = [
    "CIFARFS",
    "CUB",
    "FC100",
    "DoubleMNIST",
    "MiniImagenet",
    "Omniglot",
    "Pascal5i",
    "TripleMNIST",
    "helpers",
]
