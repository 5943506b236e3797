"""Data sets of classes and of tasks, and loaders of batches of tasks."""

from metafast.compat import absent
from metafast.compat.torchmeta.utils.data.dataloader import BatchMetaDataLoader, MetaDataLoader
from metafast.compat.torchmeta.utils.data.dataset import ClassDataset, CombinationMetaDataset, MetaDataset
from metafast.compat.torchmeta.utils.data.sampler import (
    CombinationRandomSampler,
    CombinationSequentialSampler,
)
from metafast.compat.torchmeta.utils.data.task import ConcatTask, Dataset, SubsetTask, Task
from metafast.compat.torchmeta.utils.data.wrappers import NonEpisodicWrapper

__getattr__ = absent(__name__)

__all__ = [
    "BatchMetaDataLoader",
    "ClassDataset",
    "CombinationMetaDataset",
    "CombinationRandomSampler",
    "CombinationSequentialSampler",
    "ConcatTask",
    "Dataset",
    "MetaDataLoader",
    "MetaDataset",
    "NonEpisodicWrapper",
    "SubsetTask",
    "Task",
]
