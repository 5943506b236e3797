"""learn2learn 0.2's interface on metafast: ``import metafast.compat.learn2learn as l2l``.

Names, arguments and numbers are those of learn2learn 0.2.0; docs/migration/learn2learn.md lists what is the same, what
is better and what is missing.
"""

from metafast.compat import absent
from metafast.compat.learn2learn import algorithms, data, nn, optim, utils, vision
from metafast.compat.learn2learn.utils import (
    accuracy,
    clone_distribution,
    clone_module,
    clone_named_parameters,
    clone_parameters,
    detach_distribution,
    detach_module,
    flatten_config,
    magic_box,
    update_module,
)

__version__ = "0.2.0"

__getattr__ = absent(__name__)

__all__ = [
    "accuracy",
    "algorithms",
    "clone_distribution",
    "clone_module",
    "clone_named_parameters",
    "clone_parameters",
    "data",
    "detach_distribution",
    "detach_module",
    "flatten_config",
    "magic_box",
    "nn",
    "optim",
    "update_module",
    "utils",
    "vision",
]
