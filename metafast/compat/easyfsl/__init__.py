"""easyfsl 1.5's interface on metafast: ``import metafast.compat.easyfsl as easyfsl``.

Names, arguments and numbers are those of easyfsl 1.5.0; docs/migration/easyfsl.md lists what is the same, what is
better and what is missing.
"""

from metafast.compat import absent
from metafast.compat.easyfsl import datasets, methods, modules, samplers, utils

__version__ = "1.5.0"

__getattr__ = absent(__name__)

__all__ = ["datasets", "methods", "modules", "samplers", "utils"]
