"""Training and evaluation of learners over episodes."""

from metafast.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from metafast.training.evaluate import Accuracy, evaluate
from metafast.training.fit import Interrupted, NonFiniteError, fit
from metafast.training.graphs import GraphedStep
from metafast.training.history import History, Row

__all__ = [
    "Accuracy",
    "CheckpointError",
    "GraphedStep",
    "History",
    "Interrupted",
    "NonFiniteError",
    "Row",
    "evaluate",
    "fit",
    "load_checkpoint",
    "save_checkpoint",
]
