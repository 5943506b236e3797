"""Steps that keep their graph."""

from metafast.compat import absent
from metafast.compat.learn2learn.optim.update_rules.differentiable_sgd import DifferentiableSGD

__getattr__ = absent(__name__)

__all__ = ["DifferentiableSGD"]
