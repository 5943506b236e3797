"""Steps that keep their graph."""

from metafast.compat.learn2learn.optim.update_rules.differentiable_sgd import DifferentiableSGD

__all__ = ["DifferentiableSGD"]
