"""Classifiers and layers."""

from metafast.compat import absent
from metafast.compat.learn2learn.nn import metalayers, metaoptnet, misc, protonet
from metafast.compat.learn2learn.nn.kroneckers import (
    KroneckerLinear,
    KroneckerLSTM,
    KroneckerRNN,
    kronecker_addmm,
)
from metafast.compat.learn2learn.nn.metalayers import MetaModule, ParameterTransform
from metafast.compat.learn2learn.nn.metaoptnet import SVClassifier
from metafast.compat.learn2learn.nn.misc import Flatten, Lambda, Scale, freeze, unfreeze
from metafast.compat.learn2learn.nn.protonet import PrototypicalClassifier

__getattr__ = absent(__name__)

__all__ = [
    "Flatten",
    "KroneckerLSTM",
    "KroneckerLinear",
    "KroneckerRNN",
    "Lambda",
    "MetaModule",
    "ParameterTransform",
    "PrototypicalClassifier",
    "SVClassifier",
    "Scale",
    "freeze",
    "kronecker_addmm",
    "metalayers",
    "metaoptnet",
    "misc",
    "protonet",
    "unfreeze",
]
