"""Transforms of what is inside other transforms, and of data sets."""

from __future__ import annotations

from typing import Any

from metafast.compat import absent
from metafast.compat.torchmeta._chain import Transform, chained, wrap_transform
from metafast.compat.torchmeta.utils.data.task import Task

__getattr__ = absent(__name__)

__all__ = ["apply_wrapper", "wrap_transform"]


def apply_wrapper(wrapper: Transform, task_or_dataset: Any = None) -> Any:
    """``wrapper`` itself; or of a task what it makes of it; or a meta-dataset with it as its last transform.

    Raises:
        NotImplementedError: of anything else.
    """
    from metafast.compat.torchmeta.utils.data.dataset import MetaDataset

    if task_or_dataset is None:
        return wrapper
    if isinstance(task_or_dataset, Task):
        return wrapper(task_or_dataset)
    if isinstance(task_or_dataset, MetaDataset):
        task_or_dataset.dataset_transform = chained(task_or_dataset.dataset_transform, wrapper)
        return task_or_dataset
    raise NotImplementedError(
        f"task_or_dataset: expected a Task or a MetaDataset, got {type(task_or_dataset).__name__}"
    )
