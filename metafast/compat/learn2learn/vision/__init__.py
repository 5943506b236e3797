"""Images: data sets, networks, task transforms and benchmarks."""

from metafast.compat.learn2learn.vision import benchmarks, datasets, models, transforms

__all__ = ["benchmarks", "datasets", "models", "transforms"]
