"""Modules around modules."""

from metafast.compat import absent
from metafast.compat.learn2learn.nn.metalayers.metamodule import MetaModule
from metafast.compat.learn2learn.nn.metalayers.parameter_transform import ParameterTransform

__getattr__ = absent(__name__)

__all__ = ["MetaModule", "ParameterTransform"]
