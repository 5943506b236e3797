"""Few-shot methods, each a ``nn.Module`` with ``learner(episodes) -> Outcome(loss, logits)``."""

from metafast.learners.anil import ANIL
from metafast.learners.baseline import Baseline, BaselinePlusPlus, CosineHead, LinearHead
from metafast.learners.boil import BOIL
from metafast.learners.feat import FEAT, SetAttention
from metafast.learners.maml import MAML
from metafast.learners.maml_plus_plus import MAMLPlusPlus
from metafast.learners.matching import MatchingNet
from metafast.learners.metasgd import MetaSGD
from metafast.learners.outcome import Outcome
from metafast.learners.proto_maml import ProtoMAML
from metafast.learners.protonet import ProtoNet
from metafast.learners.r2d2 import R2D2
from metafast.learners.relation import RelationEncoder, RelationHead, RelationNet
from metafast.learners.reptile import Reptile
from metafast.learners.simpleshot import SimpleShot

__all__ = [
    "ANIL",
    "BOIL",
    "FEAT",
    "MAML",
    "R2D2",
    "Baseline",
    "BaselinePlusPlus",
    "CosineHead",
    "LinearHead",
    "MAMLPlusPlus",
    "MatchingNet",
    "MetaSGD",
    "Outcome",
    "ProtoMAML",
    "ProtoNet",
    "RelationEncoder",
    "RelationHead",
    "RelationNet",
    "Reptile",
    "SetAttention",
    "SimpleShot",
]
