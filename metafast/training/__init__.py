"""Training and evaluation of learners over episodes."""

from metafast.training.analyze import Report, analyze
from metafast.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from metafast.training.distributed import RankLostError
from metafast.training.evaluate import Accuracies, Accuracy, SquaredError, episode_grid, evaluate
from metafast.training.fit import Interrupted, NonFiniteError, fit
from metafast.training.graphs import GraphedStep
from metafast.training.history import History, Row

__all__ = [
    "Accuracies",
    "Accuracy",
    "CheckpointError",
    "GraphedStep",
    "History",
    "Interrupted",
    "NonFiniteError",
    "RankLostError",
    "Report",
    "Row",
    "SquaredError",
    "analyze",
    "episode_grid",
    "evaluate",
    "fit",
    "load_checkpoint",
    "save_checkpoint",
]
