"""Algorithms: MAML, Meta-SGD, GBML and the modules of PyTorch Lightning."""

from typing import Any

from metafast.compat.learn2learn.algorithms.base_learner import BaseLearner
from metafast.compat.learn2learn.algorithms.gbml import GBML
from metafast.compat.learn2learn.algorithms.maml import MAML, maml_update
from metafast.compat.learn2learn.algorithms.meta_sgd import MetaSGD, meta_sgd_update

__all__ = ["GBML", "MAML", "BaseLearner", "MetaSGD", "maml_update", "meta_sgd_update"]


def __getattr__(name: str) -> Any:
    if not name.startswith("Lightning"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from metafast.compat.learn2learn.algorithms import lightning

    return getattr(lightning, name)
