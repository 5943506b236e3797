"""Differentiable steps and learnable transforms of gradients."""

from metafast.compat import absent
from metafast.compat.learn2learn.optim import transforms, update_rules
from metafast.compat.learn2learn.optim.learnable_optimizer import LearnableOptimizer
from metafast.compat.learn2learn.optim.parameter_update import ParameterUpdate
from metafast.compat.learn2learn.optim.transforms import (
    KroneckerTransform,
    MetaCurvatureTransform,
    ModuleTransform,
    ReshapedTransform,
    TransformDictionary,
)
from metafast.compat.learn2learn.optim.update_rules import DifferentiableSGD

__getattr__ = absent(__name__)

__all__ = [
    "DifferentiableSGD",
    "KroneckerTransform",
    "LearnableOptimizer",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ParameterUpdate",
    "ReshapedTransform",
    "TransformDictionary",
    "transforms",
    "update_rules",
]
