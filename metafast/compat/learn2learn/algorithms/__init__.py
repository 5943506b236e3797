"""Algorithms: MAML, Meta-SGD, GBML and the modules of PyTorch Lightning."""

from typing import Any

from metafast.compat import absent
from metafast.compat.learn2learn.algorithms.base_learner import BaseLearner
from metafast.compat.learn2learn.algorithms.gbml import GBML
from metafast.compat.learn2learn.algorithms.maml import MAML, maml_update
from metafast.compat.learn2learn.algorithms.meta_sgd import MetaSGD, meta_sgd_update

_absent = absent(__name__)

__all__ = ["GBML", "MAML", "BaseLearner", "MetaSGD", "maml_update", "meta_sgd_update"]


def __getattr__(name: str) -> Any:
    if not name.startswith("Lightning"):
        return _absent(name)
    from metafast.compat.learn2learn.algorithms import lightning

    return getattr(lightning, name)
