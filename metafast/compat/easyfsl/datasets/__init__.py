"""Data sets."""

from metafast.compat import absent
from metafast.compat.easyfsl.datasets.cub import CUB
from metafast.compat.easyfsl.datasets.danish_fungi import DanishFungi
from metafast.compat.easyfsl.datasets.easy_set import EasySet
from metafast.compat.easyfsl.datasets.features_dataset import FeaturesDataset
from metafast.compat.easyfsl.datasets.few_shot_dataset import FewShotDataset
from metafast.compat.easyfsl.datasets.mini_imagenet import MiniImageNet
from metafast.compat.easyfsl.datasets.support_set_folder import SupportSetFolder
from metafast.compat.easyfsl.datasets.tiered_imagenet import TieredImageNet
from metafast.compat.easyfsl.datasets.wrap_few_shot_dataset import WrapFewShotDataset

__getattr__ = absent(__name__)

__all__ = [
    "CUB",
    "DanishFungi",
    "EasySet",
    "FeaturesDataset",
    "FewShotDataset",
    "MiniImageNet",
    "SupportSetFolder",
    "TieredImageNet",
    "WrapFewShotDataset",
]
