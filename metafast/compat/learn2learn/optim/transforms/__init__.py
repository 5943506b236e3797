"""From a parameter to the module that its gradients go through."""

from metafast.compat import absent
from metafast.compat.learn2learn.optim.transforms.kronecker_transform import KroneckerTransform
from metafast.compat.learn2learn.optim.transforms.metacurvature_transform import MetaCurvatureTransform
from metafast.compat.learn2learn.optim.transforms.module_transform import ModuleTransform, ReshapedTransform
from metafast.compat.learn2learn.optim.transforms.transform_dictionary import TransformDictionary

__getattr__ = absent(__name__)

__all__ = [
    "KroneckerTransform",
    "MetaCurvatureTransform",
    "ModuleTransform",
    "ReshapedTransform",
    "TransformDictionary",
]
