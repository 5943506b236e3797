"""Images: data sets, networks, task transforms and benchmarks."""

from metafast.compat import absent
from metafast.compat.learn2learn.vision import benchmarks, datasets, models, transforms

__getattr__ = absent(__name__)

__all__ = ["benchmarks", "datasets", "models", "transforms"]
