"""Modules around modules."""

from metafast.compat.learn2learn.nn.metalayers.metamodule import MetaModule
from metafast.compat.learn2learn.nn.metalayers.parameter_transform import ParameterTransform

__all__ = ["MetaModule", "ParameterTransform"]
