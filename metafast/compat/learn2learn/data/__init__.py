"""Data sets and tasks."""

from metafast.compat import absent
from metafast.compat.learn2learn.data import samplers, transforms
from metafast.compat.learn2learn.data.meta_dataset import FilteredMetaDataset, MetaDataset, UnionMetaDataset
from metafast.compat.learn2learn.data.task_dataset import DataDescription, TaskDataset, Taskset
from metafast.compat.learn2learn.data.utils import InfiniteIterator, OnDeviceDataset, partition_task

__getattr__ = absent(__name__)

__all__ = [
    "DataDescription",
    "FilteredMetaDataset",
    "InfiniteIterator",
    "MetaDataset",
    "OnDeviceDataset",
    "TaskDataset",
    "Taskset",
    "UnionMetaDataset",
    "partition_task",
    "samplers",
    "transforms",
]
