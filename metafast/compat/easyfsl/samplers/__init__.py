"""Tasks out of data sets."""

from metafast.compat import absent
from metafast.compat.easyfsl.samplers.task_sampler import TaskSampler

__getattr__ = absent(__name__)

__all__ = ["TaskSampler"]
