"""Few-shot methods, each a ``nn.Module`` with ``learner(episodes) -> Outcome(loss, logits)``."""

from metafast.learners.anil import ANIL
from metafast.learners.maml import MAML
from metafast.learners.outcome import Outcome
from metafast.learners.protonet import ProtoNet
from metafast.learners.r2d2 import R2D2

__all__ = ["ANIL", "MAML", "R2D2", "Outcome", "ProtoNet"]
