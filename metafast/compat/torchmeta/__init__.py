"""torchmeta 1.8's interface on metafast: ``import metafast.compat.torchmeta as torchmeta``.

Names, arguments and numbers are those of torchmeta 1.8.0; docs/migration/torchmeta.md lists what is the same, what is
better and what is missing.
"""

from metafast.compat import absent
from metafast.compat.torchmeta import datasets, modules, toy, transforms, utils

__version__ = "1.8.0"

__getattr__ = absent(__name__)

__all__ = ["datasets", "modules", "toy", "transforms", "utils"]
