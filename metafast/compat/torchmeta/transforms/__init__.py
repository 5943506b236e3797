"""Transforms of targets, of tasks, and augmentations of classes."""

from metafast.compat import absent
from metafast.compat.torchmeta.transforms.augmentations import HorizontalFlip, Rotation, VerticalFlip
from metafast.compat.torchmeta.transforms.categorical import Categorical, FixedCategory
from metafast.compat.torchmeta.transforms.splitters import ClassSplitter, Splitter, WeightedClassSplitter
from metafast.compat.torchmeta.transforms.tabular_transforms import NumpyToTorch
from metafast.compat.torchmeta.transforms.target_transforms import (
    DefaultTargetTransform,
    SegmentationPairTransform,
    TargetTransform,
)

__getattr__ = absent(__name__)

__all__ = [
    "Categorical",
    "ClassSplitter",
    "DefaultTargetTransform",
    "FixedCategory",
    "HorizontalFlip",
    "NumpyToTorch",
    "Rotation",
    "SegmentationPairTransform",
    "Splitter",
    "TargetTransform",
    "VerticalFlip",
    "WeightedClassSplitter",
]
