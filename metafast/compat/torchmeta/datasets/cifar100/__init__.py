"""Data sets made of CIFAR-100."""

from metafast.compat import absent
from metafast.compat.torchmeta.datasets.cifar100.cifar_fs import CIFARFS
from metafast.compat.torchmeta.datasets.cifar100.fc100 import FC100

__getattr__ = absent(__name__)

__all__ = ["CIFARFS", "FC100"]
