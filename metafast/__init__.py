"""Fast few-shot and meta-learning in PyTorch."""

from metafast.distance import cdist, pairwise_distance
from metafast.prototype import prototypes, prototypical_loss

__all__ = ["cdist", "pairwise_distance", "prototypes", "prototypical_loss"]
