"""Few-shot methods, each a ``nn.Module`` with ``learner(episodes) -> Outcome(loss, logits)``."""

from metafast.learners.outcome import Outcome
from metafast.learners.protonet import ProtoNet

__all__ = ["Outcome", "ProtoNet"]
