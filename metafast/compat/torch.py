"""Functions of torch with metafast's operators below: ``cdist``."""

from metafast.distance import cdist

__all__ = ["cdist"]
